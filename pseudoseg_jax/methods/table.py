"""Every method, by name; its options and their defaults are the factory's keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import ml_collections

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Method
from pseudoseg_jax.methods import cps, mean_teacher, supervised

METHODS: dict[str, Callable[..., Method]] = {
  "supervised": supervised.supervised,
  "cps": cps.cps,
  "cps_cutmix": cps.cps_cutmix,
  "mean_teacher": mean_teacher.mean_teacher,
}


def default_config(name: str) -> ml_collections.ConfigDict:
  """{"name": name, option: default, ...}, made from the factory's signature: one home for every default."""
  checks.check_name("method", name, METHODS)
  options = {
    option: parameter.default
    for option, parameter in inspect.signature(METHODS[name]).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
  }
  return ml_collections.ConfigDict({"name": name, **options})
