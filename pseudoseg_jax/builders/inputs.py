"""Builders of the batches that a method learns from.

They are made of a config and its data.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.builders.classes import resolve_path
from pseudoseg_jax.builders.data import errors_name_domain
from pseudoseg_jax.builders.method import check_criterion, class_weights_of
from pseudoseg_jax.builders.opened import Data, Domain
from pseudoseg_jax.contract import Method
from pseudoseg_jax.data import (
  boxes,
  frequencies,
  pipeline,
  sources,
  tags,
)
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.geometry import Geometry
from pseudoseg_jax.data.photometry import Photometry
from pseudoseg_jax.data.pipeline import Feed, PipelineSpec
from pseudoseg_jax.data.sources import Source
from pseudoseg_jax.options import AnyData, Config, as_dict, replaced

log = logging.getLogger("pseudoseg_jax")


def build_pipelines(domains: Sequence[Domain], method: Method) -> tuple[PipelineSpec, ...]:
  """Builds the specification of the batches of each domain.

  Raises:
    InputError: whatever does not fit.
  """
  check_criterion(domains[0].config, method)
  others = [domain.name for domain in domains[1:]]
  if bool(others) != method.needs.domains:
    problems = checks.Problems(f"method '{domains[0].config.method.name}' does not fit the data")
    if others:
      remedy = "take a config of one data set, such as configs/camvid.py, or a method that learns several domains"
      problems.add(
        "config.other_data",
        got=", ".join(others),
        allowed="nothing: the method learns one domain",
        remedy=remedy,
      )
    else:
      remedy = "e.g. --config=configs/domains.py:first=camvid,second=quickstart"
      allowed = "at least one further domain: the method learns several"
      problems.add("config.other_data", got="nothing", allowed=allowed, remedy=remedy)
    problems.raise_if_any()
  _check_background(domains[0].config, domains[0].data.classes)
  specs = []
  for name, config, data in domains:
    with errors_name_domain(name):
      specs.append(build_pipeline(config, data, method))
  return tuple(specs)


def build_pipeline(config: Config, data: Data, method: Method) -> PipelineSpec:
  """Builds the specification of training batches.

  Raises:
    InputError: whatever does not fit, together.
  """
  view = as_dict(config.views)
  weak = {name: view.pop(name) for name in ("crop_size", "scales", "continuous", "flip")}
  of_labeled = {name: view.pop(name) for name in ("labeled_photometry", "labeled_operations")}
  geometry = Geometry(convention=view["convention"], **weak)
  labeled, needs = _learned_from(config, data), method.needs
  return PipelineSpec(
    labeled=labeled,
    unlabeled=data.unlabeled if needs.unlabeled else None,
    batch_size_labeled_global=config.batch_size_global.labeled,
    batch_size_unlabeled_global=config.batch_size_global.unlabeled,
    geometry=geometry,
    photometry=Photometry(**view),
    needs=needs,
    unlabeled_image_labels=_image_labels(config.data, data)
    if needs.weak_label == "image"
    else None,
    labeled_boxes=_boxes(config.data, data, labeled) if needs.weak_label == "boxes" else None,
    unlabeled_boxes=_boxes(config.data, data, data.unlabeled)
    if needs.weak_label == "boxes" and needs.unlabeled
    else None,
    seed=config.seed,
    mean=config.data.mean,
    std=config.data.std,
    skipped=data.skipped,
    **of_labeled,
  )


def _learned_from(config: Config, data: Data) -> Source:
  """Returns the labeled images and, after them, those with pseudo labels.

  Some of the labeled images are there several times.
  """
  if config.oversampling_threshold:
    factors = frequencies.repeat_factors(_class_pixels(data), config.oversampling_threshold)
    rows = frequencies.repeated_rows(factors, config.seed)
    data = data._replace(
      labeled=sources.Subset(data.labeled, [data.labeled.ids[row] for row in rows])
    )
  if data.pseudo_labeled is None:
    return data.labeled
  # As often as ST++ repeats them (Yang et al. 2022; dataset/semi.py).
  times = (
    -(-len(data.pseudo_labeled) // len(data.labeled)) if config.pseudo_labels.repeat_labeled else 1
  )
  return sources.Joined(sources.Subset(data.labeled, data.labeled.ids * times), data.pseudo_labeled)


def _class_pixels(data: Data) -> np.ndarray:
  return frequencies.count_pixels(
    data.labeled, len(data.classes), skip_unreadable=data.skipped is not None
  )


def weigh_classes(config: Config, data: Data) -> Config:
  """Returns the config with numbers as class weights.

  They are computed where config.criterion.class_weights names a way to compute them: from the masks
  that are learned from.
  """
  way = config.criterion.class_weights
  if way not in frequencies.WEIGHTS:
    return config
  weights = frequencies.class_weights(_class_pixels(data), way)
  text = ",".join(f"{weight:.6g}" for weight in weights)
  return replaced(config, {"criterion.class_weights": text})


def tell_imbalance(config: Config, data: Data, spec: PipelineSpec) -> None:
  """Logs what is done for rare classes."""
  weights = class_weights_of(config, len(data.classes))
  if weights:
    log.info(
      "class weights: %s",
      ", ".join(
        f"{name} {weight:.2f}" for name, weight in zip(data.classes.names, weights, strict=True)
      ),
    )
  if config.oversampling_threshold:
    times = collections.Counter(
      spec.labeled.ids[: len(spec.labeled) - len(data.pseudo_labeled or ())]
    ).values()
    log.info(
      "one pass over the %d labeled images meets %d: %d of them, with rare classes, more often than the others, up to %g times as often",
      len(data.labeled),
      sum(times),
      sum(count > min(times) for count in times),
      max(times) / min(times),
    )


def _check_background(config: Config, classes: Classes) -> None:
  """Checks that class 0 is the background where the method takes it so.

  A method that takes class 0 for what is left beside things must be right in that.
  """
  if config.method.options.get("background") is True and classes.background_index != 0:
    problems = checks.Problems(f"method '{config.method.name}' does not fit the classes")
    problems.add(
      "config.method.background",
      got=f"True, while class 0 is '{classes.names[0]}'",
      allowed="True where class 0 is the background",
      remedy="--config.method.background=False if every class is a thing or stuff of its own; else --config.data.background=yes",
    )
    problems.raise_if_any()


def _image_labels(data_config: AnyData, data: Data) -> np.ndarray | None:
  """Returns the image-level labels f32[N, K] of the unlabeled images.

  They are what the user's file holds; synthetic scenes know their own.
  """
  if data.truth_known:
    return tags.tags_of_masks(data.unlabeled, len(data.classes))
  if not data_config.image_labels:
    return None
  return tags.read_tags(
    resolve_path(data_config.root, data_config.image_labels),
    data.unlabeled.ids,
    data.classes,
  )


def _boxes(data_config: AnyData, data: Data, source: Source) -> np.ndarray | None:
  """Returns the boxes f32[N, M, 5] of a source's images.

  They are what the user's file holds; synthetic scenes know their own.
  """
  if data.truth_known:
    return boxes.pad_boxes(boxes.boxes_of_masks(source, data.classes))
  if not data_config.boxes:
    return None
  return boxes.pad_boxes(
    boxes.read_boxes(resolve_path(data_config.root, data_config.boxes), source.ids, data.classes)
  )


def panel_batch(specs: Sequence[PipelineSpec], data: Data, num_images: int) -> dict:
  """Draws a batch to show what is learned from the unlabeled images.

  The views are the same as in training, with the first domain's truth where known.
  """
  shown = [
    dataclasses.replace(spec, batch_size_labeled_global=1, batch_size_unlabeled_global=num_images)
    for spec in specs
  ]
  shown[0] = dataclasses.replace(shown[0], with_truth=data.truth_known)
  with pipeline.train_batches(*shown) as feed:
    return next(feed)


def batches(*specs: PipelineSpec) -> Callable[[int], Feed]:
  """Returns start_step -> the batches of all domains from that step on.

  They are this process's share of every global batch, and are to be closed.
  """
  share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  return lambda start_step: pipeline.train_batches(*specs, start_step=start_step, **share)
