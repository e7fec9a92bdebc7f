"""Every option of a run in one tree.

Each option stands with its default, what it is, and which values it may have. This is their one
home: `base` in config.py makes the ConfigDict that users change of it, `frozen` there checks what
became of it and makes it a `Config`, which is what everything else reads; `explain` prints it.
Options of methods and networks have theirs in the signature and the docstring of the factory. Batch
sizes are global, durations are in optimizer steps.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import re
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pseudoseg_jax import checks


class Allowed(NamedTuple):
  """The values that an option, or each element of a tuple, may have.

  A field is None, or (), where nothing is stated.

  one_of: words or numbers. least, most: bounds of a number, included. above, below: likewise,
  excluded.
  whole: no fractions. length: of a tuple, 0 for any. ordered: no element of a tuple is smaller than
  the one before it.
  may_be_open: also a value that leaves it to what `settings.choose` knows, see `is_open`.
  """

  one_of: tuple[Any, ...] = ()
  least: float | None = None
  above: float | None = None
  most: float | None = None
  below: float | None = None
  whole: bool = False
  length: int = 0
  ordered: bool = False
  may_be_open: bool = False

  def holds(self, value: Any) -> bool:
    if self.may_be_open and is_open(value):
      return True
    if isinstance(value, (tuple, list)):
      if not all(map(self.holds, value)) or (self.length and len(value) != self.length):
        return False
      return not self.ordered or list(value) == sorted(value)
    if self.one_of:
      return value in self.one_of
    if self.whole and not isinstance(value, numbers.Integral):
      return False
    return not (
      (self.least is not None and not value >= self.least)
      or (self.above is not None and not value > self.above)
      or (self.most is not None and not value <= self.most)
      or (self.below is not None and not value < self.below)
    )

  def in_words(self) -> str:
    """Expresses the values in words, such as "0..1".

    It is "" where any will do.
    """
    if self.one_of:
      return checks.choices(map(str, self.one_of))
    if self.length or self.ordered or self.whole:
      number = self._replace(length=0, ordered=False, whole=False).in_words()
      count = f"{self.length} " if self.length else ""
      kind = f"{count}{'whole ' * self.whole}number{'s' * (self.length != 1)}"
      return ", ".join(filter(None, [kind, number, "the smaller first" * self.ordered]))
    if self.least is not None and self.most is not None:
      return f"{self.least:g}..{self.most:g}"
    bounds = {"least": "{:g} or more", "above": "above {:g}", "most": "up to {:g}"}
    bounds |= {"below": "below {:g}"}
    values = ((words, getattr(self, name)) for name, words in bounds.items())
    return ", ".join(words.format(value) for words, value in values if value is not None)


# Kinds of numbers, for the signatures of factories.
Share = Annotated[float, Allowed(least=0, most=1)]
Positive = Annotated[float, Allowed(above=0)]
NotNegative = Annotated[float, Allowed(least=0)]
Count = Annotated[int, Allowed(least=1, whole=True)]
ShareRange = Annotated[tuple[float, float], Allowed(least=0, most=1, length=2, ordered=True)]
GridSize = Annotated[tuple[int, int], Allowed(least=1, length=2, whole=True)]  # rows, columns


def is_open(value: Any) -> bool:
  """Tells whether an option's value leaves it to `settings`.

  Such values are -1, () and "auto".
  """
  return value in (-1, (), "auto")


def option(default: Any, about: str, **allowed: Any) -> Any:
  """Declares a field of a group.

  It has a default, a sentence or more about it, and the keywords of `Allowed`.
  """
  metadata = {"about": about, "allowed": Allowed(**allowed)}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def group(kind: type) -> Any:
  """Declares a field that is a group of its own."""
  return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True)
class BatchSizes:
  labeled: int = option(8, "Labeled images of a step, over all devices.", may_be_open=True)
  unlabeled: int = option(8, "Unlabeled images of a step, over all devices.", may_be_open=True)


@dataclasses.dataclass(frozen=True)
class PseudoLabels:
  folder: str = option(
    "",
    "Labels that a network made (export_labels), learned from as if they were true ones; the folder "
    "that export_labels wrote, '' = none.",
  )
  list: str = option("", "A list file of those images that count; '' = all of the folder's.")
  repeat_labeled: bool = option(
    False, "The labeled images as often as it takes to be half of those learned from."
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  name: str = option("sgd", "The update rule.", one_of=("sgd", "adamw"))
  learning_rate: float = option(
    0.01, "Learning rate at the start, of what no multiplier is about.", above=0
  )
  power: float = option(0.9, "Of the polynomial decay to 0 at total_steps; 0 = no decay.", least=0)
  warmup_steps: int = option(0, "Steps over which the rate rises to its start.", least=0)
  shift_steps: int = option(
    0, "-1: the rate lags one step, as in loops that set it after the step (UniMatch)."
  )
  momentum: float = option(0.9, "sgd only.", least=0, most=1)
  weight_decay: float = option(1e-4, "Of what decay_scope says.", least=0)
  clip_norm: float = option(
    0.0,
    "Gradients of a network are scaled to this norm where theirs is larger; 0 = no clipping.",
    least=0,
  )
  decay_scope: str = option(
    "kernels", "What decays; 'all': batch norm and biases too.", one_of=("kernels", "all")
  )
  head_multiplier: float = option(
    1.0, "Learning rate of everything but the backbone, relative to it.", least=0
  )
  classifier_multiplier: float = option(
    1.0,
    "Learning rate of the classifiers, relative to the rest of their heads (Learning Pseudo "
    "Labels: 10).",
    least=0,
  )
  bias_multiplier: float = option(
    1.0,
    "Learning rate of the classifiers' biases, relative to the rest (TensorFlow DeepLab: 2).",
    least=0,
  )
  freeze_batch_norm: bool = option(
    False,
    "Scales and offsets of the backbone's batch norms stay as pretrained, while its statistics "
    "move (ClassMix, CutMix-Seg; with network.freeze=batch_norm both stay).",
  )


@dataclasses.dataclass(frozen=True)
class UnlabeledLoss:
  factor: float = option(
    1.0,
    "On the weight of whatever a method learns without pixel labels, on top of its own weight and "
    "ramp.",
    above=0,
  )
  rampup_fraction: float = option(
    0.0,
    "Part of the run over which that rises as exp(-5 (1 - t)^2), from 0.0067. Published weights "
    "are of runs of tens of thousands of steps: in a short one there is nothing to learn from a "
    "network that knows nothing yet.",
    least=0,
    most=1,
  )


@dataclasses.dataclass(frozen=True)
class Criterion:
  name: str = option(
    "cross_entropy",
    "The supervised loss: 'cross_entropy', 'ohem', 'focal', 'dice'; or a sum of them, "
    "'cross_entropy+dice'.",
  )
  class_weights: str = option(
    "",
    "Of cross_entropy, ohem and focal: 'inverse' or 'effective' of how often classes are in the "
    "labeled masks, or numbers, one for each class in their order, '0.2,1,3'.",
  )
  focal_gamma: float = option(
    2.0, "Exponent of focal; 0 is cross entropy, 2 in the paper.", least=0
  )
  denominator: str = option(
    "valid", "cross_entropy: the pixels that the mean is of.", one_of=("valid", "all")
  )
  min_confidence: float = option(
    0.7, "ohem: pixels whose class has a higher probability are left out.", least=0, most=1
  )
  min_kept: int = option(
    100_000, "ohem: pixels that are kept at least, per image or batch as scope says.", least=0
  )
  scope: str = option("image", "ohem: what min_kept is of.", one_of=("image", "batch"))


_KIND = "What kind of data: 'folder', 'synthetic', 'tfds'."


@dataclasses.dataclass(frozen=True)
class AnyData:
  """The options that data of every kind have."""

  name: str = option("folder", _KIND)
  mean: tuple[float, ...] = option(
    (0.485, 0.456, 0.406), "Of each channel, where white is 1: what images are normalized with."
  )
  std: tuple[float, ...] = option((0.229, 0.224, 0.225), "Likewise the standard deviation.")

  # What data are like that have no such option. Without a type these are no options.
  channels, max_value = 3, 0.0
  background, exif_orientation = "auto", "apply"
  root = classes = image_pattern = label_pattern = unlabeled_folder = ""
  image_labels = boxes = eval_boxes = ""


@dataclasses.dataclass(frozen=True)
class StoredData(AnyData):
  """The options of images and masks that are stored, in folders or in TFDS."""

  name: str = option("", _KIND)
  root: str = option("", "The folder that patterns and lists are relative to.")
  classes: str = option(
    "",
    "A file below root of class names, one a line, or `index name r g b`; or 'voc', 'cityscapes', "
    "...",
  )
  split: str = option(
    "full",
    "The labeled part: '1_8' (a random eighth), 'every_8', 'full', a list file, or a published "
    "'voc2012/cps/1_8'.",
  )
  split_seed: int = option(0, "Of '1_8' and the like.")
  label_map: str = option(
    "",
    'Stored mask value:class, "11:255,12:3", or "cityscapes" (of its labelIds); {"11": 255} in a '
    "config file.",
  )
  background: str = option(
    "auto",
    "Whether class 0 is what is left beside things; 'auto': its name says so.",
    one_of=("auto", "yes", "no"),
  )
  image_labels: str = option(
    "", "Image-level labels of the unlabeled images: a CSV or JSON file, or a folder of VOC XML."
  )
  boxes: str = option(
    "", "Boxes of labeled and unlabeled images: a folder of VOC XML, or a COCO JSON file."
  )
  eval_boxes: str = option("", "Likewise of the evaluated images; '' = made from their masks.")


@dataclasses.dataclass(frozen=True)
class FolderData(StoredData):
  """Images and masks in folders.

  Patterns hold {id} and are relative to root, as are paths in lists.
  """

  name: str = option("folder", _KIND)
  image_pattern: str = option(
    "", "Where the training images lie, 'images/{id}.jpg'; '' = the lists give the paths."
  )
  label_pattern: str = option("", "Where their masks lie, 'masks/{id}.png'.")
  channels: int = option(
    3, "Of images: 3 = RGB, made of any file; another number = files that have as many.", least=1
  )
  ignore_index: int = option(255, "Stored mask value of pixels without a label.")
  reduce_zero_label: bool = option(False, "Stored 0 is no label, stored k is class k - 1 (ADE20K).")
  exif_orientation: str = option(
    "apply",
    "Pictures as viewers and labeling tools show them; 'ignore': as the pixels are stored.",
    one_of=("apply", "ignore"),
  )
  max_value: float = option(
    0.0,
    "Stored value of full brightness; 0 = 255 of 8 bits, 65535 of 16 bits, 255 of floats.",
    least=0,
  )
  skip_unreadable: bool = option(
    False, "Damaged training files are told and left out, instead of ending the run."
  )
  mask_colors: bool = option(False, "Masks are drawn in the colors of the classes.")
  train_list: str = option(
    "",
    "What to train on: ids, or paths of images, or of images and masks, one a line; '' = every "
    "file that fits image_pattern and is not evaluated.",
  )
  unlabeled_list: str = option(
    "", "The unlabeled images: a list file; '' = what the labeled part leaves over."
  )
  unlabeled_folder: str = option("", "A bare folder of images instead.")
  eval_image_pattern: str = option("", "Where the evaluated images lie; '' = image_pattern.")
  eval_label_pattern: str = option("", "Where their masks lie; '' = label_pattern.")
  eval_list: str = option("", "What to evaluate; '' = every file that fits eval_image_pattern.")


def as_of(kind: type, name: str) -> Any:
  """Declares a field as another kind of data has it."""
  (field,) = (field for field in dataclasses.fields(kind) if field.name == name)
  return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class GivenData(AnyData):
  """Images that were given from Python.

  The options are what is known of them beside the images.
  """

  name: str = option("given", _KIND)
  channels: int = as_of(FolderData, "channels")
  exif_orientation: str = as_of(FolderData, "exif_orientation")
  max_value: float = as_of(FolderData, "max_value")
  image_labels: str = as_of(FolderData, "image_labels")
  boxes: str = as_of(FolderData, "boxes")
  eval_boxes: str = as_of(FolderData, "eval_boxes")


@dataclasses.dataclass(frozen=True)
class TfdsData(StoredData):
  """Images and masks in a TensorFlow Datasets data set."""

  name: str = option("tfds", _KIND)
  dataset: str = option(
    "",
    "A name of the TFDS catalogue; or the folder of a dataset_info.json, also below root: "
    "'voc2012/1.0.0'.",
  )
  root: str = option("", "Where TFDS keeps data sets, may be gs://...; '' = where it always does.")
  image_key: str = option("image", "Of an example's image.")
  label_key: str = option("label", "Of its mask.")
  id_key: str = option("id", "Of its id.")
  class_key: str = option(
    "", "Of a class of whole images: the label 1 then becomes 1 + that class."
  )
  train_split: str = option("train", "What to train on.")
  unlabeled_split: str = option("", "'' = what the labeled part leaves over of train_split.")
  eval_split: str = option("val", "What to evaluate.")


@dataclasses.dataclass(frozen=True)
class SyntheticData(AnyData):
  """Drawn scenes of which everything is known.

  They serve to see the whole way without data.
  """

  name: str = option("synthetic", _KIND)
  num_scenes: int = option(800, "To train on.", least=2)
  num_labeled: int = option(64, "The first so many of them have masks.", least=1)
  num_eval_scenes: int = option(200, "Other scenes, to evaluate.", least=1)
  size: tuple[int, ...] = option((64, 64), "Height and width in pixels.")
  scenes_seed: int = option(
    0, "Of the scenes themselves, apart from the run's seed: every run sees the same data."
  )


@dataclasses.dataclass(frozen=True)
class Views:
  crop_size: tuple[int, ...] = option(
    (64, 64), "Height and width of training views in pixels.", may_be_open=True
  )
  scales: tuple[float, ...] = option(
    (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
    "Factors on an image's size, of which one is drawn.",
    may_be_open=True,
  )
  continuous: bool = option(
    False,
    "Any factor between the least and the greatest of scales, as always with 'pillow', 'cct' and "
    "'ael'.",
  )
  flip: bool = option(True, "Views are mirrored with probability 1/2.")
  convention: str = option(
    "opencv",
    "Of resizing, padding and color jitter: 'opencv' (CPS), 'tensorflow' (PseudoSeg), 'pillow' "
    "(UniMatch), 'cct', 'ael', 'cutmix_seg', 'lpl'.",
    one_of=("opencv", "tensorflow", "pillow", "cct", "ael", "cutmix_seg", "lpl"),
  )
  jitter_probability: float = option(
    0.8, "Strong views: of the four color changes together.", least=0, most=1
  )
  brightness: float = option(
    0.5,
    "Strong views: factors are uniform in 1 -+ this; with 'tensorflow' a summand in -+ this.",
    least=0,
    most=1,
  )
  contrast: float = option(0.5, "Strong views: factors in 1 -+ this.", least=0, most=1)
  saturation: float = option(0.5, "Strong views: factors in 1 -+ this.", least=0, most=1)
  hue: float = option(
    0.25, "Strong views: shifts in -+ this, a fraction of the color circle.", least=0, most=0.5
  )
  grayscale_probability: float = option(
    0.2, "Strong views: of losing their colors.", least=0, most=1
  )
  blur_probability: float = option(0.5, "Strong views: of being blurred.", least=0, most=1)
  blur_sigma_pixels: tuple[float, ...] = option(
    (0.1, 2.0), "The Gaussian's standard deviation is uniform between these two."
  )
  labeled_photometry: bool = option(
    False, "Labeled images too get a strong view's colors; else they have the geometry alone."
  )
  labeled_operations: int = option(
    0,
    "Color or geometric operations on each labeled image, drawn as Learning Pseudo Labels does; 2 "
    "there.",
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class Evaluation:
  preset: str = option(
    "",
    "'cps_voc', 'unimatch_cityscapes', ...: a published protocol, in place of the options of this "
    "group but image_labels, batch_size and pictures.",
  )
  style: str = option(
    "whole",
    "How the network sees an image: 'whole', 'pad_to_crop', 'center_crop' or 'slide' (windows "
    "that overlap); 'auto' chooses.",
    one_of=("whole", "pad_to_crop", "center_crop", "slide", "auto"),
    may_be_open=True,
  )
  window_pixels: tuple[int, ...] = option(
    (512, 512), "Height and width of the window that slides, or of the crop.", may_be_open=True
  )
  stride_fraction: float = option(
    2 / 3, "slide: of the window; larger ones leave gaps.", above=0, most=1
  )
  stride_rounding: str = option(
    "up", "slide: to whole pixels, 'up' (CPS) or 'down' (UniMatch).", one_of=("up", "down")
  )
  edges: str = option(
    "shift",
    "slide: the last window is shifted back inside, or 'cut' off at the border.",
    one_of=("shift", "cut"),
  )
  summed: str = option(
    "logits", "What is summed of windows, scales and flips.", one_of=("logits", "probabilities")
  )
  scales: tuple[float, ...] = option(
    (1.0,), "Factors that an image is resized by.", may_be_open=True
  )
  flip: bool = option(False, "The scores of the mirrored image are added.")
  multiple_pixels: int = option(
    1, "whole: images are resized to multiples of this, for networks of patches.", least=1
  )
  pad_multiple: int = option(
    1,
    "whole: images are padded to a multiple of this, so that few sizes compile; 1 leaves them as "
    "they are.",
    least=1,
    may_be_open=True,
  )
  image_labels: bool = option(
    False, "Each predictor is scored among the classes that are in the image too."
  )
  absent_classes: str = option(
    "skip",
    "What classes in neither truth nor prediction do to the mIoU; 'zero': count as 0.",
    one_of=("skip", "zero"),
  )
  batch_size: int = option(8, "Images that are predicted at once.", least=1)
  pictures: int = option(6, "Images shown in pictures/.", least=0)


@dataclasses.dataclass(frozen=True)
class Run:
  """All options of a run but those of its method, its network and its data."""

  seed: int = option(0, "Of everything that is drawn.")
  total_steps: int = option(1000, "Optimizer steps of the run.", least=1, may_be_open=True)
  batch_size_global: BatchSizes = group(BatchSizes)
  log_every_steps: int = option(50, "Steps between lines of the log.", least=1)
  eval_every_steps: int = option(500, "Steps between evaluations.", least=1, may_be_open=True)
  early_stopping_patience: int = option(
    0,
    "Evaluations in a row without a better one, after which the run ends; 0 = never. What it ends "
    "with was chosen by the evaluated images and flatters on them: a comparison of methods runs "
    "to the end.",
    least=0,
  )
  checkpoint_every_steps: int = option(500, "Steps between checkpoints.", least=1, may_be_open=True)
  keep_last_checkpoints: int = option(2, "So many are kept, and the best one.", least=1)
  init_from: str = option("", "An exported folder or a workdir, whose network to start from.")
  nets_from: str = option(
    "",
    "Networks of earlier runs' last states, by role: 'ancillary=WORKDIR,primary=WORKDIR'.",
  )
  pseudo_labels: PseudoLabels = group(PseudoLabels)
  labeled_every: int = option(1, "2: only every second of the labeled images, and so on.", least=1)
  oversampling_threshold: float = option(
    0.0,
    "Labeled images with a class that a smaller share of them holds are met more often, by LVIS's "
    "repeat factors; 0 = all alike.",
    least=0,
    most=1,
  )
  optimizer: Optimizer = group(Optimizer)
  unlabeled_loss: UnlabeledLoss = group(UnlabeledLoss)
  criterion: Criterion = group(Criterion)
  data: AnyData = group(AnyData)
  other_data: dict[str, Any] = option(
    {},
    "Further domains by name, each with the options of a data config but mean and std, which are "
    "those of data: for methods that learn several domains at once. They are numbered 1, 2, ... "
    "in the order of their names.",
  )
  views: Views = group(Views)
  evaluation: Evaluation = group(Evaluation)


@dataclasses.dataclass(frozen=True)
class AnyNetwork:
  """The options that every network has beside its own."""

  dtype: str = option(
    "float32",
    "Of activations alone; parameters stay float32.",
    one_of=("float32", "bfloat16"),
  )
  pretrained: str = option(
    "",
    "Weights to start from: 'imagenet', a file (.safetensors, .pth), or "
    "'hf://organisation/name[/file]'.",
  )
  freeze: str = option(
    "none",
    "'encoder': it does not learn, which takes less time and memory; 'batch_norm': its batch "
    "norms alone do not. Both keep the running statistics of the pretrained weights, in every "
    "network of a method.",
    one_of=("none", "batch_norm", "encoder"),
  )


DATA: dict[str, type[AnyData]] = {
  "folder": FolderData,
  "tfds": TfdsData,
  "synthetic": SyntheticData,
  "given": GivenData,
}


# --- the tree that the code reads -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chosen:
  """A method: its name, and its options, the keywords of its factory."""

  name: str
  options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ChosenNetwork(AnyNetwork, Chosen):
  """A network likewise, with the options that every network has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Run):
  """All options of a run, each with a value that it may have.

  None is missing.

  data: of a class of DATA. other_data: likewise by name; their normalization is that of data.
  """

  method: Chosen
  network: ChosenNetwork


