"""Weak augmentation: mirror, scale, crop. TensorFlow ops on one example, every random draw an argument.

The order and the conventions are those of CPS's released code (Chen et al. 2021; its `TrainPre`): mirror, scale, then crop with
centred padding. A crop is described by two pairs: `scaled`, the (height, width) of the whole image after scaling, and `origin`,
the row and column of the scaled image under the crop's corner, negative where padding comes first.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL


@dataclasses.dataclass(frozen=True)
class Geometry:
  """How weak views are drawn.

  crop_size: (height, width) of every view, pixels.
  scales: factors on the image's size, one drawn per example; the default is the list of CPS, in which 1.25 is missing.
  continuous: draw the factor uniformly between the least and the greatest of `scales` instead.
  flip: mirror left-right with probability 1/2.
  """

  crop_size: tuple[int, int]
  scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
  continuous: bool = False
  flip: bool = True

  def __post_init__(self):
    problems = checks.Problems("geometry cannot be used")
    if len(self.crop_size) != 2 or not all(side >= 1 for side in self.crop_size):
      problems.add("crop_size", got=self.crop_size, allowed="(height, width), each at least 1 pixel")
    if not self.scales or not all(scale > 0 for scale in self.scales):
      problems.add("scales", got=self.scales, allowed="at least one factor, each above 0; (1.0,) leaves the size as it is")
    problems.raise_if_any()


class Draws(NamedTuple):
  """flip: bool[]; scale: f64[], factor on the size; offset: i32[2], corner of the crop in the scaled image."""

  flip: tf.Tensor
  scale: tf.Tensor
  offset: tf.Tensor


def draw(geometry: Geometry, size: tf.Tensor, seed: tf.Tensor) -> Draws:
  """Draws one example's geometry, a pure function of the seed.

  Offsets are uniform in 0 .. scaled - crop + 1 inclusive: one more than fits, as in the released code, so that the last
  one leaves the crop a pixel short. An axis that is not larger than the crop starts at 0.

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
  num_offsets = tf.where(room > 0, room + 2, 1)
  offset = tf.minimum(tf.cast(uniform[2:] * tf.cast(num_offsets, tf.float32), tf.int32), num_offsets - 1)
  flip = uniform[0] < 0.5 if geometry.flip else tf.constant(False)
  return Draws(flip, scale, offset)


def scaled_size(size: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
  """int(size * scale) per axis, i32[2], at least 1 pixel."""
  return tf.maximum(tf.cast(tf.cast(size, tf.float64) * tf.cast(scale, tf.float64), tf.int32), 1)


def crop_origin(scaled: tf.Tensor, offset: tf.Tensor, crop_size: tuple[int, int]) -> tf.Tensor:
  """Where the crop's corner lies in the scaled image, i32[2].

  What the image lacks is padded half before and half after, the odd pixel after.
  """
  missing = tf.constant(crop_size) - tf.minimum(scaled - offset, crop_size)
  return offset - missing // 2


def mirror(image: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
  """Swaps left and right (axis 1) where `flip`, bool[], says so."""
  return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def crop_image(image: tf.Tensor, scaled: tf.Tensor, origin: tf.Tensor, crop_size: tuple[int, int]) -> tf.Tensor:
  """Scales and crops an image in one pass; only the crop's pixels are computed.

  Bilinear between pixel centres without antialiasing, edges repeated, rounded to whole levels as an 8-bit resize is
  (OpenCV's INTER_LINEAR, up to one level where its fixed point rounds otherwise).

  Args:
    image: uint8 [h, w, 3].

  Returns:
    Whole levels 0..255, f32 [*crop_size, 3]; 0 outside the image.
  """
  resized = tf.raw_ops.ScaleAndTranslate(
    images=image[tf.newaxis],
    size=crop_size,
    scale=tf.cast(scaled / tf.shape(image)[:2], tf.float32),
    translation=tf.cast(-origin, tf.float32),
    kernel_type="triangle",
    antialias=False,
  )
  return tf.ensure_shape(tf.floor(resized[0] + 0.5), (*crop_size, 3))


def crop_label(label: tf.Tensor, scaled: tf.Tensor, origin: tf.Tensor, crop_size: tuple[int, int]) -> tf.Tensor:
  """Scales and crops a mask: scaled pixel i shows stored pixel floor(i * stored / scaled), as OpenCV's INTER_NEAREST.

  Args:
    label: uint8 [h, w].

  Returns:
    i32 [*crop_size], IGNORE_LABEL outside the image.
  """
  size = tf.shape(label)
  for axis in (0, 1):
    position = tf.clip_by_value(tf.range(crop_size[axis]) + origin[axis], 0, scaled[axis] - 1)
    label = tf.gather(label, position * size[axis] // scaled[axis], axis=axis)
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

  To undo the geometry: mirror the crop back where `flip`, then stretch it over this rectangle.

  Returns:
    f32[4]: top, left, height, width as fractions of the image's height and width; leaves [0, 1] on padding.
  """
  scaled = tf.cast(scaled, tf.float32)
  corner = tf.cast(origin, tf.float32) / scaled
  extent = tf.constant(crop_size, tf.float32) / scaled
  left = tf.where(flip, 1.0 - corner[1] - extent[1], corner[1])
  return tf.stack([corner[0], left, extent[0], extent[1]])
