"""Sources of images: random access by row, pure NumPy and PIL.

A source is anything with the members of `Source`. It hands out images as they are stored; all
randomness is the pipeline's.
"""

from __future__ import annotations

import collections
import concurrent.futures
import difflib
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data import decode, listing, splits
from pseudoseg_jax.data.skipped import Skipped
from pseudoseg_jax.data.splits import Entry

_COLOR_CODE = np.array([1 << 16, 1 << 8, 1], np.int32)  # red, green, blue -> one number
_NUM_THREADS = 16  # readers of headers: they wait for a disk or a network rather than for a core


class Source(Protocol):
  """Images, with or without masks.

  ids: the images' names, by row.
  has_labels: whether `label` may be asked.
  channels: C, 3 for RGB.
  dtype: of images, np.uint8, or np.float32 where files hold more than 8 bits; the scale is 0..255
    in both.
  image: row -> [h, w, C].
  label: row -> uint8 [h, w], 0..K-1 or IGNORE_LABEL.
  size: row -> (h, w), without decoding.
  """

  ids: tuple[str, ...]
  has_labels: bool
  channels: int
  dtype: type[np.generic]

  def __len__(self) -> int: ...
  def image(self, row: int) -> np.ndarray: ...
  def label(self, row: int) -> np.ndarray: ...
  def size(self, row: int) -> tuple[int, int]: ...


