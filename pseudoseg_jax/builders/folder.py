"""Builders of the data of a run from images and masks in folders.

They open config.data: they find which files there are, and what each is for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.builders.classes import build_classes, resolve_path
from pseudoseg_jax.builders.opened import Data
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data import (
  classes as classes_lib,
  decode,
  listing,
  sources,
  splits,
)
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.listing import LeftOut
from pseudoseg_jax.data.skipped import Skipped
from pseudoseg_jax.data.sources import Source
from pseudoseg_jax.data.splits import Entry
from pseudoseg_jax.options import AnyData, FolderData, StoredData

log = logging.getLogger("pseudoseg_jax")


def mask_options(data_config: FolderData, classes: Classes) -> dict:
  """Returns how masks are stored, as keywords of a source."""
  return {
    "num_classes": len(classes),
    "label_map": classes_lib.read_label_map(data_config.label_map),
    "mask_colors": classes.by_color() if data_config.mask_colors else None,
    "reduce_zero_label": data_config.reduce_zero_label,
    "ignore_index": data_config.ignore_index,
  }


def unlabeled_masks(
  data_config: AnyData, classes: Classes, ids: Sequence[str], pattern: str = ""
) -> Source:
  """Opens masks of unlabeled images, which nothing is learned from.

  They are to make weak labels of the images, or to score labels with.

  Args:
    pattern: where they lie below the data's root (--masks of the tools that call this); "" is
      config.data.label_pattern.

  Raises:
    InputError: masks that are absent or cannot be read; data that are no files.
  """
  problems = checks.Problems("the masks of the unlabeled images cannot be used")
  if not isinstance(data_config, FolderData):
    problems.add(
      "config.data.name",
      got=repr(data_config.name),
      allowed="'folder' or 'synthetic': masks are sought in files",
    )
    problems.raise_if_any()
  pattern = os.path.expanduser(pattern or data_config.label_pattern)
  if "{id}" not in pattern:
    problems.add(
      "--masks", got=repr(pattern), allowed="a path with {id} in it, e.g. masks/{id}.png"
    )
    problems.raise_if_any()
  # Ids of a bare folder of images end in .jpg or the like, which names of masks do not repeat.
  stems = [splits.without_suffix(name) for name in ids] if data_config.unlabeled_folder else ids
  options = {
    "channels": data_config.channels,
    "exif_orientation": data_config.exif_orientation,
    **mask_options(data_config, classes),
  }
  try:
    return sources.FolderSource(
      resolve_path(data_config.root, ""), stems, label_pattern=pattern, masks_only=True, **options
    )
  except checks.InputError as error:
    found = str(error).replace("label_pattern", "--masks").replace("\n", "\n  ")
    problems.add(f"--masks={pattern}", got=found, remedy="--masks=PATTERN says where they lie")
    problems.raise_if_any()


class _Lists(NamedTuple):
  """The images that are trained and evaluated on, by role."""

  labeled: Sequence[Entry]
  unlabeled: Sequence[Entry]  # unless there is an unlabeled_folder
  evaluated: Sequence[Entry]
  left_out: Sequence[LeftOut]  # beside them, where no list says which images are meant


def open_folder(data_config: FolderData, check: bool) -> Data:
  problems = checks.Problems("config.data cannot be used")
  root = resolve_path(data_config.root, "")
  if not data_config.root:
    problems.add(
      "config.data.root", got="nothing", remedy="say where the data lie: --config.data.root=DIR"
    )
  elif not root.is_dir():
    problems.add("config.data.root", got=repr(str(root)), allowed="an existing folder")
  for name in ("image_pattern", "eval_image_pattern"):
    pattern = getattr(data_config, name)
    if pattern and pattern.count("{id}") != 1:
      problems.add(
        f"config.data.{name}",
        got=repr(pattern),
        allowed="a path with one {id} in it, e.g. 'images/{id}.jpg'",
      )
  problems.raise_if_any()
  options = {
    "channels": data_config.channels,
    "exif_orientation": data_config.exif_orientation,
    "max_value": data_config.max_value,
    "check": check,
  }
  decode.check_options(options["exif_orientation"], options["max_value"], "config.data.")

  classes = build_classes(data_config)
  lists = _lists(data_config, check)
  skipped = Skipped() if data_config.skip_unreadable else None
  images = functools.partial(sources.FolderSource, root, **options)
  with_masks = functools.partial(images, **mask_options(data_config, classes))
  patterns, eval_patterns = _patterns(data_config)

  def unlabeled_source():
    if data_config.unlabeled_folder:
      return sources.image_folder(
        resolve_path(root, data_config.unlabeled_folder), skipped=skipped, **options
      )
    return images(lists.unlabeled, image_pattern=patterns["image_pattern"], skipped=skipped)

  opened = {}
  for role, listed, opener in (
    ("labeled", data_config.split, lambda: with_masks(lists.labeled, skipped=skipped, **patterns)),
    ("unlabeled", data_config.unlabeled_list, unlabeled_source),
    ("evaluated", data_config.eval_list, lambda: with_masks(lists.evaluated, **eval_patterns)),
  ):
    try:
      opened[role] = opener()
    except checks.InputError as error:
      problems.add(
        f"{role} images" + (f" ({listed})" if listed else ""), got=str(error).replace("\n", "\n  ")
      )
  problems.raise_if_any()
  if check:
    _check_some({role: opened[role] for role in ("labeled", "evaluated")}, data_config, skipped)
    if lists.left_out:
      shown = splits.shorten(
        [f"{item.shown_path()} ({item.why})" for item in lists.left_out], most=10
      )
      log.warning("files beside the images that are not used: %s", shown)
  split = split_in_words(data_config, opened, len(lists.left_out))
  return Data(classes=classes, truth_known=False, split=split, skipped=skipped, **opened)


def left_out(data_config: AnyData) -> Sequence[LeftOut]:
  """Lists what lies among the images of a folder and is not used.

  Such are other formats, links that lead nowhere, unreadable folders.
  """
  if not isinstance(data_config, FolderData):
    return ()
  return _lists(data_config, check=False).left_out


def split_in_words(
  data_config: StoredData, opened: Mapping[str, Source], num_left_out: int = 0
) -> str:
  drawn = (
    f" (random, split_seed {data_config.split_seed})"
    if data_config.split.startswith("1_") and splits.is_part(data_config.split)
    else ""
  )
  not_used = f"; {num_left_out} file{'s' * (num_left_out > 1)} not used" if num_left_out else ""
  return f"{data_config.split}{drawn}: {len(opened['labeled'])} labeled, {len(opened['unlabeled'])} unlabeled{not_used}"


def _patterns(data_config: FolderData) -> tuple[dict, dict]:
  """Returns the patterns of training and of evaluated images.

  A pattern is None where lists give the paths.
  """
  image, label, eval_image, eval_label = (
    os.path.expanduser(getattr(data_config, name)) or None
    for name in ("image_pattern", "label_pattern", "eval_image_pattern", "eval_label_pattern")
  )
  return (
    {"image_pattern": image, "label_pattern": label},
    {"image_pattern": eval_image or image, "label_pattern": eval_label or label},
  )


def _lists(data_config: FolderData, check: bool) -> _Lists:
  """Reads and makes the lists of images, by role.

  Args:
    check: False: lets roles overlap.

  Raises:
    InputError: the lists do not fit together.
  """
  patterns, eval_patterns = _patterns(data_config)
  # Else equal ids are different images.
  same_images = patterns["image_pattern"] == eval_patterns["image_pattern"]
  problems = checks.Problems("config.data cannot be used")
  if same_images and not data_config.eval_list:
    remedy = "name the evaluated images by eval_list or eval_image_pattern"
    problems.add(
      "config.data.eval_list",
      got="nothing, so that training images would be evaluated",
      remedy=remedy,
    )
  is_part = splits.is_part(data_config.split)
  unlabeled_named = data_config.unlabeled_list or data_config.unlabeled_folder
  if (
    patterns["image_pattern"] is None
    and not data_config.train_list
    and (is_part or not unlabeled_named)
  ):
    problems.add(
      "config.data.image_pattern and train_list",
      got="nothing",
      allowed="one of them, to know the training images",
    )
  problems.raise_if_any()

  def read(path: str | pathlib.Path, patterns=patterns):
    return sources.read_entries(resolve_path(data_config.root, ""), path, **patterns)

  left_out: list[LeftOut] = []
  evaluated = (
    read(resolve_path(data_config.root, data_config.eval_list), eval_patterns)
    if data_config.eval_list
    else _all(data_config, eval_patterns, left_out)
  )
  if data_config.train_list:
    train = read(resolve_path(data_config.root, data_config.train_list))
  else:
    evaluated_ids = {entry.id for entry in evaluated} if same_images else ()
    found = _all(data_config, patterns, left_out) if patterns["image_pattern"] else ()
    train = [entry for entry in found if entry.id not in evaluated_ids]
  by_id = {entry.id: entry for entry in train}
  if is_part:
    labeled = [
      by_id[name] for name in splits.part(by_id, data_config.split, seed=data_config.split_seed)
    ]
  else:
    labeled = splits.complete_ids(read(split_file(data_config)), by_id)
    labeled = [_with_paths(entry, by_id.get(entry.id, entry)) for entry in labeled]
  labeled_ids = {entry.id for entry in labeled}
  if same_images and check:
    splits.check_disjoint(labeled=labeled_ids, evaluated=[entry.id for entry in evaluated])
  _check_known(labeled, by_id, data_config)
  rest = [entry for entry in train if entry.id not in labeled_ids]
  unlabeled = (
    read(resolve_path(data_config.root, data_config.unlabeled_list))
    if data_config.unlabeled_list
    else rest
  )
  if data_config.unlabeled_folder:
    listing.image_files(resolve_path(data_config.root, data_config.unlabeled_folder), left_out)
  named = {
    resolve_path(data_config.root, path)
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
  """Returns an entry with the paths that it lacks.

  The training list gives them.
  """
  return Entry(entry.id, entry.image or trained.image, entry.mask or trained.mask)


def _check_known(
  labeled: Sequence[Entry], by_id: Mapping[str, Entry], data_config: FolderData
) -> None:
  """Checks that labeled images are training images.

  Only where no list names those, a path may lead elsewhere.
  """
  unknown_ids = [
    entry.id
    for entry in labeled
    if entry.id not in by_id and (data_config.train_list or entry.image is None)
  ]
  if unknown_ids and by_id:
    problems = checks.Problems("config.data cannot be used")
    problems.add(
      f"config.data.split {data_config.split}",
      got=f"{len(unknown_ids)} of {len(labeled)} images that are no training images: {splits.shorten(unknown_ids)}",
      allowed=f"those of {data_config.train_list}"
      if data_config.train_list
      else f"files that fit {data_config.image_pattern}",
      remedy=f"an id of them looks like '{next(iter(by_id))}'",
    )
    problems.raise_if_any()


def _all(data_config: FolderData, patterns: dict, left_out: list[LeftOut]) -> list[Entry]:
  """Lists every image that fits a pattern.

  `left_out` gains what lies among them and does not fit.
  """
  pattern, root = patterns["image_pattern"], resolve_path(data_config.root, "")
  others = [other for role in _patterns(data_config) for other in role.values() if other]
  if data_config.unlabeled_folder and splits.is_part(
    data_config.split
  ):  # a list may name images of that folder
    others.append(str(resolve_path(root, data_config.unlabeled_folder) / "{id}"))
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
  with_masks: Mapping[str, Source],
  data_config: FolderData,
  skipped: Skipped | None,
  most: int = 8,
) -> None:
  """Reads a few images and masks, to find a wrong coding before training.

  A wrong coding shows in all of them, and training should not be what finds it out. Files that
  training skips are reported when training meets them.
  """
  as_stored = data_config.ignore_index == IGNORE_LABEL and not (
    data_config.label_map or data_config.mask_colors or data_config.reduce_zero_label
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


def split_file(data_config: StoredData) -> pathlib.Path:
  candidates = (
    resolve_path(data_config.root, data_config.split),
    resolve_path("", data_config.split),
    splits.published(data_config.split),
  )
  found = next((path for path in candidates if path is not None and path.is_file()), None)
  if found is None:
    problems = checks.Problems("config.data cannot be used")
    allowed = "'1_k' such as '1_8' (a random eighth), 'every_k', 'full', a list file, or a published list: 'voc2012/cps/1_8', ..."
    known = [
      *splits.published_names(),
      *(path.name for path in resolve_path(data_config.root, "").glob("*.txt")),
    ]
    problems.add(
      "config.data.split",
      got=repr(data_config.split),
      allowed=allowed,
      remedy=checks.nearest(data_config.split, known),
    )
    problems.raise_if_any()
  return found
