"""The only reader of a config: makes from it the data, the task, the method and the evaluator of a
run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import os
import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax import checks, config as configs, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Method, Network, Optimizer, Task
from pseudoseg_jax.data import (
  boxes,
  classes as classes_lib,
  decode,
  frequencies,
  given,
  listing,
  pipeline,
  sources,
  splits,
  synthetic,
  tags,
)
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.decode import ImageLike
from pseudoseg_jax.data.geometry import Geometry
from pseudoseg_jax.data.given import GivenImages
from pseudoseg_jax.data.listing import LeftOut
from pseudoseg_jax.data.photometry import Photometry
from pseudoseg_jax.data.pipeline import Feed, PipelineSpec
from pseudoseg_jax.data.skipped import Skipped
from pseudoseg_jax.data.sources import Source
from pseudoseg_jax.data.splits import Entry
from pseudoseg_jax.evaluation import hints, inference
from pseudoseg_jax.evaluation.evaluator import Evaluator, make_evaluator
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.methods import table as methods_table
from pseudoseg_jax.models import imagenet, table as models_table
from pseudoseg_jax.ops import losses, schedules

log = logging.getLogger("pseudoseg_jax")


class Data(NamedTuple):
  """labeled: images with masks; unlabeled: images alone; evaluated: images with masks that nothing
  is learnt from.

  truth_known: the unlabeled images have masks that may be shown, never learnt from.
  pseudo_labeled: images that are learnt from as the labeled ones are, with labels that a network
    made; or None.
  skipped: the files that are learnt nothing from since they cannot be read, so far; None: such a
    file is an error.
  options: what config.data is to say of how images that were given from Python are read, see
    `name_given`.
  """

  classes: Classes
  labeled: Source
  unlabeled: Source
  evaluated: Source
  truth_known: bool
  split: str  # in words, for reports
  pseudo_labeled: Source | None = None
  skipped: Skipped | None = None
  options: Mapping[str, Any] = {}


class Domain(NamedTuple):
  """One of the data sets that a run learns from.

  name: that of config.other_data; "" of the first domain.
  config: the run's; of a further domain with its data in the place of the first one's, and a seed
    of its own.
  """

  name: str
  config: configs.ConfigDict
  data: Data


def build_classes(data: configs.ConfigDict) -> Classes:
  """The classes alone: what a trained network needs to be used without its data.

  Raises:
    InputError: no classes, or a single one, of which nothing can be learnt.
  """
  background = data.get("background", "auto")
  checks.check_name("config.data.background", background, ("auto", "yes", "no"))
  problems = checks.Problems("config.data cannot be used")
  _check_in_files(data)
  if data.name == "synthetic":
    classes = synthetic.CLASSES
  elif data.classes in classes_lib.BUILTIN:
    classes = classes_lib.BUILTIN[data.classes]
  elif not data.classes:
    allowed = f"a file of class names, one a line, or of lines `index name r g b`; or {checks.choices(classes_lib.BUILTIN)}"
    problems.add("config.data.classes", got="nothing", allowed=allowed)
    problems.raise_if_any()
  else:
    classes = classes_lib.read_classes(_below(data.root, data.classes))
  _check_several(classes, f"config.data.classes {data.get('classes', '')}")
  return _with_background(classes, background)


def _check_in_files(data: configs.ConfigDict) -> None:
  problems = checks.Problems("the images of this run were given from Python, and are in no file")
  if data.name == configs.GIVEN:
    problems.add(
      "data",
      got="nothing",
      remedy="give them again, as `data` of pseudoseg_jax.train or pseudoseg_jax.evaluate",
    )
  problems.raise_if_any()


def _check_several(classes: Classes, where: str) -> None:
  problems = checks.Problems("config.data cannot be used")
  if len(classes) == 1:
    lines = " and ".join(f"`{line}`" for line in classes_lib.with_background(classes))
    problems.add(
      where,
      got=f"one class, '{classes.names[0]}'",
      allowed="at least two: a network that knows one answer is right everywhere and learns nothing",
      remedy=f"write what is left beside it as class 0: a file of the lines {lines} fits masks of 0 and 1 as they are",
    )
  problems.raise_if_any()


def _with_background(classes: Classes, background: str) -> Classes:
  return (
    classes
    if background == "auto"
    else dataclasses.replace(classes, background=background == "yes")
  )


def build_data(data: configs.ConfigDict, *, check: bool = True) -> Data:
  """Opens the sources; raises InputError with everything that can be known without decoding all
  images.

  check=False looks at no file of a folder, and lets roles share images: for `check_data`, which
  tells of all that.
  """
  checks.check_name("config.data.name", data.name, ("folder", "synthetic", "tfds", configs.GIVEN))
  _check_in_files(data)
  if data.name == "folder":
    return _folder(data, check)
  return _synthetic(data) if data.name == "synthetic" else _tfds(data)


def make_data(
  images: Sequence[ImageLike],
  masks: Sequence[ImageLike | None],
  classes: Classes | Sequence[str],
  *,
  evaluated: tuple[Sequence[ImageLike], Sequence[ImageLike]],
  unlabeled: Sequence[ImageLike] = (),
  background: str = "auto",
  channels: int = 3,
  max_value: float = 0.0,
  exif_orientation: str = "apply",
  label_map: Mapping[int, int] | None = None,
) -> Data:
  """Makes a data set of images that a program has in its hands, for `train(..., data=...)` and
  `evaluate(..., data=...)`.

  >>> data = make_data(photos, masks, ["background", "leaf"], evaluated=(other_photos, other_masks))

  Args:
    images: to learn from, each a path, a PIL image or an array [h, w, C] of any type, see
      `data.decode.read_any_image`; sizes may differ.
    masks: one for each image: a path, a PIL image or an array [h, w] of class indices, 255 = no
      label; None: the image is unlabeled.
    classes: names by class index, or Classes.
    evaluated: images and masks that nothing is learnt from.
    unlabeled: further images without masks.
    background: whether class 0 is what is left beside things, "yes" or "no"; "auto": its name says
      so.
    channels, max_value, exif_orientation: of all images: how many channels they have, their value
      of full brightness (0 = 255, of files by their type), and whether EXIF orientations are
      applied ("apply") or not ("ignore").
    label_map: mask value -> class, {11: 255}.

  Raises:
    InputError: everything that shows without decoding files, all at once.
  """
  checks.check_name("background", background, ("auto", "yes", "no"))
  decode.check_options(exif_orientation, max_value)
  if not isinstance(classes, Classes):
    palette = classes_lib.voc_palette(len(classes) + 1)[: len(classes)]
    classes = Classes(tuple(classes), tuple(tuple(map(int, color)) for color in palette))
  _check_several(classes, "classes")
  classes = _with_background(classes, background)
  problems = checks.Problems("the data cannot be used")
  images, masks = list(images), list(masks)
  if len(images) != len(masks):
    problems.add(
      "masks",
      got=f"{len(masks)} for {len(images)} images",
      allowed="one for each, None where there is none",
    )
    problems.raise_if_any()
  reading = {"channels": channels, "max_value": max_value, "exif_orientation": exif_orientation}
  with_masks = reading | {"num_classes": len(classes), "label_map": label_map}
  has_mask = [mask is not None for mask in masks]
  labeled_images = [image for image, has in zip(images, has_mask, strict=True) if has]
  labeled_masks = [mask for mask in masks if mask is not None]
  unlabeled = [*(image for image, has in zip(images, has_mask, strict=True) if not has), *unlabeled]
  opened = {}
  for role, make in (
    ("labeled", lambda: GivenImages(labeled_images, labeled_masks, name="labeled", **with_masks)),
    # No images are left over: methods then see the labeled ones as unlabeled ones too, as with
    # folders.
    (
      "unlabeled",
      lambda: GivenImages(
        unlabeled or labeled_images, name="unlabeled" if unlabeled else "labeled", **reading
      ),
    ),
    ("evaluated", lambda: GivenImages(*evaluated, name="evaluated", **with_masks)),
  ):
    try:
      opened[role] = make()
    except checks.InputError as error:
      problems.extend([str(error).replace("\n", "\n  ")])
  problems.raise_if_any()
  given.check_apart(labeled=opened["labeled"], evaluated=opened["evaluated"])
  split = f"{len(opened['labeled'])} labeled, {len(opened['unlabeled'])} unlabeled"
  return Data(classes=classes, truth_known=False, split=split, options=reading, **opened)


def name_given(config: configs.ConfigDict, data: Data) -> None:
  """Lets config.data say, in place, that the images are those that were given from Python; the
  normalization stays.
  """
  channels = data.labeled.channels
  for name, other in (("mean", 0.5), ("std", 0.25)):
    if (
      len(config.data[name]) != channels
      and config.data[name] == configs.base(config.method).data[name]
    ):
      config.data[name] = (other,) * channels  # the default is of red, green and blue
  normalization = {name: config.data[name] for name in ("mean", "std")}
  config.data = configs.ConfigDict(
    configs.given_data(**{"channels": channels, **data.options}) | normalization
  )


def build_domains(config: configs.ConfigDict, given_data: Data | None = None) -> tuple[Domain, ...]:
  """The data of config.data and of each of config.other_data, in the order of the domains' numbers;
  raises as `build_data`.

  config.labeled_every and config.pseudo_labels are about the first one, whose images may be given.
  """
  opened = build_data(config.data) if given_data is None else given_data
  first = _with_pseudo_labels(config, _every_labeled(config.get("labeled_every", 1), opened))
  domains = [Domain("", config, first)]
  for name, options in sorted(config.get("other_data", {}).items()):
    own = config.copy_and_resolve_references()
    # One network sees all of them.
    own.data = {**options.to_dict(), "mean": config.data.mean, "std": config.data.std}
    own.seed = pipeline.stream_seed(config.seed, f"domain/{name}")
    with _told_of(name):
      domains.append(Domain(name, own, build_data(own.data)))
  return tuple(domains)


def _every_labeled(every: int, data: Data) -> Data:
  """Only every n-th of the labeled images; the others are not used at all."""
  kept = data.labeled.ids[::every]
  if len(kept) == len(data.labeled):
    return data
  left_out = {*data.labeled.ids} - {*kept}
  unlabeled = [name for name in data.unlabeled.ids if name not in left_out]
  return data._replace(
    labeled=sources.Subset(data.labeled, kept),
    unlabeled=data.unlabeled
    if len(unlabeled) == len(data.unlabeled)
    else sources.Subset(data.unlabeled, unlabeled),
    split=f"{data.split}; labeled_every {every}: {len(kept)} labeled",
  )


def _with_pseudo_labels(config: configs.ConfigDict, data: Data) -> Data:
  """The data with config.pseudo_labels; images that are labeled keep their true labels."""
  options = config.get("pseudo_labels", {"folder": ""})
  if not options["folder"]:
    return data
  folder = _below(options["folder"], "")
  sources.check_labels_folder(folder, data.classes.names)
  ids = _pseudo_labeled_ids(config, data)
  pseudo_labeled = sources.PseudoLabels(data.unlabeled, folder, data.classes.names, ids)
  return data._replace(
    pseudo_labeled=pseudo_labeled, split=f"{data.split} + {len(ids)} pseudo labels"
  )


def _pseudo_labeled_ids(config: configs.ConfigDict, data: Data) -> list[str]:
  """Those of the unlabeled images that the list of pseudo labels names."""
  options = config.pseudo_labels
  path, pattern = _below(options.folder, "list.txt"), None
  if options.list:
    path = _list_file(config.data, options.list)
    pattern = (
      None if config.data.get("unlabeled_folder") else config.data.get("image_pattern") or None
    )
  listed = [
    entry._replace(id=listing.normalized(entry.id)) for entry in splits.read_entries(path, pattern)
  ]
  unlabeled = {splits.without_suffix(name): name for name in data.unlabeled.ids} | {
    name: name for name in data.unlabeled.ids
  }
  labeled = {*data.labeled.ids}
  ids, strangers = [], []
  for entry in listed:
    # Ids of a bare folder of images end like files, and read as paths.
    name = unlabeled.get(entry.image) or unlabeled.get(entry.id) or entry.id
    if name in unlabeled and name not in labeled:
      ids.append(name)
    elif name not in labeled:
      strangers.append(name)
  problems = checks.Problems(f"cannot use pseudo labels {options.folder}")
  if strangers:
    got = f"{len(strangers)} of {len(listed)} images that are not among the training images: {splits.shorten(strangers)}"
    remedy = f"one of them is '{data.unlabeled.ids[0]}'"
    problems.add(f"list {path}", got=got, allowed="unlabeled images of config.data", remedy=remedy)
  elif not ids:
    problems.add(
      f"list {path}",
      got="only images that have true labels",
      allowed="at least one unlabeled image",
    )
  problems.raise_if_any()
  return ids


def _list_file(data: configs.ConfigDict, path: str) -> pathlib.Path:
  """A list below the data's root, or anywhere."""
  below = _below(data.get("root", ""), path)
  return below if below.is_file() else _below("", path)


