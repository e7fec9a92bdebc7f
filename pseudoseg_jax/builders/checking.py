"""Checks of what cannot be run of a config, before anything is opened."""

from __future__ import annotations

import jax

from pseudoseg_jax import checks
from pseudoseg_jax.builders.evaluation import build_protocol
from pseudoseg_jax.options import Config, as_dict, is_open


def check_run(config: Config, problems: checks.Problems | None = None) -> None:
  """Checks what can be checked of a config before anything is opened.

  What its options may be is checked elsewhere. All problems are reported at once. Open options are
  passed over.

  Args:
    problems: those that are known already, to be reported too.
  """
  problems = problems or checks.Problems("the config cannot be run")
  devices = jax.device_count()
  for stream, size in as_dict(config.batch_size_global).items():
    if not is_open(size) and (size < 1 or size % devices):
      near = max(devices, round(size / devices) * devices)
      problems.add(
        f"config.batch_size_global.{stream}",
        got=size,
        allowed=f"a multiple of the {devices} devices" if devices > 1 else "1 or more",
        remedy=f"e.g. {near}",
      )
  channels = config.data.channels
  for name, other in config.other_data.items():
    if other.channels != channels:
      problems.add(
        f"config.other_data.{name}.channels",
        got=other.channels,
        allowed=f"{channels}, as config.data has",
      )
  for name in ("mean", "std"):
    _check_normalization(
      f"config.data.{name}",
      getattr(config.data, name),
      channels,
      problems,
      least_excluded=name == "std",
    )
  if config.network.pretrained and config.init_from:
    problems.add(
      "config.init_from",
      got="a second start beside config.network.pretrained",
      remedy="keep one of the two",
    )
  if config.network.freeze == "encoder" and not (
    config.network.pretrained or config.init_from or config.nets_from
  ):
    remedy = "--config.network.pretrained=imagenet (or a file), or --config.network.freeze=none"
    problems.add(
      "config.network.freeze",
      got="'encoder' with random weights",
      allowed="an encoder that has learned something",
      remedy=remedy,
    )
  if config.criterion.class_weights and config.other_data:
    remedy = "--config.criterion.class_weights="
    problems.add(
      "config.criterion.class_weights",
      got="weights of one data set",
      allowed="none where several are learned",
      remedy=remedy,
    )
  problems.raise_if_any()
  if not any(
    is_open(getattr(config.evaluation, name))
    for name in ("style", "scales", "window_pixels", "pad_multiple")
  ):
    build_protocol(config)


def _check_normalization(
  where: str, values, channels: int, problems: checks.Problems, *, least_excluded: bool
) -> None:
  """Checks a mean or a standard deviation: one number a channel.

  It is on the scale 0..1 of brightness.
  """
  if len(values) != channels:
    problems.add(
      where,
      got=f"{len(values)} values",
      allowed=f"one for each of the {channels} channels",
      remedy="on the scale 0..1",
    )
    return
  allowed = "above 0, up to 1" if least_excluded else "0..1"
  if not all((0 < value if least_excluded else 0 <= value) and value <= 1 for value in values):
    scaled = ",".join(f"{value / 255:.3f}" for value in values)
    remedy = (
      f"on the scale of levels 0..255? --{where}={scaled}"
      if max(values) > 1 and min(values) > 0
      else None
    )
    problems.add(
      where,
      got=",".join(f"{value:g}" for value in values),
      allowed=f"{allowed}: of brightness, where white is 1",
      remedy=remedy,
    )