def replaced(tree: Any, values: Mapping[str, Any]) -> Any:
  """Returns a config, or a group of it, with other values of some options.

  The values are given by dotted key.
  """
  for key, value in values.items():
    name, dot, rest = key.partition(".")
    if dot:
      value = replaced(getattr(tree, name), {rest: value})
    tree = dataclasses.replace(tree, **{name: value})
  return tree


def still(value: Any) -> Any:
  """Makes a value that nobody can change in place.

  It has tuples for lists, and views of mappings.
  """
  if isinstance(value, Mapping):
    return types.MappingProxyType({key: still(item) for key, item in value.items()})
  return tuple(map(still, value)) if isinstance(value, (tuple, list)) else value


def as_dict(tree: Any) -> Any:
  """Converts a config, or a group of it, to nested dicts.

  They are what `frozen` made it of.
  """
  if isinstance(tree, Config):
    others = {name: own_options(as_dict(data)) for name, data in tree.other_data.items()}
    return _fields(tree) | {"other_data": others}
  if isinstance(tree, Chosen):
    fields = _fields(tree)
    return {"name": fields.pop("name"), **fields.pop("options"), **fields}
  if dataclasses.is_dataclass(tree):
    return _fields(tree)
  return {key: as_dict(item) for key, item in tree.items()} if isinstance(tree, Mapping) else tree


