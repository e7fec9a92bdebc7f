"""Converts official archives of a data set to the folders that configs read.

See --help.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pseudoseg_jax import checks, command_line
from pseudoseg_jax.data import archives, official_masks
from pseudoseg_jax.data.splits import shorten
from pseudoseg_jax.evaluation import report

_THREADS = max(2, os.cpu_count() or 1)
_REPORT_SECONDS = 5.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.part")  # see report.write_atomically

DESCRIPTION = """\
Unpacks and converts the official archives of a data set into the folders that configs/ reads. Archives may be given as folders
that they were extracted to. Files appear whole or not at all, and OUT/NAME.manifest.tsv lists each with its SHA-256 and size: the
same command again goes on where it was stopped, and with --verify first checks all that is there.
"""

EPILOG = """\
examples:
  python -m pseudoseg_jax.prepare voc --voc=VOCtrainval_11-May-2012.tar --sbd=benchmark.tgz --out=DIR
  python -m pseudoseg_jax.prepare cityscapes --images=leftImg8bit_trainvaltest.zip --labels=gtFine_trainvaltest.zip --out=DIR
  python -m pseudoseg_jax.prepare coco --images train2017.zip val2017.zip --stuff=stuffthingmaps_trainval2017.zip --out=DIR
  python -m pseudoseg_jax.prepare voc --out=DIR --verify
"""


class Tree:
  """A folder that is being filled by several threads.

  Its manifest has a line `sha256 size path` for every finished file. A file is there if the
  manifest lists it and its size is that of the manifest; others are written anew.
  """

  def __init__(self, root: pathlib.Path, name: str):
    self.root = root
    self.manifest = root / f"{name}.manifest.tsv"
    self.entries = _read_manifest(self.manifest)
    self.written = 0

  def __enter__(self):
    for left in self.root.rglob(".*.part"):  # by a run that was killed
      if _TEMPORARY.fullmatch(left.name):
        left.unlink()
    # Rewritten whole, since a killed run may have left half a line at its end.
    lines = [
      "\t".join((digest, str(size), path)) + "\n" for path, (digest, size) in self.entries.items()
    ]
    report.write_atomically(self.manifest, "".join(lines))
    self._log = open(self.manifest, "a", encoding="utf-8")
    self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)
    self._pending = collections.deque()
    return self

  def __exit__(self, kind, error, trace):
    self._threads.shutdown(cancel_futures=True)
    for job in self._pending:
      if not job.cancelled() and job.exception() is None:
        self._note(*job.result())
    try:
      self._log.close()
    except OSError:
      # Else the first error tells more, and what the manifest lacks is written anew.
      if kind is None:
        raise

  def holds(self, path: str) -> bool:
    try:
      return path in self.entries and (self.root / path).stat().st_size == self.entries[path][1]
    except FileNotFoundError:
      return False

  def put(self, path: str, make: Callable[[], bytes]) -> None:
    """Writes what `make` returns, in some thread."""
    self._pending.append(self._threads.submit(self._write, path, make))
    if len(self._pending) > 4 * _THREADS:  # bounds what is in memory
      self._settle_one()

  def settle(self) -> None:
    """Waits until all files are written."""
    while self._pending:
      self._settle_one()
    self._log.flush()

  def broken(self) -> list[str]:
    """Lists files of the manifest that are gone or have another content."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
      same = threads.map(
        lambda path: self.holds(path) and _sha256(self.root / path) == self.entries[path][0],
        self.entries,
      )
      checked = _told(zip(self.entries, same, strict=True), len(self.entries), self.manifest.name)
      return [path for path, good in checked if not good]

  def listing(self, folder: str, suffix: str) -> set[str]:
    """Returns the names of the finished files right in a folder.

    The names are without the suffix.
    """
    start = f"{folder}/"
    found = (
      path[len(start) : -len(suffix)]
      for path in self.entries
      if path.startswith(start) and path.endswith(suffix)
    )
    return {name for name in found if "/" not in name}

  def _settle_one(self):
    self._note(*self._pending.popleft().result())

  def _write(self, path, make):
    content = make()
    try:
      report.write_atomically(self.root / path, content)
    except OSError as error:  # on a full disk it does not say where
      raise OSError(error.errno, error.strerror, str(self.root / path)) from None
    return path, hashlib.sha256(content).hexdigest(), len(content)

  def _note(self, path, digest, size):
    self.entries[path] = digest, size
    self.written += 1
    self._log.write(f"{digest}\t{size}\t{path}\n")


