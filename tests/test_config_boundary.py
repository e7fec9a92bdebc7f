"""Between what users change, a ConfigDict, and what the code reads, a frozen `options.Config`."""

import ast
import dataclasses
import importlib.util
import pathlib
import types
from collections.abc import Mapping

import numpy as np
import pytest
from safetensors.numpy import save_file

from pseudoseg_jax import (
  api,
  check_data,
  checks,
  config as configs,
  convert_weights,
  export_labels,
  settings,
)
from pseudoseg_jax.methods import table as methods_table
from pseudoseg_jax.models import table as models_table
from pseudoseg_jax.options import Chosen, FolderData, is_open, replaced

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = [
  *(path.name for path in sorted(ROOT.glob("configs/[a-z]*.py")) if path.stem != "pipelines"),
  "voc.py:form=tfds",
  "domains.py:first=camvid,second=quickstart",
]


def make_config(method="cps", network="tiny"):
  config = configs.base(configs.method(method))
  config.network = configs.network(network)
  config.data.update(configs.folder_data())
  return config


def value_at(tree, key):
  """What stands at a dotted key of a frozen config."""
  for name in key.split("."):
    if isinstance(tree, Chosen) and name in tree.options:
      tree = tree.options
    tree = tree[name] if isinstance(tree, Mapping) else getattr(tree, name)
  return tree


# --- what comes through ---------------------------------------------------------------------------

CASES = [
  *((path, lambda path=path: configs.load(f"configs/{path}")) for path in CONFIGS),
  *((name, lambda name=name: make_config(name)) for name in methods_table.METHODS),
  *((name, lambda name=name: make_config(network=name)) for name in models_table.NETWORKS),
  ("given", lambda: configs.make_config("cps")),
]


@pytest.mark.parametrize("make", [make for _, make in CASES], ids=[name for name, _ in CASES])
def test_every_value_comes_through_and_nothing_else(make):
  config = make()
  frozen, values = configs.frozen(config), configs.all_options(config)
  for key, value in values.items():
    assert value_at(frozen, key) == value and type(value_at(frozen, key)) is type(value), key
  assert configs.all_options(frozen) == values
  assert configs.to_json(frozen) == configs.to_json(config)
  assert configs.frozen(configs.from_json(configs.to_json(frozen))) == frozen


def test_nothing_of_it_can_be_changed():
  config = configs.frozen(configs.load("configs/domains.py"))
  for group in (config, config.optimizer, config.data, config.network, config.method):
    for field in dataclasses.fields(group):
      with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(group, field.name, None)
  decoders = configs.frozen(make_config("cct")).method.options["decoders"]
  for mapping in (config.other_data, config.method.options, config.network.options, decoders):
    assert isinstance(mapping, types.MappingProxyType)
  lists = make_config()
  with lists.unlocked():
    lists.views.scales = [0.5, 1.0]
  assert configs.frozen(lists).views.scales == (0.5, 1.0)


def test_a_config_that_is_changed_afterwards_leaves_it_as_it_is():
  config = make_config("cct")
  frozen = configs.frozen(config)
  config.method.decoders.vat, config.optimizer.name = 7, "adamw"
  assert frozen == configs.frozen(make_config("cct"))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_missing_has_its_default(seed):
  rng = np.random.default_rng(seed)
  full = configs.ConfigDict(make_config("mean_teacher", "deeplabv3plus").to_dict())
  values = full.to_dict()
  kept = ("method.name", "network.name", "data.name")
  for key in [key for key in configs.all_options(full) if key not in kept]:
    if rng.integers(3) == 0:
      *groups, name = key.split(".")
      at = values
      for group in groups:
        at = at[group]
      del at[name]
  assert configs.frozen(configs.ConfigDict(values)) == configs.frozen(full)
  assert configs.frozen(configs.ConfigDict({})).data == FolderData()


def test_what_is_left_open_comes_through_open():
  assert all(map(is_open, (-1, (), "auto"))) and not any(map(is_open, (0, (1,), "whole", "")))
  config = configs.frozen(configs.make_config("cps"))
  assert config.total_steps == -1 and config.views.scales == ()
  assert set(settings.open_options(config)) == set(settings.OPTIONS)


def test_other_values_of_some_options():
  config = configs.frozen(make_config())
  other = replaced(config, {"views.crop_size": (8, 8), "seed": 3})
  assert configs.changes(config, other) == {"seed": (0, 3), "views.crop_size": ([64, 64], [8, 8])}
  assert config.views is not other.views and config.optimizer is other.optimizer


