"""Configs: every option of a run with its default, in one tree; a file in configs/ states what
differs.

`get_config("method=cps,split=1_8")` of such a file returns the tree. Batch sizes are global,
durations are in optimiser steps.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import numbers
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from pseudoseg_jax import checks
from pseudoseg_jax.methods import mean_teacher, table as methods_table
from pseudoseg_jax.models import imagenet, table as models_table

ConfigDict = ml_collections.ConfigDict


def defaults_of(factory: Callable) -> dict[str, Any]:
  """A factory's options with their defaults: its signature is their one home."""
  parameters = inspect.signature(factory).parameters.values()
  return {
    parameter.name: parameter.default
    for parameter in parameters
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
  }


def network(name: str, **options) -> ConfigDict:
  """config.network: a name of models.table.NETWORKS with that network's options."""
  checks.check_name("network", name, models_table.NETWORKS)
  defaults = defaults_of(models_table.NETWORKS[name]) | {
    "dtype": "float32",  # "bfloat16": activations only
    # Weights to start from: "imagenet", a file (.safetensors, .pth), or
    # "hf://organisation/name[/file]".
    "pretrained": "",
    # "encoder": it does not learn, which takes less time and memory; "batch_norm": its batch norms
    # alone do not. Both keep the running statistics of the pretrained weights, in every network of
    # a method.
    "freeze": "none",
  }
  return _differing(ConfigDict({"name": name, **defaults}), options)


def network_on(name: str, backbone: str) -> ConfigDict:
  """config.network by name, on `backbone` where the network has a choice of them; "" is the
  network's own default.
  """
  checks.check_name("network", name, models_table.NETWORKS)
  has_choice = "backbone" in defaults_of(models_table.NETWORKS[name])
  return network(name, **({"backbone": backbone} if has_choice and backbone else {}))


def choose_network(config: ConfigDict, name: str, backbone: str) -> None:
  """Sets config.network by name, or only the backbone of the one that is there; "" leaves things as
  they are.
  """
  if name:
    config.network = network_on(name, backbone)
  elif backbone and "backbone" in config.network:
    config.network.backbone = backbone


