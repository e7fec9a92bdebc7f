"""Where images come from: random access by row, pure NumPy and PIL.

A source is anything with the members of `Source`. It hands out images as they are stored; all randomness is the pipeline's.
"""

from __future__ import annotations

import collections
import difflib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data import splits

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class Source(Protocol):
  """Images, with or without masks.

  ids: the images' names, by row.
  has_labels: whether `label` may be asked.
  image: row -> uint8 [h, w, 3], RGB.
  label: row -> uint8 [h, w], 0..K-1 or IGNORE_LABEL.
  size: row -> (h, w), without decoding.
  """

  ids: tuple[str, ...]
  has_labels: bool

  def __len__(self) -> int: ...
  def image(self, row: int) -> np.ndarray: ...
  def label(self, row: int) -> np.ndarray: ...
  def size(self, row: int) -> tuple[int, int]: ...


class FolderSource:
  """Images and masks in folders, found by id.

  Masks are read as stored indices: an 8-bit grey or palette PNG, of which the palette is ignored. Images of any PIL mode become
  RGB (alpha is dropped). An EXIF orientation is not applied: masks are drawn on the stored pixels.

  Args:
    root: the data set's folder.
    ids: image ids, or the path of a list file (see `splits.read_list`).
    image_pattern: path below root, with `{id}` for the id, e.g. "JPEGImages/{id}.jpg".
    label_pattern: likewise for masks; None for images without masks, of which no mask file is ever touched.
    num_classes: K; needed with label_pattern.
    label_map: stored mask value -> class index or IGNORE_LABEL, e.g. {11: 255}; other values stay as they are.

  Raises:
    InputError: at construction, everything that shows without decoding a pixel, all at once: missing folder, empty list, absent
      files, files that are no images, masks of another size than their images. At reading: a file that cannot be decoded, a
      mask that is not an index image or holds values that are no class.
  """

  def __init__(
    self,
    root: str | pathlib.Path,
    ids: Sequence[str] | str | pathlib.Path,
    *,
    image_pattern: str,
    label_pattern: str | None = None,
    num_classes: int | None = None,
    label_map: Mapping[int, int] | None = None,
  ):
    self.root = pathlib.Path(root)
    self.image_pattern = image_pattern
    self.label_pattern = label_pattern
    self.has_labels = label_pattern is not None
    self.num_classes = num_classes
    label_map = dict(label_map or {})
    problems = checks.Problems(f"data in {self.root} cannot be used")
    self._check_options(label_map, problems)
    if not self.root.is_dir():
      problems.add("root", got="no such folder", remedy="give the folder that holds the images' folders")
    self._list_name = "ids"
    if isinstance(ids, (str, pathlib.Path)):
      self._list_name = f"list {ids}"
      try:
        ids = splits.read_list(ids)
      except checks.InputError as error:
        problems.extend([str(error)])
        problems.raise_if_any()
    self.ids = tuple(ids)
    if not self.ids:
      problems.add(self._list_name, got="no image", allowed="at least one id")
    problems.raise_if_any()

    self._table, self._known = _label_table(num_classes, label_map) if self.has_labels else (None, None)
    self._sizes = np.zeros((len(self.ids), 2), np.int32)
    if not self._check_present(problems):  # headers of absent files would only say the same again
      self._check_headers(problems)
    problems.raise_if_any()

  def __len__(self) -> int:
    return len(self.ids)

  def image_path(self, row: int) -> pathlib.Path:
    return self.root / self.image_pattern.replace("{id}", self.ids[row])

  def label_path(self, row: int) -> pathlib.Path:
    if self.label_pattern is None:
      raise ValueError(f"{self.root} was opened without label_pattern: it has no masks")
    return self.root / self.label_pattern.replace("{id}", self.ids[row])

  def size(self, row: int) -> tuple[int, int]:
    height, width = self._sizes[row]
    return int(height), int(width)

  def image(self, row: int) -> np.ndarray:
    path = self.image_path(row)
    return _decode(path, "image", lambda image: image.convert("RGB"))

  def label(self, row: int) -> np.ndarray:
    path = self.label_path(row)
    label = _decode(path, "mask", lambda image: image)
    problems = checks.Problems(f"cannot use mask {path}")
    if label.ndim != 2:
      problems.add(
        "pixels",
        got=f"{label.shape[-1]} channels",
        allowed="one channel of class indices (grey or palette PNG)",
        remedy="colour-coded masks must be converted to indices first",
      )
      problems.raise_if_any()
    if label.dtype == np.uint8 and self._known[label].all():
      return self._table[label]
    unknown = [int(value) for value in np.unique(label) if not (0 <= value <= 255 and self._known[int(value)])]
    if unknown:
      problems.add(
        "values",
        got=splits.shorten(unknown, most=10),
        allowed=f"0..{self.num_classes - 1} and {IGNORE_LABEL}",
        remedy=f"map them with label_map, e.g. {{{unknown[0]}: {IGNORE_LABEL}}}, or correct num_classes",
      )
      problems.raise_if_any()
    return self._table[label.astype(np.uint8)]  # 1-bit and 16-bit masks

  def _check_options(self, label_map, problems):
    for name, pattern in (("image_pattern", self.image_pattern), ("label_pattern", self.label_pattern)):
      if pattern is not None and "{id}" not in pattern:
        problems.add(name, got=repr(pattern), allowed="a path with {id} in it, e.g. 'images/{id}.jpg'")
    if not self.has_labels:
      return
    if self.num_classes is None or not 1 <= self.num_classes <= IGNORE_LABEL:
      problems.add("num_classes", got=repr(self.num_classes), allowed=f"1..{IGNORE_LABEL} where there are masks")
      return
    for value, index in label_map.items():
      if not 0 <= value <= 255 or not (0 <= index < self.num_classes or index == IGNORE_LABEL):
        problems.add("label_map", got=f"{{{value}: {index}}}", allowed=f"0..255 -> 0..{self.num_classes - 1} or {IGNORE_LABEL}")

  def _check_present(self, problems) -> bool:
    """Adds what is missing; says whether anything is."""
    missing = False
    repeated = [name for name, count in collections.Counter(self.ids).items() if count > 1]
    if repeated:
      problems.add(self._list_name, got=f"{splits.shorten(repeated)} more than once", allowed="every id once")
    listings: dict[pathlib.Path, frozenset[str]] = {}  # one listing a folder instead of one look a file

    def exists(path: pathlib.Path) -> bool:
      if path.parent not in listings:
        listings[path.parent] = frozenset(os.listdir(path.parent)) if path.parent.is_dir() else frozenset()
      return path.name in listings[path.parent]

    patterns = [("image", self.image_pattern, self.image_path), ("label", self.label_pattern, self.label_path)]
    for what, pattern, path_of in patterns[: 1 + self.has_labels]:
      absent = [row for row in range(len(self)) if not exists(path_of(row))]
      if absent:
        missing = True
        problems.add(
          self._list_name,
          got=f"{len(absent)} of {len(self)} {what} files absent: {splits.shorten([path_of(row) for row in absent])}",
          remedy=_pattern_remedy(self.root, pattern, self.ids[absent[0]], what),
        )
    return missing

  def _check_headers(self, problems):
    for row in range(len(self)):
      image_size = _header_size(self.image_path(row), "image", problems)
      if image_size is None:
        continue
      self._sizes[row] = image_size
      if self.has_labels:
        label_size = _header_size(self.label_path(row), "mask", problems)
        if label_size is not None and label_size != image_size:
          problems.add(
            f"mask {self.label_path(row)}",
            got=f"height x width {label_size[0]} x {label_size[1]}",
            allowed=f"{image_size[0]} x {image_size[1]}, as its image {self.image_path(row)}",
          )