class FolderSource:
  """A source of images and masks in folders.

  Files are found by id or by the paths that a list gives.

  Masks are read as stored indices, of which a palette is ignored, or by color. Files are of PIL's
  formats or .npy arrays (never pickled), and named in any spelling that `listing.Files.find` knows:
  "a.jpg" may be a.JPG or a.jpeg.

  Args:
    root: the data set's folder.
    ids: image ids, entries of a list, or the path of a list file (see `read_entries`).
    image_pattern: path below root, with `{id}` for the id, e.g. "JPEGImages/{id}.jpg"; None where
      entries give the paths.
    label_pattern: likewise for masks.
    num_classes: K; without it no mask is ever touched.
    label_map: stored mask value -> class index or IGNORE_LABEL, e.g. {11: 255}; other values stay
      as they are.
    mask_colors: (red, green, blue) -> class index or IGNORE_LABEL, for masks drawn in colors; see
      `Classes.by_color`.
    reduce_zero_label: stored 0 has no label, stored k is class k - 1 (ADE20K). label_map, where it
      names a value, comes first.
    ignore_index: the stored value of pixels without a label.
    channels, max_value: of images, see `decode.read_image`.
    exif_orientation: of images and masks, "apply" or "ignore"; see `decode.read_image`.
    skipped: files that show at construction that they cannot be read are noted there, unless all of
      them do. Their entries stay: a run that goes on when a file was damaged has the same images by
      number. None: they are errors.
    masks_only: there are no images: of the source, masks and their sizes may be asked.
    check: False opens without looking at any file; whatever is wrong then shows when it is read.

  Raises:
    InputError: at construction, everything that shows without decoding a pixel, all at once:
      missing folder, empty list, absent files, files that are no images, masks of another size than
      their images. At reading: a file that cannot be decoded, an image of other channels, a mask of
      another form or with values that are no class.
  """

  def __init__(
    self,
    root: str | pathlib.Path,
    ids: Sequence[str | Entry] | str | pathlib.Path,
    *,
    image_pattern: str | None = None,
    label_pattern: str | None = None,
    num_classes: int | None = None,
    label_map: Mapping[int, int] | None = None,
    mask_colors: Mapping[tuple[int, int, int], int] | None = None,
    reduce_zero_label: bool = False,
    ignore_index: int = IGNORE_LABEL,
    channels: int = 3,
    max_value: float = 0.0,
    exif_orientation: str = "apply",
    masks_only: bool = False,
    skipped: Skipped | None = None,
    check: bool = True,
  ):
    self.root = pathlib.Path(root)
    self.image_pattern = image_pattern
    self.label_pattern = label_pattern
    self.has_labels = label_pattern is not None or num_classes is not None
    self._kinds = ("image", "label")[masks_only : 1 + self.has_labels]
    self.num_classes = num_classes
    self.channels = channels
    self.max_value, self.exif_orientation = max_value, exif_orientation
    problems = checks.Problems(f"data in {self.root} cannot be used")
    self._check_options(
      label_map or {}, bool(mask_colors), reduce_zero_label, ignore_index, problems
    )
    if not self.root.is_dir():
      problems.add(
        "root", got="no such folder", remedy="give the folder that holds the images' folders"
      )
    self._list_name = "ids"
    if isinstance(ids, (str, pathlib.Path)):
      self._list_name = f"list {ids}"
      try:
        ids = (
          read_entries(self.root, ids, image_pattern, label_pattern) if not problems.items else ()
        )
      except checks.InputError as error:
        problems.extend([str(error)])
      problems.raise_if_any()
    entries = (entry if isinstance(entry, Entry) else Entry(entry) for entry in ids)
    self.entries = tuple(
      entry if self.has_labels else entry._replace(mask=None) for entry in entries
    )
    self.ids = tuple(entry.id for entry in self.entries)
    self._check_entries(problems)
    problems.raise_if_any()

    files = listing.Files()
    self._label_paths = (
      self._found(files, self.label_pattern, [entry.mask for entry in self.entries])
      if self.has_labels
      else []
    )
    self._image_paths = self._label_paths
    if not masks_only:
      self._image_paths = self._found(
        files, self.image_pattern, [entry.image for entry in self.entries]
      )
    self._colors = _color_table(mask_colors) if mask_colors else None
    if self.has_labels:
      self._table = _label_table(num_classes, label_map or {}, reduce_zero_label, ignore_index)
    self._sizes = np.zeros((len(self.ids), 2), np.int32)  # 0: not looked up yet
    self.dtype = np.uint8
    if check:
      # Headers of absent files would only say the same again.
      if self._check_present(files, problems):
        self._check_headers(problems, skipped)
      problems.raise_if_any()
    else:
      header = self._header(self.image_path(0))
      self.dtype = header.dtype if isinstance(header, decode.Header) else np.uint8

  def __len__(self) -> int:
    return len(self.ids)

  def image_path(self, row: int) -> pathlib.Path:
    return self._image_paths[row]

  def label_path(self, row: int) -> pathlib.Path:
    if not self.has_labels:
      raise ValueError(f"{self.root} was opened without label_pattern: it has no masks")
    return self._label_paths[row]

  def size(self, row: int) -> tuple[int, int]:
    if not self._sizes[row].any():
      header = self._header(self.image_path(row))
      if not isinstance(header, decode.Header):
        decode.raise_unreadable("image", self.image_path(row), header)
      self._sizes[row] = header.size
    height, width = self._sizes[row]
    return int(height), int(width)

  def image(self, row: int) -> np.ndarray:
    image = decode.read_image(
      self.image_path(row),
      self.channels,
      exif_orientation=self.exif_orientation,
      max_value=self.max_value,
    )
    if image.dtype != np.uint8 and self.dtype == np.uint8:
      problems = checks.Problems(f"cannot use image {self.image_path(row)}")
      problems.add(
        "file",
        got="more than 8 bits",
        allowed="8 bits, as in the first image",
        remedy="store all images alike",
      )
      problems.raise_if_any()
    return image.astype(self.dtype, copy=False)

  def label(self, row: int) -> np.ndarray:
    path = self.label_path(row)
    if self._colors is not None:
      return self._label_of_colors(path)
    label = decode.read_mask(path, exif_orientation=self.exif_orientation)
    problems = checks.Problems(f"cannot use mask {path}")
    table, known = self._table
    if label.dtype == np.uint8 and known[label].all():
      return table[label]
    counts = dict(
      zip(*(found.tolist() for found in np.unique(label, return_counts=True)), strict=True)
    )
    unknown = [value for value in counts if not (0 <= value < len(known) and known[int(value)])]
    if unknown:
      problems.add(
        "values",
        got=splits.shorten([f"{value} on {counts[value]} pixels" for value in unknown], most=10),
        allowed=f"those of the {self.num_classes} classes, 0..{self.num_classes - 1} and {IGNORE_LABEL} after mapping",
        remedy=f"if they mean no label: config.data.label_map={unknown[0]}:{IGNORE_LABEL}; else add classes: num_classes is {self.num_classes}",
      )
      problems.raise_if_any()
    return table[label.astype(np.intp)]  # 1-bit and 16-bit masks

  def _label_of_colors(self, path: pathlib.Path) -> np.ndarray:
    pixels = decode.read_color_mask(path, exif_orientation=self.exif_orientation).astype(np.int32)
    codes, labels = self._colors
    stored = pixels @ _COLOR_CODE
    place = np.minimum(np.searchsorted(codes, stored), len(codes) - 1)
    unknown = codes[place] != stored
    if unknown.any():
      colors = collections.Counter(stored[unknown].tolist()).most_common()
      shown = [
        f"({code >> 16}, {code >> 8 & 255}, {code & 255}) on {count} pixels"
        for code, count in colors
      ]
      problems = checks.Problems(f"cannot use mask {path}")
      problems.add(
        "colors",
        got=splits.shorten(shown, most=10),
        allowed="the colors of the classes",
        remedy="add them to the file of classes; a line `index void r g b` is a color without a label",
      )
      problems.raise_if_any()
    return labels[place]

  def _check_options(self, label_map, has_colors, reduce_zero_label, ignore_index, problems):
    if self.image_pattern is not None and self.image_pattern.count("{id}") != 1:
      allowed = "a path with one {id} in it, e.g. 'images/{id}.jpg'"
      problems.add("image_pattern", got=repr(self.image_pattern), allowed=allowed)
    if self.label_pattern is not None and "{id}" not in self.label_pattern:
      problems.add(
        "label_pattern",
        got=repr(self.label_pattern),
        allowed="a path with {id} in it, e.g. 'masks/{id}.png'",
      )
    if self.channels < 1:
      problems.add("channels", got=self.channels, allowed="1 or more")
    if not self.has_labels:
      return
    if self.num_classes is None or not 1 <= self.num_classes <= IGNORE_LABEL:
      problems.add(
        "num_classes",
        got=repr(self.num_classes),
        allowed=f"1..{IGNORE_LABEL} where there are masks",
      )
      return
    if has_colors and (label_map or reduce_zero_label):
      problems.add(
        "mask_colors",
        got="label_map or reduce_zero_label as well",
        allowed="one of them: a color names its class",
      )
    if not 0 <= ignore_index < decode.STORED_VALUES:
      problems.add("ignore_index", got=ignore_index, allowed=f"0..{decode.STORED_VALUES - 1}")
    for value, index in label_map.items():
      if not 0 <= value < decode.STORED_VALUES or not (
        0 <= index < self.num_classes or index == IGNORE_LABEL
      ):
        allowed = f"0..{decode.STORED_VALUES - 1} -> 0..{self.num_classes - 1} or {IGNORE_LABEL}"
        problems.add("label_map", got=f"{{{value}: {index}}}", allowed=allowed)

  def _check_entries(self, problems):
    if not self.ids:
      problems.add(self._list_name, got="no image", allowed="at least one id")
    repeated = [name for name, count in collections.Counter(self.ids).items() if count > 1]
    if repeated:
      problems.add(
        self._list_name, got=f"{splits.shorten(repeated)} more than once", allowed="every id once"
      )
    for what in self._kinds:
      without = [
        entry.id
        for entry in self.entries
        if (entry.image if what == "image" else entry.mask) is None
      ]
      if without and getattr(self, f"{what}_pattern") is None:
        remedy = f"give {what}_pattern, or a list of lines `image mask`"
        problems.add(
          self._list_name, got=f"no {what} file for {splits.shorten(without)}", remedy=remedy
        )

  def _found(
    self, files: listing.Files, pattern: str | None, listed: Sequence[str | None]
  ) -> list[pathlib.Path]:
    """Finds the files of one kind.

    An absent file gets the path where it should be.
    """
    paths = []
    for name, path in zip(self.ids, listed, strict=True):
      wanted = self.root / (path or pattern.replace("{id}", name))
      found = files.find(wanted)
      paths.append(found[0] if len(found) == 1 else wanted)
    return paths

  def _header(self, path: pathlib.Path) -> decode.Header | Exception:
    return decode.header(path, exif_orientation=self.exif_orientation, max_value=self.max_value)

  def _mask_header(self, path: pathlib.Path) -> decode.Header | Exception:
    return decode.mask_header(path, exif_orientation=self.exif_orientation)

  def _check_present(self, files: listing.Files, problems: checks.Problems) -> bool:
    """Adds a problem for what is missing; returns whether all is there."""
    whole = True
    for what in self._kinds:
      pattern, paths = getattr(self, f"{what}_pattern"), getattr(self, f"_{what}_paths")
      missing = [
        (row, files.why_absent(path)) for row, path in enumerate(paths) if path not in files
      ]
      whole = whole and not missing
      for row, why in missing:
        if why:
          problems.add(f"{what} file {paths[row]}", got=why, allowed="one file")
      absent = [row for row, why in missing if not why]
      if absent:
        problems.add(
          self._list_name,
          got=f"{len(absent)} of {len(self)} {what} files absent: {splits.shorten([paths[row] for row in absent])}",
          remedy=self._pattern_remedy(what, pattern, self.ids[absent[0]])
          if pattern
          else "paths are those below root",
        )
        listing.check_locale([self.ids[row] for row in absent], problems)
    return whole

  def _check_headers(self, problems: checks.Problems, skipped: Skipped | None):
    rows = range(len(self))
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      images = list(pool.map(self._header, self._image_paths))
      masks = (
        list(pool.map(self._mask_header, self._label_paths))
        if self.has_labels
        else [None] * len(self)
      )
    damaged = {
      row for row in rows if isinstance(images[row], Exception) or isinstance(masks[row], Exception)
    }
    noted = skipped is not None and len(damaged) < len(self)
    for row, image, mask in zip(rows, images, masks, strict=True):
      found = {"image": ("image", self.image_path, image), "label": ("mask", self.label_path, mask)}
      for what, path_of, header in (found[kind] for kind in self._kinds):
        if isinstance(header, Exception) and noted:
          skipped.add(path_of(row), str(header))
        elif isinstance(header, Exception):
          problems.add(f"{what} {path_of(row)}", **header.problem)
      if not isinstance(image, decode.Header):
        continue
      self._sizes[row] = image.size
      if image.dtype == np.float32:
        self.dtype = np.float32
      if isinstance(mask, decode.Header) and mask.size != image.size:
        problems.add(
          f"mask {self.label_path(row)}",
          got=f"height x width {mask.size[0]} x {mask.size[1]}",
          allowed=f"{image.size[0]} x {image.size[1]}, as its image {self.image_path(row)}",
          remedy=self.orientation_remedy(row) or None,
        )

  def orientation_in_words(self, row: int) -> str:
    """Describes an image's EXIF orientation, and what is done with it.

    "" for an image whose file has none.
    """
    header = self._header(self.image_path(row))
    if not isinstance(header, decode.Header) or header.orientation == 1:
      return ""
    done = {
      "apply": "applied: the picture is taken as viewers show it",
      "ignore": "ignored: the pixels are taken as stored",
    }
    return f"orientation {header.orientation}, {done[self.exif_orientation]}"

  def orientation_remedy(self, row: int) -> str:
    """Returns the remedy for an image and a mask of unlike sizes, or "".

    It applies where the other treatment of EXIF orientations makes the sizes equal.
    """
    other = {"apply": "ignore", "ignore": "apply"}[self.exif_orientation]
    image, mask = (
      decode.header(path, exif_orientation=other)
      for path in (self.image_path(row), self.label_path(row))
    )
    if (
      not (isinstance(image, decode.Header) and isinstance(mask, decode.Header))
      or image.size != mask.size
    ):
      return ""
    drawn = {"apply": "turned as", "ignore": "not turned as"}[self.exif_orientation]
    return f"the image is {drawn} its EXIF orientation says, the mask otherwise: config.data.exif_orientation={other}"

  def _pattern_remedy(self, what: str, pattern: str, name: str, most_files: int = 100_000) -> str:
    """Describes where a file of this id does lie, as a pattern.

    If there is none, describes what the pattern's own folder holds.
    """
    found = []
    stem = name.rsplit("/", 1)[-1]
    for file in itertools.islice(listing.walk(self.root), most_files):
      if stem in listing.normalized(file.name):
        path = listing.normalized(file.relative_to(self.root).as_posix())
        before, _, after = path.rpartition(name if name in path else stem)
        found += {f"{before}{{id}}{after}"} - {self.image_pattern}  # an image is no mask
    near = difflib.get_close_matches(pattern, found, n=1, cutoff=0.0)
    if near:
      return f"for '{name}' there is {what}_pattern '{near[0]}'"
    folder = (self.root / pattern.replace("{id}", name)).parent
    if not folder.is_dir():
      return f"there is no folder {folder}"
    example = next(listing.walk(folder), None)
    if example is None:
      return f"{folder} holds no file"
    return f"{folder} holds e.g. {example.relative_to(folder)}"


