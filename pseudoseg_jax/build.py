"""The only reader of a config: makes from it the data, the task, the method and the evaluator of a run."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax import checks, config as configs, optim
from pseudoseg_jax.contract import Method, Network, Optimizer, Task
from pseudoseg_jax.data import classes as classes_lib, pipeline, sources, splits, synthetic, tags
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.geometry import Geometry
from pseudoseg_jax.data.photometry import Photometry
from pseudoseg_jax.data.pipeline import PipelineSpec
from pseudoseg_jax.data.sources import Source
from pseudoseg_jax.evaluation.evaluator import Evaluator, make_evaluator
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.methods import table as methods_table
from pseudoseg_jax.models import table as models_table
from pseudoseg_jax.ops import losses, schedules


class Data(NamedTuple):
  """labeled: images with masks; unlabeled: images alone; evaluated: images with masks that nothing is learnt from.

  truth_known: the unlabeled images have masks that may be shown, never learnt from.
  """

  classes: Classes
  labeled: Source
  unlabeled: Source
  evaluated: Source
  truth_known: bool
  split: str  # in words, for reports


_BUILTIN_CLASSES = {"voc": classes_lib.VOC, "camvid": classes_lib.CAMVID, "coco": classes_lib.COCO}


def build_classes(data: configs.ConfigDict) -> Classes:
  """The classes alone: what a trained network needs to be used without its data."""
  if data.name == "synthetic":
    return synthetic.CLASSES
  if data.classes in _BUILTIN_CLASSES:
    return _BUILTIN_CLASSES[data.classes]
  return classes_lib.read_classes(_below(data.root, data.classes))


def build_data(data: configs.ConfigDict) -> Data:
  """Opens the sources; raises InputError with everything that can be known without decoding an image."""
  checks.check_name("config.data.name", data.name, ("folder", "synthetic"))
  return _synthetic(data) if data.name == "synthetic" else _folder(data)


def _synthetic(data: configs.ConfigDict) -> Data:
  scenes = synthetic.SyntheticScenes(data.num_scenes, tuple(data.size), seed=data.scenes_seed)
  if not 1 <= data.num_labeled < data.num_scenes:
    problems = checks.Problems("config.data does not fit together")
    problems.add("config.data.num_labeled", got=data.num_labeled, allowed=f"1..{data.num_scenes - 1} (num_scenes - 1)")
    problems.raise_if_any()
  return Data(
    classes=synthetic.CLASSES,
    labeled=sources.Subset(scenes, scenes.ids[: data.num_labeled]),
    unlabeled=sources.Subset(scenes, scenes.ids[data.num_labeled :]),
    evaluated=synthetic.SyntheticScenes(data.num_eval_scenes, tuple(data.size), seed=data.scenes_seed + 1),
    truth_known=True,
    split=f"{data.num_labeled} labeled of {data.num_scenes} synthetic scenes",
  )


def _below(root: str, path: str) -> pathlib.Path:
  """A path that is absolute, or relative to the data's root."""
  return pathlib.Path(root) / path


def _all_ids(data: configs.ConfigDict, pattern: str, list_file: str) -> tuple[str, ...]:
  if list_file:
    return splits.read_list(_below(data.root, list_file))
  before, after = pattern.split("{id}")
  found = sorted(path.relative_to(data.root).as_posix() for path in pathlib.Path(data.root).glob(f"{before}*{after}"))
  if not found:
    problems = checks.Problems("config.data cannot be used")
    problems.add(f"pattern {pattern}", got=f"no file below {data.root}", remedy="is this the right root, and the right pattern?")
    problems.raise_if_any()
  return tuple(path[len(before) : len(path) - len(after)] for path in found)


