"""Bounding boxes, the rough location of objects.

Boxes of an image are f32 [M, 5], a row for each: class index, top, left, bottom, right; the edges
are fractions of the image's height and width, 0..1, before any augmentation.
"""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import scipy.ndimage

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data import splits, tags
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.sources import Source

_MOST_PIXELS = 1e9  # of a side; what is more is no number of pixels, as are NaN and infinity
NO_BOX = -1.0  # the class of a row without a box

NamedBox = tuple[str, float, float, float, float]  # class name, top, left, bottom, right


def read_boxes(path: str | pathlib.Path, ids: Sequence[str], classes: Classes) -> list[np.ndarray]:
  """Reads the boxes of images from VOC annotations or a COCO JSON file.

  VOC annotations are given as a folder. An image may have no box, and the file may hold other
  images as well. Edges at most a pixel outside of the image are clipped; boxes without area are
  dropped.

  Args:
    path: a folder of VOC XML files `<id>.xml` (object/bndbox, pixels counted from 1, the last one
      included; "difficult" objects count), or a COCO JSON (bbox: left, top, width, height in pixels
      from 0; crowds are dropped).
    ids: the images' ids, with or without the ending of an image file; in a COCO JSON they are file
      names or, where no file name is among them, image ids.

  Returns:
    Boxes f32 [M_i, 5] of each of `ids`.

  Raises:
    InputError: unreadable files, images without an entry, boxes that do not lie in their image,
      unknown classes; all at once.
  """
  path = pathlib.Path(path)
  problems = checks.Problems(f"cannot use boxes {path}")
  if path.is_dir():
    entries = tags.read_annotations(path, ids, _boxes_of_xml, problems)
  else:
    entries = _read_coco(path, ids, problems)
  boxes = _with_indices(entries, ids, classes, problems)
  problems.raise_if_any()
  return boxes


def boxes_of_masks(
  source: Source, classes: Classes, min_area_fraction: float = 0.001
) -> list[np.ndarray]:
  """Reads boxes off masks, to simulate images that come with boxes only.

  Each image gets f32 [M_i, 5]. A box surrounds each connected region (4 neighbors) of a class;
  background (`Classes.background_index`) has none. Objects that touch share one, and an object that
  is cut in two has two. Regions of less than `min_area_fraction` of the image are left out.

  Raises:
    InputError: a source without masks, or a mask that cannot be read.
  """
  if not source.has_labels:
    raise checks.InputError(
      "cannot read boxes off masks: the source has none; give it a label_pattern"
    )
  things = [index for index in range(len(classes)) if index != classes.background_index]
  return [
    _boxes_of_mask(source.label(row), things, min_area_fraction) for row in range(len(source))
  ]


def boxes_of_instances(instances: np.ndarray, label: np.ndarray, classes: Classes) -> np.ndarray:
  """Computes boxes around the objects of one image, f32 [M, 5].

  Args:
    instances: integers [h, w], a number for each object, as in VOC's SegmentationObject and
      Cityscapes' instanceIds; where they are of 8 bits, IGNORE_LABEL is none.
    label: uint8 [h, w]. An object's class is the one that most of its pixels have. An object whose
      class is background, or that has none, gets no box. A numbered region that is not an object
      gets a box as well (Cityscapes: road).
  """
  height, width = label.shape
  numbers, places = np.unique(instances, return_inverse=True)
  places = places.reshape(instances.shape)
  boxes = []
  for index, (rows, columns) in enumerate(scipy.ndimage.find_objects(places + 1)):
    if instances.dtype == np.uint8 and numbers[index] == IGNORE_LABEL:
      continue
    inside = places[rows, columns] == index
    counts = np.bincount(label[rows, columns][inside], minlength=256)[: len(classes)]
    if counts.any() and counts.argmax() != classes.background_index:
      boxes.append(
        (
          counts.argmax(),
          rows.start / height,
          columns.start / width,
          rows.stop / height,
          columns.stop / width,
        )
      )
  return np.array(boxes, np.float32).reshape(-1, 5)


