"""The house: imports go down only, and some rooms never see others."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "pseudoseg_jax"

# The floor of each room; a module may import lower floors, and its own room.
FLOORS = {
  "contract": 0,
  "checks": 0,
  "rng": 0,
  "options": 1,
  "ops": 1,
  "data": 1,
  "command_line": 1,
  "notebook": 1,
  "models": 2,
  "optim": 2,
  "nets": 3,
  "methods": 4,
  "engine": 5,
  "evaluation": 5,
  "config": 6,
  "builders": 7,
  "build": 8,
  "recipes": 8,
  "workdir": 8,
  "trained": 9,
  "scoring": 9,
  "settings": 9,
  "starting": 10,
  "summary": 10,
  "api": 11,
  "main": 12,
  "predict": 12,
  "prepare": 12,
  "check_data": 12,
  "convert_weights": 12,
  "export_model": 12,
  "export_labels": 12,
  "reliable": 12,
  "cli": 12,
  "__init__": 13,
}
# What a room must not see although it lies below it, and libraries that stay out of it.
FORBIDDEN = {
  "methods": {
    "pseudoseg_jax.data",
    "pseudoseg_jax.models",
    "flax.linen",
    "ml_collections",
    "tensorflow",
  },
  "engine": {
    "pseudoseg_jax.methods",
    "pseudoseg_jax.models",
    "pseudoseg_jax.data",
    "ml_collections",
  },
  "evaluation": {"pseudoseg_jax.methods", "pseudoseg_jax.models", "ml_collections"},
  # They are given options as they are, of a config that somebody else has read.
  "builders": {"pseudoseg_jax.config", "ml_collections"},
  "build": {"pseudoseg_jax.config", "ml_collections"},
  "settings": {"pseudoseg_jax.config", "ml_collections"},
  "ops": {"tensorflow", "flax", "ml_collections"},
  "models": {"tensorflow", "ml_collections"},
  "nets": {"flax.linen", "tensorflow", "ml_collections"},
}
# Heads leave `models` as pure functions: no module is seen by the method that names one.
ALLOWED = {"methods": {"pseudoseg_jax.models", "pseudoseg_jax.models.heads"}}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
  return module.removeprefix("pseudoseg_jax.").split(".")[0]


def imports(path: pathlib.Path) -> set[str]:
  """Every imported module, "from a import b" counted as a.b where that is a module of ours."""
  found = set()
  for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      found.add(node.module)
      found.update(f"{node.module}.{alias.name}" for alias in node.names)
  return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_only(path):
  own = path.parts[0].removesuffix(".py")
  assert own in FLOORS, f"{path} stands on no floor: give {own} one"
  for module in imports(path):
    if module.startswith("pseudoseg_jax.") and room(module) in FLOORS and room(module) != own:
      assert FLOORS[room(module)] < FLOORS[own], f"{path} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_keep_to_themselves(path):
  own = path.parts[0].removesuffix(".py")
  for forbidden in FORBIDDEN.get(own, ()):
    seen = {
      module
      for module in imports(path)
      if module == forbidden or module.startswith(f"{forbidden}.")
    } - ALLOWED.get(own, set())
    assert not seen, f"{path} imports {seen}"