def method(name: str, convention: str = "", **options) -> ConfigDict:
  """Makes config.method: a method's name with its options, at their defaults but for those given.

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
  """All options but those of a data set; what a config file starts from."""
  return ConfigDict(
    {
      "seed": 0,
      "total_steps": 1000,
      "batch_size_global": {"labeled": 8, "unlabeled": 8},
      "log_every_steps": 50,
      "eval_every_steps": 500,
      # Evaluations in a row without a better one, after which the run ends; 0 = never. What it ends
      # with was chosen by the evaluated images and flatters on them: a comparison of methods runs to
      # the end.
      "early_stopping_patience": 0,
      "checkpoint_every_steps": 500,
      "keep_last_checkpoints": 2,
      "method": method_config,
      "network": network("tiny"),
      "init_from": "",  # an exported folder or a workdir, whose network to start from
      # Networks of earlier runs' last states, by role: "ancillary=WORKDIR,primary=WORKDIR".
      "nets_from": "",
      # Labels that a network made (export_labels), learnt from as if they were true ones.
      "pseudo_labels": {
        "folder": "",  # of export_labels; "" = none
        "list": "",  # a list file of those images that count; "" = all of the folder's
        # True: the labeled images as often as it takes to be half of those learnt from.
        "repeat_labeled": False,
      },
      "labeled_every": 1,  # 2: only every second of the labeled images, and so on
      # Labeled images with a class that a smaller share of them holds are met more often, by LVIS's
      # repeat factors; 0 = all alike.
      "oversampling_threshold": 0.0,
      "optimizer": {
        "name": "sgd",  # or "adamw"
        "learning_rate": 0.01,
        "power": 0.9,  # of the polynomial decay to 0 at total_steps
        "warmup_steps": 0,
        # -1: the rate lags one step, as in loops that set it after the step (UniMatch).
        "shift_steps": 0,
        "momentum": 0.9,  # sgd only
        "weight_decay": 1e-4,
        # Gradients of a network are scaled to this norm where theirs is larger; 0 = as they are.
        "clip_norm": 0.0,
        "decay_scope": "kernels",  # or "all": batch norm and biases too
        "head_multiplier": 1.0,  # learning rate of everything but the backbone, relative to it
        # of the classifiers, relative to the rest of their heads (Learning Pseudo Labels: 10).
        "classifier_multiplier": 1.0,
        # Learning rate of the classifiers' biases, relative to the rest (TensorFlow DeepLab: 2).
        "bias_multiplier": 1.0,
        # True: scales and offsets of the backbone's batch norms stay as pretrained, while its
        # statistics move (ClassMix, CutMix-Seg; with network.freeze=batch_norm both stay).
        "freeze_batch_norm": False,
      },
      # Of whatever a method learns without pixel labels, on top of its own weight and ramp. Published
      # weights are of runs of tens of thousands of steps: in a short one there is nothing to learn
      # from a network that knows nothing yet.
      "unlabeled_loss": {
        "factor": 1.0,  # on the weight
        # Part of the run over which it rises as exp(-5 (1 - t)^2), from 0.0067.
        "rampup_fraction": 0.0,
      },
      "criterion": {
        "name": "cross_entropy",  # or "ohem", "focal", "dice"; or a sum, "cross_entropy+dice"
        # Of cross_entropy, ohem and focal: "inverse" or "effective" of how often classes are in the
        # labeled masks, or numbers, one for each class in their order, "0.2,1,3".
        "class_weights": "",
        "focal_gamma": 2.0,  # focal: 0 is cross entropy
        "denominator": "valid",  # cross_entropy: "valid" pixels or "all" pixels
        "min_confidence": 0.7,  # ohem
        "min_kept": 100_000,  # ohem: pixels, per image or batch as scope says
        "scope": "image",  # ohem: "image" or "batch"
      },
      "data": {
        "name": "folder",  # or "synthetic", "tfds"
        "mean": (0.485, 0.456, 0.406),  # of RGB in [0, 1]
        "std": (0.229, 0.224, 0.225),
      },
      # Further domains by name, each with the options of a data config but mean and std, which are
      # those of data: for methods that learn several domains at once. They are numbered 1, 2, ... in
      # the order of their names.
      "other_data": {},
      "views": {
        "crop_size": (64, 64),  # height, width in pixels
        "scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        # True: any factor between the least and the greatest of scales, as always with "pillow",
        # "cct" and "ael".
        "continuous": False,
        "flip": True,
        # of resizing, padding and colour jitter: CPS; "tensorflow": PseudoSeg; "pillow": UniMatch;
        # "cct"; "ael"; "cutmix_seg"; "lpl".
        "convention": "opencv",
        # Photometric strong views, for methods that ask for them.
        "jitter_probability": 0.8,
        "brightness": 0.5,
        "contrast": 0.5,
        "saturation": 0.5,
        "hue": 0.25,
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
        "blur_sigma_pixels": (0.1, 2.0),
        # Of labeled images, which else have the geometry alone.
        "labeled_photometry": False,  # True: they too get a strong view's colours
        # Colour or geometric operations on each, drawn as Learning Pseudo Labels does; 2 there.
        "labeled_operations": 0,
      },
      "evaluation": {
        # "cps_voc", "unimatch_cityscapes", ...: a published protocol, in place of the options down to
        # absent_classes.
        "preset": "",
        "style": "whole",  # or "pad_to_crop", "center_crop", "slide"
        "window_pixels": (512, 512),  # height, width of the window that slides, or of the crop
        "stride_fraction": 2 / 3,  # slide: of the window
        "stride_rounding": "up",  # slide: to whole pixels, "up" (CPS) or "down" (UniMatch)
        "edges": "shift",  # slide: the last window is shifted back inside, or "cut" off at the border
        "summed": "logits",  # or "probabilities": of windows, scales and flips
        "scales": (1.0,),
        "flip": False,
        "multiple_pixels": 1,  # whole: images resized to multiples of this, for networks of patches
        # whole: images padded to a multiple of this, so that few sizes compile; 1 leaves them as they
        # are.
        "pad_multiple": 1,
        # True: also score each predictor among the classes that are in the image.
        "image_labels": False,
        # What classes in neither truth nor prediction do to the mIoU; "zero": count as 0.
        "absent_classes": "skip",
        "batch_size": 8,
        "pictures": 6,  # images shown in pictures/
      },
    }
  )


def folder_data(**options) -> dict[str, Any]:
  """config.data of images and masks in folders; patterns hold {id} and are relative to root, as are
  paths in lists.
  """
  return {
    "name": "folder",
    "root": "",
    # a file below root of class names, one a line, or `index name r g b`; or "voc", "cityscapes",
    # ...
    "classes": "",
    "image_pattern": "",  # "" = the lists give the paths
    "label_pattern": "",
    "channels": 3,  # of images: 3 = RGB, made of any file; another number = files that have as many
    # Stored mask value:class, "11:255,12:3", or "cityscapes" (of its labelIds); {"11": 255} in a
    # config file.
    "label_map": "",
    "ignore_index": 255,  # stored mask value of pixels without a label
    "reduce_zero_label": False,  # stored 0 is no label, stored k is class k - 1 (ADE20K)
    # Pictures as viewers and labeling tools show them; "ignore": as the pixels are stored.
    "exif_orientation": "apply",
    # Stored value of full brightness; 0 = 255 of 8 bits, 65535 of 16 bits, 255 of floats.
    "max_value": 0.0,
    # True: damaged training files are told and left out, instead of ending the run.
    "skip_unreadable": False,
    "mask_colors": False,  # masks are drawn in the colours of the classes
    # Lists: ids, or paths of images, or of images and masks, one a line.
    # What to train on; "" = every file that fits image_pattern and is not evaluated.
    "train_list": "",
    # Labeled part: "1_8" (a random eighth), "every_8", "full", a list file, or a published
    # "voc2012/cps/1_8".
    "split": "full",
    "split_seed": 0,  # of "1_8" and the like
    "unlabeled_list": "",  # "" = what the labeled part leaves over; or a list file
    "unlabeled_folder": "",  # a bare folder of images instead
    "eval_image_pattern": "",  # "" = image_pattern, likewise the next
    "eval_label_pattern": "",
    "eval_list": "",  # "" = every file that fits eval_image_pattern
    # is class 0 what is left beside things? "auto": by its name; or "yes", "no".
    "background": "auto",
    # image-level labels of the unlabeled images: a CSV or JSON file, or a folder of VOC XML.
    "image_labels": "",
    "boxes": "",  # boxes of labeled and unlabeled images: a folder of VOC XML, or a COCO JSON file
    "eval_boxes": "",  # likewise of the evaluated images; "" = made from their masks
  } | options


GIVEN = "given"  # config.data.name of images that were given from Python


def given_data(**options) -> dict[str, Any]:
  """config.data of images that were given from Python: what is known of them beside the images."""
  known = {
    name: folder_data()[name]
    for name in ("channels", "exif_orientation", "max_value", "image_labels", "boxes", "eval_boxes")
  }
  return {"name": GIVEN} | known | options


def tfds_data(**options) -> dict[str, Any]:
  """config.data of images and masks in a TensorFlow Datasets data set."""
  return {
    "name": "tfds",
    # a name of the TFDS catalogue; or the folder of a dataset_info.json, also below root:
    # "voc2012/1.0.0".
    "dataset": "",
    "root": "",  # where TFDS keeps data sets, may be gs://...; "" = where it always does
    # as in folder_data, likewise label_map, split, split_seed, image_labels and boxes.
    "classes": "",
    "image_key": "image",
    "label_key": "label",
    "id_key": "id",
    "class_key": "",  # a class of whole images: the label 1 then becomes 1 + that class
    "label_map": "",
    "background": "auto",  # as in folder_data
    "train_split": "train",
    "split": "full",
    "split_seed": 0,
    "unlabeled_split": "",  # "" = what the labeled part leaves over of train_split
    "eval_split": "val",
    "image_labels": "",
    "boxes": "",
    "eval_boxes": "",
  } | options


def arguments(text: str | None, **allowed: Any) -> dict[str, Any]:
  """Parses a config file's argument, "method=cps,split=1_8", over the allowed names and their
  defaults.

  Values take the type of their default. Raises InputError for unknown names or values of another
  type.
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
  """Makes a config for photographs of any sizes, without a file; configs/folder.py is this one for
  a folder.

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
  """Name -> path of the configs that come with the package."""
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
  """A config file where it is, or the installed one of that name: "voc" or "configs/voc.py" of any
  folder.

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
  """The config of "configs/voc.py:method=cps" (a file and, after a colon, its argument), with
  dotted overrides applied.

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


def is_open(value: Any) -> bool:
  """Whether an option's value leaves it to `settings`: -1, () or "auto"."""
  return value in (-1, (), "auto")