def _fields(tree: Any) -> dict[str, Any]:
  return {field.name: as_dict(getattr(tree, field.name)) for field in dataclasses.fields(tree)}


def own_options(data: Mapping[str, Any]) -> dict[str, Any]:
  """Selects the options of data that every domain has.

  These are all but the normalization.
  """
  return {name: value for name, value in data.items() if name not in ("mean", "std")}


# --- what is declared -----------------------------------------------------------------------------


def defaults(kind: type) -> dict[str, Any]:
  """Returns the defaults of a group and of the groups below it.

  They are nested dicts.
  """
  return {
    field.name: defaults(type(value)) if dataclasses.is_dataclass(value) else value
    for field in dataclasses.fields(kind)
    for value in [getattr(kind(), field.name)]
  }


class Option(NamedTuple):
  """An option as it is declared."""

  default: Any
  about: str
  allowed: Allowed = Allowed()


def of_group(kind: type, prefix: str = "") -> dict[str, Option]:
  """Collects the options of a group and of those below it, by dotted key."""
  options = {}
  for field in dataclasses.fields(kind):
    default = getattr(kind(), field.name)
    if dataclasses.is_dataclass(default):
      options |= of_group(type(default), f"{prefix}{field.name}.")
    else:
      about, allowed = field.metadata["about"], field.metadata["allowed"]
      options[prefix + field.name] = Option(default, about, allowed)
  return options


