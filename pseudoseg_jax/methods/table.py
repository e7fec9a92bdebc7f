"""Every method, by name; its options and their defaults are the factory's keyword arguments."""

from collections.abc import Callable

from pseudoseg_jax.contract import Method
from pseudoseg_jax.methods import cps, mean_teacher, pseudoseg, supervised

METHODS: dict[str, Callable[..., Method]] = {
  "supervised": supervised.supervised,
  "cps": cps.cps,
  "cps_cutmix": cps.cps_cutmix,
  "mean_teacher": mean_teacher.mean_teacher,
  "pseudoseg": pseudoseg.pseudoseg,
}