def _folder(data: configs.ConfigDict) -> Data:
  problems = checks.Problems("config.data cannot be used")
  if not data.root:
    problems.add("config.data.root", got="nothing", remedy="say where the data lie: --config.data.root=DIR")
  elif not pathlib.Path(data.root).is_dir():
    problems.add("config.data.root", got=repr(data.root), allowed="an existing folder")
  problems.raise_if_any()

  classes = build_classes(data)
  label_map = {int(stored): index for stored, index in data.label_map.items()}
  train_ids = _all_ids(data, data.image_pattern, data.train_list)
  if data.split == "full" or data.split.startswith("1_"):
    labeled_ids = splits.every_kth(train_ids, data.split)
  else:
    labeled_ids = splits.read_list(_split_file(data))
  with_masks = functools.partial(sources.FolderSource, data.root, num_classes=len(classes), label_map=label_map)
  eval_image_pattern = data.eval_image_pattern or data.image_pattern

  def unlabeled_source():
    if data.unlabeled_folder:
      return sources.image_folder(_below(data.root, data.unlabeled_folder))
    if data.unlabeled_list:
      ids = splits.read_list(_below(data.root, data.unlabeled_list))
    else:
      ids = splits.complement(train_ids, labeled_ids)
    # No labels are left over at split=full: methods then see the labeled images as unlabeled ones too.
    return sources.FolderSource(data.root, ids or labeled_ids, image_pattern=data.image_pattern)

  def evaluated_source():
    ids = _all_ids(data, eval_image_pattern, data.eval_list)
    label_pattern = data.eval_label_pattern or data.label_pattern
    return with_masks(ids, image_pattern=eval_image_pattern, label_pattern=label_pattern)

  opened = {}
  for role, opener in {
    "labeled": lambda: with_masks(labeled_ids, image_pattern=data.image_pattern, label_pattern=data.label_pattern),
    "unlabeled": unlabeled_source,
    "evaluated": evaluated_source,
  }.items():
    try:
      opened[role] = opener()
    except checks.InputError as error:
      problems.add(f"{role} images", got=str(error))
  problems.raise_if_any()
  split = f"{data.split}: {len(opened['labeled'])} labeled, {len(opened['unlabeled'])} unlabeled"
  return Data(classes=classes, truth_known=False, split=split, **opened)


def _split_file(data: configs.ConfigDict) -> pathlib.Path:
  candidates = _below(data.root, data.split), pathlib.Path(data.split), splits.published(data.split)
  found = next((path for path in candidates if path is not None and path.is_file()), None)
  if found is None:
    problems = checks.Problems("config.data cannot be used")
    known = ", ".join(splits.published_names())
    allowed = f"'full', '1_k' such as '1_8', a file of image ids, or a published list ({known})"
    problems.add("config.data.split", got=repr(data.split), allowed=allowed)
    problems.raise_if_any()
  return found


def build_network(config: configs.ConfigDict, num_classes: int) -> Network:
  options = {name: value for name, value in config.network.items() if name != "name"}
  checks.check_name("config.network.dtype", options["dtype"], ("float32", "bfloat16"))
  options["dtype"] = jnp.dtype(options["dtype"])
  return models_table.make_network(config.network.name, num_classes=num_classes, **options)


def build_optimizer(config: configs.ConfigDict) -> Optimizer:
  options = config.optimizer
  checks.check_name("config.optimizer.name", options.name, ("sgd", "adamw"))
  checks.check_name("config.optimizer.decay_scope", options.decay_scope, ("kernels", "all"))
  learning_rate = functools.partial(
    schedules.poly,
    base=options.learning_rate,
    total_steps=config.total_steps,
    power=options.power,
    warmup_steps=options.warmup_steps,
    shift_steps=options.shift_steps,
  )
  common = dict(
    weight_decay=options.weight_decay,
    decay_scope=options.decay_scope,
    factors={
      "classifier/bias$": options.head_multiplier * options.bias_multiplier,
      "^(?!backbone)": options.head_multiplier,
    },
  )
  if options.name == "adamw":
    return optim.adamw(learning_rate, **common)
  return optim.sgd(learning_rate, momentum=options.momentum, **common)


def build_criterion(config: configs.ConfigDict):
  options = config.criterion
  checks.check_name("config.criterion.name", options.name, ("cross_entropy", "ohem"))
  checks.check_name("config.criterion.denominator", options.denominator, ("valid", "all"))
  checks.check_name("config.criterion.scope", options.scope, ("image", "batch"))
  if options.name == "ohem":
    return functools.partial(
      losses.ohem_cross_entropy, min_confidence=options.min_confidence, min_kept=options.min_kept, scope=options.scope
    )
  return functools.partial(losses.cross_entropy_mean, denominator=options.denominator)


