"""Labeled images: lists of images and how to divide them."""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pseudoseg_jax import checks
from pseudoseg_jax.data.text import read_text

_PUBLISHED = pathlib.Path(__file__).parent / "published"
_SUFFIX = r"\.(?:bmp|jpe?g|npy|png|tiff?|webp)"
_IMAGE_END = re.compile(rf"(?<=.){_SUFFIX}(?=\s)", re.IGNORECASE)  # of the first of two paths
_PART = re.compile(r"full|(?P<kind>1|every)_(?P<k>[1-9]\d*)")
_PICKLES = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth")


class Entry(NamedTuple):
  """An image of a list.

  id: its name, the same whatever the form of the list. image, mask: paths of its files, where the
  list gives them.
  """

  id: str
  image: str | None = None
  mask: str | None = None


def read_list(path: str | pathlib.Path, image_pattern: str | None = None) -> tuple[str, ...]:
  """Reads the ids of a list file, in its order; see `read_entries`."""
  return tuple(entry.id for entry in read_entries(path, image_pattern))


def read_entries(path: str | pathlib.Path, image_pattern: str | None = None) -> tuple[Entry, ...]:
  """Reads a list file in the forms of published code, in the file's order.

  It may be in any of the forms that published code uses. A line is an image's id, its path, or the
  paths of image and mask with a tab or spaces between (names with spaces are fine where the paths
  end like image files); a mask may be the word None. Leading slashes, any line ending, blank lines
  and a missing last line ending are all the same.

  Args:
    image_pattern: where the images lie, "JPEGImages/{id}.jpg"; see `id_of`.

  Raises:
    InputError: missing or empty file, a pickle, lines of more columns, ids that stand there twice.
  """
  path = pathlib.Path(path)
  problems = checks.Problems(f"cannot use list {path}")
  if path.suffix.lower() in _PICKLES:
    problems.add(
      "file",
      got="a pickle or an array file",
      allowed="text",
      remedy="reading a pickle can run any code: write its names into a text file, one a line",
    )
    problems.raise_if_any()
  lines = [
    line.strip()
    for line in read_text(path, problems, "a text file of one image a line").split("\n")
  ]
  entries = []
  for number, line in enumerate(lines, start=1):
    fields = _fields(line)
    if len(fields) > 2:
      problems.add(
        f"line {number}",
        got=f"{len(fields)} columns",
        allowed="an id, an image, or an image and its mask",
      )
    elif fields:
      image = fields[0] if without_suffix(fields[0]) != fields[0] else None
      mask = fields[1] if len(fields) == 2 and fields[1] != "None" else None
      entries.append(Entry(id_of(fields[0], image_pattern), image, mask))
  if not entries and not problems.items:
    problems.add("images", got="none", allowed="one image a line")
  repeated = _repeated([entry.id for entry in entries])
  if repeated:
    problems.add("ids", got=f"{shorten(repeated)} more than once", allowed="every id once")
  problems.raise_if_any()
  return tuple(entries)


def list_text(entries: Iterable[Entry]) -> str:
  """Formats entries as the text of a list that `read_entries` reads."""
  return "".join(
    "\t".join(filter(None, (entry.image or entry.id, entry.mask))) + "\n" for entry in entries
  )


def without_suffix(path: str) -> str:
  """Removes the ending of an image file from a path; other dots stay."""
  return re.sub(f"{_SUFFIX}$", "", path, flags=re.IGNORECASE)


def id_of(path: str, image_pattern: str | None = None) -> str:
  """Returns the id of an image in a list, so that lists of all forms agree.

  The id is what `{id}` stands for in image_pattern. The longest end of the pattern's folder is
  looked for in the path and what follows it is the id, without the pattern's ending: with
  "leftImg8bit/train/{id}_leftImg8bit.png" all of "/leftImg8bit/train/jena/a_leftImg8bit.png",
  "train/jena/a" and "jena/a" are "jena/a". A file in other folders has its bare name. Without a
  pattern an id is the path without its ending.
  """
  name = path.lstrip("/")
  if image_pattern is None:
    return without_suffix(name)
  before, after = image_pattern.split("{id}")
  *folders, prefix = before.split("/")
  stem = without_suffix(name).removesuffix(without_suffix(after)) if after else name
  parts = stem.split("/")
  for count in range(len(folders), 0, -1):
    for start in range(len(parts) - count):
      if parts[start : start + count] == folders[-count:]:
        return "/".join(parts[start + count :]).removeprefix(prefix)
  elsewhere = folders and without_suffix(name) != name
  return (parts[-1] if elsewhere else stem).removeprefix(prefix)


def complete_ids(entries: Sequence[Entry], known_ids: Iterable[str]) -> tuple[Entry, ...]:
  """Completes entries with the folders that their ids lack.

  "jena_01" becomes "jena/jena_01" where only that one is known.
  """
  known = frozenset(known_ids)
  by_name: dict[str, list[str]] = {}
  for name in known:
    by_name.setdefault(name.rsplit("/", 1)[-1], []).append(name)

  def fitting(entry):
    found = by_name.get(entry.id, ())
    return entry._replace(id=found[0]) if entry.id not in known and len(found) == 1 else entry

  return tuple(map(fitting, entries))