def read_entries(
  root: str | pathlib.Path,
  path: str | pathlib.Path,
  image_pattern: str | None = None,
  label_pattern: str | None = None,
) -> tuple[Entry, ...]:
  """Reads a list file (`splits.read_entries`) and fits its entries to a tree.

  A path that exists, below root or absolute, is kept; without a pattern in any case. In place of
  the others the patterns hold. A mask must also end as label_pattern does: another ending is
  another coding (Cityscapes: labelTrainIds for labelIds). Ids that lack folders, as in flattened
  data sets, are completed where the tree has one such image.

  Raises:
    InputError: a list that cannot be read.
  """
  root = pathlib.Path(root)
  files = listing.Files()

  def existing(listed: str | None, pattern: str | None) -> str | None:
    candidates = [] if listed is None else [listed.lstrip("/"), listed]
    found = next((candidate for candidate in candidates if files.find(root / candidate)), None)
    return found or (candidates[0] if candidates and pattern is None else None)

  entries = []
  for entry in splits.read_entries(path, image_pattern):
    other_coding = label_pattern is not None and not (entry.mask or "").endswith(
      label_pattern.rpartition("{id}")[2]
    )
    mask = None if other_coding else existing(entry.mask, label_pattern)
    entries.append(Entry(listing.normalized(entry.id), existing(entry.image, image_pattern), mask))
  if image_pattern is None:
    return tuple(entries)
  if any(
    entry.image is None and not files.find(root / image_pattern.replace("{id}", entry.id))
    for entry in entries
  ):
    entries = splits.complete_ids(
      entries, find_ids(root, image_pattern, [label_pattern] if label_pattern else [])
    )
  return tuple(entries)


