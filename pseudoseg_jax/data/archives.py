"""Official archives, read a member at a time: tar, tar.gz, zip, or the folder that one was extracted to."""

from __future__ import annotations

import os
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pseudoseg_jax import checks

_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError)


class Member(NamedTuple):
  """A file of an archive.

  name: its path in the archive, parts joined by "/"; in a folder its absolute path, so that the ends of names agree.
  size: of its content, in bytes.
  read: () -> its content; to be called before the next member is asked for.
  done: share of the archive that lies before it, 0..1.
  """

  name: str
  size: int
  read: Callable[[], bytes]
  done: float


def members(path: str | pathlib.Path, wanted: Callable[[str], object]) -> Iterator[Member]:
  """The files of an archive or folder of which `wanted(name)` is true.

  Raises:
    InputError: no such path; no archive; a truncated or damaged one; names that lead out of it (absolute or with ".."); a wanted
      member that is a link or a device. All name the archive.
  """
  path = pathlib.Path(path)
  try:
    if path.is_dir():
      yield from _folder(path, wanted)
    elif zipfile.is_zipfile(path):
      yield from _zip(path, wanted)
    else:
      yield from _tar(path, wanted)
  except _DAMAGED as error:
    raise _unusable(path, error) from None


def _tar(path, wanted):
  total = max(path.stat().st_size, 1)
  with open(path, "rb") as raw, tarfile.open(fileobj=raw) as archive:
    for entry in archive:
      if not _wanted(path, entry.name, wanted) or entry.isdir():
        continue
      if not entry.isfile():
        _refuse(path, entry.name, "a link or device")
      read = _reader(path, lambda entry=entry: archive.extractfile(entry).read())
      yield Member(entry.name.removeprefix("./"), entry.size, read, raw.tell() / total)


def _zip(path, wanted):
  with zipfile.ZipFile(path) as archive:
    entries = archive.infolist()
    for number, entry in enumerate(entries):
      if not _wanted(path, entry.filename, wanted) or entry.is_dir():
        continue
      if (entry.external_attr >> 28) == 0o12:  # the file type that Unix notes for a link
        _refuse(path, entry.filename, "a link")
      read = _reader(path, lambda entry=entry: archive.read(entry))
      yield Member(entry.filename, entry.file_size, read, number / len(entries))


def _folder(path, wanted):
  root = path.resolve()
  found = [pathlib.Path(folder) / file for folder, _, files in os.walk(root) for file in files]
  found = sorted(file for file in found if wanted(file.as_posix()))
  for number, file in enumerate(found):
    yield Member(file.as_posix(), file.stat().st_size, file.read_bytes, number / len(found))


def _wanted(path, name, wanted) -> bool:
  parts = pathlib.PurePosixPath(name).parts
  if ".." in parts or parts[:1] == ("/",) or "\\" in name:
    _refuse(path, name, "a path that leads out of the archive")
  return bool(wanted(name.removeprefix("./")))


def _reader(path, read):
  def checked() -> bytes:
    try:
      return read()
    except _DAMAGED as error:
      raise _unusable(path, error) from None

  return checked


def _unusable(path, error) -> checks.InputError:
  problems = checks.Problems("cannot read archive")
  if path.exists():
    problems.add(str(path), got=f"{type(error).__name__}: {error}", allowed="a whole .tar, .tar.gz, .tgz or .zip, or a folder",
                 remedy="it is damaged, cut short or no archive: fetch it anew; what is written already stays")  # fmt: skip
  else:
    problems.add(str(path), got="no such file or folder", remedy="give the path of the official archive")
  try:
    problems.raise_if_any()
  except checks.InputError as told:
    return told


def _refuse(path, name, what):
  problems = checks.Problems(f"archive {path} is not safe to extract")
  problems.add(f"member {name!r}", got=what, allowed="plain files below the archive's own root", remedy="fetch the official one")
  problems.raise_if_any()
