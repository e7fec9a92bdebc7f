"""An audit of every image and mask of a data set before training."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data.sources import Source

# kind -> what is said of its items, what to do. Errors stop a run or make its scores worthless.
ERRORS = {
  "unreadable_image": (
    "images that cannot be read",
    "repair or fetch them anew, or take their ids off the list",
  ),
  "unreadable_mask": (
    "masks that cannot be read",
    "repair or fetch them anew, or take their ids off the list",
  ),
  "unknown_value": (
    "masks with values that are no class",
    "map them (config.data.label_map=VALUE:CLASS) or correct the classes",
  ),
  "size_mismatch": (
    "masks of another size than their image",
    "export them again at the image's own size",
  ),
  "no_class_but_0": (
    "masks of 0 and 255 alone; none has more",
    "255 is 'ignored'; as class 1: config.data.label_map=255:1",
  ),
  "labeled_in_evaluated": (
    "labeled images that are also evaluated",
    "take them out of one list: such scores mean nothing",
  ),
  "not_trainable": (
    "what training refuses",
    "training with this config would end with these errors",
  ),
}
WARNINGS = {
  "left_out": (
    "files beside the images that are not used",
    "convert or rename them, or correct the pattern, if they are images",
  ),
  "exif_orientation": (
    "images with an EXIF orientation",
    "config.data.exif_orientation=apply takes image and mask as viewers show them, ignore takes both as stored: which fits?",
  ),
  "only_0_and_255": (
    "masks of 0 and 255 alone",
    "255 is 'ignored'; does it stand for a class here?",
  ),
  "only_ignored": (
    "masks of ignored pixels alone",
    "nothing can be learned from them, and nothing scored",
  ),
  "unseen_class": (
    "classes of which no mask holds a pixel",
    "they cannot be learned from these images, or scored on them",
  ),
  "duplicate": ("images that are there more than once", "keep one of each"),
  "unlabeled_in_evaluated": (
    "unlabeled images that are also evaluated",
    "take them out, unless the method may see them",
  ),
  "labeled_in_unlabeled": (
    "labeled images that are also unlabeled ones",
    "meant so in some recipes; else take them out",
  ),
}
KINDS = ERRORS | WARNINGS

_PAIRS = (("labeled", "evaluated"), ("unlabeled", "evaluated"), ("labeled", "unlabeled"))


class Item(NamedTuple):
  """One file or class with a problem.

  path: of a file (of a source without files: role/id), or the name of a class. detail: what is
  wrong with it, may be empty.
  """

  path: str
  detail: str


class Finding(NamedTuple):
  """All problems of one kind.

  kind: a key of KINDS. role: whose images, e.g. "labeled"; else what it is about.
  """

  kind: str
  role: str
  items: tuple[Item, ...]

  @property
  def severity(self) -> str:
    return "error" if self.kind in ERRORS else "warning"


@dataclasses.dataclass
class Audit:
  """What was found in the images of one role.

  paths: of the images, by row. digests: of their pixels, by row; None where an image cannot be
    read.
  usable: rows of which image and mask (where there are masks) can be used.
  sizes: (height, width) -> number of images.
  pixels, images: i64 [K], pixels of each class, and masks that hold it. ignored_pixels: those with
    ignored.
  """

  has_masks: bool
  paths: list[str]
  digests: list[bytes | None]
  usable: list[int]
  sizes: collections.Counter[tuple[int, int]]
  pixels: np.ndarray
  images: np.ndarray
  ignored_pixels: int
  findings: list[Finding]


def audit(
  role: str,
  source: Source,
  names: Sequence[str],
  *,
  with_masks: bool,
  threads: int | None = None,
  each: Callable[[], None] = lambda: None,
) -> Audit:
  """Decodes every image and, if `with_masks`, every mask.

  Damage of any kind becomes a finding and never stops the audit. Memory grows by only some hundred
  bytes for each image.

  Args:
    names: the K classes' names.
    threads: decoding at a time; None: a few more than there are processors.
    each: called after each image.
  """
  threads = threads or min(32, (os.cpu_count() or 1) + 2)
  items = collections.defaultdict(list)
  result = Audit(
    with_masks,
    [_path(source, "image", row, role) for row in range(len(source))],
    [],
    [],
    collections.Counter(),
    np.zeros(len(names), np.int64),
    np.zeros(len(names), np.int64),
    0,
    [],
  )
  for row, seen in enumerate(
    _in_order(lambda row: _look(source, row, role, with_masks), len(source), threads)
  ):
    result.digests.append(seen.digest)
    if seen.size is not None:
      result.sizes[seen.size] += 1
    if seen.counts is not None:
      result.pixels += seen.counts[: len(names)]
      result.images += seen.counts[: len(names)] > 0
      result.ignored_pixels += int(seen.counts[IGNORE_LABEL])
    if seen.digest is not None and (seen.counts is not None or not with_masks):
      result.usable.append(row)
    for kind, item in seen.problems:
      items[kind].append(item)
    each()
  if with_masks:
    if not result.pixels[1:].any():
      items["no_class_but_0"] = items.pop("only_0_and_255", [])
    items["unseen_class"] = [
      Item(name, "") for name, pixels in zip(names, result.pixels, strict=True) if not pixels
    ]
  items["duplicate"] = _duplicates(result)
  result.findings = [Finding(kind, role, tuple(items[kind])) for kind in KINDS if items[kind]]
  return result


def overlaps(audits: Mapping[str, Audit]) -> list[Finding]:
  """Finds images that appear in more than one role.

  Roles are "labeled", "unlabeled" and "evaluated". An image appears in two of them as the same file
  or with the same pixels.
  """
  findings = []
  for first, second in _PAIRS:
    if first in audits and second in audits:
      items = _shared(audits[first], audits[second])
      findings += [Finding(f"{first}_in_{second}", f"{first}, {second}", items)] if items else []
  return findings


class _Seen(NamedTuple):
  """What was found in one image and its mask.

  counts: i64 [256], pixels of its mask by label, None without a usable mask.
  """

  size: tuple[int, int] | None
  digest: bytes | None
  counts: np.ndarray | None
  problems: list[tuple[str, Item]]


def _look(source: Source, row: int, role: str, with_masks: bool) -> _Seen:
  problems = []
  size = digest = label = counts = None
  try:
    image = source.image(row)
    size = image.shape[:2]
    digest = hashlib.sha1(f"{image.shape} {image.dtype}".encode())
    digest.update(np.ascontiguousarray(image))
    digest = digest.digest()
    del image
  except checks.InputError as error:
    path = _path(source, "image", row, role)
    problems.append(("unreadable_image", Item(path, _reason(error, path))))
  else:
    orientation = (
      source.orientation_in_words(row) if hasattr(source, "orientation_in_words") else ""
    )
    if orientation:
      problems.append(("exif_orientation", Item(_path(source, "image", row, role), orientation)))
  if with_masks:
    path = _path(source, "label", row, role)
    try:
      label = source.label(row)
    except checks.InputError as error:
      problems.append(_unusable_mask(path, _reason(error, path)))
  if label is not None:
    if size is not None and label.shape != size:
      detail = "{} x {}, the image {} x {} (height x width)".format(*label.shape, *size)
      remedy = source.orientation_remedy(row) if hasattr(source, "orientation_remedy") else ""
      problems.append(("size_mismatch", Item(path, "; ".join(filter(None, (detail, remedy))))))
    else:
      counts = np.bincount(label.ravel(), minlength=256)
      held = np.flatnonzero(counts).tolist()
      if held == [IGNORE_LABEL]:
        problems.append(("only_ignored", Item(path, "")))
      elif held == [0, IGNORE_LABEL]:
        problems.append(
          (
            "only_0_and_255",
            Item(path, f"{100 * counts[IGNORE_LABEL] / label.size:.1f} % of it is 255"),
          )
        )
  return _Seen(size, digest, counts, problems)


def _unusable_mask(path: str, reason: str) -> tuple[str, Item]:
  where, _, rest = reason.partition(": got ")
  if where not in ("values", "colors"):
    return "unreadable_mask", Item(path, reason)
  return "unknown_value", Item(path, rest.partition("; allowed")[0])


def _reason(error: checks.InputError, path: str) -> str:
  """Returns the message without its headline and the path.

  Both are reported anyway.
  """
  headline, *lines = str(error).splitlines()
  reason = " ".join(line.strip().removeprefix("- ") for line in lines) or headline
  return reason.removeprefix("file: got ").replace(f" '{path}'", "").rstrip(":")


def _path(source: Source, what: str, row: int, role: str) -> str:
  path_of = getattr(source, f"{what}_path", None)
  return f"{role}/{source.ids[row]}" if path_of is None else str(path_of(row))


def _in_order(call: Callable[[int], _Seen], count: int, threads: int) -> Iterator[_Seen]:
  """Yields call(0), call(1), ... in order, computed by threads.

  Only few calls are in flight at a time. Threads help because decoders release the interpreter's
  lock.
  """
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = collections.deque()
    try:
      for row in range(count):
        waiting.append(pool.submit(call, row))
        if len(waiting) >= 2 * threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _duplicates(found: Audit) -> list[Item]:
  first_row = {}
  items = []
  for row, (path, digest) in enumerate(zip(found.paths, found.digests, strict=True)):
    first = row if digest is None else first_row.setdefault(digest, row)
    if first != row:
      items.append(Item(path, f"the same pixels as {found.paths[first]}"))
  return items


def _shared(ours: Audit, theirs: Audit) -> tuple[Item, ...]:
  by_path = set(theirs.paths)
  by_digest = {
    digest: path
    for digest, path in zip(theirs.digests, theirs.paths, strict=True)
    if digest is not None
  }
  items = []
  for path, digest in zip(ours.paths, ours.digests, strict=True):
    if path in by_path:
      items.append(Item(path, "in both lists"))
    elif digest in by_digest:
      items.append(Item(path, f"the same pixels as {by_digest[digest]}"))
  return tuple(items)
