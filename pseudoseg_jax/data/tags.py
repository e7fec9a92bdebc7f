"""Image-level labels: which classes are in an image, wherever they are."""

from __future__ import annotations

import collections
import csv
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.data import splits
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.listing import IMAGE_SUFFIXES
from pseudoseg_jax.data.sources import Source

Tag = str | int  # a class's name or index


def read_tags(path: str | pathlib.Path, ids: Sequence[str], classes: Classes) -> np.ndarray:
  """Reads the tags of images from a CSV or JSON file or a folder of VOC annotations.

  An image may have no tag, and the file may hold other images as well (a header line counts as one). Lines of the same image
  add up. Class 0 is in every image where its name is "background".

  Args:
    path: a JSON file (*.json) of {id: [name or index, ...]}; a folder of VOC XML files `<id>.xml`, in which object/name counts;
      any other file is a CSV of lines `id,name,name,...` or `id,name name ...`, names or indices.
    ids: the images' ids; with or without the ending of an image file, in the file as here.

  Returns:
    f32 [N, K] of 0 and 1: a row for each of `ids`, a column for each class.

  Raises:
    InputError: unreadable files, images without an entry, unknown classes; all at once.
  """
  path = pathlib.Path(path)
  problems = checks.Problems(f"cannot use image labels {path}")
  if path.is_dir():
    entries = read_annotations(path, ids, _object_names, problems)
  else:
    entries = _read_json(path, problems) if path.suffix.lower() == ".json" else _read_csv(path, problems)
    problems.raise_if_any()  # of an unreadable file every image would be told to be missing
    entries = of_images(entries, ids, problems)
  tags = _as_rows(entries, ids, classes, problems)
  problems.raise_if_any()
  return tags


def write_tags(path: str | pathlib.Path, ids: Sequence[str], tags: np.ndarray, classes: Classes) -> None:
  """Writes tags [N, K] as a CSV of lines `id,name,name,...` that `read_tags` reads."""
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "tags"])
    for name, row in zip(ids, tags, strict=True):
      writer.writerow([name, *(classes.names[index] for index in np.flatnonzero(row))])


def tags_of_masks(source: Source, num_classes: int) -> np.ndarray:
  """f32 [N, K]: 1 for every class of which the image's mask holds a pixel; the ignore label is no class.

  Raises:
    InputError: a source without masks, or a mask that cannot be read.
  """
  if not source.has_labels:
    raise checks.InputError("cannot read image labels off masks: the source has none; give it a label_pattern")
  counts = [np.bincount(source.label(row).ravel(), minlength=256)[:num_classes] for row in range(len(source))]
  return (np.stack(counts) > 0).astype(np.float32)


def without_suffix(name: str) -> str:
  """An image's id without the ending of an image file; other dots stay."""
  return name[: -len(pathlib.PurePosixPath(name).suffix)] if name.lower().endswith(IMAGE_SUFFIXES) else name


def _read_csv(path: pathlib.Path, problems: checks.Problems) -> dict[str, list[Tag]]:
  entries = collections.defaultdict(list)
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      for row in csv.reader(file, skipinitialspace=True):
        if row:
          entries[row[0].strip()] += [field.strip() for field in row[1:] if field.strip()]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    problems.add("file", got=error, allowed="a CSV of lines `id,name,name,...`, a JSON file, or a folder of VOC XML")
  return entries


def _read_json(path: pathlib.Path, problems: checks.Problems) -> dict[str, list[Tag]]:
  try:
    entries = json.loads(path.read_text(encoding="utf-8-sig"))
  except (OSError, ValueError, RecursionError) as error:
    problems.add("file", got=error, allowed="JSON of the form {id: [name or index, ...]}")
    return {}
  if not isinstance(entries, dict):
    problems.add("file", got=f"a {type(entries).__name__}", allowed="an object {id: [name or index, ...]}")
    return {}
  wrong = [
    name for name, tags in entries.items() if not (isinstance(tags, list) and all(type(tag) in (str, int) for tag in tags))
  ]
  if wrong:
    got = f"{json.dumps(entries[wrong[0]])[:80]} for '{wrong[0]}'" + (f", and {len(wrong) - 1} more" if wrong[1:] else "")
    problems.add("file", got=got, allowed="a list of names or indices for each id")
  return entries


