"""What is declared of options: one home of defaults, allowed values and explanations."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from pseudoseg_jax import checks, config as configs, main, optim, options
from pseudoseg_jax.contract import Task
from pseudoseg_jax.data import geometry
from pseudoseg_jax.evaluation import inference
from pseudoseg_jax.methods import table as methods_table
from pseudoseg_jax.models import table as models_table
from pseudoseg_jax.ops import losses
from pseudoseg_jax.options import Allowed

CONFIGS = sorted(  # pipelines.py has no config without an argument
  path
  for path in pathlib.Path(__file__).parents[1].glob("configs/[a-z]*.py")
  if path.stem != "pipelines"
)
DATA = {
  "folder": configs.folder_data,
  "tfds": configs.tfds_data,
  "synthetic": configs.synthetic_data,
}


def make_config(method="cps", network="tiny", data="folder"):
  config = configs.base(configs.method(method))
  config.network = configs.network(network)
  config.data.update(DATA[data]())
  return config


CHOICES = [
  *({"method": name} for name in methods_table.METHODS),
  *({"network": name} for name in models_table.NETWORKS),
  *({"data": name} for name in DATA),
]


@pytest.mark.parametrize("chosen", CHOICES, ids=lambda chosen: "-".join(chosen.values()))
def test_every_option_is_explained_and_its_default_allowed(chosen):
  config = make_config(**chosen)
  declared, values = configs.declared(config), configs.all_options(config)
  for key, value in values.items():
    known = declared.get(key) or declared[key.rpartition(".")[0]]
    assert len(known.about) > 3, key
    # A sentence that only sends the reader elsewhere explains nothing.
    assert not known.about.startswith(("see ", "as in ")), (key, known.about)
    assert known.allowed.holds(value), key
  configs.frozen(config)  # refuses none of them


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_have_no_option_that_is_not_declared(path):
  config = configs.load(path)
  declared = configs.declared(config)
  for key in configs.all_options(config):
    assert key in declared or key.rpartition(".")[0] in declared, key
  configs.frozen(config)


def test_defaults_have_one_home():
  config = configs.base(configs.method("cps")).to_dict()
  for field in dataclasses.fields(options.Run):
    default = getattr(options.Run(), field.name)
    if not dataclasses.is_dataclass(default):
      assert config[field.name] == default
  with pytest.raises(dataclasses.FrozenInstanceError):
    options.Run().total_steps = 3
  other = options.defaults(options.Run)
  other["other_data"]["x"] = {}
  assert options.defaults(options.Run)["other_data"] == {}


def outside(known):
  """Values beside what is allowed, just not in it, of the type that the option has."""
  allowed, kind = known.allowed, type(known.default)
  if kind is tuple:
    element = known._replace(default=known.default[0] if known.default else allowed.least)
    element = element._replace(allowed=allowed._replace(ordered=False, length=0))
    numbers = (value for value in outside(element) if value == value)  # nan is told otherwise
    yield from (known.default[1:] + (value,) for value in numbers)
    if allowed.ordered:
      yield (allowed.most, allowed.least)
    if allowed.length:
      yield known.default[1:]
    if allowed.whole:
      yield tuple(0.5 + value for value in known.default or (1,))
    return
  if allowed.whole:
    yield known.default + 0.5
  if allowed.one_of and kind is int:
    yield from (min(allowed.one_of) - 1, max(allowed.one_of) + 1)
  elif allowed.one_of:
    yield from ("", allowed.one_of[0].upper() + "x")
  if allowed.least is not None:
    yield kind(allowed.least - 1)
  if allowed.above is not None:
    yield from (kind(allowed.above), kind(allowed.above - 1))
  if allowed.most is not None:
    yield kind(allowed.most + 1)
  if allowed.below is not None:
    yield kind(allowed.below)
  if kind is float:
    yield float("nan")


BOUNDED = [
  key
  for key, known in configs.declared(make_config()).items()
  if known.allowed._replace(may_be_open=False) != Allowed()
]


@pytest.mark.parametrize("key", BOUNDED)
def test_a_value_beside_what_is_allowed_is_an_error_that_names_the_option(key):
  known = configs.declared(make_config())[key]
  wrong = list(outside(known))
  assert wrong
  for value in wrong:
    config = make_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(checks.InputError) as error:
      configs.frozen(config)
    assert f"config.{key}: got {value!r}; allowed: {known.allowed.in_words()}" in str(error.value)


def make_task():
  network = models_table.make_network("tiny", num_classes=3, width=4)
  return Task(3, 10, network, optim.sgd(lambda step: 0.1), losses.cross_entropy_mean)


@pytest.mark.parametrize("name", methods_table.METHODS)
def test_a_method_refuses_what_its_signature_does_not_allow(name):
  """From a config, and called from Python; each option alone, then all at once."""
  factory, config = methods_table.METHODS[name], make_config(name)
  bounded = {
    key: known for key, known in options.of_factory(factory).items() if known.allowed != Allowed()
  }
  last = {}
  for key, known in bounded.items():
    for value in outside(known):
      line = f"{key}: got {value!r}; allowed: {known.allowed.in_words()}"
      with pytest.raises(checks.InputError) as error:
        factory(make_task(), **{key: value})
      assert line in str(error.value)
      broken = make_config(name)
      broken.method = configs.ConfigDict(broken.method.to_dict() | {key: value})
      with pytest.raises(checks.InputError) as error:
        configs.frozen(broken)
      assert f"config.method.{line}" in str(error.value)
      last[key] = value
  if last:
    with pytest.raises(checks.InputError) as error:
      factory(make_task(), **last)
    assert all(f"  - {key}: got" in str(error.value) for key in last)
  assert bounded or set(configs.all_options(config["method"])) <= {"name", "background"}


def test_rules_of_several_options_are_told_with_the_rest():
  def rules(problems, task, *, low, high, **_):
    if low > high:
      problems.add("low, high", got=(low, high), allowed="low <= high")

  @options.checked(rules=rules)
  def method(task, *, low: options.Share = 0.5, high: options.Share = 0.6, words: str = "a"):
    return low

  assert method(None, low=0.6) == 0.6
  with pytest.raises(checks.InputError) as error:
    method(None, low=0.7, high=2.0)
  # The rule is asked of the default in the place of what is refused already.
  assert "high: got 2.0; allowed: 0..1" in str(error.value)
  assert "low, high: got (0.7, 0.6); allowed: low <= high" in str(error.value)


def test_all_values_that_are_not_allowed_are_told_at_once():
  config = make_config()
  config.optimizer.update({"name": "sdg", "learning_rate": 0.0})
  config.views.hue = 0.7
  config.evaluation.edges = "cutt"
  with pytest.raises(checks.InputError) as error:
    configs.frozen(config)
  for line in (
    "config.optimizer.name: got 'sdg'; allowed: adamw, sgd; did you mean 'sgd'?",
    "config.optimizer.learning_rate: got 0.0; allowed: above 0",
    "config.views.hue: got 0.7; allowed: 0..0.5",
    "config.evaluation.edges: got 'cutt'; allowed: cut, shift; did you mean 'cut'?",
  ):
    assert line in str(error.value)


@pytest.mark.parametrize(
  ("allowed", "words"),
  [
    (Allowed(), ""),
    (Allowed(least=1), "1 or more"),
    (Allowed(above=0), "above 0"),
    (Allowed(least=0, most=0.5), "0..0.5"),
    (Allowed(above=0, most=1), "above 0, up to 1"),
    (Allowed(one_of=("b", "a")), "a, b"),
    (Allowed(one_of=(2, 1)), "1, 2"),
    (Allowed(least=0, below=1), "0 or more, below 1"),
    (Allowed(most=-1), "up to -1"),
    (Allowed(least=0, most=1, length=2, ordered=True), "2 numbers, 0..1, the smaller first"),
    (Allowed(least=1, length=2, whole=True), "2 whole numbers, 1 or more"),
  ],
)
def test_allowed_values_in_words(allowed, words):
  assert allowed.in_words() == words


def test_words_are_those_that_the_code_knows():
  declared = configs.declared(make_config())
  for key, known in {
    "views.convention": geometry.CONVENTIONS,
    "evaluation.style": (*inference.STYLES, "auto"),
    "evaluation.edges": inference.EDGES,
    "evaluation.summed": inference.SUMMED,
    "evaluation.stride_rounding": inference.ROUNDINGS,
    "evaluation.absent_classes": inference.ABSENT_CLASSES,
    "network.freeze": models_table.FROZEN,
    "network.name": models_table.NETWORKS,
  }.items():
    assert set(declared[key].allowed.one_of) == set(known), key


def test_what_a_docstring_says_of_an_option_elsewhere_is_found():
  about = configs.declared(make_config("ict"))
  assert about["method.decay"].about.startswith("of the teacher, constant")
  assert "too many" in about["method.decay"].about  # what ict adds to it
  about = configs.declared(make_config(network="pspnet"))
  assert "7x7" in about["network.stem"].about


def test_explain_says_what_an_option_is(capsys):
  command = ["--config=quickstart", "--explain=optimizer.learning_rate"]
  assert main.main(command) == 0
  assert capsys.readouterr().out.splitlines() == [
    "--config.optimizer.learning_rate=0.1",
    "    Learning rate at the start, of what no multiplier is about.",
    "    allowed: above 0; default: 0.01",
  ]
  assert main.main(["--config=quickstart", "--explain=views"]) == 0
  told = capsys.readouterr().out
  assert told.count("--config.views.") == len(dataclasses.fields(options.Views))
  assert max(map(len, told.splitlines())) <= 80
  assert main.main(["--explain=data.split", "--config.data.split=every_4"]) == 0
  assert "--config.data.split=every_4" in capsys.readouterr().out
  assert main.main(["--explain"]) == 0
  assert capsys.readouterr().out.count("--config.") > 100


def test_explain_names_the_nearest_option(capsys):
  assert main.main(["--explain=learning_rat"]) == 2
  assert "did you mean 'optimizer.learning_rate'?" in capsys.readouterr().err


def test_a_flag_that_explain_prints_is_one_that_is_read():
  command = [sys.executable, "-m", "pseudoseg_jax.main", "--config=quickstart", "--explain"]
  run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
  flags = [line for line in run.stdout.splitlines() if line.startswith("--config.")]
  config = configs.load("quickstart")
  before = configs.to_json(config)
  overrides = dict(flag.removeprefix("--config.").partition("=")[::2] for flag in flags)
  overrides = {key: value for key, value in overrides.items() if "other_data" not in key}
  configs.override(config, overrides)
  assert configs.to_json(config) == before
