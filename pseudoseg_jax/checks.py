"""Clear errors: where, got, allowed, remedy.

Errors are gathered, so that all problems are reported at once.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable


class InputError(ValueError):
  """An error in the user's input (config, files, command line).

  The input cannot be used as it is; the message states what to change.
  """


class Problems:
  """A collection of problems, raised as one InputError that lists them all.

  >>> problems = Problems("config does not fit the machine")
  >>> problems.add("batch_size_global.labeled", got=6, allowed="a multiple of the 4 devices", remedy="use 4 or 8")
  >>> problems.raise_if_any()
  """

  def __init__(self, headline: str):
    self.headline = headline
    self.items: list[str] = []

  def add(
    self, where: str, *, got: object = None, allowed: object = None, remedy: str | None = None
  ) -> None:
    text = where
    if got is not None:
      text += f": got {got}"
    if allowed is not None:
      text += f"; allowed: {allowed}"
    if remedy is not None:
      text += f"; {remedy}"
    self.items.append(text)

  def extend(self, items: Iterable[str]) -> None:
    self.items.extend(items)

  def raise_if_any(self, most: int = 20) -> None:
    if not self.items:
      return
    shown = [f"  - {item}" for item in self.items[:most]]
    if len(self.items) > most:
      shown.append(f"  - ... and {len(self.items) - most} more")
    raise InputError(printable("\n".join([f"{self.headline}:", *shown])))


def printable(text: str) -> str:
  r"""Writes out whatever a terminal would take for a command.

  A text whose parts come from files then shows such a command as "\x1b[31m".
  """
  return "".join(
    character
    if character.isprintable() or character in "\n\t"
    else character.encode("unicode_escape").decode()
    for character in text
  )


def choices(allowed: Iterable[str]) -> str:
  return ", ".join(sorted(allowed))


def nearest(name: str, allowed: Iterable[str]) -> str:
  """Makes a remedy for an unknown name: the nearest known one, if near."""
  near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
  return f"did you mean '{near[0]}'?" if near else "no known name is near"


def closest(name: str, allowed: Iterable[str]) -> str:
  """Finds the known name that is nearest, however far.

  There must be at least one known name.
  """
  return difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.0)[0]


def is_size(pixels: object) -> bool:
  """Tells whether it is a height and a width: two whole numbers, at least 1."""
  sides = tuple(pixels) if isinstance(pixels, Iterable) and not isinstance(pixels, str) else ()
  return len(sides) == 2 and all(
    isinstance(side, numbers.Integral) and not isinstance(side, bool) and side >= 1
    for side in sides
  )


def check_name(where: str, name: str, allowed: Iterable[str]) -> None:
  allowed = list(allowed)
  if name not in allowed:
    problems = Problems("unknown name")
    problems.add(
      where, got=repr(name), allowed=choices(allowed), remedy=nearest(str(name), allowed)
    )
    problems.raise_if_any()