def find_ids(
  root: str | pathlib.Path, image_pattern: str, others: Sequence[str] = ()
) -> tuple[str, ...]:
  """Finds the ids of all files that fit a pattern.

  See `listing.fitting`.
  """
  return listing.fitting(root, image_pattern, others).ids


def image_folder(folder: str | pathlib.Path, **options: Any) -> FolderSource:
  """Opens all images of a folder and of those below it, without masks.

  An image's id is its path below the folder.

  Args:
    options: of FolderSource.

  Raises:
    InputError: no such folder, or no image in it.
  """
  folder = pathlib.Path(folder)
  left_out = []
  files = listing.image_files(folder, left_out)
  if not files:
    problems = checks.Problems(f"data in {folder} cannot be used")
    unusable = [f"{item.shown_path()} ({item.why})" for item in left_out[:3]]
    got = ", ".join(["no image", *unusable]) if folder.is_dir() else "no such folder"
    problems.add(
      "folder", got=got, allowed=f"a folder of files ending in {', '.join(listing.IMAGE_SUFFIXES)}"
    )
    problems.raise_if_any()
  entries = [
    Entry(listing.normalized(path.relative_to(folder).as_posix()), image=str(path.absolute()))
    for path in files
  ]
  return FolderSource(folder, entries, **options)