def as_flag(value: Any) -> str:
  """A value as `override` and the command line read it: tuples and lists without brackets."""
  return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
  """Sets dotted keys in place, {"optimizer.learning_rate": "0.1"}; text is read as the type of what
  stands there.

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
  """Of an option that was just set to several values: all such options hold numbers, and
  ml_collections reads what it is given.
  """
  values = all_options(config)[key]
  if not all(
    isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    for value in values
  ):
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
  """A remedy for an option that is none: one of that name in another group, or by another tool's
  name, or the nearest.
  """
  group, _, name = key.rpartition(".")
  named = [
    other for other in known if other.rpartition(".")[2] in (name, _SYNONYMS.get(name.lower()))
  ]
  return f"did you mean '{checks.closest(key, named)}'?" if named else checks.nearest(key, known)


def all_options(config: Mapping, prefix: str = "") -> dict[str, Any]:
  """Every option by its dotted key: {"seed": 0, "method.name": "cps", ...}."""
  options = {}
  for name, value in config.items():
    options |= (
      all_options(value, f"{prefix}{name}.")
      if isinstance(value, (dict, ConfigDict))
      else {f"{prefix}{name}": value}
    )
  return options


def to_json(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
  """The config that `to_json` wrote; JSON's lists are tuples again."""

  def restored(value):
    if isinstance(value, dict):
      return {name: restored(item) for name, item in value.items()}
    return tuple(restored(item) for item in value) if isinstance(value, list) else value

  return ConfigDict(restored(json.loads(text)))


