"""Weak augmentation: mirror, scale, crop.

TensorFlow ops on one example, every random draw an argument.

The conventions of published codes have names, see `CONVENTIONS`. All but one scale the image and
crop the result. Such a crop is described by two pairs: `scaled`, the (height, width) of the whole
image after scaling, and `origin`, the row and column of the scaled image under the crop's corner,
negative where padding comes first.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL


class Convention(NamedTuple):
  """A convention of published code for views; `Geometry.convention` names it.

  kernel: of resizing, between pixel centers, edges repeated: "linear" without antialiasing;
    "triangle" (bilinear) or "keyscubic" (bicubic) with antialiasing where it shrinks.
  nearest: the stored pixel that pixel i of a scaled mask shows, as in `crop_label`: "corner",
    "corner_f32", "center", "ends".
  padding: of small images, all "after" (below and on the right), or half before and half after, the
    odd pixel after ("around"), or with the image anywhere in the crop ("random").
  whole_levels: images of uint8 are rounded to whole levels, as an 8-bit resize does.
  black: padding is black before normalization and takes part in photometry; else it is the mean
    color, 0 after normalization.
  long_side: the longer side is an integer drawn uniformly, the other follows, rounded; else both
    are the size * scale, cut off.
  """

  kernel: str
  nearest: str
  padding: str
  whole_levels: bool = True
  black: bool = False
  long_side: bool = False


CONVENTIONS = {
  # CPS (Chen et al. 2021; `TrainPre`). The one that mirrors the stored image, not the view.
  "opencv": Convention("linear", "corner", "around"),
  # PseudoSeg (Zou et al. 2021; `input_preprocess`).
  "tensorflow": Convention("triangle", "ends", "after", whole_levels=False),
  # UniMatch (Yang et al. 2023; dataset/transform.py).
  "pillow": Convention("triangle", "center", "after", black=True, long_side=True),
  # CCT (Ouali et al. 2020; base/base_dataset.py). There the longer side is 200..800 for any image:
  # 0.4..1.6 of 500.
  "cct": Convention("keyscubic", "center", "after", long_side=True),
  # AEL (Hu et al. 2021; semseg/dataset/augmentation.py). Factors below and above 1 are equally
  # likely.
  "ael": Convention("linear", "corner_f32", "around", whole_levels=False),
  # CutMix-Seg (French et al. 2020; `SegCVTransformRandomCropScaleHung`). The one that cuts first:
  # crop_size / factor, rounded, out of the stored image, padded if need be; this is scaled to
  # crop_size. The cut's edges are repeated, those of padding blend.
  "cutmix_seg": Convention("linear", "corner", "around"),
  # Learning Pseudo Labels (Wang et al. 2022; lib/datasets/transform.py, `RandomCrop`). It only
  # crops: scales are (1.0,) there.
  "lpl": Convention("linear", "corner", "random"),
}

# XLA makes one vectorised loop of a chain of operations on pixels: several times faster than
# TensorFlow's kernels one by one. It compiles for every shape anew, hence never for a stored
# image's own: see `_padded`.
compiled = functools.partial(tf.function, jit_compile=True, autograph=False)


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Settings of the geometry of weak views.

  crop_size: (height, width) of every view, pixels.
  scales: factors on the image's size, one drawn per example; the default is the list of CPS, in
    which 1.25 is missing.
  continuous: draw the factor uniformly between the least and the greatest of `scales` instead;
    always so with "pillow", "cct" and "ael".
  flip: mirror left-right with probability 1/2.
  convention: a name in `CONVENTIONS`.
  """

  crop_size: tuple[int, int]
  scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
  continuous: bool = False
  flip: bool = True
  convention: str = "opencv"

  def __post_init__(self):
    problems = checks.Problems("geometry cannot be used")
    if not checks.is_size(self.crop_size):
      problems.add(
        "crop_size",
        got=self.crop_size,
        allowed="(height, width), each a whole number of pixels, at least 1",
      )
    if not self.scales or not all(scale > 0 for scale in self.scales):
      problems.add(
        "scales",
        got=self.scales,
        allowed="at least one factor, each above 0; (1.0,) leaves the size as it is",
      )
    elif self.convention == "ael" and not min(self.scales) <= 1 <= max(self.scales):
      problems.add(
        "scales",
        got=self.scales,
        allowed="factors from below 1 to above it, with the convention 'ael'",
      )
    check_convention(self.convention, problems)
    problems.raise_if_any()


