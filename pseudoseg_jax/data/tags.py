"""Image-level labels: which classes are in an image, wherever they are."""

from __future__ import annotations

import collections
import csv
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.data import frequencies, listing, splits
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.listing import IMAGE_SUFFIXES, normalized
from pseudoseg_jax.data.sources import Source
from pseudoseg_jax.data.text import read_text

Tag = str | int  # a class's name or index

_DELIMITERS = (",", ";", "\t")
_ABSENT_OR_PRESENT = {"": False, "0": False, "false": False, "1": True, "true": True}
_MOST_XML_BYTES = 64 << 20
_CSV = "a CSV of lines `id,name,name,...`, or of a column of 0 and 1 for each class, or a JSON file, or a folder of VOC XML"
_JSON = "JSON of the form {id: [name or index, ...]}"


class _File(NamedTuple):
  """The content of a file of tags.

  entries: tags by image. columns: classes that have a column of 0 and 1. delimiter: between
  columns.
  """

  entries: dict[str, list[Tag]]
  columns: frozenset[int] = frozenset()
  delimiter: str = ","


def read_tags(path: str | pathlib.Path, ids: Sequence[str], classes: Classes) -> np.ndarray:
  """Reads the tags of images from a CSV or JSON file or VOC annotations.

  VOC annotations are given as a folder. An image may have no tag, and the file may hold other
  images as well (a header line counts as one). Lines of the same image add up. The class that is
  background (see `Classes.background_index`) is in every image, unless a column of the file gives
  its images. A class that the file never names is in no image.

  Args:
    path: a JSON file (*.json) of {id: [name or index, ...]}; a folder of VOC XML files `<id>.xml`,
      in which object/name counts; any other file is a CSV, with commas, semicolons or tabs between,
      of lines `id,name,name,...` or `id,name name ...`, names or indices; or a table whose first
      line names a class for each column, of 0 and 1 (or False and True).
    ids: the images' ids; with or without the ending of an image file, in the file as here.

  Returns:
    f32 [N, K] of 0 and 1: a row for each of `ids`, a column for each class.

  Raises:
    InputError: unreadable files, images without an entry, unknown classes, all at once; rows of 0
      and 1 that may be indices or not; a class 0 that is in no entry, where nothing tells whether
      it is background.
  """
  path = pathlib.Path(path)
  problems = checks.Problems(f"cannot use image labels {path}")
  if path.is_dir():
    file = _File(read_annotations(path, ids, _object_names, problems))
    entries = file.entries
  else:
    file = (
      _File(_read_json(path, problems))
      if path.suffix.lower() == ".json"
      else _read_csv(path, ids, classes, problems)
    )
    problems.raise_if_any()  # of an unreadable file every image would be told to be missing
    entries = of_images(file.entries, ids, problems)
    _check_indices(entries, classes, file.delimiter, problems)
  tags = _as_rows(entries, ids, classes, problems)
  problems.raise_if_any()
  background = classes.background_index
  if background is not None:
    if background not in file.columns or not tags[:, background].any():
      tags[:, background] = 1.0
  elif (
    classes.background is None
    and 0 not in file.columns
    and not _names_class(0, file.entries, classes)
  ):
    problems.add(
      "class 0",
      got=f"no entry that names '{classes.names[0]}'",
      allowed="one, unless it is known whether class 0 is background",
      remedy="config.data.background=yes: it is in every image; config.data.background=no: it is in none of them",
    )
  problems.raise_if_any()
  return tags


def write_tags(
  path: str | pathlib.Path, ids: Sequence[str], tags: np.ndarray, classes: Classes
) -> None:
  """Writes tags [N, K] as a CSV that `read_tags` reads.

  Its lines are `id,name,name,...`.
  """
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "tags"])
    for name, row in zip(ids, tags, strict=True):
      writer.writerow([name, *(classes.names[index] for index in np.flatnonzero(row))])


def tags_of_masks(source: Source, num_classes: int) -> np.ndarray:
  """Computes image tags from masks, f32 [N, K].

  1 for every class of which the image's mask holds a pixel; the ignore label is no class.

  Raises:
    InputError: a source without masks, or a mask that cannot be read.
  """
  if not source.has_labels:
    raise checks.InputError(
      "cannot read image labels off masks: the source has none; give it a label_pattern"
    )
  return (frequencies.count_pixels(source, num_classes) > 0).astype(np.float32)