@contextlib.contextmanager
def _told_of(name: str) -> Iterator[None]:
  """Says of errors meanwhile which domain they are about."""
  try:
    yield
  except checks.InputError as error:
    if not name:
      raise
    raise checks.InputError(
      f"domain '{name}': {str(error).replace('config.data', f'config.other_data.{name}')}"
    ) from error


def _synthetic(data: configs.ConfigDict) -> Data:
  scenes = synthetic.SyntheticScenes(data.num_scenes, tuple(data.size), seed=data.scenes_seed)
  if not 1 <= data.num_labeled < data.num_scenes:
    problems = checks.Problems("config.data does not fit together")
    problems.add(
      "config.data.num_labeled",
      got=data.num_labeled,
      allowed=f"1..{data.num_scenes - 1} (num_scenes - 1)",
    )
    problems.raise_if_any()
  return Data(
    classes=synthetic.CLASSES,
    labeled=sources.Subset(scenes, scenes.ids[: data.num_labeled]),
    unlabeled=sources.Subset(scenes, scenes.ids[data.num_labeled :]),
    evaluated=synthetic.SyntheticScenes(
      data.num_eval_scenes, tuple(data.size), seed=data.scenes_seed + 1
    ),
    truth_known=True,
    split=f"{data.num_labeled} labeled of {data.num_scenes} synthetic scenes",
  )


