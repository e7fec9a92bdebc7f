"""Methods on small sets of photographs with few pixel labels, from an encoder that was pretrained
on ImageNet.

Protocol. One encoder (EfficientNet-Lite0, its batch norms as they were pretrained), one head
(DeepLabv3+ of 96 channels), one crop, batch and number of steps for all, SGD at 0.001 (the head
0.01), and at twice that for fixmatch and unimatch, which halve the sum of their losses. Unlabeled
losses have their published weights, and rise to them over the first quarter of the run. Nothing is
chosen on `test`; every figure is mIoU on `test` after the LAST step, over the seeds with mean and
standard deviation. The labeled photographs are the same for all methods and seeds. The step with
the best `val` is scored on `test` apart. Minutes are of one core each, on machines that had other
work, and say little.

Image-level labels and boxes, where a method is given them, are those of the unlabeled photographs,
read off their masks; but ccp_clothing's unlabeled photographs have no masks, and tags that people
gave. Methods of several stages have as many steps in each: learn_pseudo's is that of a network
which learns from masks and from the labels of its first stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np
from benchmark import Run, alone

from pseudoseg_jax import config as configs
from pseudoseg_jax.data import listing

CROP, BATCH, STEPS = 112, 4, 1000
# Crops that hold half of a photograph at least; what else was tried for `supervised`, on val, is in
# short_runs.py.
SCALES = (0.5, 1.0)
# Four photographs are too few for batch norms to have statistics of their own, and frozen ones want
# a small rate; see short_runs.py.
NETWORK = {
  "backbone": "efficientnet_lite0",
  "pretrained": "imagenet",
  "output_stride": 32,
  "freeze": "batch_norm",
}
LEARNING_RATE = 0.001
# One rule for all methods: what is learned without labels waits for a network that knows something.
# Set by hand, not on val: the trials of short_runs.py are not made yet.
RULE = {"factor": 1.0, "rampup_fraction": 0.25}
# These halve the sum of both losses: at twice the rate a labeled photograph moves the network as
# far as in any other method.
HALVED = ("fixmatch", "unimatch")
ELSEWHERE = [
  "supervised",
  "mean_teacher",
  "cps_cutmix",
  "unimatch",
  "fixmatch",
  "classmix",
  "pseudoseg",
  "ael",
]
# Methods and numbers of labels of the curve, on the first data set.
CURVE, CURVE_LABELS = (
  ("supervised", "fixmatch", "cps_cutmix"),
  ("1 a class", "2 a class", "10 a class"),
)
# Options that follow from the crop, the data or the run's length, not from scores.
_OPTIONS = {
  "gct": {"detector_stages": 3, "detector_width": 32},
  "ael": {"bank_momentum": 0.99},
  "temporal_ensembling": {"grid": (32, 32)},
}


class DataSet:
  """name: of a folder in the layout images/SPLIT/NAME.jpg, labels/SPLIT/NAME.png. labels: what
  share is labeled, "5 a class" or "1_8". tags: image-level labels of the unlabeled photographs.
  """

  def __init__(
    self,
    name: str,
    labels: str,
    *,
    tags: str = "tags.csv",
    background: bool = True,
    boxes: bool = True,
    **data,
  ):
    self.name, self.labels, self.tags = name, labels, tags
    self.background, self.boxes, self.data = background, boxes, data


DATA_SETS = [
  DataSet("leeds_butterfly", "5 a class"),
  DataSet("msrc", "1_4"),
  # Its unlabeled photographs are those that have no masks but tags that people gave.
  DataSet(
    "ccp_clothing",
    "1_8",
    tags="tags_unlabeled.csv",
    boxes=False,
    unlabeled_folder="images/unlabeled",
  ),
  DataSet("camvid", "1_8", background=False, label_map="11:255"),
]


def labeled_list(root: pathlib.Path, data_set: str, labels: str, workdir: pathlib.Path) -> str:
  """The value of config.data.split: "1_8" as it is, or a list of the first photographs of each
  class in an order drawn once.

  Ids of leeds_butterfly begin with the three digits of their species. The file's name holds a
  digest of what is in it.
  """
  if not labels.endswith(" a class"):
    return labels
  count = int(labels.removesuffix(" a class"))
  ids = listing.fitting(root / data_set, "images/train/{id}.jpg").ids
  rng, chosen = np.random.default_rng(0), []
  for kind in sorted({name[:3] for name in ids}):
    of_kind = sorted(name for name in ids if name.startswith(kind))
    chosen += sorted(rng.permutation(of_kind)[:count].tolist())
  text = "".join(f"{name}\n" for name in chosen)
  path = (
    workdir
    / "lists"
    / f"{data_set}_{len(chosen)}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return str(path)


def config_of(
  root: pathlib.Path,
  data_set: DataSet,
  method: str,
  variant: str,
  labels: str,
  seed: int,
  workdir: pathlib.Path,
):
  """The config of one run, evaluated on val."""
  options = dict(_OPTIONS.get(method, {}))
  if variant == "image-level labels" and "image_labels" in configs.method(method):
    options["image_labels"] = True
  if not data_set.background and "background" in configs.method(method):
    options["background"] = False
  data = {
    "root": str(root / data_set.name),
    "classes": "camvid" if data_set.name == "camvid" else "classes.txt",
    "image_pattern": "images/train/{id}.jpg",
    "label_pattern": "labels/train/{id}.png",
    "split": labeled_list(root, data_set.name, labels, workdir),
    "eval_image_pattern": "images/val/{id}.jpg",
    "eval_label_pattern": "labels/val/{id}.png",
    "image_labels": data_set.tags if variant == "image-level labels" else "",
    "boxes": "boxes/train" if variant == "boxes" else "",
    "eval_boxes": "boxes/val" if variant == "boxes" else "",
  }
  config = configs.make_config(
    method, crop=CROP, steps=STEPS, data=configs.folder_data(**data | data_set.data)
  )
  config.method.update(options)
  config.network = configs.network("deeplabv3plus_unimatch", **NETWORK)
  config.seed = seed
  config.batch_size_global = {"labeled": BATCH, "unlabeled": BATCH}
  config.optimizer.update(
    {
      "learning_rate": LEARNING_RATE * (2 if method in HALVED else 1),
      "head_multiplier": 10.0,
      "power": 0.9,
      "momentum": 0.9,
      "weight_decay": 1e-4,
      "decay_scope": "all",
    }
  )
  config.unlabeled_loss.update(RULE)
  config.views.update({"scales": SCALES, "continuous": True})
  config.evaluation.update(
    {
      "style": "whole",
      "pad_multiple": 32,
      "scales": (1.0,),
      "window_pixels": (CROP, CROP),
      "batch_size": 8,
      "pictures": 0,
    }
  )
  config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = (
    50,
    STEPS // 2,
    STEPS // 4,
  )
  return config


def staged(make, *, boxes: bool) -> Iterator[Run]:
  """The methods of several stages; make: (method, variant) -> Run of one stage. boxes: whether the
  data set has some.
  """
  if boxes:
    ancillary, primary = make("ancillary", "boxes"), make("self_correcting", "boxes")
    primary.config.nets_from = "ancillary={ancillary}"
    yield dataclasses.replace(primary, before={"ancillary": ancillary.config})
  hybrid, retrained = make("learn_pseudo", "image-level labels"), make("supervised", "")
  retrained.config.pseudo_labels.folder = "{hybrid_labels}"
  # as many photographs a step as the others, all of which have labels now.
  retrained.config.batch_size_global.labeled = 2 * BATCH
  yield dataclasses.replace(
    retrained, method="learn_pseudo", variant="image-level labels", before={"hybrid": hybrid.config}
  )


TEST = {
  "data.eval_image_pattern": "images/test/{id}.jpg",
  "data.eval_label_pattern": "labels/test/{id}.png",
}


def runs(root: pathlib.Path, workdir: pathlib.Path, seeds: list[int]) -> Iterator[Run]:
  """All runs, in the order in which they are of use: seed by seed, the first set first."""

  def run(data_set, method, seed, variant="", labels=""):
    labels = labels or data_set.labels
    config = config_of(root, data_set, method, variant, labels, seed, workdir)
    test = TEST | ({"data.eval_boxes": "boxes/test"} if variant == "boxes" else {})
    return Run(data_set.name, method, variant, labels, seed, config, test)

  for seed in seeds:
    for data_set in DATA_SETS:
      first = data_set is DATA_SETS[0]
      for method in alone() if first else ELSEWHERE:
        yield run(data_set, method, seed)
      if data_set.background:
        for method in ("pseudoseg", "cct") if first else ("pseudoseg",):
          yield run(data_set, method, seed, "image-level labels")
        yield from staged(
          lambda method, variant, seed=seed, data_set=data_set: run(
            data_set, method, seed, variant
          ),
          boxes=data_set.boxes,
        )
      yield run(data_set, "supervised", seed, labels="full")
    for labels in CURVE_LABELS:
      for method in CURVE:
        yield run(DATA_SETS[0], method, seed, labels=labels)