def defaults_of(factory: Callable) -> dict[str, Any]:
  """Reads the options of a factory with their defaults.

  They are the keywords of a method's or a network's factory.
  """
  parameters = inspect.signature(factory).parameters.values()
  return {
    parameter.name: parameter.default
    for parameter in parameters
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
  }


def of_factory(factory: Callable, prefix: str = "") -> dict[str, Option]:
  """Reads the options of a method's or a network's factory.

  Each has what the signature allows and what the docstring states of it.
  """
  about, allowed = _arguments(factory), _allowed(factory)
  return {
    prefix + name: Option(default, about.get(name, ""), allowed.get(name, Allowed()))
    for name, default in defaults_of(factory).items()
  }


@functools.cache
def _allowed(factory: Callable) -> dict[str, Allowed]:
  """Reads what the annotations of a factory allow.

  They may be Literal, and Annotated with `Allowed`.
  """
  try:
    hints = get_type_hints(factory, include_extras=True)
  except (NameError, TypeError):  # of another package, whose names stand for type checkers alone
    return {}
  found = {}
  for name, hint in hints.items():
    if get_origin(hint) is Literal:
      found[name] = Allowed(one_of=get_args(hint))
    elif get_origin(hint) is Annotated:
      found[name] = next(
        (rule for rule in get_args(hint)[1:] if isinstance(rule, Allowed)), Allowed()
      )
  return found