def published(name: str) -> pathlib.Path | None:
  """Returns the file of a published list that comes with the package.

  Lists are given by name ("voc2012/pseudoseg/92"); None for other names.
  """
  return _PUBLISHED / f"{name}.txt" if name in published_names() else None


def published_names() -> tuple[str, ...]:
  """Lists the published lists of labeled images that come with the package.

  They are given by name.
  """
  return tuple(
    sorted(
      path.relative_to(_PUBLISHED).with_suffix("").as_posix() for path in _PUBLISHED.rglob("*.txt")
    )
  )


def published_or_own(data_set: str, lists: str, split: str, *, default: str) -> str:
  """Resolves config.data.split of a data set with published lists.

  "1_8" becomes "voc2012/cps/1_8" where there is such a list.

  Args:
    lists: whose lists, "cps" or another folder of the data set's; "random" leaves the split as it
      is; "" is the default's, and a split that they lack (a list file, "full", "1_100") is left as
      it is.

  Raises:
    InputError: named lists that lack the split.
  """
  if lists == "random":
    return split
  name = f"{data_set}/{lists or default}/{split}"
  if lists:
    checks.check_name(
      "split", name, [known for known in published_names() if known.startswith(f"{data_set}/")]
    )
  return name if published(name) else split


def is_part(name: str) -> bool:
  """Tells whether `part` knows the name."""
  return _PART.fullmatch(name) is not None


def part(ids: Iterable[str], name: str, *, seed: int = 0) -> tuple[str, ...]:
  """Selects the labeled part of a list by name.

  From n ids, ceil(n / k) are taken, as in the published lists.

  "1_8", a random eighth: the ids in the order of their SHA-256 digests, of "seed/id" in UTF-8, and
  of these the first. So the part is the same on every machine for ever, whatever the list's order,
  and "1_16" is the beginning of "1_8", and so on. "every_8": every 8th of the sorted ids, so that
  video sequences stay represented; "every_16" lies inside "every_8". "full": all of them, sorted.

  Raises:
    InputError: another name.
  """
  match = _PART.fullmatch(name)
  if match is None:
    problems = checks.Problems("cannot take a part of the list")
    problems.add(
      "part",
      got=repr(name),
      allowed="'1_k' such as '1_8' (random), 'every_k' such as 'every_8', or 'full'",
    )
    problems.raise_if_any()
  if match["kind"] == "1":
    ranked = sorted(ids, key=lambda one: hashlib.sha256(f"{seed}/{one}".encode()).digest())
    return tuple(ranked[: -(-len(ranked) // int(match["k"]))])
  return tuple(sorted(ids)[:: int(match["k"] or 1)])


def complement(all_ids: Sequence[str], labeled_ids: Sequence[str]) -> tuple[str, ...]:
  """Returns the ids of `all_ids` that are not labeled, in their order.

  Raises:
    InputError: labeled ids that are not among all ids (two lists that do not belong together).
  """
  unknown_ids = sorted(set(labeled_ids) - set(all_ids))
  if unknown_ids:
    problems = checks.Problems("the lists do not belong together")
    problems.add(
      "labeled ids",
      got=f"{len(unknown_ids)} of {len(labeled_ids)} that are not among all ids: {shorten(unknown_ids)}",
      allowed="ids of the full list",
      remedy=f"an id of the full list looks like '{all_ids[0]}'"
      if all_ids
      else "the full list is empty",
    )
    problems.raise_if_any()
  labeled = set(labeled_ids)
  return tuple(name for name in all_ids if name not in labeled)


def check_disjoint(**ids_by_role: Sequence[str]) -> None:
  """Raises InputError when an id appears in two of the lists.

  Lists are given by role: check_disjoint(train=..., val=...).
  """
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
  """Joins the first few names for a message: "a, b, c, ... (12 in all)"."""
  first = ", ".join(shown(name) for name in names[:most])
  return first if len(names) <= most else f"{first}, ... ({len(names)} in all)"


def shown(name: object, most: int = 200) -> str:
  """Formats a name for a message.

  The middle of a very long one is left out, and what would move a terminal's cursor is written as
  in code.
  """
  text = str(name)
  text = text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"
  return text if text.isprintable() else repr(text)[1:-1]


def _repeated(ids: Sequence[str]) -> list[str]:
  seen: set[str] = set()
  return sorted({name for name in ids if name in seen or seen.add(name)})


def _fields(line: str) -> list[str]:
  """Returns the columns of a line."""
  fields = line.split("\t") if "\t" in line else _pair(line) or [line]
  return [field for field in (field.strip().replace("\\", "/") for field in fields) if field]


def _pair(line: str) -> tuple[str, str] | None:
  """Returns the paths of an image and a mask with spaces between.

  The time grows with the line. None for another line.
  """
  *image, last = line.rsplit(maxsplit=1) or [""]
  if last.casefold() == "none" and image and _is_image(image[0]):
    return image[0], last
  end = _IMAGE_END.search(line)
  return (
    (line[: end.end()], line[end.end() :]) if end and _is_image(line[end.end() :].strip()) else None
  )


def _is_image(path: str) -> bool:
  return without_suffix(path) not in ("", path)