class Subset:
  """Some rows of a source, as a source of their own.

  For example `Subset(scenes, splits.part(scenes.ids, "1_8"))`.

  Raises:
    InputError: no ids, or ids that the source lacks.
  """

  def __init__(self, source: Source, ids: Sequence[str]):
    row_of = {name: row for row, name in enumerate(source.ids)}
    problems = checks.Problems("cannot take a part of the source")
    unknown = [name for name in ids if name not in row_of]
    if unknown:
      problems.add(
        "ids",
        got=splits.shorten(unknown),
        allowed="ids of the source",
        remedy=checks.nearest(unknown[0], row_of),
      )
    if not ids:
      problems.add("ids", got="none", allowed="at least one")
    problems.raise_if_any()
    self.ids = tuple(ids)
    self.has_labels = source.has_labels
    self.channels = source.channels
    self.dtype = source.dtype
    self._source = source
    self._rows = [row_of[name] for name in ids]
    for name in ("entries", "digests"):
      if hasattr(source, name):
        setattr(self, name, tuple(getattr(source, name)[row] for row in self._rows))

  def __len__(self) -> int:
    return len(self.ids)

  def image(self, row: int) -> np.ndarray:
    return self._source.image(self._rows[row])

  def label(self, row: int) -> np.ndarray:
    return self._source.label(self._rows[row])

  def size(self, row: int) -> tuple[int, int]:
    return self._source.size(self._rows[row])

  # Properties, so that a source without files leads to one that has no such attribute either.
  @property
  def image_path(self) -> Callable[[int], pathlib.Path]:
    path = self._source.image_path
    return lambda row: path(self._rows[row])

  @property
  def label_path(self) -> Callable[[int], pathlib.Path]:
    path = self._source.label_path
    return lambda row: path(self._rows[row])


