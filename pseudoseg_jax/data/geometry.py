"""Weak augmentation: mirror, scale, crop. TensorFlow ops on one example, every random draw an argument.

Two conventions, by name. "opencv" is that of CPS's released code (Chen et al. 2021; its `TrainPre`): mirror, scale, crop with
centred padding. "tensorflow" is that of PseudoSeg's (Zou et al. 2021; its `input_preprocess`): scale, pad at the bottom and the
right, crop, then mirror. A crop is described by two pairs: `scaled`, the (height, width) of the whole image after scaling, and
`origin`, the row and column of the scaled image under the crop's corner, negative where padding comes first.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL

CONVENTIONS = ("opencv", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Geometry:
  """How weak views are drawn.

  crop_size: (height, width) of every view, pixels.
  scales: factors on the image's size, one drawn per example; the default is the list of CPS, in which 1.25 is missing.
  continuous: draw the factor uniformly between the least and the greatest of `scales` instead.
  flip: mirror left-right with probability 1/2.
  convention: "opencv" or "tensorflow", as this file's head says.
  """

  crop_size: tuple[int, int]
  scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
  continuous: bool = False
  flip: bool = True
  convention: str = "opencv"

  def __post_init__(self):
    problems = checks.Problems("geometry cannot be used")
    if len(self.crop_size) != 2 or not all(side >= 1 for side in self.crop_size):
      problems.add("crop_size", got=self.crop_size, allowed="(height, width), each at least 1 pixel")
    if not self.scales or not all(scale > 0 for scale in self.scales):
      problems.add("scales", got=self.scales, allowed="at least one factor, each above 0; (1.0,) leaves the size as it is")
    check_convention(self.convention, problems)
    problems.raise_if_any()


def check_convention(convention: str, problems: checks.Problems) -> None:
  if convention not in CONVENTIONS:
    remedy = checks.nearest(str(convention), CONVENTIONS)
    problems.add("convention", got=repr(convention), allowed=checks.choices(CONVENTIONS), remedy=remedy)


class Draws(NamedTuple):
  """flip: bool[]; scale: f64[], factor on the size; offset: i32[2], corner of the crop in the scaled image."""

  flip: tf.Tensor
  scale: tf.Tensor
  offset: tf.Tensor


def draw(geometry: Geometry, size: tf.Tensor, seed: tf.Tensor) -> Draws:
  """Draws one example's geometry, a pure function of the seed.

  Offsets are uniform in 0 .. scaled - crop inclusive; with "opencv" in 0 .. scaled - crop + 1, one more than fits, as in the
  released code, so that the last one leaves the crop a pixel short. An axis that is not larger than the crop starts at 0.

  Args:
    size: i32[2], height and width of the image.
    seed: i64[2].
  """
  uniform = tf.random.stateless_uniform([4], seed)
  scales = tf.constant(geometry.scales, tf.float64)
  if geometry.continuous:
    low, high = min(geometry.scales), max(geometry.scales)
    scale = low + (high - low) * tf.cast(uniform[1], tf.float64)
  else:
    scale = scales[tf.cast(uniform[1] * len(geometry.scales), tf.int32)]
  room = scaled_size(size, scale) - tf.constant(geometry.crop_size)
  num_offsets = tf.where(room > 0, room + (2 if geometry.convention == "opencv" else 1), 1)
  offset = tf.minimum(tf.cast(uniform[2:] * tf.cast(num_offsets, tf.float32), tf.int32), num_offsets - 1)
  flip = uniform[0] < 0.5 if geometry.flip else tf.constant(False)
  return Draws(flip, scale, offset)


def scaled_size(size: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
  """int(size * scale) per axis, i32[2], at least 1 pixel."""
  return tf.maximum(tf.cast(tf.cast(size, tf.float64) * tf.cast(scale, tf.float64), tf.int32), 1)


class Crop(NamedTuple):
  """A weak view: rgb f32 [H, W, 3] in [0, 1]; label i32 [H, W] or None; valid bool [H, W]; window f32[4], as `window` says."""

  rgb: tf.Tensor
  label: tf.Tensor | None
  valid: tf.Tensor
  window: tf.Tensor


def crop(image: tf.Tensor, label: tf.Tensor | None, draws: Draws, crop_size: tuple[int, int], convention: str = "opencv") -> Crop:
  """All of the geometry: a stored image, uint8 [h, w, 3], and its mask, uint8 [h, w] or None, as a view of `crop_size`."""
  if convention == "opencv":
    image, label = _mirrored((image, label), draws.flip)
  scaled = scaled_size(tf.shape(image)[:2], draws.scale)
  origin = crop_origin(scaled, draws.offset, crop_size, convention)
  rgb = crop_image(image, scaled, origin, crop_size, convention) / 255.0
  if label is not None:
    label = crop_label(label, scaled, origin, crop_size, convention)
  valid = valid_mask(scaled, origin, crop_size)
  if convention == "opencv":
    return Crop(rgb, label, valid, window(scaled, origin, crop_size, draws.flip))
  rgb, label, valid = _mirrored((rgb, label, valid), draws.flip)
  # Mirroring the crop, and not the image, leaves the crop's place in the image as it is.
  return Crop(rgb, label, valid, window(scaled, origin, crop_size, tf.constant(False)))


def _mirrored(arrays: tuple, flip: tf.Tensor) -> tuple:
  return tuple(None if array is None else mirror(array, flip) for array in arrays)


def crop_origin(scaled: tf.Tensor, offset: tf.Tensor, crop_size: tuple[int, int], convention: str = "opencv") -> tf.Tensor:
  """Where the crop's corner lies in the scaled image, i32[2].

  What the image lacks is padded half before and half after, the odd pixel after ("opencv"), or all of it after ("tensorflow").
  """
  if convention == "tensorflow":
    return offset
  missing = tf.constant(crop_size) - tf.minimum(scaled - offset, crop_size)
  return offset - missing // 2


def mirror(image: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
  """Swaps left and right (axis 1) where `flip`, bool[], says so."""
  return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def crop_image(
  image: tf.Tensor, scaled: tf.Tensor, origin: tf.Tensor, crop_size: tuple[int, int], convention: str = "opencv"
) -> tf.Tensor:
  """Scales and crops an image in one pass; only the crop's pixels are computed.

  Bilinear between pixel centres, edges repeated. "opencv": without antialiasing, rounded to whole levels as an 8-bit resize is
  (OpenCV's INTER_LINEAR, up to one level where its fixed point rounds otherwise). "tensorflow": with antialiasing where it
  shrinks, not rounded (TensorFlow 2's `tf.image.resize(..., antialias=True)`).

  Args:
    image: uint8 [h, w, 3], or any other type of levels 0..255.

  Returns:
    Levels 0..255, f32 [*crop_size, 3]; 0 outside the image.
  """
  resized = tf.raw_ops.ScaleAndTranslate(
    images=image[tf.newaxis],
    size=crop_size,
    scale=tf.cast(scaled / tf.shape(image)[:2], tf.float32),
    translation=tf.cast(-origin, tf.float32),
    kernel_type="triangle",
    antialias=convention == "tensorflow",
  )
  levels = resized[0] if convention == "tensorflow" else tf.floor(resized[0] + 0.5)
  return tf.ensure_shape(levels, (*crop_size, 3))


def crop_label(
  label: tf.Tensor, scaled: tf.Tensor, origin: tf.Tensor, crop_size: tuple[int, int], convention: str = "opencv"
) -> tf.Tensor:
  """Scales and crops a mask by the nearest stored pixel.

  Scaled pixel i shows stored pixel floor(i * stored / scaled), as OpenCV's INTER_NEAREST; with "tensorflow" the nearest to
  i * (stored - 1) / (scaled - 1), halves up: corners lie on corners (TensorFlow 1's nearest resize with align_corners).

  Args:
    label: uint8 [h, w].

  Returns:
    i32 [*crop_size], IGNORE_LABEL outside the image.
  """
  size = tf.shape(label)
  for axis in (0, 1):
    position = tf.clip_by_value(tf.range(crop_size[axis]) + origin[axis], 0, scaled[axis] - 1)
    if convention == "tensorflow":
      steps = tf.maximum(scaled[axis] - 1, 1)
      stored = (2 * position * (size[axis] - 1) + steps) // (2 * steps)
    else:
      stored = position * size[axis] // scaled[axis]
    label = tf.gather(label, stored, axis=axis)
  return tf.where(valid_mask(scaled, origin, crop_size), tf.cast(label, tf.int32), IGNORE_LABEL)


def valid_mask(scaled: tf.Tensor, origin: tf.Tensor, crop_size: tuple[int, int]) -> tf.Tensor:
  """bool [*crop_size], False on padding."""
  row = tf.range(crop_size[0]) + origin[0]
  column = tf.range(crop_size[1]) + origin[1]
  inside_rows = (row >= 0) & (row < scaled[0])
  inside_columns = (column >= 0) & (column < scaled[1])
  return inside_rows[:, tf.newaxis] & inside_columns[tf.newaxis, :]


def window(scaled: tf.Tensor, origin: tf.Tensor, crop_size: tuple[int, int], flip: tf.Tensor) -> tf.Tensor:
  """The crop in the stored image's own frame, so that a prediction can be put back.

  To undo the geometry: mirror the crop back where it is mirrored, then stretch it over this rectangle.

  Args:
    flip: bool[], whether the image was mirrored before it was cropped.

  Returns:
    f32[4]: top, left, height, width as fractions of the image's height and width; leaves [0, 1] on padding.
  """
  scaled = tf.cast(scaled, tf.float32)
  corner = tf.cast(origin, tf.float32) / scaled
  extent = tf.constant(crop_size, tf.float32) / scaled
  left = tf.where(flip, 1.0 - corner[1] - extent[1], corner[1])
  return tf.stack([corner[0], left, extent[0], extent[1]])