def _below(root: str, path: str) -> pathlib.Path:
  """A path that is absolute, or relative to the data's root; "~" is the user's home."""
  return pathlib.Path(os.path.expanduser(root)) / os.path.expanduser(path)


def mask_options(data: configs.ConfigDict, classes: Classes) -> dict:
  """How masks are stored, as keywords of a source."""
  return {
    "num_classes": len(classes),
    "label_map": classes_lib.read_label_map(data.label_map),
    "mask_colors": classes.by_color() if data.mask_colors else None,
    "reduce_zero_label": data.reduce_zero_label,
    "ignore_index": data.ignore_index,
  }


def unlabeled_masks(
  data: configs.ConfigDict, classes: Classes, ids: Sequence[str], pattern: str = ""
) -> Source:
  """Masks of unlabeled images, which nothing is learnt from: to make weak labels of them, or to
  score labels with.

  Args:
    pattern: where they lie below the data's root (--masks of the tools that call this); "" is
      config.data.label_pattern.

  Raises:
    InputError: masks that are absent or cannot be read; data that are no files.
  """
  problems = checks.Problems("the masks of the unlabeled images cannot be used")
  if data.name != "folder":
    problems.add(
      "config.data.name",
      got=repr(data.name),
      allowed="'folder' or 'synthetic': masks are sought in files",
    )
    problems.raise_if_any()
  pattern = os.path.expanduser(pattern or data.label_pattern)
  if "{id}" not in pattern:
    problems.add(
      "--masks", got=repr(pattern), allowed="a path with {id} in it, e.g. masks/{id}.png"
    )
    problems.raise_if_any()
  # Ids of a bare folder of images end in .jpg or the like, which names of masks do not repeat.
  stems = [splits.without_suffix(name) for name in ids] if data.unlabeled_folder else ids
  options = {
    "channels": data.channels,
    "exif_orientation": data.get("exif_orientation", "apply"),
    **mask_options(data, classes),
  }
  try:
    return sources.FolderSource(
      _below(data.root, ""), stems, label_pattern=pattern, masks_only=True, **options
    )
  except checks.InputError as error:
    found = str(error).replace("label_pattern", "--masks").replace("\n", "\n  ")
    problems.add(f"--masks={pattern}", got=found, remedy="--masks=PATTERN says where they lie")
    problems.raise_if_any()


