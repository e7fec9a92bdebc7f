"""A source of images and masks that a program already has at hand.

They are arrays, PIL images, or paths.
"""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data import decode, splits
from pseudoseg_jax.data.decode import ImageLike


class GivenImages:
  """A source of images in memory or of files by path, see `sources.Source`.

  Arrays are not copied: leave them as they are while they are in use. Files are read when they are
  needed.

  Args:
    images: each a path, a PIL image or an array, see `decode.read_any_image`.
    masks: of each image, a path or PIL image of class indices, or an array [h, w] of integers;
      None: no masks.
    name: what the images are, in their ids ("labeled_00003") and in errors. A file's id is its
      path.
    num_classes: K, where there are masks.
    channels, max_value, exif_orientation: of images, see `decode.read_any_image`.
    label_map: stored mask value -> class index or IGNORE_LABEL.

  Raises:
    InputError: at construction, whatever shows without decoding a file, all at once: images of
      another shape or scale, masks of another size than their images or with values that are no
      class, absent files.
  """

  def __init__(
    self,
    images: Sequence[ImageLike],
    masks: Sequence[ImageLike] | None = None,
    *,
    name: str = "image",
    num_classes: int | None = None,
    channels: int = 3,
    max_value: float = 0.0,
    exif_orientation: str = "apply",
    label_map: Mapping[int, int] | None = None,
  ):
    self.images, self.masks = list(images), None if masks is None else list(masks)
    self.has_labels = masks is not None
    self.channels, self.num_classes = channels, num_classes
    self._reading = {"exif_orientation": exif_orientation, "max_value": max_value}
    self._label_map = dict(label_map or {})
    self.ids = tuple(
      str(image) if _is_path(image) else f"{name}_{row:05d}"
      for row, image in enumerate(self.images)
    )
    problems = checks.Problems(f"the {name} images cannot be used")
    if not self.images:
      problems.add("images", got="none", allowed="at least one")
    repeated = [path for path, count in collections.Counter(self.ids).items() if count > 1]
    if repeated:
      problems.add(
        "images", got=f"{splits.shorten(repeated)} more than once", allowed="every file once"
      )
    if self.has_labels and len(self.masks) != len(self.images):
      problems.add(
        "masks", got=f"{len(self.masks)} for {len(self.images)} images", allowed="one for each"
      )
    problems.raise_if_any()
    self._sizes = [(0, 0)] * len(self.images)
    self.dtype = np.uint8
    for row in range(len(self.images)):
      problems.extend(self._look(row))
    problems.raise_if_any()
    # A resumed run must have the same images, and names say nothing of what an array holds.
    parts = (
      zip(self.images, self.masks, strict=True)
      if self.has_labels
      else ((image,) for image in self.images)
    )
    self.digests = tuple(
      _digest(*(part for part in of_row if not _is_path(part))) for of_row in parts
    )

  def __len__(self) -> int:
    return len(self.ids)

  def image(self, row: int) -> np.ndarray:
    image = decode.read_any_image(self.images[row], self.channels, **self._reading)
    if image.dtype != np.uint8 and self.dtype == np.uint8:
      problems = checks.Problems(f"cannot use image {self.ids[row]}")
      problems.add(
        "file",
        got="more than 8 bits",
        allowed="8 bits, as its header said",
        remedy="leave the file as it is",
      )
      problems.raise_if_any()
    return image.astype(self.dtype, copy=False)

  def label(self, row: int) -> np.ndarray:
    if not self.has_labels:
      raise ValueError("these images have no masks")
    return self._classes_of(self._read_mask(row), f"mask of {self.ids[row]}")

  def size(self, row: int) -> tuple[int, int]:
    return self._sizes[row]

  def _look(self, row: int) -> list[str]:
    """Checks an image and its mask, as far as no file needs decoding.

    Returns what is wrong with them. Notes size and type.
    """
    image, problems = self.images[row], checks.Problems("")
    try:
      if _is_path(image):
        header = decode.header(image, **self._reading)
        if isinstance(header, decode.Unusable):
          problems.add(f"image {image}", **header.problem)
          return problems.items
        size, dtype = header.size, header.dtype
      else:
        pixels = decode.read_any_image(image, self.channels, **self._reading)
        size, dtype = pixels.shape[:2], pixels.dtype
    except checks.InputError as error:
      return [f"{self.ids[row]}: {str(error).replace(chr(10), chr(10) + '  ')}"]
    self._sizes[row] = size
    if dtype != np.uint8:
      self.dtype = np.float32
    return self._look_at_mask(row, size) if self.has_labels else []

  def _look_at_mask(self, row: int, size: tuple[int, int]) -> list[str]:
    mask, problems = self.masks[row], checks.Problems("")
    where = f"mask of {self.ids[row]}"
    if _is_path(mask):
      header = decode.mask_header(mask, exif_orientation=self._reading["exif_orientation"])
      if isinstance(header, decode.Unusable):
        problems.add(f"mask {mask}", **header.problem)
        return problems.items
      found = header.size
    else:
      try:
        found = self._classes_of(self._read_mask(row), where).shape
      except checks.InputError as error:
        return [str(error)]
    if found != size:
      got, allowed = (f"height x width {height} x {width}" for height, width in (found, size))
      problems.add(where, got=got, allowed=f"{allowed}, as the image")
    return problems.items

  def _read_mask(self, row: int) -> np.ndarray:
    mask = self.masks[row]
    if _is_path(mask):
      return decode.read_mask(mask, exif_orientation=self._reading["exif_orientation"])
    problems = checks.Problems(f"cannot use the mask of {self.ids[row]}")
    try:
      numbers = decode.numbers_of(mask) if isinstance(mask, Image.Image) else np.asarray(mask)
    except decode.Unusable as error:
      problems.add("mask", **error.problem)
      problems.raise_if_any()
    numbers = numbers[..., 0] if numbers.shape[2:] == (1,) else numbers
    if numbers.ndim != 2 or numbers.dtype.kind not in "buif":
      remedy = "one-hot masks want np.argmax(mask, axis=-1)" if numbers.ndim == 3 else None
      got = "None" if mask is None else f"{numbers.dtype} of shape {numbers.shape}"
      problems.add(
        "mask", got=got, allowed="class indices [height, width], integers", remedy=remedy
      )
    elif (
      numbers.dtype.kind == "f" and not (np.isfinite(numbers) & (numbers == np.rint(numbers))).all()
    ):
      problems.add("mask", got=f"{numbers.dtype} with fractions", allowed="class indices, integers")
    problems.raise_if_any()
    return numbers.astype(np.int64)

  def _classes_of(self, numbers: np.ndarray, where: str) -> np.ndarray:
    """Converts stored values to uint8 classes.

    InputError for values that are no class.
    """
    values, place = np.unique(numbers, return_inverse=True)
    mapped = np.array([self._label_map.get(value, value) for value in values.tolist()], np.int64)
    unknown = [
      value
      for value, index in zip(values.tolist(), mapped.tolist(), strict=True)
      if index != IGNORE_LABEL and not 0 <= index < self.num_classes
    ]
    if unknown:
      problems = checks.Problems("a mask cannot be used")
      problems.add(
        where,
        got=f"the values {splits.shorten(list(map(str, unknown)))}",
        allowed=f"the classes 0..{self.num_classes - 1}, and {IGNORE_LABEL} for no label",
        remedy=f"if they mean no label: label_map={{{unknown[0]}: {IGNORE_LABEL}}}; else name more classes",
      )
      problems.raise_if_any()
    return mapped.astype(np.uint8)[place].reshape(numbers.shape)


def _digest(*parts: np.ndarray | Image.Image) -> str:
  digest = hashlib.sha256()
  for part in parts:
    array = np.ascontiguousarray(np.asarray(part))
    digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
  return digest.hexdigest()


def _is_path(value: Any) -> bool:
  return isinstance(value, (str, os.PathLike))


def check_apart(*, labeled: GivenImages, evaluated: GivenImages) -> None:
  """Raises InputError for images that are used in training and evaluation."""

  def named(source: GivenImages) -> dict[str, str]:
    return {
      os.path.realpath(name) if _is_path(image) else _digest(image): name
      for name, image in zip(source.ids, source.images, strict=True)
    }

  learned, scored = named(labeled), named(evaluated)
  both = [
    f"{learned[key]} = {scored[key]}" if learned[key] != scored[key] else scored[key]
    for key in scored
    if key in learned
  ]
  problems = checks.Problems("the data cannot be used")
  if both:
    got = f"{len(both)} of {len(scored)} images that are learned from: {splits.shorten(both)}"
    problems.add(
      "evaluated",
      got=got,
      allowed="images that nothing is learned from",
      remedy="leave them out of one of the two",
    )
  problems.raise_if_any()