def without_suffix(name: str) -> str:
  """Removes the ending of an image file from an image's id.

  Other dots stay.
  """
  stem, suffix = os.path.splitext(name)
  return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _read_csv(
  path: pathlib.Path, ids: Sequence[str], classes: Classes, problems: checks.Problems
) -> _File:
  # Excel's way to name a delimiter.
  text = re.sub(r'\A"?sep=.?"?\n', "", read_text(path, problems, _CSV))
  known = {normalized(without_suffix(name)) for name in ids}
  tables, reason = {}, None
  for delimiter in _DELIMITERS:
    try:
      tables[delimiter] = _rows(text, delimiter)
    except csv.Error as error:
      reason = error
  if not tables:
    problems.add("file", got=reason, allowed=_CSV)
    problems.raise_if_any()

  def is_ours(row: Sequence[str]) -> bool:
    return normalized(without_suffix(row[0])) in known

  # The delimiter parts the most of our ids from what follows them.
  def fit(delimiter: str) -> tuple[int, bool]:
    rows = tables[delimiter]
    return sum(map(is_ours, rows)), any(len(row) > 1 for row in rows)

  delimiter = max(tables, key=fit)
  rows = tables[delimiter]
  heading = next((row for row in rows if len(row) > 1), None)
  if heading and not is_ours(heading):
    ours = [row for row in rows if is_ours(row)]
    if _is_table(heading[1:], [cells for _, *cells in ours], classes):
      return _read_table(heading[1:], ours, classes, problems)
  entries = collections.defaultdict(list)
  for name, *tags in rows:
    entries[name] += filter(None, tags)
  return _File(entries, delimiter=delimiter)


def _rows(text: str, delimiter: str) -> list[list[str]]:
  rows = csv.reader(text.split("\n"), delimiter=delimiter, skipinitialspace=True)
  return [[field.strip() for field in row] for row in rows if any(row)]


def _is_table(heading: Sequence[str], rows: Sequence[Sequence[str]], classes: Classes) -> bool:
  """Tells whether rows form a table with a heading of class names.

  The cells of a row are then numbers, each of which marks whether the class is present.
  """
  if not any(heading) or not any(map(any, rows)):
    return False
  index_of = index_by_name(classes)
  named = [column for column, name in enumerate(heading) if normalized(name) in index_of]
  if named:  # whatever the other columns are about
    return all(_is_number(row[column]) for row in rows for column in named if column < len(row))
  if any(len(row) != len(heading) or None in map(_as_bool, row) for row in rows):
    return False  # lists of names or indices
  if any(map(str.isdecimal, heading)):  # if not all the indices, the list of another image
    return [*heading] == [str(index) for index in range(len(classes))]
  return len(heading) > 1 or heading[0].casefold() in {name.casefold() for name in classes.names}


def _is_number(cell: str) -> bool:
  try:
    return _as_bool(cell) is not None or float(cell) is not None
  except ValueError:
    return False


def _as_bool(cell: str) -> bool | None:
  """Converts a cell that marks whether a class is present to a bool.

  None for any other cell. Some tools write the numbers as 1.0.
  """
  return _ABSENT_OR_PRESENT.get(re.sub(r"\.0*$", "", cell.casefold()) if cell else "")


def _read_table(
  heading: Sequence[str], rows: Sequence[Sequence[str]], classes: Classes, problems: checks.Problems
) -> _File:
  """Reads rows of an image and of 0 and 1 below a heading of class names."""
  index_of = index_by_name(classes)
  indices = [class_index(name, index_of) for name in heading]
  for column, (name, index) in enumerate(zip(heading, indices, strict=True), start=1):
    if index is None and (name or any(any(row[column : column + 1]) for row in rows)):
      remedy = f"{checks.nearest(name, classes.names)}; a column about something else: take it out"
      problems.add(
        f"column {name!r}", got="no class", allowed=checks.choices(classes.names), remedy=remedy
      )
  for index, count in collections.Counter(index for index in indices if index is not None).items():
    if count > 1:
      problems.add(f"column '{classes.names[index]}'", got=f"{count} of them", allowed="one")
  entries = collections.defaultdict(list)
  for image, *cells in rows:
    if len(cells) != len(heading):
      problems.add(
        f"image {image!r}",
        got=f"{len(cells)} cells",
        allowed=f"{len(heading)}, one for each column of the heading",
      )
      continue
    for name, index, cell in zip(heading, indices, cells, strict=True):
      present = _as_bool(cell)
      if index is not None and present is None:
        problems.add(
          f"image {image!r}, column {name!r}",
          got=repr(cell),
          allowed="1 if the class is in the image, else 0",
        )
    entries[image] += [
      classes.names[index]
      for index, cell in zip(indices, cells)
      if index is not None and _as_bool(cell)
    ]
  return _File(entries, frozenset(indices) - {None})