# --- what does not --------------------------------------------------------------------------------


def wrong():
  """As no flag would make it, but a file might."""
  config = make_config().to_dict()
  config["optimizer"]["name"], config["views"]["hue"] = "sdg", 0.7
  config["views"] |= {"scales": (0.5, "abc"), "crop_siz": (3, 3)}
  config["evaluation"] |= {"flip": "perhaps", "edges": "cutt"}
  config["criterion"]["focal_gamma"] = float("inf")
  config["data"] |= {"mean": (0.5, True, 0.5), "rot": "there"}
  config["method"] |= {"weight": "much", "wieght": 1.0}
  config["network"] |= {"width": "wide", "freeze": "all"}
  return configs.ConfigDict(config | {"total_step": 3, "unlabeled_loss": 3})


TOLD = (
  "config.optimizer.name: got 'sdg'; allowed: adamw, sgd; did you mean 'sgd'?",
  "config.views.hue: got 0.7; allowed: 0..0.5",
  "config.views.scales: got 0.5,abc; allowed: numbers, such as 0.5,0.75",
  "config.views.crop_siz: got no such option; did you mean 'crop_size'?",
  "config.evaluation.flip: got 'perhaps'; allowed: bool, such as False",
  "config.evaluation.edges: got 'cutt'; allowed: cut, shift; did you mean 'cut'?",
  "config.total_step: got no such option; did you mean 'total_steps'?",
  "config.criterion.focal_gamma: got inf; allowed: a number, such as 2.0",
  "config.data.mean: got 0.5,True,0.5; allowed: numbers, such as 0.485",
  "config.data.rot: got no such option; did you mean 'root'?",
  "config.method.weight: got 'much'; allowed: float, such as",
  "config.method.wieght: got no such option; did you mean 'weight'?",
  "config.network.width: got 'wide'; allowed: int, such as 16",
  "config.network.freeze: got 'all'; allowed: batch_norm, encoder, none",
  "config.unlabeled_loss: got 3; allowed: a group of options",
)


def test_all_that_is_wrong_is_told_at_once():
  with pytest.raises(checks.InputError) as error:
    configs.frozen(wrong())
  for line in TOLD:
    assert line in str(error.value)
  assert str(error.value).count("\n") == len(TOLD)


def test_where_problems_are_gathered_the_rest_can_be_looked_at():
  problems = checks.Problems("")
  assert configs.frozen(wrong(), problems) == configs.frozen(make_config())
  assert len(problems.items) == len(TOLD)


def test_other_networks_and_data_and_methods_are_told_with_those_there_are():
  for key, told in {
    "network.name": "config.network.name: got 'tinny'; allowed: .*tiny.*did you mean 'tiny'",
    "data.name": "config.data.name: got 'tinny'; allowed: folder, given, synthetic, tfds",
    "method.name": "config.method.name: got 'tinny'; allowed: .*cps",
  }.items():
    config = make_config()
    config.update_from_flattened_dict({key: "tinny"})
    with pytest.raises(checks.InputError, match=told):
      configs.frozen(config)


def test_a_method_of_another_package_knows_its_own_options(tmp_path, monkeypatch):
  config = make_config()
  config.method = configs.ConfigDict({"name": "gone_module:gone", "depth": 3})
  frozen = configs.frozen(config)  # what was learned by it can still be used
  assert frozen.method == Chosen("gone_module:gone", {"depth": 3})
  (tmp_path / "there_module.py").write_text("def there(task, *, depth=2, kind=(1, 'a')): pass")
  monkeypatch.syspath_prepend(tmp_path)
  config.method = configs.ConfigDict({"name": "there_module:there", "depth": "deep"})
  assert configs.frozen(config).method.options == {"depth": "deep", "kind": (1, "a")}
  config.method = configs.ConfigDict({"name": "there_module:there", "dept": 3})
  with pytest.raises(checks.InputError, match="config.method.dept: .*did you mean 'depth'"):
    configs.frozen(config)


# --- the ways in ----------------------------------------------------------------------------------

WRONG = {"optimizer.name": "sdg", "evaluation.edges": "cutt"}
FLAGS = [f"--config.{key}={value}" for key, value in WRONG.items()]
QUICKSTART = "--config=configs/quickstart.py"


def assert_both(told):
  assert (
    "config.optimizer.name: got 'sdg'" in told and "config.evaluation.edges: got 'cutt'" in told
  )


