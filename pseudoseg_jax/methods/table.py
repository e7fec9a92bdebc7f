"""Every method, by name.

A method's options and their defaults are the factory's keyword arguments. A method of another
package is named by module and factory, "my_module:my_factory".
"""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Callable
from typing import Any

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Method
from pseudoseg_jax.methods import (
  ael,
  cct,
  classmix,
  cps,
  cross_prob,
  cutmix_seg,
  gct,
  ict,
  learn_pseudo,
  mean_teacher,
  pi_model,
  pseudoseg,
  self_correcting,
  single_pseudo,
  supervised,
  temporal_ensembling,
  unimatch,
  vat,
)

METHODS: dict[str, Callable[..., Method]] = {
  "supervised": supervised.supervised,
  "cps": cps.cps,
  "cps_cutmix": cps.cps_cutmix,
  "mean_teacher": mean_teacher.mean_teacher,
  "pseudoseg": pseudoseg.pseudoseg,
  "single_pseudo": single_pseudo.single_pseudo,
  "single_pseudo_cutmix": single_pseudo.single_pseudo_cutmix,
  "cross_prob": cross_prob.cross_prob,
  "fixmatch": unimatch.fixmatch,
  "unimatch": unimatch.unimatch,
  "cutmix_seg": cutmix_seg.cutmix_seg,
  "ict": ict.ict,
  "vat": vat.vat,
  "pi_model": pi_model.pi_model,
  "temporal_ensembling": temporal_ensembling.temporal_ensembling,
  "ael": ael.ael,
  "classmix": classmix.classmix,
  "cct": cct.cct,
  "cct_domains": cct.cct_domains,
  "ancillary": self_correcting.ancillary,
  "self_correcting": self_correcting.self_correcting,
  "learn_pseudo": learn_pseudo.learn_pseudo,
  "gct": gct.gct,
}


def is_external(name: str) -> bool:
  """Tells whether a method is named by module and factory.

  The options of such a method are known to its module alone.
  """
  return ":" in name


def find(name: str) -> Callable[..., Method]:
  """Finds the factory of a method.

  It is one of METHODS, or "module:factory" of any module that Python finds. A name may come from a
  saved run, so that nothing is called but what looks like a factory: its first parameter is `task`,
  its options follow by keyword and have defaults.

  Raises:
    InputError: no such method, module or factory; the module's own error where it has one.
  """
  if not is_external(name):
    checks.check_name("config.method.name", name, METHODS)
    return METHODS[name]
  module_name, _, factory_name = name.partition(":")
  problems = checks.Problems(f"method '{name}' cannot be used")
  if not all(part.isidentifier() for part in module_name.split(".")):
    problems.add("module", got=f"'{module_name}'", allowed="a name, as in my_module:my_factory")
    problems.raise_if_any()
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    remedy = "pip install what it imports"
    if error.name and f"{module_name}.".startswith(f"{error.name}."):
      remedy = (
        f"start where {error.name}.py is, or with PYTHONPATH=FOLDER, the folder that holds it"
      )
    problems.add("config.method.name", got=f"no module named '{error.name}'", remedy=remedy)
    problems.raise_if_any()
  except Exception as error:
    raise checks.InputError(f"{module_name} cannot be imported: {_where(error)}") from error
  factory: Any = getattr(module, factory_name, None)
  if not _is_factory(factory):
    allowed = "a function (task, *, option=default, ...) -> Method"
    named = sorted(key for key, value in vars(module).items() if _is_factory(value))
    got = f"no '{factory_name}'" if factory is None else f"'{factory_name}', which is none"
    known = f"there are: {', '.join(named)}" if named else None
    problems.add(f"in {module_name}", got=got, allowed=allowed, remedy=known)
    problems.raise_if_any()
  return factory


def _where(error: Exception) -> str:
  """Describes the error of a module, with the line of the module.

  The line is not that of a library which the module calls.
  """
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame for frame in frames if not re.search(r"importlib|site-packages", frame.filename)]
  at = (own or frames)[-1]
  return f"{type(error).__name__}: {error} ({at.filename}, line {at.lineno})"


def _is_factory(value: object) -> bool:
  if not inspect.isfunction(value):
    return False
  parameters = list(inspect.signature(value).parameters.values())
  return [parameter.name for parameter in parameters[:1]] == ["task"] and all(
    option.kind is inspect.Parameter.KEYWORD_ONLY and option.default is not option.empty
    for option in parameters[1:]
  )