def image_folder(folder: str | pathlib.Path) -> FolderSource:
  """All images of a folder and of those below it, without masks; an image's id is its path below the folder.

  Raises:
    InputError: no such folder, or no image in it.
  """
  folder = pathlib.Path(folder)
  files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
  if not files:
    problems = checks.Problems(f"data in {folder} cannot be used")
    found = "no image" if folder.is_dir() else "no such folder"
    problems.add("folder", got=found, allowed=f"a folder of files ending in {', '.join(IMAGE_SUFFIXES)}")
    problems.raise_if_any()
  return FolderSource(folder, [path.relative_to(folder).as_posix() for path in files], image_pattern="{id}")


class Subset:
  """Some rows of a source, as a source of their own: `Subset(scenes, splits.every_kth(scenes.ids, "1_8"))`.

  Raises:
    InputError: no ids, or ids that the source lacks.
  """

  def __init__(self, source: Source, ids: Sequence[str]):
    row_of = {name: row for row, name in enumerate(source.ids)}
    problems = checks.Problems("cannot take a part of the source")
    unknown = [name for name in ids if name not in row_of]
    if unknown:
      problems.add("ids", got=splits.shorten(unknown), allowed="ids of the source", remedy=checks.nearest(unknown[0], row_of))
    if not ids:
      problems.add("ids", got="none", allowed="at least one")
    problems.raise_if_any()
    self.ids = tuple(ids)
    self.has_labels = source.has_labels
    self._source = source
    self._rows = [row_of[name] for name in ids]

  def __len__(self) -> int:
    return len(self.ids)

  def image(self, row: int) -> np.ndarray:
    return self._source.image(self._rows[row])

  def label(self, row: int) -> np.ndarray:
    return self._source.label(self._rows[row])

  def size(self, row: int) -> tuple[int, int]:
    return self._source.size(self._rows[row])


