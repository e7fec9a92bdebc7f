"""Builders of the method of a run, with its network, optimizer and criterion.

They are made of a config.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import Method, Network, Optimizer, Predictor, Task
from pseudoseg_jax.data import (
  frequencies,
)
from pseudoseg_jax.methods import table as methods_table
from pseudoseg_jax.models import imagenet, table as models_table
from pseudoseg_jax.ops import losses, schedules
from pseudoseg_jax.options import AnyData, Config, Criterion, replaced

log = logging.getLogger("pseudoseg_jax")


def build_network(config: Config, num_classes: int) -> Network:
  chosen = config.network
  return models_table.make_network(
    chosen.name,
    num_classes=num_classes,
    in_channels=config.data.channels,
    freeze=chosen.freeze,
    dtype=jnp.dtype(chosen.dtype),
    **chosen.options,
  )


def take_normalization(config: Config) -> Config:
  """Returns the config with the normalization of the pretrained weights.

  Its data then give how images were normalized for the weights of network.pretrained=imagenet.

  The default of config.data is nobody's choice and makes way; another one stays, see
  `tell_normalization`.
  """
  wanted = _normalization_of_weights(config)
  if not wanted or _normalization(config.data) != _normalization(AnyData()):
    return config
  mean, std = wanted
  return replaced(config, {"data.mean": mean, "data.std": std})


def tell_normalization(config: Config) -> None:
  """Logs how images are normalized where weights ask for it.

  It warns where the config has another way.
  """
  if not (wanted := _normalization_of_weights(config)):
    return
  in_words = "mean {} and deviation {}".format(
    *(",".join(f"{value:.3f}" for value in values) for values in wanted)
  )
  if _normalization(config.data) == wanted:
    log.info(
      "images are normalized as for the weights of %s: %s",
      config.network.options["backbone"],
      in_words,
    )
  else:
    log.warning(
      "config.data.mean=%s and config.data.std=%s are kept, but the weights of %s were trained with %s",
      *_normalization(config.data),
      config.network.options["backbone"],
      in_words,
    )


def _normalization(data_config: AnyData) -> tuple[tuple[float, ...], tuple[float, ...]]:
  return tuple(data_config.mean), tuple(data_config.std)


def _normalization_of_weights(config: Config) -> imagenet.Normalization | None:
  """Returns the normalization that the pretrained weights were trained with.

  The weights are those of network.pretrained=imagenet; None where nothing asks for it.
  """
  backbone = config.network.options.get("backbone", "")
  if (
    config.network.pretrained != "imagenet"
    or backbone not in imagenet.BACKBONES
    or config.data.channels != 3
  ):
    return None
  return imagenet.normalization_of(backbone)


def build_optimizer(config: Config) -> Optimizer:
  options = config.optimizer
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
    factors=({"^backbone/.*bn/(scale|bias)$": 0.0} if options.freeze_batch_norm else {})
    | {
      "classifier/bias$": options.head_multiplier
      * options.classifier_multiplier
      * options.bias_multiplier,
      "classifier/kernel$": options.head_multiplier * options.classifier_multiplier,
      # PSPNet's pyramid ends its backbone, but starts as fresh as its head.
      "^(?!backbone(?!/psp/))": options.head_multiplier,
    },
  )
  if options.name == "adamw":
    optimizer = optim.adamw(learning_rate, **common)
  else:
    optimizer = optim.sgd(learning_rate, momentum=options.momentum, **common)
  if options.clip_norm:
    optimizer = optim.clip(optimizer, options.clip_norm)
  frozen = models_table.FROZEN[config.network.freeze]
  return optim.freeze(optimizer, frozen) if frozen else optimizer


def build_criterion(config: Config, num_classes: int) -> Callable:
  """Builds (logits, label) -> the supervised loss.

  It is a sum where config.criterion.name is one, "cross_entropy+dice".
  """
  options, names = config.criterion, config.criterion.name.split("+")
  weights = class_weights_of(config, num_classes)
  known = {
    "cross_entropy": functools.partial(
      losses.cross_entropy_mean, denominator=options.denominator, class_weights=weights
    ),
    "ohem": functools.partial(
      losses.ohem_cross_entropy,
      min_confidence=options.min_confidence,
      min_kept=options.min_kept,
      scope=options.scope,
      class_weights=weights,
    ),
    "focal": functools.partial(losses.focal_mean, gamma=options.focal_gamma, class_weights=weights),
    "dice": losses.dice_loss,
  }
  for name in names:
    checks.check_name("config.criterion.name", name, known)
  problems = checks.Problems("the config cannot be run")
  if weights and names == ["dice"]:
    remedy = "--config.criterion.name=cross_entropy+dice, or --config.criterion.class_weights="
    problems.add(
      "config.criterion.class_weights",
      got="weights",
      allowed="none with dice, to which all classes are alike",
      remedy=remedy,
    )
  problems.raise_if_any()
  if len(names) == 1:
    return known[names[0]]
  return lambda logits, label: sum(known[name](logits, label) for name in names)


def check_criterion(config: Config, method: Method) -> None:
  """Raises InputError for a chosen criterion that the method would not use."""
  if method.needs.criterion:
    return
  problems = checks.Problems(f"method '{config.method.name}' has a supervised loss of its own")
  for name in ("name", "class_weights"):
    asked, default = getattr(config.criterion, name), getattr(Criterion(), name)
    if asked not in (default, "ohem"):  # which recipes set for a data set, whatever the method
      problems.add(
        f"config.criterion.{name}",
        got=repr(asked),
        allowed=repr(default),
        remedy=f"--config.criterion.{name}={default}",
      )
  problems.raise_if_any()


def class_weights_of(config: Config, num_classes: int) -> tuple[float, ...]:
  """Returns the weights that config.criterion.class_weights gives.

  The result is () for none, and for those that `weigh_classes` has not computed yet.
  """
  text = config.criterion.class_weights
  if text in ("", *frequencies.WEIGHTS):
    return ()
  problems = checks.Problems("the config cannot be run")
  try:
    weights = tuple(float(part) for part in text.split(","))
  except ValueError:
    weights = ()
  if (
    len(weights) != num_classes
    or not all(math.isfinite(weight) and weight >= 0 for weight in weights)
    or not any(weights)
  ):
    allowed = f"'', {', '.join(map(repr, frequencies.WEIGHTS))}, or {num_classes} numbers of 0 or more, by class: 0.2,1,..."
    problems.add("config.criterion.class_weights", got=repr(text), allowed=allowed)
  problems.raise_if_any()
  return weights


def _unlabeled_weight(config: Config) -> Callable:
  """Returns step -> the factor of config.unlabeled_loss."""
  options = config.unlabeled_loss
  length_steps = options.rampup_fraction * config.total_steps
  return lambda step: (
    options.factor * (schedules.sigmoid_rampup(step, length_steps) if length_steps else 1.0)
  )


def build_method(
  config: Config,
  num_classes: int,
  num_unlabeled: int = 0,
  other_classes: Sequence[int] = (),
) -> Method:
  """Builds the method of a config, for any use.

  The uses are training, evaluation and prediction.

  Args:
    num_unlabeled: only matters to training.
    other_classes: the number of classes of each further domain.
  """
  factory = methods_table.find(config.method.name)
  task = Task(
    num_classes=num_classes,
    total_steps=config.total_steps,
    network=build_network(config, num_classes),
    optimizer=build_optimizer(config),
    criterion=build_criterion(config, num_classes),
    num_unlabeled=num_unlabeled,
    other_classes=tuple(other_classes),
    mean=tuple(config.data.mean),
    std=tuple(config.data.std),
    unlabeled_weight=_unlabeled_weight(config),
  )
  method = factory(task, **config.method.options)
  if not isinstance(method, Method):
    problems = checks.Problems(f"method '{config.method.name}' cannot be used")
    problems.add("its factory", got=f"a {type(method).__name__}", allowed="a contract.Method")
    problems.raise_if_any()
  problems = checks.Problems(f"method '{config.method.name}' cannot be used")
  for name, predict in method.predictors.items():
    if not isinstance(predict, Predictor):
      remedy = "contract.Predictor(function), or nets.predictors(network, ROLE)"
      problems.add(
        f"predictors['{name}']",
        got=f"a {type(predict).__name__}",
        allowed="a contract.Predictor",
        remedy=remedy,
      )
  problems.raise_if_any()
  return method
