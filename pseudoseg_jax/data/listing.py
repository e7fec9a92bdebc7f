"""The files of a data set: one rule for every place that lists or seeks them.

Links to files and to folders are followed, and a folder is entered once, however many links lead to
it. What is hidden (".NAME", among it macOS' "._NAME.jpg") or kept by a system beside the files
("__MACOSX") is none of them. Endings count in any case, and .jpg is .jpeg, .tif is .tiff. Names are
the same however their accents are composed (macOS: NFD). The order is that of the names.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pseudoseg_jax import checks

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Not read unasked.
_OTHER_IMAGES = (
  ".avif",
  ".gif",
  ".heic",
  ".heif",
  ".jfif",
  ".jp2",
  ".jpe",
  ".npy",
  ".pgm",
  ".ppm",
  ".tga",
)
_SAME_FORMAT = {".jpeg": ".jpg", ".tiff": ".tif"}
# by macOS' zip files, Synology's disks, Windows.
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


class LeftOut(NamedTuple):
  """A path that is left out of the files.

  path: of what is not among the files. why: in words, e.g. "a link to gone.jpg, which is not
  there".
  """

  path: pathlib.Path
  why: str

  def shown_path(self) -> str:
    """Returns the path as a printable text, whatever bytes its names are of."""
    return str(self.path).encode(errors="backslashreplace").decode()


def image_files(
  folder: str | pathlib.Path, left_out: list[LeftOut] | None = None
) -> list[pathlib.Path]:
  """Lists the images of a folder and of all below it, in order of name.

  None where there is no such folder.

  Args:
    left_out: gains what may be an image and is none of them: other formats, and what could not be
      followed or entered.
  """
  files = files_below(folder, left_out)
  if left_out is not None:
    left_out += [
      LeftOut(path, "does not end as an image")
      for path in files
      if path.suffix.lower() in _OTHER_IMAGES
    ]
  return [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def files_below(
  folder: str | pathlib.Path, left_out: list[LeftOut] | None = None
) -> list[pathlib.Path]:
  """Lists the files of a folder and of all below it, in order of name.

  Args:
    left_out: gains what could not be followed or entered.
  """
  return sorted(
    walk(folder, left_out), key=lambda path: (normalized(str(path)).split(os.sep), str(path))
  )


def walk(
  folder: str | pathlib.Path, left_out: list[LeftOut] | None = None
) -> Iterator[pathlib.Path]:
  """Yields `files_below` one by one, in the same order on every machine.

  Real folders come before linked ones.
  """
  left_out = [] if left_out is None else left_out
  entered, linked = set(), [str(folder)] if os.path.isdir(folder) else []
  while linked:
    waiting = [(path, os.path.realpath(path)) for path in sorted(linked, reverse=True)]
    linked = []
    while waiting:
      path, real = waiting.pop()
      if real in entered:
        continue
      entered.add(real)
      folders = []
      for entry in _entries(path, left_out):
        kind = _strange_name(entry.name) or _kind(entry)
        if kind == "file":
          yield pathlib.Path(entry.path)
        elif kind != "a folder":
          left_out.append(LeftOut(pathlib.Path(entry.path), kind))
        elif entry.is_symlink():
          linked.append(entry.path)
        else:
          folders.append((entry.path, os.path.join(real, entry.name)))
      waiting += reversed(folders)


def _entries(folder: str, left_out: list[LeftOut]) -> list[os.DirEntry]:
  """Lists what a folder holds that is not hidden, by name."""
  try:
    with os.scandir(folder) as entries:
      shown = [entry for entry in entries if not _is_hidden(entry.name)]
    return sorted(shown, key=lambda entry: (normalized(entry.name), entry.name))
  except OSError as error:
    left_out.append(
      LeftOut(pathlib.Path(folder), f"a folder that cannot be read ({error.strerror})")
    )
    return []


def _kind(entry: os.DirEntry) -> str:
  """Returns what an entry is: "file", "a folder", or why it is neither."""
  try:
    if entry.is_dir():
      return "a folder"
    if entry.is_file():
      return "file"
  except OSError as error:
    return f"a link that leads nowhere ({error.strerror})"
  return (
    f"a link to {os.readlink(entry.path)}, which is not there" if entry.is_symlink() else "no file"
  )


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name in _OF_SYSTEMS


def _strange_name(name: str) -> str:
  """Explains why a name cannot be in a list, or be an id; else ""."""
  is_text = name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)
  return "" if is_text else "its name is not UTF-8"


def normalized(name: str) -> str:
  """Composes the accents of a name (NFC), as ids have them."""
  return name if name.isascii() else unicodedata.normalize("NFC", name)


def check_locale(names: Iterable[object], problems: checks.Problems) -> None:
  """Adds a problem where Python's encoding cannot represent the names.

  Such an encoding results from LC_ALL=C with PYTHONUTF8=0.
  """
  encoding = sys.getfilesystemencoding()
  foreign = [] if encoding == "utf-8" else [str(name) for name in names if not str(name).isascii()]
  if foreign:
    problems.add(
      "names of files",
      got=f"{encoding} as the locale's encoding, in which {ascii(foreign[0])} cannot be found",
      allowed="utf-8",
      remedy="set PYTHONUTF8=1 or LC_ALL=C.UTF-8",
    )


class Pattern:
  """The place of files of ids: a path with `{id}` in it.

  For example "images/{id}.jpg". An id may hold folders.

  folder: the deepest folder that all these files lie in.
  rank: of two patterns that a file fits, it belongs to that of the higher rank, the narrower one:
    "masks/{id}.png" before "{id}.png", "{id}_mask.png" before "{id}.png".
  """

  def __init__(self, root: str | pathlib.Path, pattern: str):
    path = (pathlib.Path(root) / pattern).as_posix()
    self.folder = pathlib.Path(Files().folder(os.path.dirname(path.partition("{id}")[0])))
    stem, suffix = os.path.splitext(normalized(path))
    if "{id}" in suffix:
      stem, suffix = stem + suffix, ""
    before, *after = map(re.escape, stem.split("{id}"))
    same = (
      [other for other in (*IMAGE_SUFFIXES, suffix) if _format(other) == _format(suffix)]
      if suffix
      else [""]
    )
    endings = "|".join(map(re.escape, same))
    self._expression = re.compile(
      f"{before}(?P<id>.+){'(?P=id)'.join(after)}(?i:{endings})", re.DOTALL
    )
    self.rank = (len(self.folder.parts), len(path.replace("{id}", "")))

  def id_of(self, path: str) -> str | None:
    """Returns the id of a file, given its `normalized` path.

    None for one that does not fit.
    """
    found = self._expression.fullmatch(path)
    return found and found["id"]


class Fitting(NamedTuple):
  """The files that fit a pattern.

  ids: of all files that fit a pattern, in the order of their paths. left_out: images in its folder
  that are none of them.
  """

  ids: tuple[str, ...]
  left_out: tuple[LeftOut, ...]


def fitting(root: str | pathlib.Path, pattern: str, others: Sequence[str] = ()) -> Fitting:
  """Finds what fits a pattern below root, in its folder and in all below it.

  Args:
    others: patterns of what else lies there, as masks; what belongs to them (see `Pattern.rank`) is
      not left out.

  Raises:
    InputError: names of files that the locale cannot spell.
  """
  own = Pattern(root, pattern)
  rivals = [Pattern(root, other) for other in others if other != pattern]
  left_out: list[LeftOut] = []
  found: dict[str, list[pathlib.Path]] = {}
  for path in files_below(own.folder, left_out):
    text = normalized(path.as_posix())
    name = own.id_of(text)
    ranks = [rival.rank for rival in rivals if rival.id_of(text) is not None]
    if name is not None and own.rank >= max(ranks, default=own.rank):
      found.setdefault(name, []).append(path)
    elif not ranks and path.suffix.lower() in (*IMAGE_SUFFIXES, *_OTHER_IMAGES):
      left_out.append(LeftOut(path, f"does not fit {pattern}"))
  problems = checks.Problems(f"files below {own.folder} cannot be used")
  check_locale([path.name for path, _ in left_out], problems)
  problems.raise_if_any()
  for name, paths in found.items():
    exact = pathlib.Path(root) / pattern.replace("{id}", name)
    if len(paths) > 1 and exact in paths:  # else nothing says which: see Files.find
      left_out += [
        LeftOut(path, f"{exact.name} has the same id") for path in paths if path != exact
      ]
  ids = sorted(found, key=lambda name: normalized(found[name][0].as_posix()))
  return Fitting(tuple(ids), tuple(left_out))


def _format(suffix: str) -> str:
  return _SAME_FORMAT.get(suffix.lower(), suffix.lower())


class Files:
  """An index of files: one listing a folder instead of one look a file."""

  def __init__(self):
    self._kinds: dict[str, dict[str, str]] = {}  # by folder: names, and what they are (see `_kind`)
    # by folder: names by what is the same in all spellings of one.
    self._spellings: dict[str, dict[str, list[str]]] = {}

  def __contains__(self, path: str | pathlib.Path) -> bool:
    return len(self.find(path)) == 1

  def find(self, path: str | pathlib.Path) -> list[pathlib.Path]:
    """Finds the file of this path, or those that it names in another spelling.

    Another spelling has an ending in another case or another one of the same format, or accents
    composed otherwise. It counts only where no file has this very path. Several: nothing determines
    which one is meant.
    """
    folder, name = os.path.split(path)
    folder = self.folder(folder)
    if self._listed(folder).get(name) == "file":
      return [pathlib.Path(folder, name)]
    if folder not in self._spellings:
      spellings = self._spellings[folder] = {}
      for other, kind in self._listed(folder).items():
        if kind == "file":
          spellings.setdefault(_spelling(other), []).append(other)
    return [
      pathlib.Path(folder, other)
      for other in sorted(self._spellings[folder].get(_spelling(name), ()))
    ]

  def why_absent(self, path: str | pathlib.Path) -> str:
    """Explains why `find` did not find one file.

    "" where no more is known than that there is none.
    """
    found = self.find(path)
    if len(found) == 1:
      return ""
    if found:
      return f"several files of this id: {', '.join(other.name for other in found)}"
    folder, name = os.path.split(path)
    folder = self.folder(folder)
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
      return f"in folder {folder}, which cannot be read"
    return self._listed(folder).get(name, "")

  def folder(self, folder: str) -> str:
    """Returns the path of a folder as it is spelled on the disk."""
    if folder.isascii() or os.path.isdir(folder):
      return folder
    above, name = os.path.split(folder)
    above = self.folder(above)
    same = [other for other in self._listed(above) if normalized(other) == normalized(name)]
    return os.path.join(above, same[0]) if len(same) == 1 else folder

  def _listed(self, folder: str) -> dict[str, str]:
    if folder not in self._kinds:
      try:
        with os.scandir(folder or ".") as entries:
          self._kinds[folder] = {entry.name: _kind(entry) for entry in entries}
      except (OSError, ValueError):  # no such folder; ValueError: no name of a folder at all
        self._kinds[folder] = {}
    return self._kinds[folder]


def _spelling(name: str) -> str:
  stem, suffix = os.path.splitext(normalized(name))
  return stem + _format(suffix)
