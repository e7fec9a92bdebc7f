"""Which images are labeled: lists of image ids and how to divide them."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Sequence

from pseudoseg_jax import checks


_PUBLISHED = pathlib.Path(__file__).parent / "published"


def read_list(path: str | pathlib.Path) -> tuple[str, ...]:
  """Reads a list file of one image id per line, in the file's order.

  Any line ending will do, blank lines and space around an id are dropped.

  Raises:
    InputError: missing or empty file, ids that stand there twice.
  """
  path = pathlib.Path(path)
  problems = checks.Problems(f"cannot use list {path}")
  try:
    ids = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
  except (OSError, UnicodeDecodeError) as error:
    problems.add("file", got=error, remedy="give a text file of one image id per line")
    problems.raise_if_any()
  if not ids:
    problems.add("ids", got="none", allowed="one image id per line")
  repeated = _repeated(ids)
  if repeated:
    problems.add("ids", got=f"{shorten(repeated)} more than once", allowed="every id once")
  problems.raise_if_any()
  return ids


def published(name: str) -> pathlib.Path | None:
  """The file of a published list that comes with the package, by name ("voc2012/pseudoseg/92"); None for other names."""
  return _PUBLISHED / f"{name}.txt" if name in published_names() else None


def published_names() -> tuple[str, ...]:
  """Names of the published lists of labeled images that come with the package."""
  return tuple(sorted(path.relative_to(_PUBLISHED).with_suffix("").as_posix() for path in _PUBLISHED.rglob("*.txt")))


def every_kth(ids: Iterable[str], fraction_name: str) -> tuple[str, ...]:
  """The labeled part of a list: every k-th of the sorted ids, so that video sequences stay represented.

  Nested: "1_8" lies inside "1_4" inside "1_2"; of n ids, ceil(n / k) are taken.

  Args:
    ids: image ids in any order.
    fraction_name: "1_k" such as "1_8", or "full".

  Raises:
    InputError: another fraction name.
  """
  match = re.fullmatch(r"1_([1-9]\d*)", fraction_name)
  if match is None and fraction_name != "full":
    problems = checks.Problems("cannot take a part of the list")
    problems.add("fraction", got=repr(fraction_name), allowed="'full' or '1_k', for instance '1_8'")
    problems.raise_if_any()
  return tuple(sorted(ids)[:: int(match[1]) if match else 1])


def complement(all_ids: Sequence[str], labeled_ids: Sequence[str]) -> tuple[str, ...]:
  """The ids of `all_ids` that are not labeled, in their order.

  Raises:
    InputError: labeled ids that are not among all ids (two lists that do not belong together).
  """
  strangers = sorted(set(labeled_ids) - set(all_ids))
  if strangers:
    problems = checks.Problems("the lists do not belong together")
    problems.add(
      "labeled ids",
      got=f"{len(strangers)} of {len(labeled_ids)} that are not among all ids: {shorten(strangers)}",
      allowed="ids of the full list",
      remedy=f"an id of the full list looks like '{all_ids[0]}'" if all_ids else "the full list is empty",
    )
    problems.raise_if_any()
  labeled = set(labeled_ids)
  return tuple(name for name in all_ids if name not in labeled)


def check_disjoint(**ids_by_role: Sequence[str]) -> None:
  """Raises InputError when an id stands in two of the lists, given by role: check_disjoint(train=..., val=...)."""
  problems = checks.Problems("lists overlap")
  roles = list(ids_by_role)
  for number, first in enumerate(roles):
    for second in roles[number + 1 :]:
      shared = sorted(set(ids_by_role[first]) & set(ids_by_role[second]))
      if shared:
        problems.add(
          f"{first} and {second}",
          got=f"{len(shared)} ids in both: {shorten(shared)}",
          allowed="none",
          remedy=f"take them out of one list, e.g. with splits.complement({first}, {second})",
        )
  problems.raise_if_any()


def shorten(names: Sequence[object], most: int = 3) -> str:
  """The first few names for a message: "a, b, c, ... (12 in all)"."""
  shown = ", ".join(str(name) for name in names[:most])
  return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def _repeated(ids: Sequence[str]) -> list[str]:
  seen: set[str] = set()
  return sorted({name for name in ids if name in seen or seen.add(name)})