def check_convention(convention: str, problems: checks.Problems) -> None:
  if convention not in CONVENTIONS:
    remedy = checks.nearest(str(convention), CONVENTIONS)
    problems.add(
      "convention", got=repr(convention), allowed=checks.choices(CONVENTIONS), remedy=remedy
    )


class Draws(NamedTuple):
  """The random draws of one view.

  flip: bool[]; scale: f64[], factor on the size; offset: i32[2], corner of the crop in the scaled
  image.

  With "cutmix_seg", offset is the corner of what is cut out of the stored image, padded.
  """

  flip: tf.Tensor
  scale: tf.Tensor
  offset: tf.Tensor


def draw(geometry: Geometry, size: tf.Tensor, seed: tf.Tensor) -> Draws:
  """Draws one example's geometry, a pure function of the seed.

  Args:
    size: i32[2], height and width of the image.
    seed: i64[2].
  """
  return from_uniform(geometry, size, tf.random.stateless_uniform([4], seed))


def from_uniform(geometry: Geometry, size: tf.Tensor, uniform: tf.Tensor) -> Draws:
  """Converts four numbers uniform in [0, 1), f32 or f64 [4], to draws.

  They determine, in this order: mirrored (below 1/2), scale, row, column.

  Offsets are uniform in 0 .. scaled - crop inclusive; with "opencv" in 0 .. scaled - crop + 1, one
  more than fits, as in the released code, so that the last one leaves the crop a pixel short; with
  "cutmix_seg" the number times the room, rounded, so that the first and the last come half as
  often. An axis that is not larger than the crop starts at 0; with "lpl", a smaller one is at one
  of scaled - crop .. 0.
  """
  scale = _scale(geometry, size, uniform[1])
  if geometry.convention == "cutmix_seg":
    room = tf.maximum(size - cut_size(geometry.crop_size, scale), 0)
    offset = tf.cast(
      tf.round(tf.cast(room, tf.float64) * tf.cast(uniform[2:], tf.float64)), tf.int32
    )
  else:
    room = scaled_size(size, scale, geometry.convention) - tf.constant(geometry.crop_size)
    anywhere = CONVENTIONS[geometry.convention].padding == "random"
    num_offsets = tf.where(
      room > 0, room + (2 if geometry.convention == "opencv" else 1), 1 - room if anywhere else 1
    )
    offset = tf.minimum(
      tf.cast(uniform[2:] * tf.cast(num_offsets, uniform.dtype), tf.int32), num_offsets - 1
    )
    offset = tf.where(room < 0, -offset, offset)
  flip = uniform[0] < 0.5 if geometry.flip else tf.constant(False)
  return Draws(flip, scale, offset)