def test_the_ways_in_refuse_what_is_wrong(tmp_path, capsys):
  trained = tmp_path / "trained"
  trained.mkdir()
  (trained / "config.json").write_text(configs.to_json(configs.load("configs/quickstart.py")))
  for call in (
    lambda: api.train("configs/quickstart.py", tmp_path / "run", WRONG),
    lambda: api.evaluate(trained, overrides=WRONG),
    lambda: api.load(trained, overrides=WRONG),
  ):
    with pytest.raises(checks.InputError) as error:
      call()
    assert_both(str(error.value))
  assert not (tmp_path / "run").exists()
  assert export_labels.main([f"--workdir={trained}", f"--out={tmp_path}/out", *FLAGS]) == 2
  assert_both(capsys.readouterr().err)


def test_looking_at_the_data_tells_it_beside_the_rest(capsys):
  sizes = ("num_scenes=4", "num_labeled=2", "num_eval_scenes=2")
  few = [f"--config.data.{size}" for size in sizes]
  assert check_data.main([QUICKSTART, *few, *FLAGS, "--config.evaluation.pad_multiple=0"]) == 1
  told = capsys.readouterr().out
  assert_both(told)
  assert "config.evaluation.pad_multiple: got 0" in told and "decoded" in told


def test_converting_weights_refuses_it_too(tmp_path, capsys):
  (tmp_path / "mine.py").write_text("""
from pseudoseg_jax import config as configs
def get_config(argument):
  config = configs.load("configs/quickstart.py")
  config.optimizer.name, config.evaluation.edges = "sdg", "cutt"
  return config
""")
  save_file({"a": np.zeros(3, np.float32)}, tmp_path / "in.safetensors")
  files = [f"{tmp_path}/in.safetensors", f"{tmp_path}/out"]
  assert convert_weights.main([*files, f"--config={tmp_path}/mine.py"]) == 2
  assert_both(capsys.readouterr().err)


@pytest.mark.parametrize(
  ("tool", "arguments"),
  [
    ("step_time", ["--methods=cps"]),
    ("input_rate", []),
    ("tags_from_masks", ["--out={}/tags.csv"]),
    ("boxes_from_masks", ["--out={}/boxes.json"]),
    ("label_quality", ["--labels={}"]),
  ],
)
def test_tools_refuse_it_in_a_line(tool, arguments, tmp_path, capsys):
  spec = importlib.util.spec_from_file_location(tool, ROOT / "launch" / f"{tool}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  arguments = [argument.format(tmp_path) for argument in arguments]
  assert module.main([QUICKSTART, *arguments, *FLAGS]) == 2
  assert_both(capsys.readouterr().err)


# --- nobody else sees what users change -----------------------------------------------------------

PACKAGE = ROOT / "pseudoseg_jax"
# Where a ConfigDict is made, read from a file, or given; and what plans runs, of which each enters
# by itself.
ABOVE = {"config.py", "recipes.py", "workdir.py", "api.py", "benchmark.py", "pipeline.py"}
BELOW = sorted(
  path
  for path in [*PACKAGE.rglob("*.py"), *(ROOT / "launch").glob("*.py")]
  if path.name not in ABOVE or path.parent.name == "data"
)


def names_of(node):
  """The names of a chain, of its root first: ["config", "data", "get"] of config.data.get."""
  names = []
  while isinstance(node, ast.Attribute | ast.Subscript):
    names[:0] = [node.attr] if isinstance(node, ast.Attribute) else []
    node = node.value
  return [node.id, *names] if isinstance(node, ast.Name) else []


def is_of_config(names):
  return any(name.endswith("config") for name in names[:-1])


@pytest.mark.parametrize("path", BELOW, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_below_nobody_names_a_config_dict_or_asks_for_an_option_with_a_default(path):
  for node in ast.walk(ast.parse(path.read_text())):
    names = names_of(node)
    assert "ConfigDict" not in names and "ml_collections" not in names, node.lineno
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      names = names_of(node.func)
      # Whether a method or a network has an option is a fact about it.
      if names[-1:] == ["get"] and "options" not in names:
        assert not is_of_config(names), f"line {node.lineno}: {'.'.join(names)}"


@pytest.mark.parametrize("name", ["api.py", "workdir.py"])
def test_those_that_take_a_config_dict_read_nothing_of_it(name):
  for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
    if isinstance(node, ast.Call) and names_of(node.func)[-1:] == ["get"]:
      names = names_of(node.func)
      assert not is_of_config(names) or "options" in names, f"line {node.lineno}"
    for target in node.targets if isinstance(node, ast.Assign) else ():
      assert not is_of_config(names_of(target)), f"line {node.lineno}"
