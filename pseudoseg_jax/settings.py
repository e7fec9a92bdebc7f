"""Settings that follow from the data and the machine.

They follow from facts of these, where a config leaves them open. An option is open at -1, () or
"auto"; `make_config` and configs/folder.py leave those of `choose` open, and whatever a user sets
is kept. What is chosen is reported at the start and stands in the workdir's config.json as any
other option; a resumed run takes it from there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pseudoseg_jax.build import Data
from pseudoseg_jax.options import Config, Run, as_flag, is_open, of_group, replaced

# Those that may be open.
OPTIONS = tuple(key for key, option in of_group(Run).items() if option.allowed.may_be_open)
_SAMPLED = 200  # images whose size is looked up


class Facts(NamedTuple):
  """The facts that settings are chosen from.

  num_labeled, num_unlabeled: images. sizes: (height, width) of some of them, in pixels.
  accelerator: whether a GPU or TPU is at hand. num_devices: of all processes. memory_gib: of one
    device; 0 where it does not say.
  """

  num_labeled: int
  num_unlabeled: int
  sizes: Sequence[tuple[int, int]]
  accelerator: bool
  num_devices: int
  memory_gib: float


class Choice(NamedTuple):
  """The value of an option, and why."""

  option: str
  value: Any
  reason: str


def choose(facts: Facts, *, crop: int = 0, steps: int = 0) -> list[Choice]:
  """Chooses all settings that follow from the facts.

  They follow also from the crop and the number of steps where these are settled.
  """
  height, width = (int(side) for side in np.median(np.array(facts.sizes), axis=0))
  short, long = min(height, width), max(height, width)
  choices = []

  def add(option: str, value: Any, reason: str) -> None:
    choices.append(Choice(option, value, reason))

  # --- how large the network sees a photograph
  most = 320 if facts.accelerator else 112
  crop = crop or max(16, min(most, short) // 16 * 16)
  device = "GPU or TPU" if facts.accelerator else "CPU"
  why = (
    f"a {device} learns from {most} pixels in fair time"
    if most <= short
    else f"most photographs are {short} pixels high or wide"
  )
  add("views.crop_size", (crop, crop), why)
  least = min(1.0, crop / long)
  scales = (_rounded(least), _rounded(min(1.0, 2 * least)))
  add(
    "views.scales",
    scales,
    f"crops that hold from half of a photograph ({width}x{height}) to all of it: objects are met whole",
  )
  scale = scales[1]
  add(
    "evaluation.scales",
    (scale,),
    "the size at which the network learned to see them" if scale < 1 else "as they are",
  )
  # Whole images, padded to few sizes; large ones in windows, for the memory of their scores.
  if scale * long <= 640:
    add("evaluation.style", "whole", "photographs at that size fit a device whole")
    add(
      "evaluation.pad_multiple",
      32,
      "sizes are rounded up to multiples of 32, so that few have to be compiled for",
    )
  else:
    add("evaluation.style", "slide", "photographs are too large to be seen whole")
    add("evaluation.window_pixels", (crop, crop), "windows of the training crop")

  # --- how many at a time
  small = 0 < facts.memory_gib < 12
  per_device = (4 if small else 8) if facts.accelerator else math.ceil(4 / facts.num_devices)
  batch = per_device * facts.num_devices
  add(
    "batch_size_global.labeled",
    batch,
    f"{per_device} on each device, of a {device}" + f" with {facts.memory_gib:.0f} GiB" * small,
  )
  add(
    "batch_size_global.unlabeled", batch, "as many as labeled ones, as in nearly all published runs"
  )

  # --- how long
  # Whatever the method, so that runs of two methods can be compared.
  images = facts.num_labeled + facts.num_unlabeled
  fewest, most = (2000, 20_000) if facts.accelerator else (1000, 2000)
  passes = 40
  steps = steps or int(np.clip(passes * images / batch, fewest, most)) // 100 * 100
  why = f"{passes * images / batch:.0f} would be {passes} passes over {images} images; {fewest} to {most} on a {device}"
  add("total_steps", steps, why)
  add("eval_every_steps", max(steps // 4, 1), "four evaluations")
  add(
    "checkpoint_every_steps", max(steps // 10, 1), "at most a tenth of the run is lost by a crash"
  )
  return choices


def _rounded(scale: float) -> float:
  return float(f"{scale:.2g}")


def open_options(config: Config) -> list[str]:
  """Lists the open options, by dotted key.

  For these `choose` has a value and the config has none.
  """
  return [option for option in OPTIONS if is_open(_value(config, option))]


def _value(config: Config, option: str) -> Any:
  return functools.reduce(getattr, option.split("."), config)


def facts_of(data: Data) -> Facts:
  """Collects facts from the sizes of images and from the devices.

  Images are not decoded.
  """
  rows = np.unique(
    np.linspace(0, len(data.labeled) - 1, min(_SAMPLED, len(data.labeled))).astype(int)
  )
  device = jax.devices()[0]
  memory = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else 0
  return Facts(
    num_labeled=len(data.labeled),
    num_unlabeled=len(data.unlabeled),
    sizes=[data.labeled.size(int(row)) for row in rows],
    accelerator=device.platform != "cpu",
    num_devices=jax.device_count(),
    memory_gib=memory / 2**30,
  )


def settle_from(config: Config, data: Data) -> tuple[Config, list[Choice]]:
  """Chooses the open options of a config from the data of its first domain.

  Returns the config with these options, and those that were chosen.
  """
  return settle(config, facts_of(data)) if open_options(config) else (config, [])


def settle(config: Config, facts: Facts) -> tuple[Config, list[Choice]]:
  """Chooses the open options of a config from the facts.

  Returns the config with these options, and those that were chosen.
  """
  wanted, crop = open_options(config), max(config.views.crop_size, default=0)
  chosen = [
    choice
    for choice in choose(facts, crop=crop, steps=max(config.total_steps, 0))
    if choice.option in wanted
  ]
  config = replaced(config, {choice.option: choice.value for choice in chosen})
  # Of the style that was not chosen, but may have been set.
  left = {
    "evaluation.window_pixels": config.views.crop_size,
    "evaluation.pad_multiple": 32 if config.evaluation.style == "whole" else 1,
  }
  return replaced(config, {option: left[option] for option in open_options(config)}), chosen


def settle_as(config: Config, other: Config) -> Config:
  """Returns the config with its open options as another one has them."""
  return replaced(config, {option: _value(other, option) for option in open_options(config)})


def in_words(chosen: Sequence[Choice]) -> str:
  """Formats a table of choices with their reasons."""
  rows = [(f"--config.{choice.option}={as_flag(choice.value)}", choice.reason) for choice in chosen]
  width = max((len(flag) for flag, _ in rows), default=0)
  return "\n".join(
    [
      "chosen from the data; what you set yourself wins:",
      *(f"  {flag.ljust(width)}  {reason}" for flag, reason in rows),
    ]
  )