def _check_indices(
  entries: Mapping[str, list[Tag]], classes: Classes, delimiter: str, problems: checks.Problems
) -> None:
  """Adds a problem for numbers that may be something else than indices.

  Such numbers stand beside names, or in rows that may be those of a table.
  """
  index_of = index_by_name(classes)
  rows = [list(_single(tags, index_of)) for tags in entries.values()]
  mixed = [
    image
    for image, row in zip(entries, rows, strict=True)
    if len({_is_index(tag, index_of) for tag in row}) == 2
  ]
  if mixed:
    problems.add(
      "numbers",
      got=f"some beside names, for {splits.shorten(mixed)}",
      allowed="names alone, or indices of classes alone",
      remedy="leave numbers out that say something else, and classes that are not in the image",
    )
  width = len(rows[0]) if rows else 0
  if width < 2 or any(len(row) != width for row in rows):
    return
  if not all(str(tag) in ("0", "1") and _is_index(tag, index_of) for row in rows for tag in row):
    return
  if width < len(classes) - 1 and all(len(set(row)) == width for row in rows):
    return
  names = {len(classes): classes.names, len(classes) - 1: classes.names[1:]}.get(
    width, ["NAME"] * width
  )
  heading = io.StringIO()
  csv.writer(heading, delimiter=delimiter, lineterminator="").writerow(["id", *names])
  problems.add(
    "numbers",
    got=f"{width} of them for every image, all 0 or 1: indices of classes, or whether each class is there?",
    allowed="names of classes; or a CSV of 0 and 1 with a heading of class names",
    remedy=f"if they say whether each class is there: a CSV with the first line {heading.getvalue()} and a cell for each number",
  )


def _is_index(tag: Tag, index_of: Mapping[str, int]) -> bool:
  return class_index(tag, index_of) is not None and normalized(str(tag)) not in index_of


def _names_class(index: int, entries: Mapping[str, list[Tag]], classes: Classes) -> bool:
  index_of = index_by_name(classes)
  return any(
    class_index(tag, index_of) == index
    for tags in entries.values()
    for tag in _single(tags, index_of)
  )


def _read_json(path: pathlib.Path, problems: checks.Problems) -> dict[str, list[Tag]]:
  entries = read_json(path, problems, _JSON, object_pairs_hook=_without_repetition)
  if not isinstance(entries, dict):
    problems.add(
      "file", got=f"a {type(entries).__name__}", allowed="an object {id: [name or index, ...]}"
    )
    return {}
  wrong = [
    name
    for name, tags in entries.items()
    if not (isinstance(tags, list) and all(type(tag) in (str, int) for tag in tags))
  ]
  if wrong:
    got = f"{json.dumps(entries[wrong[0]])[:80]} for '{wrong[0]}'" + (
      f", and {len(wrong) - 1} more" if wrong[1:] else ""
    )
    problems.add("file", got=got, allowed="a list of names or indices for each id")
  return entries


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  counts = collections.Counter(key for key, _ in pairs)
  repeated = [key for key in counts if counts[key] > 1]
  if repeated:  # json would take the last one without a word
    raise ValueError(f"the key {splits.shorten(repeated)} more than once")
  return dict(pairs)


def read_json(path: str | pathlib.Path, problems: checks.Problems, allowed: str, **options) -> Any:
  """Reads what a JSON file holds.

  InputError with the reason for what is no JSON, NaN and Infinity included.

  Args:
    options: of `json.loads`.
  """

  def refuse(constant):
    raise ValueError(f"{constant}, which is no JSON")

  text = read_text(path, problems, allowed)
  try:
    return json.loads(text, parse_constant=refuse, **options)
  except (ValueError, RecursionError) as error:
    problems.add("file", got=f"{type(error).__name__}: {error}", allowed=allowed)
    problems.raise_if_any()


def read_annotations(
  folder: pathlib.Path,
  ids: Sequence[str],
  read: Callable[[ElementTree.Element], list],
  problems: checks.Problems,
) -> dict[str, list]:
  """Applies `read` to the root of each image's VOC annotation `<id>.xml`.

  `read` raises ValueError for what it cannot use.
  """
  entries, missing, files = {}, [], listing.Files()
  for name in ids:
    candidates = [
      files.find(folder / f"{stem}.xml") for stem in dict.fromkeys((name, without_suffix(name)))
    ]
    found = next(filter(None, candidates), ())
    if not found:
      missing.append(name)
    elif len(found) > 1:
      problems.add(f"image {name}", got=" and ".join(map(str, found)), allowed="one annotation")
    else:
      try:
        entries[name] = read(_read_xml(found[0]))
      # LookupError: of encodings.
      except (OSError, ValueError, LookupError, ElementTree.ParseError, expat.ExpatError) as error:
        got = splits.shown(error, 300)
        problems.add(
          f"file {found[0]}",
          got=got,
          allowed="a VOC annotation, in UTF-8 or what its first line names",
        )
  if missing:
    held = [
      path.relative_to(folder).with_suffix("").as_posix()
      for path in listing.files_below(folder)
      if _is_xml(path)
    ]
    _add_missing(missing, ids, held, problems)
  return entries