class _Lists(NamedTuple):
  """What is trained and evaluated on, by role."""

  labeled: Sequence[Entry]
  unlabeled: Sequence[Entry]  # unless there is an unlabeled_folder
  evaluated: Sequence[Entry]
  left_out: Sequence[LeftOut]  # beside them, where no list says which images are meant


def _folder(data: configs.ConfigDict, check: bool) -> Data:
  problems = checks.Problems("config.data cannot be used")
  root = _below(data.root, "")
  if not data.root:
    problems.add(
      "config.data.root", got="nothing", remedy="say where the data lie: --config.data.root=DIR"
    )
  elif not root.is_dir():
    problems.add("config.data.root", got=repr(str(root)), allowed="an existing folder")
  for name in ("image_pattern", "eval_image_pattern"):
    if data[name] and data[name].count("{id}") != 1:
      problems.add(
        f"config.data.{name}",
        got=repr(data[name]),
        allowed="a path with one {id} in it, e.g. 'images/{id}.jpg'",
      )
  problems.raise_if_any()
  # Further domains of runs of older releases lack these options.
  options = {"channels": data.channels, "exif_orientation": data.get("exif_orientation", "apply")}
  options |= {"max_value": data.get("max_value", 0.0), "check": check}
  decode.check_options(options["exif_orientation"], options["max_value"], "config.data.")

  classes = build_classes(data)
  lists = _lists(data, check)
  skipped = Skipped() if data.get("skip_unreadable", False) else None
  images = functools.partial(sources.FolderSource, root, **options)
  with_masks = functools.partial(images, **mask_options(data, classes))
  patterns, eval_patterns = _patterns(data)

  def unlabeled_source():
    if data.unlabeled_folder:
      return sources.image_folder(_below(root, data.unlabeled_folder), skipped=skipped, **options)
    return images(lists.unlabeled, image_pattern=patterns["image_pattern"], skipped=skipped)

  opened = {}
  for role, listed, opener in (
    ("labeled", data.split, lambda: with_masks(lists.labeled, skipped=skipped, **patterns)),
    ("unlabeled", data.unlabeled_list, unlabeled_source),
    ("evaluated", data.eval_list, lambda: with_masks(lists.evaluated, **eval_patterns)),
  ):
    try:
      opened[role] = opener()
    except checks.InputError as error:
      problems.add(
        f"{role} images" + (f" ({listed})" if listed else ""), got=str(error).replace("\n", "\n  ")
      )
  problems.raise_if_any()
  if check:
    _check_some({role: opened[role] for role in ("labeled", "evaluated")}, data, skipped)
    if lists.left_out:
      shown = splits.shorten(
        [f"{item.shown_path()} ({item.why})" for item in lists.left_out], most=10
      )
      log.warning("files beside the images that are not used: %s", shown)
  split = _split_in_words(data, opened, len(lists.left_out))
  return Data(classes=classes, truth_known=False, split=split, skipped=skipped, **opened)


def left_out(data: configs.ConfigDict) -> Sequence[LeftOut]:
  """What lies among the images of a folder and is not used: other formats, links that lead nowhere,
  unreadable folders.
  """
  return _lists(data, check=False).left_out if data.name == "folder" else ()


def _split_in_words(
  data: configs.ConfigDict, opened: Mapping[str, Source], num_left_out: int = 0
) -> str:
  drawn = (
    f" (random, split_seed {data.split_seed})"
    if data.split.startswith("1_") and splits.is_part(data.split)
    else ""
  )
  not_used = f"; {num_left_out} file{'s' * (num_left_out > 1)} not used" if num_left_out else ""
  return f"{data.split}{drawn}: {len(opened['labeled'])} labeled, {len(opened['unlabeled'])} unlabeled{not_used}"


def _patterns(data: configs.ConfigDict) -> tuple[dict, dict]:
  """Of training and of evaluated images; None where lists give the paths."""
  image, label, eval_image, eval_label = (
    os.path.expanduser(data[name]) or None
    for name in ("image_pattern", "label_pattern", "eval_image_pattern", "eval_label_pattern")
  )
  return (
    {"image_pattern": image, "label_pattern": label},
    {"image_pattern": eval_image or image, "label_pattern": eval_label or label},
  )