def build_method(config: configs.ConfigDict, num_classes: int) -> Method:
  """The method of a config, for any use: training, evaluation, prediction."""
  checks.check_name("config.method.name", config.method.name, methods_table.METHODS)
  options = {name: value for name, value in config.method.items() if name != "name"}
  known = configs.defaults_of(methods_table.METHODS[config.method.name])
  for name in options:
    checks.check_name(f"option of method '{config.method.name}'", name, known)
  task = Task(
    num_classes=num_classes,
    total_steps=config.total_steps,
    network=build_network(config, num_classes),
    optimizer=build_optimizer(config),
    criterion=build_criterion(config),
  )
  return methods_table.METHODS[config.method.name](task, **options)


def build_pipeline(config: configs.ConfigDict, data: Data, method: Method) -> PipelineSpec:
  """What training batches are made of; raises InputError for whatever does not fit, together."""
  view = config.views.to_dict()
  weak = {name: view.pop(name) for name in ("crop_size", "scales", "continuous", "flip")}
  geometry = Geometry(convention=view["convention"], **weak)
  return PipelineSpec(
    labeled=data.labeled,
    unlabeled=data.unlabeled if method.needs.unlabeled else None,
    batch_size_labeled_global=config.batch_size_global.labeled,
    batch_size_unlabeled_global=config.batch_size_global.unlabeled,
    geometry=geometry,
    photometry=Photometry(**view),
    needs=method.needs,
    unlabeled_image_labels=_image_labels(config.data, data) if method.needs.weak_label == "image" else None,
    seed=config.seed,
    mean=config.data.mean,
    std=config.data.std,
  )


def _image_labels(data_config: configs.ConfigDict, data: Data) -> np.ndarray | None:
  """f32[N, K] of the unlabeled images: what the user's file says; synthetic scenes know their own."""
  if data.truth_known:
    return tags.tags_of_masks(data.unlabeled, len(data.classes))
  if not data_config.image_labels:
    return None
  return tags.read_tags(_below(data_config.root, data_config.image_labels), data.unlabeled.ids, data.classes)


def panel_batch(spec: PipelineSpec, data: Data, num_images: int) -> dict:
  """A batch to show what the unlabeled images teach: the same views as in training, with the truth where it is known."""
  shown = dataclasses.replace(
    spec, batch_size_labeled_global=1, batch_size_unlabeled_global=num_images, with_truth=data.truth_known
  )
  return next(pipeline.train_batches(shown))


def check_run(config: configs.ConfigDict) -> None:
  """What can be said of a config's numbers before anything is opened: all of it at once."""
  problems = checks.Problems("the config cannot be run")
  devices = jax.device_count()
  for stream, size in config.batch_size_global.items():
    if size < 1 or size % devices:
      near = max(devices, round(size / devices) * devices)
      problems.add(
        f"config.batch_size_global.{stream}",
        got=size,
        allowed=f"a multiple of the {devices} devices" if devices > 1 else "1 or more",
        remedy=f"e.g. {near}",
      )
  for name in ("total_steps", "log_every_steps", "eval_every_steps", "checkpoint_every_steps", "keep_last_checkpoints"):
    if config[name] < 1:
      problems.add(f"config.{name}", got=config[name], allowed="1 or more")
  if not config.optimizer.learning_rate > 0:
    problems.add("config.optimizer.learning_rate", got=config.optimizer.learning_rate, allowed="above 0")
  problems.raise_if_any()


def build_protocol(config: configs.ConfigDict) -> Protocol:
  options = {name: value for name, value in config.evaluation.items() if name in Protocol._fields}
  return Protocol(**options)


def build_evaluator(config: configs.ConfigDict, data: Data, method: Method, mesh: jax.sharding.Mesh) -> Evaluator:
  return make_evaluator(
    method.predictors, data.evaluated, data.classes, protocol=build_protocol(config), mean=config.data.mean, std=config.data.std,
    batch_size=config.evaluation.batch_size, mesh=mesh,
  )  # fmt: skip


def batches(spec: PipelineSpec):
  """start_step -> this process's share of every global batch from that step on."""
  return lambda start_step: pipeline.train_batches(
    spec, start_step=start_step, process_index=jax.process_index(), process_count=jax.process_count()
  )