def _is_xml(path: pathlib.Path) -> bool:
  return path.suffix.lower() == ".xml"


def _read_xml(path: pathlib.Path) -> ElementTree.Element:
  size = path.stat().st_size
  if size > _MOST_XML_BYTES:
    raise ValueError(f"{size >> 20} MB, of at most {_MOST_XML_BYTES >> 20}")
  root = _parse_xml(path.read_bytes())
  if root.tag != "annotation":  # it would be one without objects
    raise ValueError(f"<{root.tag}>, not <annotation>")
  return root


def _parse_xml(document: bytes) -> ElementTree.Element:
  def refuse(*_):
    raise ValueError("an entity declaration, which no annotation needs")

  # Entities can blow a small file up to gigabytes, and ElementTree has no way to refuse them: look
  # first, then read.
  parser = expat.ParserCreate()
  parser.EntityDeclHandler = refuse
  parser.Parse(document, True)
  return ElementTree.fromstring(document)


def _object_names(root: ElementTree.Element) -> list[Tag]:
  # Direct children only: VOC's parts of a person (object/part/name) are no classes.
  return [object_name(found) for found in root.iterfind("object")]


def object_name(element: ElementTree.Element) -> str:
  """Returns the class of an <object>; ValueError for one without."""
  name = (element.findtext("name") or "").strip()
  if not name:
    raise ValueError("an <object> without a <name>")
  return name


def of_images(
  entries: Mapping[str, list], ids: Sequence[str], problems: checks.Problems
) -> dict[str, list]:
  """Finds the entries of these images, by our id.

  An entry is one of the same name, or of one that only lacks or has an ending.
  """
  whole, shortened = collections.defaultdict(list), collections.defaultdict(list)
  for name, tags in entries.items():
    whole[normalized(name)] += tags
    shortened[normalized(without_suffix(name))] += tags
  found = {}
  for name in ids:
    own = normalized(name)
    for table, key in ((whole, own), (shortened, own), (whole, without_suffix(own))):
      if key in table:
        found[name] = table[key]
        break
  missing = [name for name in ids if name not in found]
  if missing:
    _add_missing(missing, ids, list(entries), problems)
  return found


def _add_missing(
  missing: Sequence[str], ids: Sequence[str], held: Sequence[str], problems: checks.Problems
) -> None:
  remedy = "there is no entry at all"
  if held:
    # The nearest is sought among some: each comparison takes its time, and a file may hold a
    # hundred thousand.
    remedy = f"for '{missing[0]}', {checks.nearest(missing[0], held[:5000])} an entry looks like {splits.shorten(held[-1:])!r}"
  problems.add(
    "images",
    got=f"no entry for {len(missing)} of {len(ids)}: {splits.shorten(missing)}",
    allowed="an entry for every image, an empty one if nothing is in it",
    remedy=remedy,
  )


def _as_rows(
  entries: Mapping[str, list[Tag]], ids: Sequence[str], classes: Classes, problems: checks.Problems
) -> np.ndarray:
  index_of = index_by_name(classes)
  tags = np.zeros((len(ids), len(classes)), np.float32)
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


def index_by_name(classes: Classes) -> dict[str, int]:
  return {normalized(name): index for index, name in enumerate(classes.names)}


def class_index(tag: Tag, index_of: Mapping[str, int]) -> int | None:
  """Returns the index of a class given by name or index.

  None for what is no class.

  Args:
    index_of: see `index_by_name`.
  """
  if isinstance(tag, str) and normalized(tag) in index_of:
    return index_of[normalized(tag)]
  text = str(tag)
  return int(text) if re.fullmatch("[0-9]{1,9}", text) and int(text) < len(index_of) else None


def add_unknown(
  unknown: Mapping[Tag, Sequence[str]], classes: Classes, problems: checks.Problems
) -> None:
  """Adds a problem for each name that is no class, with its images."""
  for number, (tag, images) in enumerate(unknown.items()):
    problems.add(
      f"class {splits.shown(repr(tag))}",
      got=f"for {splits.shorten(images)}",
      allowed=f"{checks.choices(classes.names)} or 0..{len(classes) - 1}",
      # no more are shown, and each takes its time.
      remedy=checks.nearest(str(tag), classes.names) if number < 20 else None,
    )


def _single(tags: Sequence[Tag], index_of: Mapping[str, int]) -> Iterator[Tag]:
  """Yields one class at a time.

  A text that is no class as a whole is several, with spaces between.
  """
  for tag in tags:
    yield from tag.split() if isinstance(tag, str) and normalized(tag) not in index_of else (tag,)