def _lists(data: configs.ConfigDict, check: bool) -> _Lists:
  """Reads and makes the lists; raises InputError where they do not fit together (check=False: lets
  roles overlap).
  """
  patterns, eval_patterns = _patterns(data)
  # Else equal ids are different images.
  same_images = patterns["image_pattern"] == eval_patterns["image_pattern"]
  problems = checks.Problems("config.data cannot be used")
  if same_images and not data.eval_list:
    remedy = "name the evaluated images by eval_list or eval_image_pattern"
    problems.add(
      "config.data.eval_list",
      got="nothing, so that training images would be evaluated",
      remedy=remedy,
    )
  is_part = splits.is_part(data.split)
  unlabeled_named = data.unlabeled_list or data.unlabeled_folder
  if patterns["image_pattern"] is None and not data.train_list and (is_part or not unlabeled_named):
    problems.add(
      "config.data.image_pattern and train_list",
      got="nothing",
      allowed="one of them, to know the training images",
    )
  problems.raise_if_any()

  def read(path: str | pathlib.Path, patterns=patterns):
    return sources.read_entries(_below(data.root, ""), path, **patterns)

  left_out: list[LeftOut] = []
  evaluated = (
    read(_below(data.root, data.eval_list), eval_patterns)
    if data.eval_list
    else _all(data, eval_patterns, left_out)
  )
  if data.train_list:
    train = read(_below(data.root, data.train_list))
  else:
    evaluated_ids = {entry.id for entry in evaluated} if same_images else ()
    found = _all(data, patterns, left_out) if patterns["image_pattern"] else ()
    train = [entry for entry in found if entry.id not in evaluated_ids]
  by_id = {entry.id: entry for entry in train}
  if is_part:
    labeled = [by_id[name] for name in splits.part(by_id, data.split, seed=data.split_seed)]
  else:
    labeled = splits.completed(read(_split_file(data)), by_id)
    labeled = [_with_paths(entry, by_id.get(entry.id, entry)) for entry in labeled]
  labeled_ids = {entry.id for entry in labeled}
  if same_images and check:
    splits.check_disjoint(labeled=labeled_ids, evaluated=[entry.id for entry in evaluated])
  _check_known(labeled, by_id, data)
  rest = [entry for entry in train if entry.id not in labeled_ids]
  unlabeled = read(_below(data.root, data.unlabeled_list)) if data.unlabeled_list else rest
  if data.unlabeled_folder:
    listing.image_files(_below(data.root, data.unlabeled_folder), left_out)
  named = {
    _below(data.root, path)
    for entry in (*labeled, *unlabeled, *evaluated)
    for path in (entry.image, entry.mask)
    if path
  }
  # No images are left over at split=full: methods then see the labeled images as unlabeled ones
  # too.
  return _Lists(
    labeled,
    unlabeled or labeled,
    evaluated,
    [item for item in dict.fromkeys(left_out) if item.path not in named],
  )


def _with_paths(entry: Entry, trained: Entry) -> Entry:
  """An entry with the paths that it lacks and the training list gives."""
  return Entry(entry.id, entry.image or trained.image, entry.mask or trained.mask)


def _check_known(
  labeled: Sequence[Entry], by_id: Mapping[str, Entry], data: configs.ConfigDict
) -> None:
  """Labeled images are training images; only where no list names those, a path may lead
  elsewhere.
  """
  strangers = [
    entry.id
    for entry in labeled
    if entry.id not in by_id and (data.train_list or entry.image is None)
  ]
  if strangers and by_id:
    problems = checks.Problems("config.data cannot be used")
    problems.add(
      f"config.data.split {data.split}",
      got=f"{len(strangers)} of {len(labeled)} images that are no training images: {splits.shorten(strangers)}",
      allowed=f"those of {data.train_list}"
      if data.train_list
      else f"files that fit {data.image_pattern}",
      remedy=f"an id of them looks like '{next(iter(by_id))}'",
    )
    problems.raise_if_any()


def _all(data: configs.ConfigDict, patterns: dict, left_out: list[LeftOut]) -> list[Entry]:
  """Every image that fits a pattern; `left_out` gains what lies among them and does not."""
  pattern, root = patterns["image_pattern"], _below(data.root, "")
  others = [other for role in _patterns(data) for other in role.values() if other]
  if data.unlabeled_folder and splits.is_part(data.split):  # a list may name images of that folder
    others.append(str(_below(root, data.unlabeled_folder) / "{id}"))
  found = listing.fitting(root, pattern, others)
  left_out += found.left_out
  if not found.ids:
    problems = checks.Problems("config.data cannot be used")
    folder = (root / pattern).parent
    folder = folder if folder.is_dir() else root
    held = splits.shorten(sorted(os.listdir(folder))) or "nothing"
    remedy = f"{folder} holds {held}; is it the right root, and the right pattern?"
    other = [
      path.suffix
      for path, _ in found.left_out
      if path.is_file() and path.suffix.lower() in listing.IMAGE_SUFFIXES
    ]
    if other:
      remedy += f" Of images that end in {other[0]} it is '{pathlib.PurePath(pattern).with_suffix(other[0])}'"
    unusable = [
      f"; {item.shown_path()}: {item.why}" for item in found.left_out if not item.path.is_file()
    ]
    problems.add(
      f"pattern {pattern}", got=f"no file below {root}{''.join(unusable[:3])}", remedy=remedy
    )
    problems.raise_if_any()
  return [Entry(name) for name in found.ids]