def _scale(geometry: Geometry, size: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
  """Converts a number uniform in [0, 1) to the factor on the size, f64[]."""
  low, high = min(geometry.scales), max(geometry.scales)
  share = tf.cast(uniform, tf.float64)
  if geometry.convention == "ael":
    return tf.where(
      share < 0.5, low + (1.0 - low) * 2.0 * share, 1.0 + (high - 1.0) * (2.0 * share - 1.0)
    )
  if CONVENTIONS[geometry.convention].long_side:
    longer = tf.cast(tf.reduce_max(size), tf.float64)
    least, greatest = tf.floor(low * longer), tf.floor(high * longer)
    return tf.minimum(least + tf.floor(share * (greatest - least + 1.0)), greatest) / longer
  if geometry.continuous:
    return low + (high - low) * share
  return tf.constant(geometry.scales, tf.float64)[tf.cast(uniform * len(geometry.scales), tf.int32)]


def scaled_size(size: tf.Tensor, scale: tf.Tensor, convention: str = "opencv") -> tf.Tensor:
  """Computes height and width after scaling, i32[2], at least 1 pixel.

  int(size * scale), or as in `Convention.long_side`.
  """
  size, scale = tf.cast(size, tf.float64), tf.cast(scale, tf.float64)
  if CONVENTIONS[convention].long_side:
    longer = tf.reduce_max(size)
    scaled = size * tf.round(longer * scale) / longer + 0.5
  else:
    scaled = size * scale
  return tf.maximum(tf.cast(scaled, tf.int32), 1)


def cut_size(crop_size: tuple[int, int], scale: tf.Tensor) -> tf.Tensor:
  """Computes the size that "cutmix_seg" cuts out of the stored image, i32[2].

  crop_size / scale, rounded, at least 1 pixel.
  """
  return tf.maximum(
    tf.cast(tf.round(tf.constant(crop_size, tf.float64) / tf.cast(scale, tf.float64)), tf.int32), 1
  )


class Crop(NamedTuple):
  """A weak view.

  rgb: f32 [H, W, C] in [0, 1], 0 on padding. label: i32 [H, W] or None. valid: bool [H, W], False
    on padding.
  window: f32[4], as in `window`.
  opacity: f32 [H, W], how much rgb is to hide the mean color: 0 on padding, or 1 if it is to be
    black; "cutmix_seg" has values in between along the padding's edges, and is valid above 1/2.
  """

  rgb: tf.Tensor
  label: tf.Tensor | None
  valid: tf.Tensor
  window: tf.Tensor
  opacity: tf.Tensor


def crop(
  image: tf.Tensor,
  label: tf.Tensor | None,
  draws: Draws,
  crop_size: tuple[int, int],
  convention: str = "opencv",
) -> Crop:
  """Applies all of the geometry to a stored image and its mask.

  The image is [h, w, C] of levels 0..255, and the mask uint8 [h, w] or None. The result is a view.
  """
  if convention == "cutmix_seg":
    view = _cut_and_scale(image, label, draws, crop_size)
  else:
    view = _scale_and_crop(image, label, draws, crop_size, convention)
  if convention == "opencv":
    return view
  # Mirroring the crop, and not the image, leaves the crop's place in the image as it is.
  rgb, label, valid, opacity = (
    None if plane is None else mirror(plane, draws.flip)
    for plane in (view.rgb, view.label, view.valid, view.opacity)
  )
  return Crop(rgb, label, valid, view.window, opacity)


def _scale_and_crop(image, label, draws, crop_size, convention):
  """Computes `crop` by scaling first, mirrored under "opencv" alone."""
  scaled = scaled_size(tf.shape(image)[:2], draws.scale, convention)
  origin = crop_origin(scaled, draws.offset, crop_size, convention)
  flip = draws.flip if convention == "opencv" else tf.constant(False)
  rgb = crop_image(image, scaled, origin, crop_size, convention, flip=flip) / 255.0
  if label is not None:
    # AEL's padding is of class 0, by accident it seems ("change to 0"): trained, and counted. Here
    # it is IGNORE_LABEL throughout.
    label = crop_label(label, scaled, origin, crop_size, convention, flip=flip)
  valid = valid_mask(scaled, origin, crop_size)
  opacity = tf.ones(crop_size) if CONVENTIONS[convention].black else tf.cast(valid, tf.float32)
  return Crop(rgb, label, valid, window(scaled, origin, crop_size, flip), opacity)


def _cut_and_scale(image, label, draws, crop_size):
  """Computes `crop` under "cutmix_seg", not mirrored."""
  size, cut = tf.shape(image)[:2], cut_size(crop_size, draws.scale)
  corner = draws.offset - tf.maximum(cut - size, 0) // 2
  row, column = (tf.range(cut[axis]) + corner[axis] for axis in (0, 1))
  inside = ((row >= 0) & (row < size[0]))[:, tf.newaxis] & ((column >= 0) & (column < size[1]))

  def cut_out(stored):
    rows = tf.gather(stored, tf.clip_by_value(row, 0, size[0] - 1), axis=0)
    return tf.gather(rows, tf.clip_by_value(column, 0, size[1] - 1), axis=1)

  place = dict(
    scaled=tf.constant(crop_size),
    origin=tf.constant((0, 0)),
    crop_size=crop_size,
    convention="cutmix_seg",
  )
  pixels = tf.concat(
    [cut_out(image), tf.fill([cut[0], cut[1], 1], tf.cast(255, image.dtype))], axis=2
  )
  levels = crop_image(tf.where(inside[..., tf.newaxis], pixels, tf.zeros_like(pixels)), **place)
  opacity = levels[..., -1] / 255.0
  # The padding's zeros are blended in; without their share, the rest has its own color.
  rgb = tf.math.divide_no_nan(levels[..., :-1], levels[..., -1:])
  if label is not None:
    label = crop_label(
      tf.where(inside, cut_out(label), tf.cast(IGNORE_LABEL, label.dtype)), **place
    )
  return Crop(rgb, label, opacity > 0.5, window(size, corner, cut, tf.constant(False)), opacity)


def crop_origin(
  scaled: tf.Tensor, offset: tf.Tensor, crop_size: tuple[int, int], convention: str = "opencv"
) -> tf.Tensor:
  """Computes where the crop's corner lies in the scaled image, i32[2].

  The image is padded as in `Convention.padding`.
  """
  if CONVENTIONS[convention].padding != "around":
    return offset
  missing = tf.constant(crop_size) - tf.minimum(scaled - offset, crop_size)
  return offset - missing // 2


@compiled
def mirror(view: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
  """Swaps left and right (axis 1) where `flip`, bool[], is true."""
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

  The kernel is the convention's. "opencv" is OpenCV's INTER_LINEAR and "pillow" PIL's BILINEAR, up
  to one level where their fixed point rounds otherwise; "tensorflow" is TensorFlow 2's
  `tf.image.resize(..., antialias=True)`.

  Args:
    image: [h, w, C] of levels 0..255, uint8 or f32; C is known before the graph runs.
    flip: bool[], mirror the image before it is cropped (kernel "linear" only).

  Returns:
    Levels 0..255, f32 [*crop_size, C]; 0 outside the image.
  """
  rules = CONVENTIONS[convention]
  whole_levels = rules.whole_levels and image.dtype == tf.uint8
  if rules.kernel == "linear":
    options = dict(crop_size=crop_size, channels=image.shape[2], whole_levels=whole_levels)
    return _bilinear(
      _padded(image), tf.shape(image)[:2], scaled, origin, tf.convert_to_tensor(flip), **options
    )
  resized = tf.raw_ops.ScaleAndTranslate(
    images=image[tf.newaxis],
    size=crop_size,
    scale=tf.cast(scaled / tf.shape(image)[:2], tf.float32),
    translation=tf.cast(-origin, tf.float32),
    kernel_type=rules.kernel,
    antialias=True,
  )
  resized = tf.ensure_shape(resized[0], (*crop_size, image.shape[2]))
  if whole_levels:
    resized = tf.floor(resized + 0.5)
  # Only this one leaves the range.
  return tf.clip_by_value(resized, 0.0, 255.0) if rules.kernel == "keyscubic" else resized


def _padded(stored: tf.Tensor) -> tf.Tensor:
  """Lays all values in one row, with zeros up to a power of two.

  A data set's images then have few shapes.
  """
  count = tf.size(stored)
  length = tf.cast(
    2.0 ** tf.math.ceil(tf.math.log(tf.cast(count, tf.float64)) / np.log(2.0)), tf.int32
  )
  return tf.concat([tf.reshape(stored, [-1]), tf.zeros([length - count], stored.dtype)], axis=0)


@compiled
def _bilinear(values, size, scaled, origin, flip, *, crop_size, channels, whole_levels):
  """Computes `crop_image` without antialiasing.

  The image [*size, channels] is laid out in a row.
  """

  def taps(axis):
    """Computes the two stored pixels and the blending share on an axis.

    They are the stored pixels before and after each of the crop's, and the second one's share.
    """
    centre = tf.cast(tf.range(crop_size[axis]) + origin[axis], tf.float64) + 0.5
    position = centre * tf.cast(size[axis], tf.float64) / tf.cast(scaled[axis], tf.float64) - 0.5
    before = tf.floor(position)
    first, second = (
      tf.clip_by_value(tf.cast(before, tf.int32) + step, 0, size[axis] - 1) for step in (0, 1)
    )
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
  if whole_levels:
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

  The stored pixel that scaled pixel i shows depends on `Convention.nearest`:

  "corner": floor(i * stored / scaled), as OpenCV's INTER_NEAREST.
  "corner_f32": the same in single precision, as PyTorch, which may be a pixel less where the
    division comes out even.
  "center": floor((i + 1/2) * stored / scaled), as PIL, which may be a pixel less where the division
    comes out even.
  "ends": the nearest to i * (stored - 1) / (scaled - 1), halves up (TensorFlow 1's nearest resize
    with align_corners).

  Args:
    label: uint8 [h, w].
    flip: bool[], mirror the mask before it is cropped.

  Returns:
    i32 [*crop_size], IGNORE_LABEL outside the image.
  """
  options = dict(crop_size=crop_size, rule=CONVENTIONS[convention].nearest)
  return _nearest(
    _padded(label), tf.shape(label), scaled, origin, tf.convert_to_tensor(flip), **options
  )


@compiled
def _nearest(values, size, scaled, origin, flip, *, crop_size, rule):
  """Computes `crop_label` of a mask laid out in a row."""

  def stored(axis):
    position = tf.clip_by_value(tf.range(crop_size[axis]) + origin[axis], 0, scaled[axis] - 1)
    if rule == "corner":
      return position * size[axis] // scaled[axis]
    if rule == "corner_f32":
      step = tf.cast(size[axis], tf.float32) / tf.cast(scaled[axis], tf.float32)
      return tf.minimum(tf.cast(tf.cast(position, tf.float32) * step, tf.int32), size[axis] - 1)
    if rule == "center":
      return (2 * position + 1) * size[axis] // (2 * scaled[axis])
    steps = tf.maximum(scaled[axis] - 1, 1)
    return (2 * position * (size[axis] - 1) + steps) // (2 * steps)

  row, column = stored(0), stored(1)
  column = tf.where(flip, size[1] - 1 - column, column)
  label = tf.gather(values, row[:, tf.newaxis] * size[1] + column)
  return tf.where(valid_mask(scaled, origin, crop_size), tf.cast(label, tf.int32), IGNORE_LABEL)


def valid_mask(scaled: tf.Tensor, origin: tf.Tensor, crop_size: tuple[int, int]) -> tf.Tensor:
  """Marks the pixels of a crop that show the image, not padding.

  bool [*crop_size], False on padding.
  """
  row = tf.range(crop_size[0]) + origin[0]
  column = tf.range(crop_size[1]) + origin[1]
  inside_rows = (row >= 0) & (row < scaled[0])
  inside_columns = (column >= 0) & (column < scaled[1])
  return inside_rows[:, tf.newaxis] & inside_columns[tf.newaxis, :]


def window(
  scaled: tf.Tensor, origin: tf.Tensor, crop_size: tuple[int, int], flip: tf.Tensor
) -> tf.Tensor:
  """Locates the crop in the stored image's own frame.

  So a prediction can be put back. To undo the geometry: mirror the crop back where it is mirrored,
  then stretch it over this rectangle.

  Args:
    flip: bool[], whether the image was mirrored before it was cropped.

  Returns:
    f32[4]: top, left, height, width as fractions of the image's height and width; leaves [0, 1] on
    padding.
  """
  scaled = tf.cast(scaled, tf.float32)
  corner = tf.cast(origin, tf.float32) / scaled
  extent = tf.cast(crop_size, tf.float32) / scaled
  left = tf.where(flip, 1.0 - corner[1] - extent[1], corner[1])
  return tf.stack([corner[0], left, extent[0], extent[1]])


def crop_boxes(
  boxes: tf.Tensor, window: tf.Tensor, flip: tf.Tensor, crop_size: tuple[int, int]
) -> tf.Tensor:
  """Transforms bounding boxes of a stored image to the frame of the view.

  This holds under any convention.

  Args:
    boxes: f32 [M, 5]: class index (-1: no box), then top, left, bottom, right in fractions of the
      image's height and width.
    window: of the view, as in `window`.
    flip: bool[], whether the view shows the image mirrored.

  Returns:
    f32 [M, 5] with edges in fractions of the view, clipped to it; (-1, 0, 0, 0, 0) where less than
    a pixel is left of a box.
  """
  kind, top, left, bottom, right = tf.unstack(boxes, axis=1)
  top, bottom = ((edge - window[0]) / window[2] for edge in (top, bottom))
  left, right = ((edge - window[1]) / window[3] for edge in (left, right))
  left, right = tf.where(flip, 1.0 - right, left), tf.where(flip, 1.0 - left, right)
  top, left, bottom, right = (
    tf.clip_by_value(edge, 0.0, 1.0) for edge in (top, left, bottom, right)
  )
  seen = (
    (kind >= 0) & ((bottom - top) * crop_size[0] >= 1.0) & ((right - left) * crop_size[1] >= 1.0)
  )
  return tf.where(
    seen[:, tf.newaxis],
    tf.stack([kind, top, left, bottom, right], axis=1),
    [[-1.0, 0.0, 0.0, 0.0, 0.0]],
  )
