"""Builders of what scores a method's predictors or labels images with them."""

from __future__ import annotations

import functools
import shlex

import jax

from pseudoseg_jax import checks
from pseudoseg_jax.builders.classes import resolve_path
from pseudoseg_jax.builders.opened import Data, images_of, rows_unlabeled_alone
from pseudoseg_jax.contract import Method
from pseudoseg_jax.data import (
  boxes,
  tags,
)
from pseudoseg_jax.evaluation import inference, weak_labels
from pseudoseg_jax.evaluation.evaluator import Evaluator, make_evaluator
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.options import AnyData, Config


def build_protocol(config: Config) -> Protocol:
  options = config.evaluation
  if options.preset:
    checks.check_name("config.evaluation.preset", options.preset, inference.PRESETS)
    return inference.PRESETS[options.preset]
  protocol = Protocol(**{name: getattr(options, name) for name in inference.OPTIONS})
  inference.check_protocol(protocol)
  return protocol


def describe_protocol(config: Config) -> str:
  """Describes the protocol in words, after its preset's name if it is one.

  For example: "cps_voc: sliding windows of 512x512, ...".
  """
  preset = config.evaluation.preset
  return f"{preset}: " * bool(preset) + inference.describe(build_protocol(config))


def _protocol_flags(config: Config, protocol: Protocol) -> str:
  """Returns the flags that turn the config's protocol into this one.

  They are those of a command line.
  """
  options, values = config.evaluation, protocol._asdict()
  flags = ["--config.evaluation.preset="] * bool(options.preset)
  flags += [
    f"--config.evaluation.{name}={values[name]}"
    for name in inference.OPTIONS
    if values[name] not in (getattr(options, name), None)
  ]
  return " ".join(map(shlex.quote, flags))


def build_evaluator(
  config: Config, data: Data, method: Method, mesh: jax.sharding.Mesh, number: int = 0
) -> Evaluator:
  """Builds the evaluator of domain `number`, on that domain's data.

  It scores the predictors of the domain. With config.evaluation.image_labels, those that are shown
  the image alone are scored a second time as NAME+image_labels, with their predictions kept to the
  classes in the image.
  """
  names = []
  for name, predict in method.predictors.items():
    if predict.domain == number:
      names.append(name)
      if config.evaluation.image_labels and not predict.weak_label:
        names.append(name + weak_labels.IMAGE_LABELS)
  flags = functools.partial(_protocol_flags, config)
  return _evaluator(
    config, data, method, mesh, names, "evaluated", protocol=build_protocol(config), flags=flags
  )


def build_labeler(
  config: Config,
  data: Data,
  method: Method,
  mesh: jax.sharding.Mesh,
  name: str,
  role: str,
  protocol: Protocol,
) -> Evaluator:
  """Builds what predicts the images of a role with one predictor.

  The predictor is NAME or NAME+image_labels. For roles see `images_of`. The result is for
  `Evaluator.stream` alone.

  Raises:
    InputError: no weak labels where they are wanted.
  """
  return _evaluator(config, data, method, mesh, [name], role, protocol=protocol, with_labels=False)


def _evaluator(config, data, method, mesh, names, role, **options) -> Evaluator:
  """Builds an evaluator of predictors by name, on the images of a role.

  The names are with "+image_labels" or without.
  """
  source, num_classes = images_of(data, role), len(data.classes)
  plain = {name: name.removesuffix(weak_labels.IMAGE_LABELS) for name in names}
  predictors = {name: method.predictors[of] for name, of in plain.items()}
  kinds = {predict.weak_label for predict in predictors.values()} - {None}
  kinds |= {"image"} if any(name != of for name, of in plain.items()) else set()
  if kinds:
    source = weak_labels.WithChannels(
      source,
      num_classes,
      {kind: _weak_labels(config.data, data, role, kind) for kind in sorted(kinds)},
    )
    predictors = {
      name: source.predictor(predict, masked=name != plain[name])
      for name, predict in predictors.items()
    }
  planes = len(kinds) * num_classes
  return make_evaluator(
    predictors,
    source,
    data.classes,
    mean=(*config.data.mean, *[0.0] * planes),
    std=(*config.data.std, *[1.0] * planes),
    batch_size=config.evaluation.batch_size,
    mesh=mesh,
    **options,
  )


def _weak_labels(data_config: AnyData, data: Data, role: str, kind: str) -> weak_labels.WeakLabel:
  """Returns the weak labels of the images of a role, by row.

  They are what the user's files hold, else read off masks that are known.

  Image-level labels of labeled and evaluated images are always those of their masks.
  """
  source, others = images_of(data, role), rows_unlabeled_alone(data)
  if role == "train" and others:
    labeled, unlabeled = (
      _weak_labels(data_config, data, part, kind) for part in ("labeled", "unlabeled")
    )
    count = len(data.labeled)
    return lambda row: labeled(row) if row < count else unlabeled(others[row - count])
  masks_known = role != "unlabeled" or data.truth_known
  option = {"image": "image_labels", "boxes": "eval_boxes" if role == "evaluated" else "boxes"}[
    kind
  ]
  path = getattr(data_config, option)
  if path and not (kind == "image" and masks_known):
    read = {"image": tags.read_tags, "boxes": boxes.read_boxes}[kind]
    return read(resolve_path(data_config.root, path), source.ids, data.classes).__getitem__
  if not masks_known:
    problems = checks.Problems(f"the {role} images cannot be predicted with weak labels")
    allowed = {
      "image": "a CSV or JSON of image-level labels, or a folder of VOC XML",
      "boxes": "a folder of VOC XML, or a COCO JSON",
    }
    problems.add(
      f"config.data.{option}",
      got="nothing",
      allowed=allowed[kind],
      remedy=f"--config.data.{option}=PATH",
    )
    problems.raise_if_any()
  return (
    weak_labels.image_labels_of_masks(source, len(data.classes))
    if kind == "image"
    else weak_labels.boxes_of_masks(source, data.classes)
  )
