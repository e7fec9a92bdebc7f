"""Weak augmentation: mirror, scale, crop. TensorFlow ops on one example, every random draw an argument.

Two conventions, by name. "opencv" is that of CPS's released code (Chen et al. 2021; its `TrainPre`): mirror, scale, crop with
centred padding. "tensorflow" is that of PseudoSeg's (Zou et al. 2021; its `input_preprocess`): scale, pad at the bottom and the
right, crop, then mirror. A crop is described by two pairs: `scaled`, the (height, width) of the whole image after scaling, and
`origin`, the row and column of the scaled image under the crop's corner, negative where padding comes first.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL

CONVENTIONS = ("opencv", "tensorflow")

# XLA makes one vectorised loop of a chain of operations on pixels: several times faster than TensorFlow's kernels one by one.
# It compiles for every shape anew, hence never for a stored image's own: see `_padded`.
compiled = functools.partial(tf.function, jit_compile=True, autograph=False)


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
  """A weak view: rgb f32 [H, W, C] in [0, 1]; label i32 [H, W] or None; valid bool [H, W]; window f32[4], as `window` says."""

  rgb: tf.Tensor
  label: tf.Tensor | None
  valid: tf.Tensor
  window: tf.Tensor


def crop(image: tf.Tensor, label: tf.Tensor | None, draws: Draws, crop_size: tuple[int, int], convention: str = "opencv") -> Crop:
  """All of the geometry: a stored image, [h, w, C] of levels 0..255, and its mask, uint8 [h, w] or None, as a view of `crop_size`."""
  scaled = scaled_size(tf.shape(image)[:2], draws.scale)
  origin = crop_origin(scaled, draws.offset, crop_size, convention)
  valid = valid_mask(scaled, origin, crop_size)
  if convention == "opencv":
    rgb = crop_image(image, scaled, origin, crop_size, flip=draws.flip) / 255.0
    if label is not None:
      label = crop_label(label, scaled, origin, crop_size, flip=draws.flip)
    return Crop(rgb, label, valid, window(scaled, origin, crop_size, draws.flip))
  rgb = mirror(crop_image(image, scaled, origin, crop_size, convention) / 255.0, draws.flip)
  if label is not None:
    label = mirror(crop_label(label, scaled, origin, crop_size, convention), draws.flip)
  # Mirroring the crop, and not the image, leaves the crop's place in the image as it is.
  return Crop(rgb, label, mirror(valid, draws.flip), window(scaled, origin, crop_size, tf.constant(False)))


def crop_origin(scaled: tf.Tensor, offset: tf.Tensor, crop_size: tuple[int, int], convention: str = "opencv") -> tf.Tensor:
  """Where the crop's corner lies in the scaled image, i32[2].

  What the image lacks is padded half before and half after, the odd pixel after ("opencv"), or all of it after ("tensorflow").
  """
  if convention == "tensorflow":
    return offset
  missing = tf.constant(crop_size) - tf.minimum(scaled - offset, crop_size)
  return offset - missing // 2


@compiled
def mirror(view: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
  """Swaps left and right (axis 1) where `flip`, bool[], says so."""
  return tf.where(flip, tf.reverse(view, [1]), view)


def crop_image(
  image: tf.Tensor,
  scaled: tf.Tensor,
  origin: tf.Tensor,
  crop_size: tuple[int, int],
  convention: str = "opencv",
  *,
  flip: tf.Tensor | bool = False,
) -> tf.Tensor:
  """Scales and crops an image in one pass; only the crop's pixels are computed.

  Bilinear between pixel centres, edges repeated. "opencv": without antialiasing; images of uint8 are rounded to whole levels as
  an 8-bit resize is (OpenCV's INTER_LINEAR, up to one level where its fixed point rounds otherwise). "tensorflow": with
  antialiasing where it shrinks, not rounded (TensorFlow 2's `tf.image.resize(..., antialias=True)`).

  Args:
    image: [h, w, C] of levels 0..255, uint8 or f32; C is known before the graph runs.
    flip: bool[], mirror the image before it is cropped ("opencv" only).

  Returns:
    Levels 0..255, f32 [*crop_size, C]; 0 outside the image.
  """
  if convention == "opencv":
    options = dict(crop_size=crop_size, channels=image.shape[2])
    return _bilinear(_padded(image), tf.shape(image)[:2], scaled, origin, tf.convert_to_tensor(flip), **options)
  resized = tf.raw_ops.ScaleAndTranslate(
    images=image[tf.newaxis],
    size=crop_size,
    scale=tf.cast(scaled / tf.shape(image)[:2], tf.float32),
    translation=tf.cast(-origin, tf.float32),
    kernel_type="triangle",
    antialias=True,
  )
  return tf.ensure_shape(resized[0], (*crop_size, image.shape[2]))


def _padded(stored: tf.Tensor) -> tf.Tensor:
  """All values in one row, with zeros up to a power of two: a data set's images then have few shapes."""
  count = tf.size(stored)
  length = tf.cast(2.0 ** tf.math.ceil(tf.math.log(tf.cast(count, tf.float64)) / np.log(2.0)), tf.int32)
  return tf.concat([tf.reshape(stored, [-1]), tf.zeros([length - count], stored.dtype)], axis=0)


@compiled
def _bilinear(values, size, scaled, origin, flip, *, crop_size, channels):
  """The "opencv" half of `crop_image`, of an image [*size, channels] laid out in a row."""

  def taps(axis):
    """Stored pixels before and after each of the crop's, and the second one's share."""
    centre = tf.cast(tf.range(crop_size[axis]) + origin[axis], tf.float64) + 0.5
    position = centre * tf.cast(size[axis], tf.float64) / tf.cast(scaled[axis], tf.float64) - 0.5
    before = tf.floor(position)
    first, second = (tf.clip_by_value(tf.cast(before, tf.int32) + step, 0, size[axis] - 1) for step in (0, 1))
    return first, second, tf.cast(position - before, tf.float32)

  top, bottom, below = taps(0)
  left, right, beside = taps(1)
  left, right = (tf.where(flip, size[1] - 1 - column, column) for column in (left, right))
  channel = tf.range(channels)

  def at(row, column):
    place = row[:, tf.newaxis, tf.newaxis] * size[1] + column[:, tf.newaxis]
    return tf.cast(tf.gather(values, place * channels + channel), tf.float32)

  below, beside = below[:, tf.newaxis, tf.newaxis], beside[:, tf.newaxis]
  above = at(top, left) * (1.0 - beside) + at(top, right) * beside
  under = at(bottom, left) * (1.0 - beside) + at(bottom, right) * beside
  levels = above * (1.0 - below) + under * below
  if values.dtype == tf.uint8:
    levels = tf.floor(levels + 0.5)
  return tf.where(valid_mask(scaled, origin, crop_size)[..., tf.newaxis], levels, 0.0)


def crop_label(
  label: tf.Tensor,
  scaled: tf.Tensor,
  origin: tf.Tensor,
  crop_size: tuple[int, int],
  convention: str = "opencv",
  *,
  flip: tf.Tensor | bool = False,
) -> tf.Tensor:
  """Scales and crops a mask by the nearest stored pixel.

  Scaled pixel i shows stored pixel floor(i * stored / scaled), as OpenCV's INTER_NEAREST; with "tensorflow" the nearest to
  i * (stored - 1) / (scaled - 1), halves up: corners lie on corners (TensorFlow 1's nearest resize with align_corners).

  Args:
    label: uint8 [h, w].
    flip: bool[], mirror the mask before it is cropped.

  Returns:
    i32 [*crop_size], IGNORE_LABEL outside the image.
  """
  options = dict(crop_size=crop_size, convention=convention)
  return _nearest(_padded(label), tf.shape(label), scaled, origin, tf.convert_to_tensor(flip), **options)


@compiled
def _nearest(values, size, scaled, origin, flip, *, crop_size, convention):
  """`crop_label`, of a mask laid out in a row."""

  def stored(axis):
    position = tf.clip_by_value(tf.range(crop_size[axis]) + origin[axis], 0, scaled[axis] - 1)
    if convention == "opencv":
      return position * size[axis] // scaled[axis]
    steps = tf.maximum(scaled[axis] - 1, 1)
    return (2 * position * (size[axis] - 1) + steps) // (2 * steps)

  row, column = stored(0), stored(1)
  column = tf.where(flip, size[1] - 1 - column, column)
  label = tf.gather(values, row[:, tf.newaxis] * size[1] + column)
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


def crop_boxes(boxes: tf.Tensor, window: tf.Tensor, flip: tf.Tensor, crop_size: tuple[int, int]) -> tf.Tensor:
  """Bounding boxes of a stored image as the view shows them, under either convention.

  Args:
    boxes: f32 [M, 5]: class index (-1: no box), then top, left, bottom, right in fractions of the image's height and width.
    window: of the view, as `window` says.
    flip: bool[], whether the view shows the image mirrored.

  Returns:
    f32 [M, 5] with edges in fractions of the view, clipped to it; (-1, 0, 0, 0, 0) where less than a pixel is left of a box.
  """
  kind, top, left, bottom, right = tf.unstack(boxes, axis=1)
  top, bottom = ((edge - window[0]) / window[2] for edge in (top, bottom))
  left, right = ((edge - window[1]) / window[3] for edge in (left, right))
  left, right = tf.where(flip, 1.0 - right, left), tf.where(flip, 1.0 - left, right)
  top, left, bottom, right = (tf.clip_by_value(edge, 0.0, 1.0) for edge in (top, left, bottom, right))
  seen = (kind >= 0) & ((bottom - top) * crop_size[0] >= 1.0) & ((right - left) * crop_size[1] >= 1.0)
  return tf.where(seen[:, tf.newaxis], tf.stack([kind, top, left, bottom, right], axis=1), [[-1.0, 0.0, 0.0, 0.0, 0.0]])