def _label_table(num_classes: int, label_map: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Stored value -> label, and stored value -> whether it is a label at all."""
  table = np.arange(256, dtype=np.uint8)
  for value, index in label_map.items():
    table[value] = index
  return table, (table < num_classes) | (table == IGNORE_LABEL)


def _decode(path: pathlib.Path, what: str, convert) -> np.ndarray:
  try:
    with Image.open(path) as image:
      return np.asarray(convert(image))
  # PIL reports damaged files by all of these.
  except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
    problems = checks.Problems(f"cannot read {what} {path}")
    problems.add("file", got=f"{type(error).__name__}: {error}", remedy="fetch the file anew, or take its id off the list")
    problems.raise_if_any()


def _header_size(path: pathlib.Path, what: str, problems: checks.Problems) -> tuple[int, int] | None:
  try:
    with Image.open(path) as image:
      return image.height, image.width
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    problems.add(f"{what} {path}", got=f"no readable image ({error})", remedy="fetch it anew, or take its id off the list")
    return None


def _pattern_remedy(root: pathlib.Path, pattern: str, name: str, what: str, most_files: int = 100_000) -> str:
  """Where a file of this id does lie, as a pattern; else what the pattern's own folder holds."""
  found = []
  stem = name.rsplit("/", 1)[-1]
  seen = 0
  for folder, _, files in os.walk(root):
    seen += len(files)
    for file in files:
      if stem in file:
        path = (pathlib.Path(folder) / file).relative_to(root).as_posix()
        before, _, after = path.rpartition(name if name in path else stem)
        found.append(f"{before}{{id}}{after}")
    if seen > most_files:
      break
  near = difflib.get_close_matches(pattern, found, n=1, cutoff=0.0)
  if near:
    return f"for '{name}' there is {what}_pattern '{near[0]}'"
  folder = (root / pattern.replace("{id}", name)).parent
  if not folder.is_dir():
    return f"there is no folder {folder}"
  example = next((entry.name for entry in sorted(folder.iterdir())), None)
  if example is None:
    return f"{folder} is empty"
  pairs = "; one id per line is read, not 'image mask' pairs" if len(name.split()) > 1 else ""
  return f"{folder} holds e.g. {example}{pairs}"