def _check_some(
  with_masks: Mapping[str, Source], data: configs.ConfigDict, skipped: Skipped | None, most: int = 8
) -> None:
  """Reads a few images and masks: a wrong coding shows in all of them, and training should not be
  what finds it out.

  What training skips it tells when it meets it.
  """
  as_stored = data.ignore_index == IGNORE_LABEL and not (
    data.label_map or data.mask_colors or data.reduce_zero_label
  )
  problems = checks.Problems("config.data cannot be used")
  for role, source in with_masks.items():
    rows = np.unique(np.linspace(0, len(source) - 1, most).astype(int)).tolist()
    may_fail = contextlib.suppress(
      *[checks.InputError] * (skipped is not None and role == "labeled")
    )

    def values_in(row, source=source, may_fail=may_fail):
      with may_fail:
        return set(np.unique(source.label(row)).tolist())
      return set()

    with may_fail:
      source.image(rows[0])
    values = set().union(*map(values_in, rows))
    if values == {IGNORE_LABEL} and all(
      values_in(row) <= {IGNORE_LABEL} for row in range(len(source))
    ):
      problems.add(
        f"masks of the {role} images",
        got=f"no label in all {len(source)} of them: every pixel is 255"
        + ("" if as_stored else ", as config.data maps them"),
        allowed="pixels of the classes: else there is nothing to learn, or to score",
        remedy="list images whose masks have labels"
        + ("" if as_stored else ", or correct how stored values are mapped"),
      )
    elif as_stored and IGNORE_LABEL in values and values <= {0, IGNORE_LABEL}:
      problems.add(
        f"masks of the {role} images",
        got=f"only {splits.shorten(sorted(values))} in {len(rows)} of them, where 255 means no label",
        allowed="at least one class besides 0",
        remedy="if 255 stands for class 1: config.data.label_map=255:1; if all is as it should be: config.data.label_map=255:255",
      )
  problems.raise_if_any()


def _tfds(data: configs.ConfigDict) -> Data:
  from pseudoseg_jax.data.tfds_source import TfdsSource  # takes seconds to import, and few need it

  classes = build_classes(data)
  keys = {name: data[name] or None for name in ("image_key", "id_key", "class_key")}
  images = functools.partial(
    TfdsSource, os.path.expanduser(data.dataset), data_dir=os.path.expanduser(data.root) or None
  )
  masks = {
    "label_key": data.label_key,
    "num_classes": len(classes),
    "label_map": classes_lib.read_label_map(data.label_map),
  }
  train = images(data.train_split, **masks, **keys)
  if splits.is_part(data.split):
    labeled_ids = splits.part(train.ids, data.split, seed=data.split_seed)
  else:
    labeled_ids = splits.read_list(_split_file(data))
  rest = splits.complement(train.ids, labeled_ids)
  unlabeled = images(
    data.unlabeled_split or data.train_split, label_key=None, **keys | {"class_key": None}
  )
  opened = {
    "labeled": sources.Subset(train, labeled_ids),
    "unlabeled": unlabeled
    if data.unlabeled_split
    else sources.Subset(unlabeled, rest or labeled_ids),
    "evaluated": images(data.eval_split, **masks, **keys),
  }
  return Data(classes=classes, truth_known=False, split=_split_in_words(data, opened), **opened)


def _split_file(data: configs.ConfigDict) -> pathlib.Path:
  candidates = _below(data.root, data.split), _below("", data.split), splits.published(data.split)
  found = next((path for path in candidates if path is not None and path.is_file()), None)
  if found is None:
    problems = checks.Problems("config.data cannot be used")
    allowed = "'1_k' such as '1_8' (a random eighth), 'every_k', 'full', a list file, or a published list: 'voc2012/cps/1_8', ..."
    known = [
      *splits.published_names(),
      *(path.name for path in _below(data.root, "").glob("*.txt")),
    ]
    problems.add(
      "config.data.split",
      got=repr(data.split),
      allowed=allowed,
      remedy=checks.nearest(data.split, known),
    )
    problems.raise_if_any()
  return found


def build_network(config: configs.ConfigDict, num_classes: int) -> Network:
  options = {
    name: value for name, value in config.network.items() if name not in ("name", "pretrained")
  }
  options["dtype"] = jnp.dtype(options["dtype"])
  channels = config.data.get("channels", 3)
  return models_table.make_network(
    config.network.name, num_classes=num_classes, in_channels=channels, **options
  )


def take_normalization(config: configs.ConfigDict) -> None:
  """Lets config.data say, in place, how images were normalized for the weights of
  network.pretrained=imagenet.

  The default of config.data is nobody's choice and makes way; another one stays, see
  `tell_normalization`.
  """
  default = configs.base(config.method).data
  if (wanted := _normalization_of_weights(config)) and _normalization(
    config.data
  ) == _normalization(default):
    config.data.mean, config.data.std = wanted


def tell_normalization(config: configs.ConfigDict) -> None:
  """Says in the log how images are normalized where weights ask for it; warns where the config has
  another way.
  """
  if not (wanted := _normalization_of_weights(config)):
    return
  in_words = "mean {} and deviation {}".format(
    *(",".join(f"{value:.3f}" for value in values) for values in wanted)
  )
  if _normalization(config.data) == wanted:
    log.info(
      "images are normalized as for the weights of %s: %s", config.network.backbone, in_words
    )
  else:
    log.warning(
      "config.data.mean=%s and config.data.std=%s are kept, but the weights of %s were trained with %s",
      *_normalization(config.data),
      config.network.backbone,
      in_words,
    )


