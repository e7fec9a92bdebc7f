"""Masks of official releases as class indices in 8-bit PNG files: SBD, COCO.

Pixels are indices, 255 = ignored; the palette (VOC's colors) is only for the eye.
"""

from __future__ import annotations

import collections
import io
import json
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import scipy.io
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.data import classes

_IGNORE = 255
# SciPy reports damaged files by all of these.
_UNREADABLE = (
  ValueError,
  KeyError,
  IndexError,
  TypeError,
  NotImplementedError,
  EOFError,
  OSError,
  zlib.error,
  scipy.io.matlab.MatReadError,
)
_VOC_CLASSES = 21
# COCO's 80 category ids.
_THING_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
_PALETTE = classes.voc_palette(256).tobytes()


def png(mask: np.ndarray) -> bytes:
  """Encodes indices uint8 [h, w] as a palette PNG."""
  image = Image.fromarray(np.ascontiguousarray(mask, np.uint8)).convert("L")
  image.putpalette(_PALETTE)
  content = io.BytesIO()
  image.save(content, format="PNG", compress_level=3)
  return content.getvalue()


def from_sbd(content: bytes, name: str) -> bytes:
  """Converts a .mat file of SBD's `cls` to a palette PNG.

  The file holds struct GTcls, field Segmentation; the PNG holds VOC's classes 0..20.

  Raises:
    InputError: not such a file; `name` identifies it.
  """
  try:
    mask = scipy.io.loadmat(io.BytesIO(content), variable_names=["GTcls"])["GTcls"]["Segmentation"][
      0, 0
    ]
    if mask.ndim != 2 or not np.all(mask < _VOC_CLASSES):
      raise ValueError(f"shape {mask.shape}, values up to {mask.max()}")
  except _UNREADABLE as error:
    problems = checks.Problems("cannot read a mask of SBD")
    problems.add(
      name,
      got=f"{type(error).__name__}: {error}",
      allowed=f"GTcls.Segmentation [h, w] of 0..{_VOC_CLASSES - 1}",
    )
    problems.raise_if_any()
  return png(mask)


def from_coco_stuff(content: bytes, name: str) -> bytes:
  """Converts a PNG of stuffthingmaps_trainval2017 to class indices.

  Stored are category id - 1, and 255 unlabeled. The result has 0 stuff, 1..80 things, 255
  unlabeled.

  Raises:
    InputError: not such a file; `name` identifies it.
  """
  table = np.zeros(256, np.uint8)
  table[np.array(_THING_IDS) - 1] = np.arange(1, 81)
  table[255] = _IGNORE
  try:
    with Image.open(io.BytesIO(content)) as image:
      mask = table[np.asarray(image)]
      if mask.ndim != 2:
        raise ValueError(f"shape {mask.shape}")
  except (OSError, SyntaxError, ValueError, IndexError) as error:
    problems = checks.Problems("cannot read a mask of COCO-Stuff")
    problems.add(
      name, got=f"{type(error).__name__}: {error}", allowed="a PNG of 8-bit indices [h, w]"
    )
    problems.raise_if_any()
  return png(mask)


def require_pycocotools() -> None:
  """Raises InputError where `from_coco_instances` could not draw."""
  try:
    import pycocotools.mask  # noqa: F401
  except ImportError:
    problems = checks.Problems("masks of COCO's instances cannot be drawn")
    problems.add(
      "pycocotools",
      got="not installed",
      remedy="pip install pycocotools, or give --stuff, which does without",
    )
    problems.raise_if_any()


def from_coco_instances(content: bytes, name: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
  """Yields the masks of an instances_*.json of COCO.

  For every image there are its file name without suffix, and () -> palette PNG.

  Where instances overlap, the one that stands first in the file wins, as in the widespread DeepLab
  loaders; PseudoSeg's own masks were published only as made. Crowd regions, whose outlines are
  coarse, are 255 where no instance lies, while those loaders take them for the class. All that has
  no instance is 0.

  Raises:
    InputError: another kind of file; `name` identifies it.
  """
  problems = checks.Problems("cannot read COCO's instances")
  try:
    data = json.loads(content)
    found = sorted((entry["id"], entry["name"]) for entry in data["categories"])
  except (ValueError, KeyError, TypeError) as error:
    problems.add(
      name,
      got=f"{type(error).__name__}: {error}",
      allowed="COCO's JSON",
      remedy="give annotations_trainval2017.zip",
    )
    problems.raise_if_any()
  if found != list(zip(_THING_IDS, classes.COCO.names[1:], strict=True)):
    problems.add(
      name,
      got=f"{len(found)} categories",
      allowed="COCO's 80",
      remedy="give annotations_trainval2017.zip",
    )
    problems.raise_if_any()
  by_image = collections.defaultdict(list)
  for annotation in data["annotations"]:
    by_image[annotation["image_id"]].append(annotation)
  for image in data["images"]:
    draw = lambda image=image: png(_draw(by_image[image["id"]], image["height"], image["width"]))
    yield image["file_name"].rpartition(".")[0], draw


def _draw(annotations, height, width):
  import pycocotools.mask

  index = {category: number for number, category in enumerate(_THING_IDS, start=1)}
  mask = np.zeros((height, width), np.uint8)
  # Crowds last; otherwise the file's order.
  for annotation in sorted(annotations, key=lambda entry: entry["iscrowd"]):
    shape = pycocotools.mask.frPyObjects(annotation["segmentation"], height, width)
    inside = pycocotools.mask.decode(shape)
    # Several polygons, or one run-length code.
    inside = inside.any(axis=-1) if inside.ndim == 3 else inside > 0
    mask[inside & (mask == 0)] = (
      _IGNORE if annotation["iscrowd"] else index[annotation["category_id"]]
    )
  return mask