class Joined:
  """The images of one source, then those of another.

  It has labels if both have. Ids may stand there twice.

  Raises:
    InputError: sources of unlike channels.
  """

  def __init__(self, first: Source, second: Source):
    if first.channels != second.channels:
      problems = checks.Problems("cannot join two sources")
      problems.add(
        "channels", got=f"{first.channels} and {second.channels}", allowed="the same number"
      )
      problems.raise_if_any()
    self.ids = (*first.ids, *second.ids)
    self.has_labels = first.has_labels and second.has_labels
    self.channels = first.channels
    self.dtype = np.uint8 if first.dtype == second.dtype == np.uint8 else np.float32
    self._first, self._second = first, second

  def __len__(self) -> int:
    return len(self.ids)

  def image(self, row: int) -> np.ndarray:
    source, row = self._at(row)
    return source.image(row).astype(self.dtype, copy=False)

  def label(self, row: int) -> np.ndarray:
    source, row = self._at(row)
    return source.label(row)

  def size(self, row: int) -> tuple[int, int]:
    source, row = self._at(row)
    return source.size(row)

  @property
  def image_path(self) -> Callable[[int], pathlib.Path]:
    first, second = self._first.image_path, self._second.image_path
    return lambda row: first(row) if row < len(self._first) else second(row - len(self._first))

  @property
  def label_path(self) -> Callable[[int], pathlib.Path]:
    first, second = self._first.label_path, self._second.label_path
    return lambda row: first(row) if row < len(self._first) else second(row - len(self._first))

  def _at(self, row: int) -> tuple[Source, int]:
    return (self._first, row) if row < len(self._first) else (self._second, row - len(self._first))


