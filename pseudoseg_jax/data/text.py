"""Text files that a user gives: read, or refused with the reason."""

from __future__ import annotations

import codecs
import pathlib
import shlex

from pseudoseg_jax import checks

_MARKS = {
  codecs.BOM_UTF32_LE: "UTF-32",
  codecs.BOM_UTF32_BE: "UTF-32",
  codecs.BOM_UTF16_LE: "UTF-16",
  codecs.BOM_UTF16_BE: "UTF-16",
}
LFS_POINTER = b"version https://git-lfs.github.com/"
_HEAD_BYTES = 1 << 16


def read_text(path: str | pathlib.Path, problems: checks.Problems, allowed: str) -> str:
  r"""Reads the text of a UTF-8 file; every line ending becomes "\n".

  The file may be with or without a byte order mark.

  Args:
    problems: gains the reason where the file cannot be read, and is raised.
    allowed: what file is wanted, in words.

  Raises:
    InputError: no such file, another encoding, no text at all.
  """
  try:
    with open(path, "rb") as file:
      head = file.read(_HEAD_BYTES)
      reason = _no_text(path, head)  # before the rest is read, which may be a film
      content = b"" if reason else head + file.read()
      reason = reason or _no_text(path, content)
  except (OSError, ValueError) as error:  # ValueError: a path with a null byte
    problems.add("file", got=error, allowed=allowed)
    problems.raise_if_any()
  if not reason:
    try:
      return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
      reason = (
        f"{type(error).__name__}: {error}",
        f"save it as UTF-8; if it was written on Windows: {_iconv('CP1252', path)}",
      )
  got, remedy = reason
  problems.add("file", got=got, allowed=allowed, remedy=remedy)
  problems.raise_if_any()


def _no_text(path: str | pathlib.Path, content: bytes) -> tuple[str, str] | None:
  """Identifies content that is no text in UTF-8, and the remedy.

  Returns what a file that holds this, or begins so, is, and what to do; None for what may be UTF-8.
  """
  encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
  if encoding:
    return (
      f"text in {encoding}",
      f"save it as UTF-8 (Excel: 'CSV UTF-8'), or: {_iconv(encoding, path)}",
    )
  if content.startswith(LFS_POINTER):
    return (
      "a pointer of Git LFS in the place of the file",
      f"git -C {shlex.quote(str(pathlib.Path(path).parent))} lfs pull",
    )
  if b"\0" in content:
    return "null bytes, so no text in UTF-8", "save it as plain text in UTF-8 (Excel: 'CSV UTF-8')"
  return None


def _iconv(encoding: str, path: str | pathlib.Path) -> str:
  old, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
  # Not onto the file that is being read.
  return f"iconv -f {encoding} -t UTF-8 {old} > {new} && mv {new} {old}"
