"""Augmentation of Learning Pseudo Labels.

Color and geometric operations on a stored image and its mask, before any crop.

NumPy and PIL on one example. The ranges are those of the official code (Wang et al. 2022;
lib/datasets/BaseDataset.py, `__strong_augment__`, and transform.py). The official code warps by
OpenCV; here PIL does. PIL has another bicubic kernel (a = -1 for -3/4), cuts fractions of levels
off and does not blend pixels with the border. A scaled mask's pixels are taken by their centers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from pseudoseg_jax.contract import IGNORE_LABEL

# name -> least and greatest amount, drawn uniformly, and the operation. Blends are with the image
# itself: 0 is the full effect, 1 none, and more moves away from it. Bits and the threshold are
# rounded down.
COLOR_OPERATIONS: dict[str, tuple[float, float, Callable[[Image.Image, float], Image.Image]]] = {
  "autocontrast": (
    0.0,
    1.0,
    lambda image, amount: Image.blend(ImageOps.autocontrast(image), image, amount),
  ),
  "brightness": (0.5, 1.5, lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
  "color": (0.5, 1.5, lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
  "contrast": (0.5, 1.5, lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
  "equalize": (
    0.5,
    1.5,
    lambda image, amount: Image.blend(ImageOps.equalize(image), image, amount),
  ),
  "invert": (0.0, 1.0, lambda image, amount: Image.blend(ImageOps.invert(image), image, amount)),
  # 1..8 bits, equally likely.
  "posterize": (1.0, 9.0, lambda image, bits: ImageOps.posterize(image, int(bits))),
  "sharpness": (0.0, 1.0, lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
  "solarize": (0.0, 255.0, lambda image, threshold: ImageOps.solarize(image, threshold)),
}
GEOMETRIC_OPERATIONS = ("scale", "flip", "shear", "rotation")


def augment(
  image: np.ndarray,
  label: np.ndarray,
  num_operations: int,
  rng: np.random.Generator,
  border: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
  """Applies random color and geometric operations, num_operations in all.

  Draws a in 0..num_operations, then applies a color and num_operations - a geometric operations,
  each drawn anew.

  Args:
    image: uint8 [h, w, 3], RGB.
    label: uint8 [h, w].
    border: RGB levels of what a warp brings in from outside; in the mask it is IGNORE_LABEL.

  Returns:
    Both again, possibly of another size (scale).
  """
  pixels, mask = Image.fromarray(image), Image.fromarray(label)
  num_color = int(rng.integers(num_operations + 1))
  for name in rng.choice(list(COLOR_OPERATIONS), num_color):
    least, greatest, operation = COLOR_OPERATIONS[name]
    pixels = operation(pixels, rng.uniform(least, greatest))
  for name in rng.choice(GEOMETRIC_OPERATIONS, num_operations - num_color):
    pixels, mask = _geometric(name, pixels, mask, rng, border)
  return np.array(pixels), np.array(mask)


def _geometric(name, pixels, mask, rng, border):
  if name == "scale":
    factor = rng.uniform(0.5, 2.0)
    return scale(pixels, mask, factor)
  if name == "flip":
    return (
      (ImageOps.mirror(pixels), ImageOps.mirror(mask)) if rng.random() < 0.5 else (pixels, mask)
    )
  if name == "shear":
    return warp(pixels, mask, shear_matrix(pixels.size, *rng.uniform(-0.3, 0.3, 2)), border)
  return warp(pixels, mask, rotation_matrix(pixels.size, int(rng.integers(-45, 46))), border)


def scale(pixels: Image.Image, mask: Image.Image, factor: float) -> tuple[Image.Image, Image.Image]:
  """Scales both sides of an image and its mask by the factor, rounded.

  Bicubic without antialiasing, as OpenCV's, and the nearest pixel of the mask.
  """
  (width, height), size = pixels.size, tuple(max(1, round(side * factor)) for side in pixels.size)
  inverse = (width / size[0], 0.0, 0.0, 0.0, height / size[1], 0.0)
  return (
    pixels.transform(size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC),
    mask.transform(size, Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST),
  )


def shear_matrix(size: tuple[int, int], across: float, down: float) -> np.ndarray:
  """Computes the f64 [2, 3] matrix of a shear for a (width, height) image.

  x + across * (y - width / 2), y + down * (x - height / 2).
  """
  # The code takes these two, and not the other way round, for the middle: both are off in oblong
  # images.
  width, height = size
  return np.array([[1.0, across, -across * width / 2], [down, 1.0, -down * height / 2]])


def rotation_matrix(size: tuple[int, int], degrees: float) -> np.ndarray:
  """Computes the f64 [2, 3] matrix of a rotation for a (width, height) image.

  The rotation is counter-clockwise about the image's middle.
  """
  cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  x, y = size[0] / 2, size[1] / 2
  return np.array(
    [[cosine, sine, x - cosine * x - sine * y], [-sine, cosine, y + sine * x - cosine * y]]
  )


def warp(
  pixels: Image.Image, mask: Image.Image, matrix: np.ndarray, border: tuple[int, int, int]
) -> tuple[Image.Image, Image.Image]:
  """Warps an image and its mask by a matrix, on a canvas of the same size.

  What is at (x, y), in pixels from the first one's center, moves to matrix @ (x, y, 1).
  """
  linear = np.linalg.inv(matrix[:, :2])
  shift = 0.5 - linear @ (matrix[:, 2] + 0.5)  # PIL counts from the first pixel's corner
  inverse = (*linear[0], shift[0], *linear[1], shift[1])
  return (
    pixels.transform(
      pixels.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor=border
    ),
    mask.transform(
      mask.size, Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST, fillcolor=IGNORE_LABEL
    ),
  )
