"""Readers of official archives, a member at a time.

An archive is a tar, tar.gz or zip, or the folder that one was extracted to.

Memory and time are bounded by what an archive holds, whatever its headers declare. No size is
trusted that only a header gives. Nothing is unfolded to a multiple of itself that no images, masks
or lists have.
"""

from __future__ import annotations

import gzip
import pathlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from pseudoseg_jax import checks
from pseudoseg_jax.data import listing

# Of damaged files; ValueError: names that are no text, numbers that are none, places before the
# beginning; RecursionError: names of names of names.
_DAMAGED = (
  tarfile.TarError,
  zipfile.BadZipFile,
  zlib.error,
  struct.error,
  EOFError,
  NotImplementedError,
  OSError,
  ValueError,
  OverflowError,
  RecursionError,
)
_MOST_RATIO, _ANY_RATIO_BYTES = 100, 64 << 20  # of text about 10; what is small may be of any
_PIECE_BYTES = 1 << 20


class Member(NamedTuple):
  """A file of an archive.

  name: its path in the archive, parts joined by "/"; in a folder its absolute path, so that the
    ends of names agree.
  size: of its content, in bytes.
  read: () -> its content; to be called before the next member is asked for.
  done: share of the archive that lies before it, 0..1.
  """

  name: str
  size: int
  read: Callable[[], bytes]
  done: float


def members(path: str | pathlib.Path, wanted: Callable[[str], object]) -> Iterator[Member]:
  """Yields the files of an archive or folder of which `wanted(name)` is true.

  Raises:
    InputError: no such path; no archive; a truncated, damaged or encrypted one; one that unfolds to
      a multiple of itself that no data set has; names that lead out of it (absolute or with "..");
      a wanted member that is a link or a device. All name the archive.
  """
  path = pathlib.Path(path)
  try:
    if path.is_dir():
      yield from _folder(path, wanted)
    elif zipfile.is_zipfile(path):
      yield from _zip(path, wanted)
    else:
      yield from _tar(path, wanted)
  except checks.InputError:
    raise
  except _DAMAGED as error:
    raise _unusable(path, error) from None


class _Unfolded:
  """The bytes of a file, unzipped if it is compressed, for `tarfile`.

  `tarfile` believes every size that it reads.
  """

  def __init__(self, path: pathlib.Path, raw: BinaryIO):
    self._path, self._raw, self._place = path, raw, 0
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    self._file = gzip.GzipFile(fileobj=raw) if packed else raw

  def tell(self) -> int:
    return self._place

  def read(self, size: int) -> bytes:
    if size < 0:
      raise tarfile.ReadError("a negative size")
    pieces = []
    while size > 0 and (piece := self._file.read(min(size, _PIECE_BYTES))):
      pieces.append(piece)
      size -= len(piece)
      self._place += len(piece)
      _check_ratio(self._path, self._place, self._raw.tell())
    return b"".join(pieces)

  def seek(self, place: int) -> None:
    if self._file is self._raw or place < self._place:
      self._place = self._file.seek(place)
    while self._place < place and self.read(min(place - self._place, _PIECE_BYTES)):
      pass


def _tar(path, wanted):
  total, last = max(path.stat().st_size, 1), -1
  with open(path, "rb") as raw, tarfile.open(fileobj=_Unfolded(path, raw), mode="r:") as archive:
    for entry in archive:
      if entry.size < 0 or entry.offset <= last:
        raise tarfile.ReadError("its parts lead back to each other")
      last = entry.offset
      if not _wanted(path, entry.name, wanted) or entry.isdir():
        continue
      if not entry.isfile() or entry.issparse():
        _refuse(
          path,
          f"member {entry.name!r}",
          "a sparse file" if entry.issparse() else "a link or device",
        )
      read = _reader(path, lambda entry=entry: archive.extractfile(entry).read())
      yield Member(entry.name.removeprefix("./"), entry.size, read, raw.tell() / total)


def _zip(path, wanted):
  size = path.stat().st_size
  with zipfile.ZipFile(path) as archive:
    entries = archive.infolist()
    if sum(entry.compress_size for entry in entries) > size:
      raise zipfile.BadZipFile("its parts overlap, or reach beyond its end")
    _check_ratio(path, sum(entry.file_size for entry in entries), size)
    for number, entry in enumerate(entries):
      if not _wanted(path, entry.filename, wanted) or entry.is_dir():
        continue
      if (entry.external_attr >> 28) == 0o12:  # the file type that Unix notes for a link
        _refuse(path, f"member {entry.filename!r}", "a link")
      if entry.flag_bits & 1:
        problems = checks.Problems("cannot read archive")
        problems.add(
          str(path),
          got="encrypted members",
          remedy="extract it with its password, and give the folder",
        )
        problems.raise_if_any()
      _check_ratio(path, entry.file_size, entry.compress_size, entry.filename)
      read = _reader(path, lambda entry=entry: archive.read(entry))
      yield Member(entry.filename, entry.file_size, read, number / len(entries))


def _folder(path, wanted):
  found = [file for file in listing.files_below(path.resolve()) if wanted(file.as_posix())]
  for number, file in enumerate(found):
    yield Member(file.as_posix(), file.stat().st_size, file.read_bytes, number / len(found))


def _check_ratio(path, unfolded: int, stored: int, name: str = "") -> None:
  """Refuses files that were made to fill disk or memory."""
  if unfolded > _ANY_RATIO_BYTES + _MOST_RATIO * stored:
    _refuse(
      path,
      f"member {name!r}" if name else "all members",
      f"more than {_MOST_RATIO} times what is stored of it",
    )


def _wanted(path, name, wanted) -> bool:
  parts = pathlib.PurePosixPath(name).parts
  if ".." in parts or parts[:1] == ("/",) or "\\" in name:
    _refuse(path, f"member {name!r}", "a path that leads out of the archive")
  return bool(wanted(name.removeprefix("./")))


def _reader(path, read):
  def checked() -> bytes:
    try:
      return read()
    except checks.InputError:
      raise
    except _DAMAGED as error:
      raise _unusable(path, error) from None

  return checked


def _unusable(path, error) -> checks.InputError:
  problems = checks.Problems("cannot read archive")
  if path.exists():
    problems.add(
      str(path),
      got=f"{type(error).__name__}: {error}",
      allowed="a whole .tar, .tar.gz, .tgz or .zip, or a folder",
      remedy="it is damaged, cut short or of another kind: fetch it anew, or extract it and give the folder; "
      "what is written already stays",
    )
  else:
    problems.add(
      str(path), got="no such file or folder", remedy="give the path of the official archive"
    )
  try:
    problems.raise_if_any()
  except checks.InputError as told:
    return told


def _refuse(path, member: str, got: str) -> None:
  problems = checks.Problems(f"archive {path} is not safe to extract")
  problems.add(
    member,
    got=got,
    allowed="plain files below the archive's own root",
    remedy="fetch the official one",
  )
  problems.raise_if_any()
