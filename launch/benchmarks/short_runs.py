"""What short runs on small photographs make of published settings; all figures are on val, none on
test.

The runs are those of photographs.py (leeds_butterfly, 5 labeled photographs a class, 1000 steps,
one seed). Four things are tried here:

- of `supervised`: by which factors photographs are resized before they are cropped (a crop at twice
  the size shows a wing, not a butterfly), the output stride, what of the encoder is learned, and the
  learning rate. These trials began with everything learned at a rate of 0.01; a setting that names
  neither has that. Other methods were tried in those that looked best;
- of pseudoseg with image-level labels, in what was chosen: what holds it back;
- of three methods together, in what was chosen: config.unlabeled_loss, over which share of the run
  the unlabeled losses rise, and a factor on their published weights, which are of runs fifty times
  as long;
- on msrc, a quarter of it labeled, where cps_cutmix loses: a tenth of its weight; and a learning rate
  that rises in the first steps.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import photographs
from benchmark import Run

from pseudoseg_jax import config as configs

SETTINGS = {
  "": {},
  "scales 0.5-1.5": {"views.scales": (0.5, 1.5)},
  "scales 0.75-1.5": {"views.scales": (0.75, 1.5)},
  "scales 0.5-2": {"views.scales": (0.5, 2.0)},
  "output stride 16": {"network.output_stride": 16},
  "learning rate 0.02": {"optimizer.learning_rate": 0.02},
  "frozen encoder": {"network.freeze": "encoder"},
  "frozen encoder, scales 0.75-1.5": {"network.freeze": "encoder", "views.scales": (0.75, 1.5)},
  "learning rate 0.001": {"optimizer.learning_rate": 0.001},
  "frozen batch norm, learning rate 0.001": {
    "network.freeze": "batch_norm",
    "optimizer.learning_rate": 0.001,
  },
  "frozen batch norm, learning rate 0.0005": {
    "network.freeze": "batch_norm",
    "optimizer.learning_rate": 0.0005,
  },
  "frozen batch norm, learning rate 0.003": {
    "network.freeze": "batch_norm",
    "optimizer.learning_rate": 0.003,
  },
  "frozen batch norm, learning rate 0.001, output stride 16": {
    "network.freeze": "batch_norm",
    "optimizer.learning_rate": 0.001,
    "network.output_stride": 16,
  },
  "frozen batch norm, learning rate 0.001, scales 0.75-1.5": {
    "network.freeze": "batch_norm",
    "optimizer.learning_rate": 0.001,
    "views.scales": (0.75, 1.5),
  },
}
# What else learns in which of these settings.
OTHERS = {
  "scales 0.75-1.5": ["cps_cutmix", "fixmatch"],
  "frozen encoder, scales 0.75-1.5": ["cps_cutmix", "fixmatch"],
  "frozen batch norm, learning rate 0.001": ["cps_cutmix", "fixmatch", "mean_teacher"],
}
# Of pseudoseg with image-level labels, in what was chosen: it sees classes on a grid of the output
# stride, and its classifier learns the labeled photographs by heart.
PSEUDOSEG = {
  "": {},
  "output stride 16": {"network.output_stride": 16},
  "classification weight 0.1": {"method.classification_weight": 0.1},
}
METHODS = ("fixmatch", "cps_cutmix", "mean_teacher")
RULES = [
  {"factor": 1.0, "rampup_fraction": 0.25},
  {"factor": 0.1, "rampup_fraction": 0.25},
  {"factor": 1.0, "rampup_fraction": 0.5},
  {"factor": 1.0, "rampup_fraction": 0.0},
]
# On the second data set.
SECOND = [
  ("supervised", {}),
  ("supervised", {"optimizer.warmup_steps": 100}),
  ("cps_cutmix", {"unlabeled_loss.factor": 0.1}),
]


def runs(root: pathlib.Path, workdir: pathlib.Path, seeds: list[int]) -> Iterator[Run]:
  """Settings of `supervised`, then rule by rule; the first seed alone."""
  first_set, second_set, *_ = photographs.DATA_SETS
  seed = seeds[0]

  def run(
    method: str, variant: str, overrides: Mapping[str, Any], given: str = "", data_set=first_set
  ):
    config = photographs.config_of(root, data_set, method, given, data_set.labels, seed, workdir)
    configs.override(config, overrides)
    return Run(
      data_set.name,
      method,
      ", ".join(filter(None, [given, variant])),
      data_set.labels,
      seed,
      config,
      {},
    )

  for variant, overrides in SETTINGS.items():
    for method in ("supervised", *OTHERS.get(variant, ())):
      first = {
        "network.freeze": "none",
        "optimizer.learning_rate": 0.02 if method in photographs.HALVED else 0.01,
      }
      yield run(method, variant, first | overrides)
  for variant, overrides in PSEUDOSEG.items():
    yield run("pseudoseg", variant, overrides, "image-level labels")
  for rule in RULES:
    for method in METHODS:
      variant = f"factor {rule['factor']:g}, rises over {rule['rampup_fraction']:g} of the run"
      yield run(method, variant, {f"unlabeled_loss.{key}": value for key, value in rule.items()})
  for method, overrides in SECOND:
    variant = ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in overrides.items())
    yield run(method, variant, overrides, data_set=second_set)