Rules = Callable[..., None]  # (problems, task, **options): adds what several options break together


def checked(factory: Callable | None = None, *, rules: Rules | None = None) -> Callable:
  """Decorates a method's factory so that it refuses options before it begins.

  It is used as `@checked` or `@checked(rules=...)`: options that its signature does not allow, or
  that break its rules, are refused all at once.

  Rules are given every option, those that are refused by themselves at their default.
  """
  if factory is None:
    return functools.partial(checked, rules=rules)

  @functools.wraps(factory)
  def with_checked_options(task: Any, **options: Any) -> Any:
    problems, known = checks.Problems(f"{factory.__name__} cannot be run with these options"), {}
    for name, declared in of_factory(factory).items():
      known[name] = usable(options.get(name, declared.default), declared, name, problems)
    if rules is not None:
      rules(problems, task, **known)
    problems.raise_if_any()
    return factory(task, **options)

  return with_checked_options


def _arguments(function: Callable | None) -> dict[str, str]:
  """Reads the section "Args:" of a docstring, by name.

  "as in `module.function`" is looked up there.
  """
  text = inspect.getdoc(function) or ""
  section = re.search(r"^Args:\n((?:  .*\n?|\n)*)", text, re.MULTILINE)
  about = {}
  for names, lines in re.findall(
    r"^  (\w[\w, ]*):((?:.*\n?)(?:^    .*\n?)*)", section[1] if section else "", re.MULTILINE
  ):
    words = " ".join(lines.split())
    same = re.match(r"(?:see|as in) `([\w.]+)`", words)
    there = _arguments(_named(function, same[1])) if same else {}
    for name in names.split(", "):
      if name in there:
        more = words[same.end() :].lstrip(" .;,")
        about[name] = f"{there[name]} {more[:1].upper()}{more[1:]}".strip()
      else:
        about[name] = f"{names}: {words}" if "," in names else words
  return about