class PseudoLabels:
  """Images of a source with the labels that `export_labels` wrote for them.

  The labels are FOLDER/labels/ID.png. The source's own masks, if it has any, are never opened.

  Args:
    folder: of export_labels, which has finished (manifest.json records it).
    class_names: the K classes that the labels must be of.
    ids: those of the source that count; None = all.

  Raises:
    InputError: at construction, all at once: no such folder, an export that is unfinished or of
      other classes, absent or unreadable labels, labels of another size than their images. At
      reading: values that are neither a class nor IGNORE_LABEL.
  """

  has_labels = True

  def __init__(
    self,
    source: Source,
    folder: str | pathlib.Path,
    class_names: Sequence[str],
    ids: Sequence[str] | None = None,
  ):
    self._images = source if ids is None else Subset(source, ids)
    self.ids, self.channels, self.dtype = (
      self._images.ids,
      self._images.channels,
      self._images.dtype,
    )
    self.image, self.size = self._images.image, self._images.size
    check_labels_folder(folder, class_names)
    problems = checks.Problems(f"cannot use pseudo labels {folder}")
    labels = "labels/{id}.png"
    stems = [splits.without_suffix(name) for name in self.ids]
    try:
      self._labels = FolderSource(
        folder, stems, label_pattern=labels, num_classes=len(class_names), masks_only=True
      )
    except checks.InputError as error:
      problems.add(
        "labels",
        got=str(error).replace("\n", "\n  "),
        remedy="export the labels of these images, or list fewer images",
      )
      problems.raise_if_any()
    self.label, self.label_path = self._labels.label, self._labels.label_path
    self._check_sizes(problems)
    problems.raise_if_any()

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def image_path(self) -> Callable[[int], pathlib.Path]:
    return self._images.image_path  # which a source without files lacks

  def _check_sizes(self, problems: checks.Problems) -> None:
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      sizes = pool.map(self.size, range(len(self)))
      for row, size in enumerate(sizes):
        found = self._labels.size(row)
        if found != size:
          got, allowed = (f"{height} x {width}" for height, width in (found, size))
          problems.add(
            f"label {self._labels.label_path(row)}",
            got=f"height x width {got}",
            allowed=f"{allowed}, as its image",
          )


def check_labels_folder(folder: str | pathlib.Path, class_names: Sequence[str]) -> None:
  """Raises InputError unless the folder holds a finished export of labels.

  The labels must be of these classes.
  """
  folder = pathlib.Path(folder)
  problems = checks.Problems(f"cannot use pseudo labels {folder}")
  begin = "make it with: python -m pseudoseg_jax.export_labels --workdir=WORKDIR --out=FOLDER"
  go_on = "the command that began it goes on from there"
  try:
    manifest = json.loads((folder / "manifest.json").read_text())
    finished, named = manifest["finished"], list(manifest["classes"])
  except FileNotFoundError:
    is_begun = (folder / "labels").is_dir()
    got = (
      "no manifest.json: an export that did not finish" if is_begun else "no such folder of labels"
    )
    problems.add("folder", got=got, remedy=go_on if is_begun else begin)
  except (OSError, ValueError, KeyError, TypeError) as error:
    problems.add("manifest.json", got=f"{type(error).__name__}: {error}", remedy=begin)
  else:
    if finished is not True:
      problems.add("manifest.json", got="an export that did not finish", remedy=go_on)
    if named != list(class_names) and sorted(map(str, named)) == sorted(class_names):
      index = next(
        index
        for index, (ours, theirs) in enumerate(zip(class_names, named, strict=True))
        if ours != theirs
      )
      got, allowed = (f"'{names[index]}' as class {index}" for names in (named, class_names))
      remedy = "give config.data.classes in the order of the network that made the labels, or export them anew"
      allowed = f"{allowed}, as in the data"
      problems.add(
        "manifest.json", got=f"the classes in another order, {got}", allowed=allowed, remedy=remedy
      )
    elif named != list(class_names):
      got, allowed = (splits.shorten(names) for names in (named, class_names))
      problems.add(
        "manifest.json", got=f"labels of the classes {got}", allowed=f"those of the data: {allowed}"
      )
  problems.raise_if_any()


def _label_table(
  num_classes: int, label_map: Mapping[int, int], reduce_zero_label: bool, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
  """Builds the tables that convert stored values to labels.

  Stored value -> label uint8, and stored value -> whether it is a label at all; [65536] each.
  """
  labels = np.arange(decode.STORED_VALUES) - reduce_zero_label
  labels[labels < 0] = IGNORE_LABEL
  known = (labels < num_classes) | (np.arange(decode.STORED_VALUES) < reduce_zero_label)
  for value, index in [(ignore_index, IGNORE_LABEL), *label_map.items()]:
    labels[value], known[value] = index, True
  return labels.astype(np.uint8), known


def _color_table(mask_colors: Mapping[tuple[int, int, int], int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns sorted color codes and the label of each."""
  entries = sorted((int(np.dot(color, _COLOR_CODE)), label) for color, label in mask_colors.items())
  codes, labels = zip(*entries, strict=True)
  return np.array(codes, np.int32), np.array(labels, np.uint8)