def write_boxes(
  path: str | pathlib.Path,
  ids: Sequence[str],
  sizes: Sequence[tuple[int, int]],
  boxes: Sequence[np.ndarray],
  classes: Classes,
) -> None:
  """Writes the boxes of images as a COCO JSON for `read_boxes`.

  Boxes are [M_i, 5], of images of (height, width) pixels. Edges become whole pixels.
  """
  images, annotations = [], []
  for row, (name, (height, width), of_image) in enumerate(zip(ids, sizes, boxes, strict=True)):
    images.append({"id": row, "file_name": name, "height": height, "width": width})
    for kind, *edges in np.rint(of_image * [1, height, width, height, width]).astype(int).tolist():
      top, left, bottom, right = edges
      bbox = [left, top, right - left, bottom - top]
      annotations.append(
        {"id": len(annotations), "image_id": row, "category_id": kind, "bbox": bbox, "iscrowd": 0}
      )
  categories = [{"id": index, "name": name} for index, name in enumerate(classes.names)]
  pathlib.Path(path).write_text(
    json.dumps({"images": images, "annotations": annotations, "categories": categories})
  )


def pad_boxes(boxes: Sequence[np.ndarray]) -> np.ndarray:
  """Pads the boxes of N images to one array: [M_i, 5] -> f32 [N, M, 5].

  M is the largest count, and at least 1. Rows without a box are of class -1.
  """
  padded = np.zeros((len(boxes), max([1, *map(len, boxes)]), 5), np.float32)
  padded[..., 0] = NO_BOX
  for row, of_image in enumerate(boxes):
    padded[row, : len(of_image)] = of_image
  return padded


def _boxes_of_mask(
  label: np.ndarray, indices: Sequence[int], min_area_fraction: float
) -> np.ndarray:
  height, width = label.shape
  boxes = []
  for index in np.intersect1d(label, indices):
    regions, _ = scipy.ndimage.label(label == index)
    areas = np.bincount(regions.ravel())[1:]
    for area, (rows, columns) in zip(areas, scipy.ndimage.find_objects(regions), strict=True):
      if area >= min_area_fraction * label.size:
        boxes.append(
          (
            index,
            rows.start / height,
            columns.start / width,
            rows.stop / height,
            columns.stop / width,
          )
        )
  return np.array(boxes, np.float32).reshape(-1, 5)


