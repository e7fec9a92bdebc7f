"""Configs: every option of a run with its default, in one tree.

A file in configs/ states what differs. `get_config("method=cps,split=1_8")` of such a file returns
the tree, a ConfigDict that users change; what is declared of its options stands in `options`. What
they made of it the code does not read before `frozen` has made it an `options.Config`, which nobody
changes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from pseudoseg_jax import checks, options as options_lib
from pseudoseg_jax.methods import mean_teacher, table as methods_table
from pseudoseg_jax.models import imagenet, table as models_table
from pseudoseg_jax.options import Allowed, Config, Option, as_dict, as_flag, defaults_of

ConfigDict = ml_collections.ConfigDict


def network(name: str, **options) -> ConfigDict:
  """Makes config.network.

  It holds a name of models.table.NETWORKS with that network's options.
  """
  checks.check_name("network", name, models_table.NETWORKS)
  defaults = defaults_of(models_table.NETWORKS[name]) | options_lib.defaults(options_lib.AnyNetwork)
  return _differing(ConfigDict({"name": name, **defaults}), options)


def network_on(name: str, backbone: str) -> ConfigDict:
  """Makes config.network by name, on a backbone.

  The network is on `backbone` where it has a choice of them; "" is the network's own default.
  """
  checks.check_name("network", name, models_table.NETWORKS)
  has_choice = "backbone" in defaults_of(models_table.NETWORKS[name])
  return network(name, **({"backbone": backbone} if has_choice and backbone else {}))


def choose_network(config: ConfigDict, name: str, backbone: str) -> None:
  """Sets config.network by name, or only the backbone of the one there.

  "" leaves things as they are.
  """
  if name:
    config.network = network_on(name, backbone)
  elif backbone and "backbone" in config.network:
    config.network.backbone = backbone


def method(name: str, convention: str = "", **options) -> ConfigDict:
  """Makes config.method: a method's name with its options.

  They are at their defaults but for those given.

  Args:
    name: of methods.table.METHODS, or "my_module:my_factory".
    convention: names a published set of options.
  """
  config = ConfigDict({"name": name, **defaults_of(methods_table.find(name))})
  if convention:
    if name != "mean_teacher":
      raise checks.InputError(
        f"convention={convention}: only method=mean_teacher has named conventions, not '{name}'"
      )
    checks.check_name("convention", convention, mean_teacher.CONVENTIONS)
    config.update(mean_teacher.CONVENTIONS[convention])
  return _differing(config, options)


def _differing(config: ConfigDict, options: Mapping[str, Any]) -> ConfigDict:
  for key, value in options.items():
    checks.check_name(f"option of '{config.name}'", key, list(config))
    config[key] = value
  return config


def base(method_config: ConfigDict) -> ConfigDict:
  """Makes the config that a config file starts from.

  It has all options but those of a data set.
  """
  config = ConfigDict(options_lib.defaults(options_lib.Run))
  config.method, config.network = method_config, network("tiny")
  return config


def folder_data(**options) -> dict[str, Any]:
  """Makes config.data of images and masks in folders.

  See `options.FolderData`.
  """
  return _data(options_lib.FolderData) | options


def given_data(**options) -> dict[str, Any]:
  """Makes config.data of images that were given from Python.

  See `options.GivenData`.
  """
  return _data(options_lib.GivenData) | options


def tfds_data(**options) -> dict[str, Any]:
  """Makes config.data of a TensorFlow Datasets data set.

  See `options.TfdsData`.
  """
  return _data(options_lib.TfdsData) | options


def synthetic_data(**options) -> dict[str, Any]:
  """Makes config.data of drawn scenes.

  See `options.SyntheticData`.
  """
  return _data(options_lib.SyntheticData) | options


def _data(kind: type) -> dict[str, Any]:
  return options_lib.own_options(options_lib.defaults(kind))


def declared(config: Mapping) -> dict[str, Option]:
  """Collects what is declared of a config's options, by dotted key.

  The options are those that every run has, and those of its data, its method and its network.
  """
  known = options_lib.of_group(options_lib.Run)
  domains = {"data": config["data"]} | {
    f"other_data.{name}": data for name, data in config["other_data"].items()
  }
  for prefix, data in domains.items():
    known |= options_lib.of_group(
      options_lib.DATA.get(data["name"], options_lib.FolderData), f"{prefix}."
    )
  method, network = config["method"]["name"], config["network"]["name"]
  name = "The method, by name; or that of another package, my_module:my_factory."
  known |= {"method.name": Option(method, name)}
  with contextlib.suppress(checks.InputError):  # what it predicts may be used without its module
    known |= options_lib.of_factory(methods_table.find(method), "method.")
  names = Allowed(one_of=tuple(models_table.NETWORKS))
  known |= {"network.name": Option(network, "The network, by name.", names)}
  if network in models_table.NETWORKS:
    known |= options_lib.of_factory(models_table.NETWORKS[network], "network.")
  known |= options_lib.of_group(options_lib.AnyNetwork, "network.")  # dtype as every network has it
  return known


def frozen(config: ConfigDict, problems: checks.Problems | None = None) -> Config:
  """Makes the config as the code reads it.

  This is the one boundary between what users change and what is run. What is missing has the
  default that is declared for it: configs of older releases lack options.

  Args:
    problems: gains what is wrong, in the place of an InputError; the value in question is then the
      default.

  Raises:
    InputError: options that there are not, values of another type, or none that is allowed; all at
      once. A kind of data or a method that there is not, at once: nothing is known of its options.
  """
  noted = checks.Problems("the config cannot be run") if problems is None else problems
  values = config.to_dict()
  method, network, data, others = (
    values.pop(name, {}) for name in ("method", "network", "data", "other_data")
  )
  if not isinstance(others, Mapping):
    noted.add("config.other_data", got=repr(others), allowed="a group of options")
    others = {}
  domains = {
    name: _frozen_data(of, f"config.other_data.{name}", noted) for name, of in others.items()
  }
  known = {
    "data": _frozen_data(data, "config.data", noted),
    "other_data": options_lib.still(domains),
  }
  run = options_lib.read(options_lib.Run, values, "config", noted, **known)
  method, network = _frozen_method(method, noted), _frozen_network(network, noted)
  tree = Config(**vars(run), method=method, network=network)
  if problems is None:
    noted.raise_if_any()
  return tree


def _frozen_data(values: Any, where: str, problems: checks.Problems) -> options_lib.AnyData:
  name = values.get("name", "folder") if isinstance(values, Mapping) else "folder"
  checks.check_name(f"{where}.name", name, options_lib.DATA)
  return options_lib.read(options_lib.DATA[name], values, where, problems)


def _frozen_method(values: Mapping[str, Any], problems: checks.Problems) -> options_lib.Chosen:
  values = dict(values)
  name = values.pop("name", "supervised")
  is_external = methods_table.is_external(name)
  try:
    factory = methods_table.find(name)
  except checks.InputError:
    if not is_external:
      raise
    # What it predicts may be used without its module, which alone knows its options.
    return options_lib.Chosen(name, options_lib.still(values))
  known = options_lib.of_factory(factory)
  if is_external:  # what their values may be is its own business
    known = {key: option._replace(default=None) for key, option in known.items()}
    values = defaults_of(factory) | values
  own = options_lib.read_keywords(known, values, "config.method", problems)
  return options_lib.Chosen(name, own)


def _frozen_network(
  values: Mapping[str, Any], problems: checks.Problems
) -> options_lib.ChosenNetwork:
  values, where = dict(values), "config.network"
  names = Allowed(one_of=tuple(models_table.NETWORKS))
  asked = values.pop("name", "tiny")
  name = options_lib.usable(asked, Option("tiny", "", names), f"{where}.name", problems)
  of_any = options_lib.of_group(options_lib.AnyNetwork)
  shared = {key: values.pop(key) for key in of_any if key in values}
  known = options_lib.of_factory(models_table.NETWORKS[name])
  known = {key: option for key, option in known.items() if key not in of_any}
  own = options_lib.read_keywords(known, values if name == asked else {}, where, problems)
  return options_lib.read(
    options_lib.ChosenNetwork, shared, where, problems, name=name, options=own
  )


def _of(config: ConfigDict, key: str) -> dict[str, Any]:
  """Selects the option `key`, or those of the group `key`, or all."""
  return {
    name: value
    for name, value in all_options(config).items()
    if not key or f"{name}.".startswith(f"{key}.")
  }


def explain(config: ConfigDict, key: str = "") -> str:
  """Explains an option, or all of a group, or all.

  Each stands with its value here, and what else it may be.

  Raises:
    InputError: no such option.
  """
  chosen = _of(config, key)
  if not chosen:
    problems = checks.Problems("nothing to explain")
    remedy = _nearest_option(key, all_options(config))
    problems.add("--explain", got=f"'{key}', no such option", remedy=remedy)
    problems.raise_if_any()
  return options_lib.explain(declared(config), chosen)


def arguments(text: str | None, **allowed: Any) -> dict[str, Any]:
  """Parses a config file's argument, "method=cps,split=1_8".

  It is read over the allowed names and their defaults. Values take the type of their default.

  Raises:
    InputError: unknown names or values of another type.
  """
  values = dict(allowed)
  problems = checks.Problems(f"cannot read config argument '{text}'")
  for part in filter(None, (text or "").split(",")):
    name, equals, value = part.partition("=")
    if name not in allowed:
      problems.add(
        "name",
        got=repr(name),
        allowed=checks.choices(allowed),
        remedy=checks.nearest(name, allowed),
      )
    elif not equals:
      problems.add(name, got="no value", allowed=f"{name}=VALUE")
    else:
      try:
        values[name] = type(allowed[name])(value)
      except ValueError:
        problems.add(name, got=repr(value), allowed=type(allowed[name]).__name__)
  problems.raise_if_any()
  return values


def make_config(
  method_name: str = "cps_cutmix",
  *,
  convention: str = "",
  network: str = "",
  backbone: str = "",
  crop: int = 0,
  steps: int = 0,
  data: Mapping[str, Any] | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """Makes a config for photographs of any sizes, without a file.

  configs/folder.py is this one for a folder.

  Args:
    convention: of the method, see `method`.
    network, backbone: names of models.table, from random weights; with neither, DeepLabv3+ on
      EfficientNet-Lite0 with ImageNet's weights where their package is installed, else on a
      ResNet-50 from random weights, which the run warns of.
    crop: height and width of the training views in pixels. Where it is 0, it is chosen when the run
      begins, from the data and the machine, as are batch sizes, scales and the form of the
      evaluation, unless `overrides` set them; see `settings.choose`.
    steps: total_steps; likewise.
    data: config.data, such as `folder_data(root=..., ...)`; None where the images are given to
      `pseudoseg_jax.train`.
    overrides: any options, dotted: {"method.weight": 1.0, "batch_size_global.labeled": 4}.

  Raises:
    InputError: unknown names, or values of another type.
  """
  config = base(method(method_name, convention))
  config.data.update(given_data() if data is None else data)
  config.total_steps = steps or -1
  config.batch_size_global = {"labeled": -1, "unlabeled": -1}
  # Published weights are of runs of tens of thousands of steps. As in
  # launch/benchmarks/photographs.py.
  config.unlabeled_loss.rampup_fraction = 0.25
  if not (network or backbone) and imagenet.installed("efficientnet_lite0"):
    config.network = network_on("deeplabv3plus", "efficientnet_lite0")
    # A step has too few images for statistics of their own. Ten times the rate for what starts
    # fresh. As in launch/benchmarks/photographs.py.
    config.network.update({"pretrained": "imagenet", "freeze": "batch_norm"})
    config.optimizer.update(
      {"learning_rate": 0.001, "head_multiplier": 10.0, "weight_decay": 1e-4, "decay_scope": "all"}
    )
  else:
    config.network = network_on(network or "deeplabv3plus", backbone)
    # as of CPS on VOC, see configs/voc.py.
    config.optimizer.update({"learning_rate": 0.0025, "weight_decay": 4e-4})
  config.views.update({"crop_size": (crop, crop) if crop else (), "scales": (), "continuous": True})
  config.log_every_steps = 50
  config.eval_every_steps = config.checkpoint_every_steps = -1
  config.evaluation.update(
    {"style": "auto", "window_pixels": (), "pad_multiple": -1, "scales": (), "batch_size": 4}
  )
  override(config, overrides or {})
  return config


def _installed() -> dict[str, str]:
  """Finds the configs that come with the package: name -> path."""
  spec = importlib.util.find_spec("pseudoseg_jax.configs")
  folders = (
    list(spec.submodule_search_locations)
    if spec
    else [str(pathlib.Path(__file__).parents[1] / "configs")]
  )
  return {
    path.stem: str(path)
    for folder in folders
    for path in sorted(pathlib.Path(folder).glob("*.py"))
    if path.stem != "__init__"
  }


def _file(path: str) -> str:
  """Finds a config file where it is, or the installed one of that name.

  The installed one is "voc" or "configs/voc.py" of any folder.

  Raises:
    InputError: there is neither.
  """
  named, installed = pathlib.PurePath(path), _installed()
  if named.suffix == ".py" and pathlib.Path(path).is_file():
    return path
  if (
    str(named.parent) in ("configs", ".")
    and named.suffix in ("", ".py")
    and named.stem in installed
  ):
    return installed[named.stem]
  folder = pathlib.Path(path).parent
  near = (
    sorted(map(str, folder.glob("*.py"))) if folder.is_dir() and named.suffix else sorted(installed)
  )
  problems = checks.Problems("no such config")
  problems.add(
    "config",
    got=path,
    allowed=", ".join(near) or None,
    remedy=checks.nearest(path, near) if near else None,
  )
  problems.raise_if_any()


def load(path: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """Loads the config of "configs/voc.py:method=cps".

  This is a file and, after a colon, its argument. Dotted overrides are applied.

  Args:
    path: config file, optionally with ":argument"; also of those that are installed with the
      package, "configs/voc.py" or "voc" in any folder.
    overrides: {"data.root": "/data/camvid", "total_steps": 10}.

  Raises:
    InputError: no such file, wrong argument, unknown key or a value of the wrong type.
  """
  file, _, argument = str(path).partition(":")
  file = _file(file)
  spec = importlib.util.spec_from_file_location(
    f"pseudoseg_jax_config_{pathlib.Path(file).stem}", file
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(argument)
  override(config, overrides or {})
  return config


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
  """Sets dotted keys in place, {"optimizer.learning_rate": "0.1"}.

  Text is read as the type of what stands there.

  Raises:
    InputError: unknown keys (with the nearest known one), values of another type; all of them at
      once.
  """
  overrides, problems = dict(overrides), checks.Problems("cannot override the config")
  name = str(overrides.pop("method.name", config.method.name))
  if methods_table.is_external(name) and name != config.method.name:
    config.method = method(name)  # options are its factory's; others may follow
  elif name != config.method.name:
    # A config file also sets what a method of ours wants on its data.
    checks.check_name("config.method.name", name, methods_table.METHODS)
    remedy = f"choose it by the config's argument, --config=FILE:method={name}"
    problems.add("config.method.name", got=f"'{name}', a method of another config", remedy=remedy)
    problems.raise_if_any()
  for key, value in overrides.items():
    # ml_collections' own flags do the reading, so that notebooks and command lines agree to the
    # letter.
    values, line = flags.FlagValues(), ["", f"--config.{key}={value}"]
    try:
      config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
      before = all_options(config).get(key)
      values(line)
      if isinstance(before, (tuple, list)):
        _check_numbers(problems, config, key, before)
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError):
      known = all_options(config)
      if key in known:
        problems.add(
          f"config.{key}",
          got=repr(value),
          allowed=f"{type(known[key]).__name__}, such as {known[key]!r}",
        )
      else:
        group = any(name.startswith(f"{key}.") for name in known)
        remedy = (
          f"set one of its options, config.{key}.NAME" if group else _nearest_option(key, known)
        )
        problems.add(
          f"config.{key}", got="a group of options" if group else "no such option", remedy=remedy
        )
  problems.raise_if_any()


def _check_numbers(
  problems: checks.Problems, config: ConfigDict, key: str, before: Sequence[Any]
) -> None:
  """Checks that an option just set to several values holds numbers.

  All such options hold numbers, and ml_collections reads what it is given.
  """
  values = all_options(config)[key]
  if not options_lib.are_numbers(values):
    example = as_flag(before) or "1,2"
    problems.add(f"config.{key}", got=as_flag(values), allowed=f"numbers, such as {example}")


# What other tools call our options.
_SYNONYMS = {
  "lr": "learning_rate",
  "wd": "weight_decay",
  "epochs": "total_steps",
  "steps": "total_steps",
  "max_steps": "total_steps",
  "iterations": "total_steps",
  "batch_size": "labeled",
  "bs": "labeled",
  "crop": "crop_size",
  "image_size": "crop_size",
  "data_root": "root",
  "data_dir": "root",
  "checkpoint": "init_from",
  "num_classes": "classes",
  "ignore_label": "ignore_index",
}


def _nearest_option(key: str, known: Mapping[str, Any]) -> str:
  """Finds a remedy for an option that is none.

  It is an option of that name in another group, or by another tool's name, or the nearest.
  """
  group, _, name = key.rpartition(".")
  named = [
    other for other in known if other.rpartition(".")[2] in (name, _SYNONYMS.get(name.lower()))
  ]
  return f"did you mean '{checks.closest(key, named)}'?" if named else checks.nearest(key, known)


def all_options(config: Mapping | Config, prefix: str = "") -> dict[str, Any]:
  """Lists every option by its dotted key.

  {"seed": 0, "method.name": "cps", ...}.
  """
  options = {}
  for name, value in (as_dict(config) if isinstance(config, Config) else config).items():
    options |= (
      all_options(value, f"{prefix}{name}.")
      if isinstance(value, (dict, ConfigDict))
      else {f"{prefix}{name}": value}
    )
  return options


def to_json(config: ConfigDict | Config) -> str:
  values = as_dict(config) if isinstance(config, Config) else config.to_dict()
  return json.dumps(values, indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
  """Restores the config that `to_json` wrote.

  JSON's lists are tuples again.
  """

  def restored(value):
    if isinstance(value, dict):
      return {name: restored(item) for name, item in value.items()}
    return tuple(restored(item) for item in value) if isinstance(value, list) else value

  return ConfigDict(restored(json.loads(text)))


def from_saved(content: Any) -> ConfigDict:
  """Restores the config of a parsed config.json of any release.

  What is missing is at its default.

  Raises:
    InputError, or any error of a wrong type or key: a content that no release wrote.
  """
  if not isinstance(content, dict):
    raise TypeError(f"a {type(content).__name__}, not the options of a run")
  saved = from_json(json.dumps(content))
  config = fill_missing_defaults(saved)
  problems = checks.Problems("options that no run has")
  frozen(config, problems)
  problems.raise_if_any()
  return config


def fill_missing_defaults(saved: ConfigDict) -> ConfigDict:
  """Adds the options that a saved config lacks, at their defaults.

  They were added since, and their defaults change nothing.
  """
  defaults = base(saved.method).to_dict()
  defaults["data"] |= {"folder": folder_data, "tfds": tfds_data}.get(saved.data.name, dict)()
  known = saved.network.name in models_table.NETWORKS
  # A method of another package knows its own options: what it predicts may be used without it.
  external = methods_table.is_external(saved.method.name)
  defaults["method"] = {} if external else defaults_of(methods_table.find(saved.method.name))
  defaults["network"] = defaults_of(models_table.NETWORKS[saved.network.name]) if known else {}
  defaults["network"]["freeze"] = "none"

  def fill(config: ConfigDict, defaults: Mapping[str, Any]) -> None:
    for key, value in defaults.items():
      if key not in config:
        config[key] = value
      elif isinstance(value, dict) and isinstance(config[key], ConfigDict) and key != "other_data":
        fill(config[key], value)

  # Runs whose config lacks the option read pictures as they are stored.
  as_stored = {"exif_orientation": "ignore"}
  if saved.data.name == "folder":
    defaults["data"] |= as_stored
  with saved.unlocked():
    fill(saved, defaults)
    for other in saved.other_data.values():
      if other.name == "folder":
        fill(other, folder_data() | as_stored)
  return saved


def changes(ours: ConfigDict | Config, theirs: ConfigDict | Config) -> dict[str, tuple[Any, Any]]:
  """Finds the options in which two configs differ, by dotted key.

  (ours, theirs), "absent" where one lacks it.
  """
  mine, other = (all_options(json.loads(to_json(config))) for config in (ours, theirs))
  pairs = {
    key: (mine.get(key, "absent"), other.get(key, "absent"))
    for key in sorted(mine.keys() | other.keys())
  }
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def differences(ours: ConfigDict | Config, theirs: ConfigDict | Config) -> list[str]:
  """Describes each option in which two configs differ, on one line.

  "total_steps: 100 now, 200 there".
  """
  return [
    f"{key}: {json.dumps(mine)} now, {json.dumps(other)} there"
    for key, (mine, other) in changes(ours, theirs).items()
  ]