def read_annotations(
  folder: pathlib.Path, ids: Sequence[str], read: Callable[[ElementTree.Element], list], problems: checks.Problems
) -> dict[str, list]:
  """What `read` makes of the root of each image's VOC annotation `<id>.xml`; it raises ValueError for what it cannot use."""
  entries, missing = {}, []
  for name in ids:
    candidates = [folder / f"{stem}.xml" for stem in dict.fromkeys((name, without_suffix(name)))]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
      missing.append(name)
      continue
    try:
      entries[name] = read(_parse_xml(path.read_bytes()))
    except (OSError, ValueError, ElementTree.ParseError, expat.ExpatError) as error:
      problems.add(f"file {path}", got=error, allowed="a VOC annotation")
  if missing:
    held = sorted(file.removesuffix(".xml") for file in os.listdir(folder) if file.endswith(".xml"))
    _add_missing(missing, ids, held, problems)
  return entries


def _parse_xml(document: bytes) -> ElementTree.Element:
  def refuse(*_):
    raise ValueError("an entity declaration, which no annotation needs")

  # Entities can blow a small file up to gigabytes, and ElementTree has no way to refuse them: look first, then read.
  parser = expat.ParserCreate()
  parser.EntityDeclHandler = refuse
  parser.Parse(document, True)
  return ElementTree.fromstring(document)


def _object_names(root: ElementTree.Element) -> list[Tag]:
  # Direct children only: VOC's parts of a person (object/part/name) are no classes.
  return [(name.text or "").strip() for name in root.iterfind("object/name")]


def of_images(entries: Mapping[str, list], ids: Sequence[str], problems: checks.Problems) -> dict[str, list]:
  """The entries of these images, by our id: an entry of the same name, or of one that only lacks or has an ending."""
  shortened = collections.defaultdict(list)
  for name, tags in entries.items():
    shortened[without_suffix(name)] += tags
  found = {}
  for name in ids:
    for table, key in ((entries, name), (shortened, name), (entries, without_suffix(name))):
      if key in table:
        found[name] = table[key]
        break
  missing = [name for name in ids if name not in found]
  if missing:
    _add_missing(missing, ids, list(entries), problems)
  return found


def _add_missing(missing: Sequence[str], ids: Sequence[str], held: Sequence[str], problems: checks.Problems) -> None:
  remedy = "there is no entry at all"
  if held:
    # The nearest is sought among some: each comparison takes its time, and a file may hold a hundred thousand.
    remedy = f"for '{missing[0]}', {checks.nearest(missing[0], held[:5000])} an entry looks like '{held[-1]}'"
  problems.add(
    "images",
    got=f"no entry for {len(missing)} of {len(ids)}: {splits.shorten(missing)}",
    allowed="an entry for every image, an empty one if nothing is in it",
    remedy=remedy,
  )


def _as_rows(entries: Mapping[str, list[Tag]], ids: Sequence[str], classes: Classes, problems: checks.Problems) -> np.ndarray:
  index_of = {name: index for index, name in enumerate(classes.names)}
  tags = np.zeros((len(ids), len(classes)), np.float32)
  tags[:, 0] = classes.names[0] == "background"
  unknown = collections.defaultdict(list)
  for row, name in enumerate(ids):
    for tag in _single(entries.get(name, ()), index_of):
      index = class_index(tag, index_of)
      if index is None:
        unknown[tag].append(name)
      else:
        tags[row, index] = 1.0
  add_unknown(unknown, classes, problems)
  return tags


def class_index(tag: Tag, index_of: Mapping[str, int]) -> int | None:
  """The index of a class given by name or index; None for what is no class."""
  index = index_of.get(tag, int(tag) if str(tag).isdecimal() else -1)
  return index if 0 <= index < len(index_of) else None


def add_unknown(unknown: Mapping[Tag, Sequence[str]], classes: Classes, problems: checks.Problems) -> None:
  """Adds a problem for each name that is no class, with the images that have it."""
  for tag, images in unknown.items():
    problems.add(
      f"class {tag!r}",
      got=f"for {splits.shorten(images)}",
      allowed=f"{checks.choices(classes.names)} or 0..{len(classes) - 1}",
      remedy=checks.nearest(str(tag), classes.names),
    )


def _single(tags: Sequence[Tag], index_of: Mapping[str, int]) -> Iterator[Tag]:
  """One class at a time: a text that is no class as a whole is several, with spaces between."""
  for tag in tags:
    yield from tag.split() if isinstance(tag, str) and tag not in index_of else (tag,)