def _boxes_of_xml(root: ElementTree.Element) -> list[NamedBox]:
  width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
  boxes = []
  for found in root.iterfind("object"):
    left, top, right, bottom = (
      _number(found, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")
    )
    boxes.append(
      _in_image(tags.object_name(found), left - 1, top - 1, right, bottom, width, height)
    )
  return boxes


def _number(element: ElementTree.Element, path: str) -> float:
  text = element.findtext(path)
  if text is None:
    raise ValueError(f"no {path} in <{element.tag}>")
  if not abs(float(text)) < _MOST_PIXELS:
    raise ValueError(f"{text.strip()} as {path}")
  return float(text)


_COCO = "a folder of VOC XML, or a COCO JSON of images, annotations and categories"


def _read_coco(
  path: pathlib.Path, ids: Sequence[str], problems: checks.Problems
) -> dict[str, list[NamedBox]]:
  content = tags.read_json(path, problems, _COCO)
  if not isinstance(content, dict):
    problems.add("file", got=f"a {type(content).__name__}", allowed=_COCO)
    problems.raise_if_any()
  images = _items(content, "images", {"id": _is_id, "file_name": _is_text}, problems)
  annotations = _items(
    content, "annotations", {"image_id": _is_id, "category_id": _is_id}, problems
  )
  categories = _items(content, "categories", {"id": _is_id, "name": _is_text}, problems)
  for name, items in ("images", images), ("categories", categories):
    for key, count in collections.Counter(str(item["id"]) for item in items).items():
      if count > 1:
        problems.add(
          name, got=f"id {splits.shown(key)} {count} times", allowed="an id of its own for each"
        )
  category_of = {str(category["id"]): category["name"] for category in categories}
  boxes_of = collections.defaultdict(list)
  for number, annotation in enumerate(annotations):
    category = str(annotation["category_id"])
    if category not in category_of:
      problems.add(
        f"annotations[{number}]",
        got=f"category_id {splits.shown(category)}",
        allowed="the id of a category",
      )
    elif not annotation.get("iscrowd"):
      boxes_of[str(annotation["image_id"])].append((category_of[category], annotation.get("bbox")))
  problems.raise_if_any()  # of an unreadable file every image would be told to be missing
  entries = collections.defaultdict(list)
  for name, same in tags.of_images(_coco_images(images, ids), ids, problems).items():
    image, *others = same
    if others:
      problems.add(f"image {name}", got=f"{len(same)} images of that name", allowed="one")
      continue
    try:
      for category, bbox in boxes_of[str(image["id"])]:
        left, top, width, height = _numbers(bbox, 4)
        size = _numbers([image.get("width"), image.get("height")], 2)
        entries[name].append(_in_image(category, left, top, left + width, top + height, *size))
    except ValueError as error:
      problems.add(
        f"image {name}",
        got=error,
        allowed="bbox [left, top, width, height] inside of width x height",
      )
  return entries


def _items(
  content: Mapping[str, Any],
  name: str,
  keys: Mapping[str, Callable[[Any], bool]],
  problems: checks.Problems,
) -> list[dict[str, Any]]:
  """Returns the usable entries of a list of objects in a COCO JSON.

  Each entry that lacks one of the keys, or has an unfit value there, adds a problem.
  """
  items = content.get(name)
  if not isinstance(items, list):
    problems.add(name, got=_shown(items), allowed=f"a list; the file: {_COCO}")
    return []
  usable = []
  for number, item in enumerate(items):
    wrong = [
      key for key, fits in keys.items() if not (isinstance(item, dict) and fits(item.get(key)))
    ]
    if wrong:
      got = _shown(item.get(wrong[0]) if isinstance(item, dict) else item)
      problems.add(
        f"{name}[{number}].{wrong[0]}",
        got=got,
        allowed=f"{_WORDS[keys[wrong[0]]]}, as a COCO JSON has it",
      )
    else:
      usable.append(item)
  return usable


def _is_id(value: Any) -> bool:
  return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and value != ""


_WORDS = {_is_id: "a whole number or text", _is_text: "text"}


def _shown(value: Any) -> str:
  return (
    "nothing"
    if value is None
    else f"{splits.shown(json.dumps(value), 60)} ({type(value).__name__})"
  )


def _numbers(values: Any, count: int) -> list[float]:
  """Returns finite numbers from a JSON; ValueError for anything else."""
  numbers = (
    values
    if isinstance(values, list) and all(type(value) in (int, float) for value in values)
    else []
  )
  if len(numbers) != count or not all(abs(number) < _MOST_PIXELS for number in numbers):
    raise ValueError(f"{_shown(values)} in the place of {count} numbers")
  return numbers


def _coco_images(
  images: Sequence[dict[str, Any]], ids: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
  """Groups the images by the names that `ids` use for them.

  Each image stands in a list, as `tags.of_images` expects.
  """
  by_file = collections.defaultdict(list)
  for image in images:
    by_file[image["file_name"]].append(image)
  stems = set(map(tags.without_suffix, by_file))
  if any(tags.without_suffix(name) in stems for name in ids):
    return by_file
  by_id = {str(image["id"]): [image] for image in images}
  return by_id if any(name in by_id for name in ids) else by_file


def _in_image(
  name: str, left: float, top: float, right: float, bottom: float, width: float, height: float
) -> NamedBox:
  """Converts edges in pixels to fractions, clipped to the image."""
  if not (
    width > 0
    and height > 0
    and -1 <= left <= right <= width + 1
    and -1 <= top <= bottom <= height + 1
  ):
    raise ValueError(
      f"a box of '{name}' from x {left:g} to {right:g} and y {top:g} to {bottom:g} in an image of {width:g} x {height:g} pixels"
    )
  edges = np.clip((top / height, left / width, bottom / height, right / width), 0.0, 1.0)
  return name, *edges.tolist()


def _with_indices(
  entries: Mapping[str, Sequence[NamedBox]],
  ids: Sequence[str],
  classes: Classes,
  problems: checks.Problems,
) -> list[np.ndarray]:
  index_of = tags.index_by_name(classes)
  unknown = collections.defaultdict(dict)  # name -> its images, as keys
  boxes = []
  for image in ids:
    rows = []
    for name, top, left, bottom, right in entries.get(image, ()):
      index = tags.class_index(name, index_of)
      if index is None:
        unknown[name][image] = True
      elif top < bottom and left < right:
        rows.append((index, top, left, bottom, right))
    boxes.append(np.array(rows, np.float32).reshape(-1, 5))
  tags.add_unknown({name: list(images) for name, images in unknown.items()}, classes, problems)
  return boxes
