"""A method of another package: named by module and factory, it does what ours do."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import pseudoseg_jax
from pseudoseg_jax import checks, config as configs
from pseudoseg_jax.methods import table

ROOT = pathlib.Path(__file__).parents[1]
# The method of the docs, and what is none.
(EXAMPLE,) = re.findall(
  r"^```python\n(.*?)^```", (ROOT / "docs/design.md").read_text(), flags=re.MULTILINE | re.DOTALL
)
SOURCE = (
  EXAMPLE
  + """

def not_a_method(task, *, weight: float = 0.1):
  return weight


def needs_more(task, width):
  return None
"""
)


@pytest.fixture
def module(tmp_path, monkeypatch):
  """The name of a module with methods, which Python finds."""
  folder = tmp_path / "theirs"
  folder.mkdir()
  (folder / "their_methods.py").write_text(SOURCE)
  (folder / "broken_method.py").write_text("import numpy\n\nnumpy.no_such_thing\n")
  (folder / "needs_another.py").write_text("import no_such_package\n")
  monkeypatch.syspath_prepend(str(folder))
  yield "their_methods"
  for name in ("their_methods", "broken_method", "needs_another"):
    sys.modules.pop(name, None)


def small(config):
  configs.override(
    config,
    {"data.num_scenes": 12, "data.num_labeled": 4, "data.num_eval_scenes": 2, "total_steps": 4}
    | {"batch_size_global.labeled": 8, "batch_size_global.unlabeled": 8, "log_every_steps": 2}
    | {"eval_every_steps": 2, "checkpoint_every_steps": 2, "network.width": 4},
  )
  return config


def test_it_trains_resumes_evaluates_exports(module, tmp_path, monkeypatch):
  config = configs.load(f"quickstart:method={module}:yours", {"method.weight": 0.2})
  small(config).total_steps = 2
  pseudoseg_jax.train(config, tmp_path / "w")
  config.total_steps = 4
  resumed = pseudoseg_jax.train(config, tmp_path / "w")
  assert resumed["last"]["step"] == 4
  scores = pseudoseg_jax.evaluate(tmp_path / "w", checkpoint="last")
  assert scores["student"].miou == resumed["last"]["predictors"]["student"]["miou"]
  pseudoseg_jax.export(tmp_path / "w", tmp_path / "exported")
  image = np.zeros((40, 40, 3), np.uint8)
  expected = pseudoseg_jax.load(tmp_path / "w").predict(image)

  # Its module is gone: the exported network does without, the workdir says what is missing.
  sys.modules.pop(module)
  monkeypatch.undo()
  assert np.array_equal(pseudoseg_jax.load(tmp_path / "exported").predict(image), expected)
  with pytest.raises(checks.InputError, match=f"no module named '{module}'; .*PYTHONPATH"):
    pseudoseg_jax.evaluate(tmp_path / "w")


def test_an_override_brings_the_options_of_its_factory(module):
  config = configs.load(
    "quickstart:method=pseudoseg",
    {"method.weight": 0.5, "method.name": f"{module}:yours", "total_steps": 7},
  )
  assert config.method.to_dict() == {"name": f"{module}:yours", "weight": 0.5}
  assert config.total_steps == 7
  configs.override(config, {"method.name": f"{module}:yours"})
  assert config.method.weight == 0.5
  made = configs.make_config(f"{module}:yours", overrides={"method.weight": 3.0})
  assert made.method.weight == 3.0


def test_ours_are_chosen_by_the_argument_of_a_config():
  config = configs.load("quickstart:method=pseudoseg")
  for name, said in (("cps", r"--config=FILE:method=cps"), ("cpss", "did you mean 'cps'")):
    with pytest.raises(checks.InputError, match=said):
      configs.override(config, {"method.name": name})
  configs.override(config, {"method.name": "pseudoseg", "total_steps": 3})
  assert config.total_steps == 3


@pytest.mark.parametrize(
  "name, said",
  [
    ("no_such_module:yours", "no module named 'no_such_module'.*PYTHONPATH"),
    ("their_methods:entropies", "no 'entropies'.*there are: not_a_method, yours"),
    ("their_methods:needs_more", "which is none; allowed: a function"),
    ("os:system", "which is none; allowed: a function"),
    ("os:getcwd", "which is none"),
    ("their_methods:", "no ''"),
    (":yours", "module"),
    ("..:yours", "module"),
    ("broken_method:f", "cannot be imported: AttributeError.*broken_method.py, line 3"),
    ("needs_another:f", "no_such_package"),
    ("cpss", "did you mean 'cps'"),
  ],
)
def test_names_that_are_no_methods_are_told(module, name, said):
  with pytest.raises(checks.InputError, match=re.compile(said, re.DOTALL)):
    table.find(name)


def test_a_factory_that_makes_no_method_is_told(module, tmp_path):
  config = small(configs.load(f"quickstart:method={module}:not_a_method"))
  with pytest.raises(checks.InputError, match="got a float; allowed: a contract.Method"):
    pseudoseg_jax.train(config, tmp_path / "w")


@pytest.mark.slow
def test_the_contract_can_be_tested_on_it(module, tmp_path):
  command = [
    sys.executable,
    "-m",
    "pytest",
    "tests/test_methods_contract.py",
    "-k",
    "yours",
  ]
  tested = subprocess.run(
    [*command, f"--method={module}:yours", "-p", "no:cacheprovider"],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": f"{tmp_path / 'theirs'}:{ROOT}"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert tested.returncode == 0, tested.stdout
  assert int(re.search(r"(\d+) passed", tested.stdout)[1]) >= 5