def _read_manifest(path: pathlib.Path) -> dict[str, tuple[str, int]]:
  """Reads a manifest as path -> (sha256, size).

  A last line that was cut short is left out.
  """
  entries = {}
  if path.exists():
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
      fields = line.removesuffix("\n").split("\t")
      if line.endswith("\n") and len(fields) == 3 and fields[1].isdigit():
        entries[fields[2]] = fields[0], int(fields[1])
  return entries


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


# PASCAL VOC 2012 with SBD

_VOC = "VOCdevkit/VOC2012"
_VOC_MEMBER = re.compile(
  r"(?:^|/)VOC2012/((?:JPEGImages/\w+\.jpg)|(?:SegmentationClass/\w+\.png)|(?:Annotations/\w+\.xml)"
  r"|(?:ImageSets/Segmentation/(?:train|val|trainval)\.txt))$"
)
_SBD_MEMBER = re.compile(
  r"(?:^|/)dataset/(?:cls/(?P<mask>\w+)\.mat|img/(?P<image>\w+)\.jpg|(?P<list>train|val)\.txt)$"
)


def prepare_voc(tree: Tree, arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
  """Prepares VOC with the masks of SBD.

  VOC's own files stay as they are; masks of SBD become PNG. SegmentationClassAug and train_aug.txt
  join the two. Where VOC has a mask, it is taken; train_aug is SBD's train and val and VOC's train,
  without VOC's val.

  Returns:
    Counts: what -> (found, official).
  """
  for member in _members(arguments.voc, _VOC_MEMBER, "VOC2012/JPEGImages/ID.jpg"):
    _put_member(tree, f"{_VOC}/{_VOC_MEMBER.search(member.name)[1]}", member)
  tree.settle()
  lists = {
    name: _ids(tree, f"{_VOC}/ImageSets/Segmentation/{name}.txt") for name in ("train", "val")
  }
  own = tree.listing(f"{_VOC}/SegmentationClass", ".png")
  for name in sorted(own):
    mask, copy = (
      f"{_VOC}/{folder}/{name}.png" for folder in ("SegmentationClass", "SegmentationClassAug")
    )
    if not tree.holds(copy) or tree.entries[copy] != tree.entries[mask]:
      tree.put(copy, (tree.root / mask).read_bytes)

  images = tree.listing(f"{_VOC}/JPEGImages", ".jpg")
  sbd = {}
  for member in _members(arguments.sbd, _SBD_MEMBER, "dataset/cls/ID.mat"):
    found = _SBD_MEMBER.search(member.name)
    if found["list"]:
      sbd[found["list"]] = member.read().decode(errors="replace").split()
    elif found["mask"] and found["mask"] not in own:
      _put_member(
        tree, f"{_VOC}/SegmentationClassAug/{found['mask']}.png", member, official_masks.from_sbd
      )
    elif found["image"] and found["image"] not in images:
      _put_member(tree, f"{_VOC}/JPEGImages/{found['image']}.jpg", member)
  tree.settle()
  for name in sorted({"train", "val"} - set(sbd)):
    _refuse_incomplete(f"dataset/{name}.txt of {arguments.sbd}")
  train_aug = sorted({*sbd["train"], *sbd["val"], *lists["train"]} - set(lists["val"]))
  tree.put(
    f"{_VOC}/ImageSets/Segmentation/train_aug.txt",
    lambda: "".join(f"{name}\n" for name in train_aug).encode(),
  )
  tree.settle()
  _check_complete(
    tree,
    [*train_aug, *lists["val"]],
    [f"{_VOC}/JPEGImages/{{id}}.jpg", f"{_VOC}/SegmentationClassAug/{{id}}.png"],
  )
  return {
    "VOC train": (len(lists["train"]), 1464),
    "VOC val": (len(lists["val"]), 1449),
    "SBD train": (len(sbd["train"]), 8498),
    "SBD val": (len(sbd["val"]), 2857),
    "train_aug": (len(train_aug), 10582),
    "masks": (len(tree.listing(f"{_VOC}/SegmentationClassAug", ".png")), 12031),
  }


# Cityscapes

_CITY_IMAGE = re.compile(
  r"(?:^|/)(leftImg8bit/(?:train|val|test|train_extra)/[\w-]+/[\w-]+_leftImg8bit\.png)$"
)
_CITY_LABEL = re.compile(r"(?:^|/)(gtFine/(?:train|val|test)/[\w-]+/[\w-]+_gtFine_labelIds\.png)$")
_CITY_COUNTS = {"train": 2975, "val": 500, "test": 1525}


def prepare_cityscapes(tree: Tree, arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
  """Prepares images and labelIds masks of Cityscapes in the official layout.

  The files stay as they are. Returns counts as `prepare_voc` does.
  """
  images = [*arguments.images, *([arguments.extra] if arguments.extra else [])]
  packs = [(path, _CITY_IMAGE, "leftImg8bit/train/CITY/FRAME_leftImg8bit.png") for path in images]
  for path, pattern, example in [
    *packs,
    (arguments.labels, _CITY_LABEL, "gtFine/train/CITY/FRAME_gtFine_labelIds.png"),
  ]:
    for member in _members(path, pattern, example):
      _put_member(tree, pattern.search(member.name)[1], member)
  tree.settle()
  kept = collections.Counter("/".join(path.split("/")[:2]) for path in tree.entries)
  counts = {}
  for name, official in _CITY_COUNTS.items():
    for folder in ("leftImg8bit", "gtFine"):
      counts[f"{folder}/{name}"] = kept[f"{folder}/{name}"], official
  labels = [path for path in tree.entries if path.startswith("gtFine/")]
  frames = [path.removeprefix("gtFine/").removesuffix("_gtFine_labelIds.png") for path in labels]
  _check_complete(tree, frames, ["leftImg8bit/{id}_leftImg8bit.png"])
  return counts | (
    {"leftImg8bit/train_extra": (kept["leftImg8bit/train_extra"], 19998)} if arguments.extra else {}
  )


# COCO 2017

_COCO_IMAGE = re.compile(r"(?:^|/)((?:train|val)2017/\w+\.jpg)$")
_COCO_STUFF = re.compile(r"(?:^|/)(?:train|val)2017/(\w+)\.png$")
_COCO_INSTANCES = re.compile(r"(?:^|/)instances_(?:train|val)2017\.json$")


def prepare_coco(tree: Tree, arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
  """Prepares images of COCO and masks of 80 things and background.

  Images stay as they are; masks are from either annotation. Returns counts as `prepare_voc` does.
  """
  if arguments.annotations:
    official_masks.require_pycocotools()  # before the long part
  for path in arguments.images:
    for member in _members(path, _COCO_IMAGE, "train2017/ID.jpg"):
      _put_member(tree, _COCO_IMAGE.search(member.name)[1], member)
  if arguments.stuff:
    for member in _members(arguments.stuff, _COCO_STUFF, "train2017/ID.png"):
      path = f"masks/{_COCO_STUFF.search(member.name)[1]}.png"
      _put_member(tree, path, member, official_masks.from_coco_stuff)
  else:
    for member in _members(
      arguments.annotations, _COCO_INSTANCES, "annotations/instances_train2017.json"
    ):
      print(f"{member.name}: reading", flush=True)
      images = list(official_masks.from_coco_instances(member.read(), member.name))
      for name, draw in _told(images, len(images), member.name.rpartition("/")[2]):
        if not tree.holds(f"masks/{name}.png"):
          tree.put(f"masks/{name}.png", draw)
  tree.settle()
  names = {part: tree.listing(f"{part}2017", ".jpg") for part in ("train", "val")}
  _check_complete(tree, sorted(names["train"] | names["val"]), ["masks/{id}.png"])
  return {"train2017": (len(names["train"]), 118287), "val2017": (len(names["val"]), 5000)}


# What TFDS data sets hold: data set -> split -> patterns of image and mask (None: no masks), list
# of ids (None: all there are).

_TFDS = {
  "voc": {
    "voc2012": {
      name: (
        f"{_VOC}/JPEGImages/{{id}}.jpg",
        f"{_VOC}/{masks}/{{id}}.png",
        f"{_VOC}/ImageSets/Segmentation/{name}.txt",
      )
      for name, masks in (
        ("train", "SegmentationClass"),
        ("val", "SegmentationClass"),
        ("train_aug", "SegmentationClassAug"),
      )
    }
  },
  "cityscapes": {
    "cityscapes": {
      name: (
        f"leftImg8bit/{name}/{{id}}_leftImg8bit.png",
        f"gtFine/{name}/{{id}}_gtFine_labelIds.png",
        None,
      )
      for name in _CITY_COUNTS
    },
    "cityscapes_extra": {
      "train_extra": ("leftImg8bit/train_extra/{id}_leftImg8bit.png", None, None)
    },
  },
  "coco": {
    "coco2017": {
      name: (f"{name}2017/{{id}}.jpg", "masks/{id}.png", None) for name in ("train", "val")
    }
  },
}


def write_tfds(tree: Tree, dataset: str) -> None:
  """Writes what the tree holds as OUT/tfds/NAME/VERSION."""
  from pseudoseg_jax.data import tfds_builders  # it takes seconds to import

  def in_tree(pattern):
    return pattern and (lambda name: tree.root / pattern.replace("{id}", name))

  for name, parts in _TFDS[dataset].items():
    splits = {}
    for split, (image, label, listed) in parts.items():
      before, after = image.split("{id}")
      found = [
        path[len(before) : -len(after)]
        for path in tree.entries
        if path.startswith(before) and path.endswith(after)
      ]
      ids = (
        (tree.root / listed).read_text(encoding="utf-8", errors="replace").split()
        if listed
        else sorted(found)
      )
      ids = [name for name in ids if label is None or label.replace("{id}", name) in tree.entries]
      if ids:
        splits[split] = tfds_builders.Split(ids, in_tree(image), in_tree(label))
    if splits:
      progress = _Progress(f"TFDS {name}")
      written = tfds_builders.write(tree.root / "tfds", name, splits, progress=progress.one_more)
      progress.end()
      print(f"{written}: {', '.join(f'{split} {len(part.ids)}' for split, part in splits.items())}")


# What they share


def _members(path: pathlib.Path, pattern: re.Pattern, example: str) -> Iterator[archives.Member]:
  """Yields the members that match, and prints progress now and then."""
  progress = _Progress(path.name)
  for member in archives.members(path, pattern.search):
    yield member
    progress.one_more(member.done)
  if not progress.files:
    problems = checks.Problems("nothing to prepare")
    problems.add(
      str(path),
      got="no such file in it",
      allowed=f"files like {example}",
      remedy="is it the right archive?",
    )
    problems.raise_if_any()
  progress.end()


def _told(items: Iterable[Any], total: int, name: str) -> Iterator[Any]:
  """Yields the items, and prints progress now and then."""
  progress = _Progress(name)
  for number, item in enumerate(items, start=1):
    yield item
    progress.one_more(number / total)
  progress.end()


class _Progress:
  """A line now and then: share done, rate, time left."""

  def __init__(self, name: str):
    self.name, self.files = name, 0
    self.started = self.reported = time.perf_counter()

  def one_more(self, done: float) -> None:
    self.files += 1
    now = time.perf_counter()
    if now - self.reported > _REPORT_SECONDS:
      self.reported, elapsed = now, now - self.started
      left = elapsed * (1 - done) / max(done, 1e-3)
      rate = f"{self.files} files  {self.files / elapsed:.0f} files/s"
      print(
        f"{self.name}: {100 * done:.0f} %  {rate}  left {left // 60:.0f} min {left % 60:.0f} s",
        flush=True,
      )

  def end(self) -> None:
    print(
      f"{self.name}: {self.files} files in {time.perf_counter() - self.started:.1f} s", flush=True
    )


def _put_member(
  tree: Tree,
  path: str,
  member: archives.Member,
  convert: Callable[[bytes, str], bytes] | None = None,
) -> None:
  """Adds a member of an archive, unless the file is there.

  It is added as it is, or as `convert(content, name)`.
  """
  if tree.holds(path) and (convert or tree.entries[path][1] == member.size):
    return
  content = member.read()  # here, as an archive is read in its own order
  tree.put(path, lambda: convert(content, member.name) if convert else content)


def _ids(tree: Tree, path: str) -> list[str]:
  if not tree.holds(path):
    _refuse_incomplete(path)
  return (tree.root / path).read_text(encoding="utf-8", errors="replace").split()


def _refuse_incomplete(what: str) -> None:
  problems = checks.Problems("the archive is not whole")
  problems.add(what, got="not in it", remedy="is it the right archive? fetch it anew")
  problems.raise_if_any()


def _check_complete(tree: Tree, ids: Iterable[str], patterns: list[str]) -> None:
  problems = checks.Problems(f"{tree.root} is not complete")
  for pattern in patterns:
    paths = [pattern.replace("{id}", name) for name in ids]
    absent = [path for path in paths if path not in tree.entries]
    if absent:
      problems.add(
        pattern,
        got=f"{len(absent)} of {len(paths)} absent: {shorten(absent)}",
        remedy="fetch the archive anew",
      )
  problems.raise_if_any()


def _check_counts(counts: Mapping[str, tuple[int, int]]) -> None:
  problems = checks.Problems("the archives do not hold what they officially do")
  for what, (found, official) in counts.items():
    if found != official:
      problems.add(what, got=found, allowed=official)
  if problems.items:
    problems.add(
      "remedy: fetch the archives anew, or say --any_count if they are partial on purpose"
    )
  problems.raise_if_any()


_PREPARE = {"voc": prepare_voc, "cityscapes": prepare_cityscapes, "coco": prepare_coco}
_ARCHIVES = {"voc": ("voc", "sbd"), "cityscapes": ("images", "labels"), "coco": ("images",)}
_OPTIONS = ("voc", "sbd", "images", "labels", "extra", "stuff", "annotations")


def _parse(arguments):
  parser = argparse.ArgumentParser(
    "python -m pseudoseg_jax.prepare",
    description=DESCRIPTION,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  kinds = parser.add_subparsers(dest="dataset", required=True)
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument(
    "--out", type=pathlib.Path, required=True, help="folder to fill: config.data.root afterwards"
  )
  common.add_argument(
    "--format",
    choices=("folder", "tfds"),
    default="folder",
    help="tfds: also a TFDS data set, in OUT/tfds",
  )
  common.add_argument(
    "--any_count",
    action="store_true",
    help="accept partial archives: do not check the official counts",
  )
  common.add_argument(
    "--verify",
    action="store_true",
    help="check content, not only size; without archives, do nothing else",
  )

  def add(name, title, **archives_by_option):
    kind = kinds.add_parser(name, help=title, parents=[common], allow_abbrev=False)
    for option, text in archives_by_option.items():
      kind.add_argument(
        f"--{option}", type=pathlib.Path, nargs="+" if option == "images" else None, help=text
      )

  add(
    "voc",
    "PASCAL VOC 2012 with the masks of SBD",
    voc="VOCtrainval_11-May-2012.tar",
    sbd="benchmark.tgz",
  )
  add(
    "cityscapes",
    "Cityscapes",
    images="leftImg8bit_trainvaltest.zip",
    labels="gtFine_trainvaltest.zip",
    extra="leftImg8bit_trainextra.zip, images without masks",
  )
  add(
    "coco",
    "COCO 2017",
    images="train2017.zip val2017.zip",
    stuff="stuffthingmaps_trainval2017.zip",
    annotations="annotations_trainval2017.zip, instead; needs pycocotools and 4 GiB of memory",
  )
  known = parser.parse_args(arguments)
  known.given = {name for name in _OPTIONS if getattr(known, name, None)}
  needed = set(_ARCHIVES[known.dataset])
  if known.given or not known.verify:
    if needed - known.given:
      parser.error(
        f"{known.dataset} needs {', '.join('--' + name for name in _ARCHIVES[known.dataset])}"
      )
    if known.dataset == "coco" and len(known.given & {"stuff", "annotations"}) != 1:
      parser.error("coco needs either --stuff or --annotations")
  return known


def _check_given(known) -> None:
  problems = checks.Problems("cannot prepare")
  if known.out.exists() and not known.out.is_dir():
    problems.add(
      "--out", got=f"{known.out}, which is a file", remedy="give a folder; it is made if need be"
    )
  for name in sorted(known.given):
    paths = getattr(known, name)
    for path in paths if isinstance(paths, list) else [paths]:
      if not path.exists():
        problems.add(
          f"--{name}",
          got=f"{path}, which does not exist",
          remedy="give an official archive, or its extracted folder",
        )
  problems.raise_if_any()


def _verify(tree: Tree, *, alone: bool) -> None:
  broken = tree.broken()
  print(f"{len(tree.entries)} files checked, {len(broken)} gone or changed")
  if alone:
    problems = checks.Problems(f"{tree.root} is not as it was written")
    if not tree.entries:
      problems.add(str(tree.manifest), got="no finished file", remedy="prepare the data set first")
    for path in broken:
      problems.add(str(tree.root / path), got="gone or changed")
    if broken:
      problems.add("remedy: the command with the archives and --verify writes them anew")
    problems.raise_if_any()
  for path in broken:
    del tree.entries[path]


def main(arguments=None) -> int:
  known = _parse(sys.argv[1:] if arguments is None else arguments)

  def command():
    _check_given(known)
    tree = Tree(known.out, known.dataset)
    if known.verify:
      _verify(tree, alone=not known.given)
    if known.given:
      with tree:
        counts = _PREPARE[known.dataset](tree, known)
      if not known.any_count:
        _check_counts(counts)
      if known.format == "tfds":
        write_tfds(tree, known.dataset)
      _summary(tree, known, counts)

  return command_line.run(command, again=f"the same command goes on from here, into {known.out}")


def _summary(tree, known, counts):
  there = len(tree.entries) - tree.written
  print(
    f"{tree.root}: {tree.written} files written"
    + (f", {there} were there already" if there > 0 else "")
  )
  print("  " + ", ".join(f"{what} {found}" for what, (found, _) in counts.items()))
  config = f"--config=configs/{known.dataset}.py --config.data.root={tree.root.resolve()}"
  print("next:")
  print(f"  python -m pseudoseg_jax.check_data {config}")
  print(f"  python -m pseudoseg_jax.main {config} --workdir=W")


if __name__ == "__main__":
  command_line.leave(main)