def _named(function: Callable, path: str) -> Callable | None:
  """Finds the function that a docstring calls `path`.

  It is one of the function's module, of what that imports, or of a module beside it; None where it
  cannot be found.
  """
  names, package = path.split("."), function.__module__.rpartition(".")[0]
  beside = sys.modules.get(f"{package}.{names[0]}")
  at = sys.modules[function.__module__]
  for start, way in ((at, names), (at, names[-1:]), (beside, names[1:] or names)):
    found = functools.reduce(lambda at, name: getattr(at, name, None), way, start)
    if inspect.ismodule(found):  # of a method, whose factory has its name
      found = getattr(found, names[-1], None)
    if found is not None:
      return found
  return None


def read(kind: type, values: Any, where: str, problems: checks.Problems, **known: Any) -> Any:
  """Makes a group of what stands in a config for it.

  What is missing has its default, and so has what cannot be used, which `problems` gains.

  Args:
    where: the group's dotted key, for the problems.
    known: fields that are made already.
  """
  if not isinstance(values, Mapping):
    problems.add(where, got=repr(values), allowed="a group of options")
    values = {}
  fields = {field.name: field for field in dataclasses.fields(kind)}
  note_unknown(values, fields, where, problems)
  for name, field in fields.items():
    if name in known or name not in values:
      continue
    at = f"{where}.{name}"
    inner = (
      field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
    if dataclasses.is_dataclass(inner):
      known[name] = read(type(inner), values[name], at, problems)
    else:
      declared = Option(inner, field.metadata["about"], field.metadata["allowed"])
      known[name] = usable(values[name], declared, at, problems)
  return kind(**known)


def read_keywords(
  options: Mapping[str, Option], values: Mapping[str, Any], where: str, problems: checks.Problems
) -> Mapping[str, Any]:
  """Reads the options of a factory as `read` does a group.

  See `of_factory`.
  """
  note_unknown(values, options, where, problems)
  return types.MappingProxyType(
    {
      name: usable(values.get(name, declared.default), declared, f"{where}.{name}", problems)
      for name, declared in options.items()
    }
  )


def note_unknown(
  values: Mapping[str, Any], known: Mapping[str, Any], where: str, problems: checks.Problems
) -> None:
  """Notes what is no option of a group."""
  for name in values:
    if name not in known:
      remedy = checks.nearest(name, known)
      problems.add(f"{where}.{name}", got="no such option", remedy=remedy)


def usable(value: Any, declared: Option, where: str, problems: checks.Problems) -> Any:
  """Returns a value as its option is declared, else the default.

  Where it is the default, `problems` gains why.
  """
  default, allowed = declared.default, declared.allowed
  if hasattr(value, "aval"):  # an array, maybe traced: not known yet
    return value
  if not _is_like(value, default):
    wanted = f"{type(default).__name__}, such as {default!r}"
    problems.add(where, got=repr(value), allowed=wanted)
  elif isinstance(default, (tuple, list)) and are_numbers(default) and not are_numbers(value):
    wanted = f"numbers, such as {as_flag(default) or '1,2'}"
    problems.add(where, got=as_flag(value), allowed=wanted)
  elif not allowed.holds(value):
    words = [word for word in allowed.one_of if isinstance(word, str)]
    remedy = checks.nearest(str(value), words) if words else None
    problems.add(where, got=repr(value), allowed=allowed.in_words(), remedy=remedy)
  elif isinstance(value, numbers.Real) and not math.isfinite(value):
    problems.add(where, got=repr(value), allowed=f"a number, such as {default!r}")
  else:
    return still(value)
  return still(default)


def _is_like(value: Any, default: Any) -> bool:
  """Tells whether a value is of the kind of its option's default."""
  if default is None:
    return True
  if isinstance(default, bool) or isinstance(value, bool):
    return isinstance(value, bool) and isinstance(default, bool)
  if isinstance(default, numbers.Real):
    return isinstance(value, numbers.Real)
  if isinstance(default, str):
    return isinstance(value, (str, Mapping))  # label_map may be given as a mapping
  if isinstance(default, (tuple, list)):
    return isinstance(value, (tuple, list))
  return isinstance(value, Mapping if isinstance(default, Mapping) else type(default))


def are_numbers(values: Any) -> bool:
  """Tells whether all of several values are finite numbers."""
  return all(
    isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    for value in values
  )


def explain(options: Mapping[str, Option], values: Mapping[str, Any]) -> str:
  """Explains options.

  For each there are the flag with the value that it has, what it is, and what it may be.
  """
  order = {key: rank for rank, key in enumerate(options)}
  keys = sorted(values, key=lambda key: order.get(key, order.get(key.rpartition(".")[0], 0)))
  return "\n\n".join(_explained(key, options, values[key]) for key in keys)


def _explained(key: str, options: Mapping[str, Option], value: Any) -> str:
  declared = options.get(key)
  if declared is None:  # of an option that is a mapping itself, such as cct's decoders
    declared = Option(value, options[key.rpartition(".")[0]].about)
  notes = {"allowed": declared.allowed.in_words()}
  if declared.default != value:
    notes["default"] = as_flag(declared.default) or "nothing"
  lines = textwrap.wrap(declared.about[:1].upper() + declared.about[1:], 76)
  lines += textwrap.wrap("; ".join(f"{of}: {what}" for of, what in notes.items() if what), 76)
  return "\n".join([f"--config.{key}={as_flag(value)}", *(f"    {line}" for line in lines)])


def as_flag(value: Any) -> str:
  """Formats a value as the command line reads it.

  Tuples and lists have no brackets.
  """
  return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