def _normalization(data: configs.ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
  return tuple(data.mean), tuple(data.std)


def _normalization_of_weights(config: configs.ConfigDict) -> imagenet.Normalization | None:
  """What network.pretrained=imagenet was trained with; None where nothing asks for it."""
  backbone = config.network.get("backbone", "")
  if (
    config.network.pretrained != "imagenet"
    or backbone not in imagenet.BACKBONES
    or config.data.get("channels", 3) != 3
  ):
    return None
  return imagenet.normalization_of(backbone)


def build_optimizer(config: configs.ConfigDict) -> Optimizer:
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


def build_criterion(config: configs.ConfigDict, num_classes: int) -> Callable:
  """(logits, label) -> the supervised loss; a sum where config.criterion.name is one,
  "cross_entropy+dice".
  """
  options, names = config.criterion, config.criterion.name.split("+")
  weights = _class_weights(config, num_classes)
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


def _check_criterion(config: configs.ConfigDict, method: Method) -> None:
  """Raises InputError where a criterion is asked for that the method would not use."""
  if method.needs.criterion:
    return
  problems = checks.Problems(f"method '{config.method.name}' has a supervised loss of its own")
  for name in ("name", "class_weights"):
    asked, default = config.criterion[name], configs.base(config.method).criterion[name]
    if asked not in (default, "ohem"):  # which recipes set for a data set, whatever the method
      problems.add(
        f"config.criterion.{name}",
        got=repr(asked),
        allowed=repr(default),
        remedy=f"--config.criterion.{name}={default}",
      )
  problems.raise_if_any()


def _class_weights(config: configs.ConfigDict, num_classes: int) -> tuple[float, ...]:
  """Those that config.criterion.class_weights gives; () for none, and for those that
  `weigh_classes` has not computed yet.
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


def _class_pixels(data: Data) -> np.ndarray:
  return frequencies.count_pixels(
    data.labeled, len(data.classes), skip_unreadable=data.skipped is not None
  )


def weigh_classes(config: configs.ConfigDict, data: Data) -> None:
  """Puts numbers, in place, where config.criterion.class_weights names a way to compute them: from
  the masks that are learnt from.
  """
  way = config.criterion.class_weights
  if way not in frequencies.WEIGHTS:
    return
  weights = frequencies.class_weights(_class_pixels(data), way)
  config.criterion.class_weights = ",".join(f"{weight:.6g}" for weight in weights)


def tell_imbalance(config: configs.ConfigDict, data: Data, spec: PipelineSpec) -> None:
  """Says in the log what is done for rare classes."""
  weights = _class_weights(config, len(data.classes))
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


def _unlabeled_weight(config: configs.ConfigDict) -> Callable:
  """step -> the factor of config.unlabeled_loss."""
  options = config.unlabeled_loss
  length_steps = options.rampup_fraction * config.total_steps
  return lambda step: (
    options.factor * (schedules.sigmoid_rampup(step, length_steps) if length_steps else 1.0)
  )


def build_method(
  config: configs.ConfigDict,
  num_classes: int,
  num_unlabeled: int = 0,
  other_classes: Sequence[int] = (),
) -> Method:
  """The method of a config, for any use: training, evaluation, prediction; num_unlabeled only
  matters to training.

  other_classes: the number of classes of each further domain.
  """
  factory = methods_table.find(config.method.name)
  options = {name: value for name, value in config.method.items() if name != "name"}
  known = configs.defaults_of(factory)
  for name in options:
    checks.check_name(f"option of method '{config.method.name}'", name, known)
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
  method = factory(task, **options)
  if not isinstance(method, Method):
    problems = checks.Problems(f"method '{config.method.name}' cannot be used")
    problems.add("its factory", got=f"a {type(method).__name__}", allowed="a contract.Method")
    problems.raise_if_any()
  return method


def build_pipeline(config: configs.ConfigDict, data: Data, method: Method) -> PipelineSpec:
  """What training batches are made of; raises InputError for whatever does not fit, together."""
  view = config.views.to_dict()
  weak = {name: view.pop(name) for name in ("crop_size", "scales", "continuous", "flip")}
  of_labeled = {name: view.pop(name) for name in ("labeled_photometry", "labeled_operations")}
  geometry = Geometry(convention=view["convention"], **weak)
  labeled, needs = _learnt_from(config, data), method.needs
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


def _learnt_from(config: configs.ConfigDict, data: Data) -> Source:
  """The labeled images, some of them several times, and, after them, those with pseudo labels."""
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


def build_pipelines(domains: Sequence[Domain], method: Method) -> tuple[PipelineSpec, ...]:
  """What the batches of each domain are made of; raises InputError for whatever does not fit."""
  _check_criterion(domains[0].config, method)
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
    with _told_of(name):
      specs.append(build_pipeline(config, data, method))
  return tuple(specs)


def _check_background(config: configs.ConfigDict, classes: Classes) -> None:
  """A method that takes class 0 for what is left beside things must be right in that."""
  if config.method.get("background") is True and classes.background_index != 0:
    problems = checks.Problems(f"method '{config.method.name}' does not fit the classes")
    problems.add(
      "config.method.background",
      got=f"True, while class 0 is '{classes.names[0]}'",
      allowed="True where class 0 is the background",
      remedy="--config.method.background=False if every class is a thing or stuff of its own; else --config.data.background=yes",
    )
    problems.raise_if_any()


def _image_labels(data_config: configs.ConfigDict, data: Data) -> np.ndarray | None:
  """f32[N, K] of the unlabeled images: what the user's file says; synthetic scenes know their
  own.
  """
  if data.truth_known:
    return tags.tags_of_masks(data.unlabeled, len(data.classes))
  if not data_config.image_labels:
    return None
  return tags.read_tags(
    _below(data_config.get("root", ""), data_config.image_labels), data.unlabeled.ids, data.classes
  )


def _boxes(data_config: configs.ConfigDict, data: Data, source: Source) -> np.ndarray | None:
  """f32[N, M, 5] of a source's images: what the user's file says; synthetic scenes know their
  own.
  """
  if data.truth_known:
    return boxes.pad_boxes(boxes.boxes_of_masks(source, data.classes))
  if not data_config.boxes:
    return None
  return boxes.pad_boxes(
    boxes.read_boxes(
      _below(data_config.get("root", ""), data_config.boxes), source.ids, data.classes
    )
  )


def panel_batch(specs: Sequence[PipelineSpec], data: Data, num_images: int) -> dict:
  """A batch to show what the unlabeled images teach: the same views as in training, with the first
  domain's truth where known.
  """
  shown = [
    dataclasses.replace(spec, batch_size_labeled_global=1, batch_size_unlabeled_global=num_images)
    for spec in specs
  ]
  shown[0] = dataclasses.replace(shown[0], with_truth=data.truth_known)
  with pipeline.train_batches(*shown) as feed:
    return next(feed)


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


def build_protocol(config: configs.ConfigDict) -> Protocol:
  options = config.evaluation
  if options.preset:
    checks.check_name("config.evaluation.preset", options.preset, inference.PRESETS)
    return inference.PRESETS[options.preset]
  protocol = Protocol(**{name: options[name] for name in inference.OPTIONS})
  inference.check_protocol(protocol)
  return protocol


def describe_protocol(config: configs.ConfigDict) -> str:
  """The protocol in words, after its preset's name where it is one: "cps_voc: sliding windows of
  512x512, ...".
  """
  preset = config.evaluation.preset
  return f"{preset}: " * bool(preset) + inference.describe(build_protocol(config))


def _protocol_flags(config: configs.ConfigDict, protocol: Protocol) -> str:
  """What a command line must say so that the config's protocol becomes this one."""
  options, said = config.evaluation, protocol._asdict()
  flags = ["--config.evaluation.preset="] * bool(options.preset)
  flags += [
    f"--config.evaluation.{name}={said[name]}"
    for name in inference.OPTIONS
    if said[name] not in (options[name], None)
  ]
  return " ".join(map(shlex.quote, flags))


def build_evaluator(
  config: configs.ConfigDict, data: Data, method: Method, mesh: jax.sharding.Mesh, number: int = 0
) -> Evaluator:
  """Of the predictors of domain `number`, on that domain's data.

  With config.evaluation.image_labels, those that are shown the image alone are scored a second time
  as NAME+image_labels, with their answers kept to the classes in the image.
  """
  names = []
  for name in method.predictors:
    if method.predictor_domains.get(name, 0) == number:
      names.append(name)
      if config.evaluation.get("image_labels") and name not in method.predictor_hints:
        names.append(name + hints.IMAGE_LABELS)
  flags = functools.partial(_protocol_flags, config)
  return _evaluator(
    config, data, method, mesh, names, "evaluated", protocol=build_protocol(config), flags=flags
  )


def build_labeler(
  config: configs.ConfigDict,
  data: Data,
  method: Method,
  mesh: jax.sharding.Mesh,
  name: str,
  role: str,
  protocol: Protocol,
) -> Evaluator:
  """Predicts the images of a role (see `images_of`) with one predictor, or with NAME+image_labels;
  for `Evaluator.stream` alone.

  Raises:
    InputError: no weak labels where they are wanted.
  """
  return _evaluator(config, data, method, mesh, [name], role, protocol=protocol, with_labels=False)


def images_of(data: Data, role: str) -> Source:
  """The "labeled", "unlabeled" or "evaluated" images; or "train", the labeled ones and then those
  that are unlabeled alone.
  """
  if role != "train":
    return getattr(data, role)
  others = [data.unlabeled.ids[row] for row in _rows_unlabeled_alone(data)]
  return (
    sources.Joined(data.labeled, sources.Subset(data.unlabeled, others)) if others else data.labeled
  )


def _rows_unlabeled_alone(data: Data) -> list[int]:
  labeled = frozenset(data.labeled.ids)
  return [row for row, name in enumerate(data.unlabeled.ids) if name not in labeled]


def _evaluator(config, data, method, mesh, names, role, **options) -> Evaluator:
  """Of predictors by name, with "+image_labels" or without, on the images of a role."""
  source, num_classes = images_of(data, role), len(data.classes)
  plain = {name: name.removesuffix(hints.IMAGE_LABELS) for name in names}
  kinds = {
    method.predictor_hints[name] for name in plain.values() if name in method.predictor_hints
  }
  kinds |= {"image"} if any(name != of for name, of in plain.items()) else set()
  predictors = {name: method.predictors[of] for name, of in plain.items()}
  if kinds:
    source = hints.Hinted(
      source,
      num_classes,
      {kind: _weak_labels(config.data, data, role, kind) for kind in sorted(kinds)},
    )
    predictors = {
      name: source.predictor(
        predict, method.predictor_hints.get(plain[name]), masked=name != plain[name]
      )
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


def _weak_labels(
  data_config: configs.ConfigDict, data: Data, role: str, kind: str
) -> hints.WeakLabel:
  """The weak labels of the images of a role, by row: what the user's files say, else read off masks
  that are known.

  Image-level labels of labeled and evaluated images are always those of their masks.
  """
  source, others = images_of(data, role), _rows_unlabeled_alone(data)
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
  path = data_config.get(option)
  if path and not (kind == "image" and masks_known):
    read = {"image": tags.read_tags, "boxes": boxes.read_boxes}[kind]
    return read(_below(data_config.get("root", ""), path), source.ids, data.classes).__getitem__
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
    hints.image_labels_of_masks(source, len(data.classes))
    if kind == "image"
    else hints.boxes_of_masks(source, data.classes)
  )


def batches(*specs: PipelineSpec) -> Callable[[int], Feed]:
  """start_step -> this process's share of every global batch of all domains from that step on; to
  be closed.
  """
  share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  return lambda start_step: pipeline.train_batches(*specs, start_step=start_step, **share)