def from_saved(content: Any) -> ConfigDict:
  """The config of a parsed config.json of any release, with what is missing at its defaults.

  Raises:
    InputError, or any error of a wrong type or key: a content that no release wrote.
  """
  if not isinstance(content, dict):
    raise TypeError(f"a {type(content).__name__}, not the options of a run")
  saved = from_json(json.dumps(content))
  own = ("method.", "network.")  # each has options of its own, below
  groups = {
    key: value for key, value in all_options(base(saved.method)).items() if not key.startswith(own)
  }
  config = completed(saved)
  known = {
    **groups,
    **all_options(
      {"data": {"folder": folder_data, "tfds": tfds_data}.get(config.data.name, dict)()}
    ),
  }
  known |= all_options({"network": network(config.network.name)})
  if not methods_table.is_external(config.method.name):
    known |= all_options({"method": method(config.method.name)})
  problems = checks.Problems("options that no run has")
  options = all_options(config)
  for key, default in known.items():
    if (
      default is not None
      and not key.startswith("other_data")
      and not _fits(options.get(key), default)
    ):
      problems.add(
        f"config.{key}",
        got=repr(options.get(key)),
        allowed=f"{type(default).__name__}, such as {default!r}",
      )
  problems.raise_if_any()
  return config


def _fits(value: Any, default: Any) -> bool:
  """Whether a value is of the kind that the default of its option is of."""
  if isinstance(default, bool) or isinstance(value, bool):
    return isinstance(value, bool) and isinstance(default, bool)
  if isinstance(default, (int, float)):
    return isinstance(value, (int, float)) and math.isfinite(value)
  if isinstance(default, str) and isinstance(value, Mapping):
    return True  # label_map may be given as a mapping
  return isinstance(value, type(default)) or (
    isinstance(default, Mapping) and isinstance(value, (Mapping, ConfigDict))
  )


def completed(saved: ConfigDict) -> ConfigDict:
  """A saved config with the options that were added since, at their defaults, which change
  nothing.
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


def changes(ours: ConfigDict, theirs: ConfigDict) -> dict[str, tuple[Any, Any]]:
  """The options in which two configs differ, by dotted key: (ours, theirs), "absent" where one
  lacks it.
  """
  mine, other = (all_options(json.loads(to_json(config))) for config in (ours, theirs))
  pairs = {
    key: (mine.get(key, "absent"), other.get(key, "absent"))
    for key in sorted(mine.keys() | other.keys())
  }
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
  """One line for each option in which two configs differ: "total_steps: 100 now, 200 there"."""
  return [
    f"{key}: {json.dumps(mine)} now, {json.dumps(other)} there"
    for key, (mine, other) in changes(ours, theirs).items()
  ]
