"""Which files there are: one rule for every place that lists or seeks them.

Links to files and to folders are followed, and a folder is entered once, however many links lead to it. What is hidden (".NAME",
among it macOS' "._NAME.jpg") or kept by a system beside the files ("__MACOSX") is none of them. Endings count in any case, and
.jpg is .jpeg, .tif is .tiff. Names are the same however their accents are composed (macOS: NFD). The order is that of the names.
"""

from __future__ import annotations

import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_SAME_FORMAT = {".jpeg": ".jpg", ".tiff": ".tif"}
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # of zip files from macOS, and thumbnails of Synology's disks: copies of the files beside


class LeftOut(NamedTuple):
  """path: of what is not among the files. why: in words, e.g. "a link to gone.jpg, which is not there"."""

  path: pathlib.Path
  why: str


def image_files(folder: str | pathlib.Path) -> list[pathlib.Path]:
  """The images of a folder and of all below it, in order of name; none where there is no such folder."""
  return [path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def files_below(folder: str | pathlib.Path, left_out: list[LeftOut] | None = None) -> list[pathlib.Path]:
  """The files of a folder and of all below it, in order of name.

  Args:
    left_out: gains what could not be followed or entered.
  """
  return sorted(walk(folder, left_out), key=lambda path: [normalized(part) for part in path.parts])


def walk(folder: str | pathlib.Path, left_out: list[LeftOut] | None = None) -> Iterator[pathlib.Path]:
  """`files_below` one by one, in an order that is the same on every machine; real folders come before linked ones."""
  left_out = [] if left_out is None else left_out
  entered = set()
  waiting = [str(folder)] if os.path.isdir(folder) else []
  while waiting:
    linked = []
    for start in waiting:
      yield from _walk_real(start, os.path.realpath(start), entered, linked, left_out)
    waiting = sorted(linked)


def _walk_real(folder: str, real: str, entered: set[str], linked: list[str], left_out: list[LeftOut]) -> Iterator[pathlib.Path]:
  """The files of a folder and of those below it that no link leads to; `linked` gains the others."""
  if real in entered:
    return
  entered.add(real)
  folders = []
  try:
    with os.scandir(folder) as found:
      entries = sorted(found, key=lambda entry: normalized(entry.name))
  except OSError as error:
    left_out.append(LeftOut(pathlib.Path(folder), f"a folder that cannot be read ({error.strerror})"))
    return
  for entry in entries:
    if is_hidden(entry.name):
      continue
    kind = _kind(entry)
    if kind == "file":
      yield pathlib.Path(entry.path)
    elif kind != "folder":
      left_out.append(LeftOut(pathlib.Path(entry.path), kind))
    elif entry.is_symlink():
      linked.append(entry.path)
    else:
      folders.append(entry)
  for entry in folders:
    yield from _walk_real(entry.path, os.path.join(real, entry.name), entered, linked, left_out)


def _kind(entry: os.DirEntry) -> str:
  """"file", "folder", or why it is neither."""
  try:
    if entry.is_dir():
      return "folder"
    if entry.is_file():
      return "file"
  except OSError as error:
    return f"a link that leads nowhere ({error.strerror})"
  return f"a link to {os.readlink(entry.path)}, which is not there" if entry.is_symlink() else "no file"


def is_hidden(name: str) -> bool:
  """Whether a file or folder of this name is none of the user's."""
  return name.startswith(".") or name in _SYSTEM_FOLDERS


def normalized(name: str) -> str:
  """A name with its accents composed (NFC), as ids have them."""
  return name if name.isascii() else unicodedata.normalize("NFC", name)


class Files:
  """Which files there are: one listing a folder instead of one look a file."""

  def __init__(self):
    self._names: dict[str, frozenset[str]] = {}

  def __contains__(self, path: pathlib.Path) -> bool:
    folder, name = os.path.split(path)
    if folder not in self._names:
      self._names[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
    return name in self._names[folder]
