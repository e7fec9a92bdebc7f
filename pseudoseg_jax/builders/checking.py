"""Says what cannot be run of a config, before anything is opened."""

from __future__ import annotations

import jax

from pseudoseg_jax import checks, config as configs
from pseudoseg_jax.builders.evaluation import build_protocol


def check_run(config: configs.ConfigDict) -> None:
  """What can be said of a config's numbers before anything is opened: all of it at once. Open
  options are passed over.
  """
  problems = checks.Problems("the config cannot be run")
  devices = jax.device_count()
  for stream, size in config.batch_size_global.items():
    if not configs.is_open(size) and (size < 1 or size % devices):
      near = max(devices, round(size / devices) * devices)
      problems.add(
        f"config.batch_size_global.{stream}",
        got=size,
        allowed=f"a multiple of the {devices} devices" if devices > 1 else "1 or more",
        remedy=f"e.g. {near}",
      )
  problems.extend(configs.problems_of(config))
  channels = config.data.get("channels", 3)
  for name, other in config.get("other_data", {}).items():
    if other.get("channels", 3) != channels:
      problems.add(
        f"config.other_data.{name}.channels",
        got=other.get("channels", 3),
        allowed=f"{channels}, as config.data has",
      )
  for name in ("mean", "std"):
    _check_normalization(
      f"config.data.{name}", config.data[name], channels, problems, least_excluded=name == "std"
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
      allowed="an encoder that has learnt something",
      remedy=remedy,
    )
  if config.criterion.class_weights and config.get("other_data"):
    remedy = "--config.criterion.class_weights="
    problems.add(
      "config.criterion.class_weights",
      got="weights of one data set",
      allowed="none where several are learnt",
      remedy=remedy,
    )
  problems.raise_if_any()
  if not any(
    configs.is_open(config.evaluation[name])
    for name in ("style", "scales", "window_pixels", "pad_multiple")
  ):
    build_protocol(config)


def _check_normalization(
  where: str, values, channels: int, problems: checks.Problems, *, least_excluded: bool
) -> None:
  """A mean or a standard deviation: one number a channel, on the scale 0..1 of brightness."""
  if len(values) != channels:
    problems.add(
      where,
      got=f"{len(values)} values",
      allowed=f"one for each of the {channels} channels",
      remedy="on the scale 0..1",
    )
    return
  allowed = "above 0, up to 1" if least_excluded else "0..1"
  if not all(isinstance(value, (int, float)) for value in values):
    problems.add(where, got=f"{tuple(values)}", allowed=f"{channels} numbers, {allowed}")
  elif not all((0 < value if least_excluded else 0 <= value) and value <= 1 for value in values):
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
