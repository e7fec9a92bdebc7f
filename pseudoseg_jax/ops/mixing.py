"""Masks that choose between two images, and the mixing itself.

All of it runs on the device, inside the jitted step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax.ops import gaussian


class BoxDraws(NamedTuple):
  """Uniform draws in [0, 1) behind one batch of box masks.

  There are N masks of `boxes` boxes each.
  """

  area: jax.Array  # [N, boxes], proportion within area_range (edge length where by_area is off)
  aspect: jax.Array | None  # [N, boxes], None where the aspect ratio is fixed
  position: jax.Array  # [N, boxes, 2], y before x


def draw_boxes(
  key: jax.Array, num_masks: int, *, boxes: int = 3, random_aspect_ratio: bool = True
) -> BoxDraws:
  area, aspect, position = jax.random.split(key, 3)
  return BoxDraws(
    area=jax.random.uniform(area, (num_masks, boxes)),
    aspect=jax.random.uniform(aspect, (num_masks, boxes)) if random_aspect_ratio else None,
    position=jax.random.uniform(position, (num_masks, boxes, 2)),
  )


def box_masks(
  draws: BoxDraws,
  size: tuple[int, int],
  *,
  area_range: tuple[float, float] = (0.25, 0.5),
  by_area: bool = True,
  within_bounds: bool = True,
  invert: bool = True,
) -> jax.Array:
  """Builds masks of random boxes.

  Where boxes of one mask overlap they cancel (the value is flipped in each).

  Defaults are those of CPS+CutMix: 3 boxes a mask that together take a quarter to half of the area.
  [French et al. 2020, mask_gen.py BoxMaskGenerator; TorchSemiSeg CPS+CutMix mask_gen.py]

  Args:
    draws: uniforms; the number of boxes and whether the aspect ratio is random are read off their
      shapes.
    size: (height, width) in pixels.
    by_area: the drawn proportion is a box's area; otherwise its edge length (then `aspect` is the
      second edge's draw).
    within_bounds: boxes lie inside the image; otherwise their centers do.
    invert: 0 outside the boxes and 1 inside; False gives the complement.

  Returns:
    bool[N, height, width].
  """
  low, high = area_range
  proportion = low + (high - low) * draws.area
  if by_area and draws.aspect is not None:
    positive = jnp.where(proportion > 0, proportion, 1)
    shares = jnp.stack([positive**draws.aspect, positive ** (1 - draws.aspect)], axis=-1)
    shares = jnp.where(proportion[..., None] > 0, shares, 0)
  elif by_area:
    shares = jnp.stack([jnp.sqrt(proportion)] * 2, axis=-1)
  elif draws.aspect is not None:
    shares = jnp.stack([proportion, low + (high - low) * draws.aspect], axis=-1)
  else:
    shares = jnp.stack([proportion] * 2, axis=-1)
  boxes = proportion.shape[-1]
  # With a fixed aspect ratio both edges are one array in the official code, so its factor acts
  # twice; kept as it is.
  shares = shares * (1 / boxes if draws.aspect is None else (1 / boxes) ** 0.5)

  size_yx = jnp.asarray(size, shares.dtype)
  edges = jnp.round(shares * size_yx)  # half to even, like NumPy
  if within_bounds:
    start = jnp.round((size_yx - edges) * draws.position)
    stop = start + edges
  else:
    centre = jnp.round(size_yx * draws.position)
    start, stop = jnp.trunc(centre - edges / 2), jnp.trunc(centre + edges / 2)
    # A negative start wraps, as a NumPy slice does in the official code: such a box comes out
    # (nearly always) empty.
    start = jnp.where(start < 0, jnp.maximum(start + size_yx, 0), start)
  rows, columns = jnp.arange(size[0]), jnp.arange(size[1])
  in_rows = (rows >= start[..., :1]) & (rows < stop[..., :1])  # [N, boxes, H]
  in_columns = (columns >= start[..., 1:]) & (columns < stop[..., 1:])
  inside = in_rows[..., :, None] & in_columns[..., None, :]
  odd = jnp.sum(inside, axis=1) % 2 == 1
  return odd if invert else ~odd


def mix(mask: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
  """Takes `second` where the mask is true and `first` elsewhere.

  The mask is bool[B, H, W], the others are [B, H, W] or [B, H, W, C].
  """
  if first.ndim == mask.ndim + 1:
    mask = mask[..., None]
  return jnp.where(mask, second, first)


def cutout_masks(centre_yx: jax.Array, size: tuple[int, int], half_side_pixels: int) -> jax.Array:
  """Builds one square box for each image, clipped at the border.

  bool[N, height, width], True inside. [DeVries & Taylor 2017]

  Args:
    centre_yx: i32[N, 2], row and column.
    size: (height, width) in pixels.
    half_side_pixels: rows center - half .. center + half - 1 are inside, columns likewise.
  """
  rows = jnp.arange(size[0]) - centre_yx[:, :1]
  columns = jnp.arange(size[1]) - centre_yx[:, 1:]
  in_rows = (rows >= -half_side_pixels) & (rows < half_side_pixels)
  in_columns = (columns >= -half_side_pixels) & (columns < half_side_pixels)
  return in_rows[:, :, None] & in_columns[:, None, :]


def class_masks(label: jax.Array, chosen: jax.Array) -> jax.Array:
  """Marks the pixels whose class is among the chosen ones.

  i32[B, H, W], bool[B, K] -> bool[B, H, W]. [ClassMix; AEL's copy-paste]

  Labels outside 0..K-1 are in no mask.
  """
  # By comparison, not by gather: this fuses, and labels out of range need no clipping.
  hit = label[..., None] == jnp.arange(chosen.shape[-1])
  return jnp.any(hit & chosen[:, None, None], axis=-1)


def edge_masks(edges: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Builds the mask of one box for each image, True inside.

  Edges i32[N, 4] (top, left, bottom, right; the last two are outside) -> bool[N, *size].
  """
  top, left, bottom, right = jnp.split(edges, 4, axis=1)
  rows, columns = jnp.arange(size[0]), jnp.arange(size[1])
  in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
  return in_rows[:, :, None] & in_columns[:, None, :]


def fitting_boxes(
  area: jax.Array, ratio: jax.Array, corner_yx: jax.Array, size: tuple[int, int]
) -> jax.Array:
  """Chooses UniMatch's box of each image: the first try that lies inside.

  There are several tries. [UniMatch dataset/transform.py, obtain_cutmix_box]

  Args:
    area: f32[N], share of the image.
    ratio: f32[N, tries], height to width, relative to that of the image: in an image that is not
      square, boxes are stretched with it (official crops are square).
    corner_yx: i32[N, tries, 2], top and left in pixels.
    size: (height, width) of the image in pixels.

  Returns:
    Edges i32[N, 4] as `edge_masks` takes them; all 0, an empty box, where no try fits.
  """
  area = area[:, None]
  sides = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], axis=-1) * jnp.asarray(
    size, ratio.dtype
  )
  stop_yx = corner_yx + sides.astype(corner_yx.dtype)  # sides are cut off to whole pixels
  fits = jnp.all(stop_yx <= jnp.asarray(size), axis=-1)
  edges = jnp.concatenate([corner_yx, stop_yx], axis=-1)
  first = jnp.take_along_axis(edges, jnp.argmax(fits, axis=1)[:, None, None], axis=1)[:, 0]
  return jnp.where(jnp.any(fits, axis=1, keepdims=True), first, 0)


def draw_fitting_boxes(
  key: jax.Array, num_boxes: int, size: tuple[int, int], *, probability: float = 0.5
) -> jax.Array:
  """Draws the edges i32[num_boxes, 4] of boxes that lie in the image.

  Boxes take 2 to 40 % of the image, at 0.3 <= height/width <= 1/0.3; they are empty but with
  `probability`.

  The area is drawn once, ratio and place until the box fits: 256 times at most, which is in vain
  for 2 boxes in 10^9 (the official code has no end). The mean area is 21 %, less what is cut off to
  whole pixels: 20.6 % of 321x321.
  """
  area, ratio, corner, used = jax.random.split(key, 4)
  edges = fitting_boxes(
    jax.random.uniform(area, (num_boxes,), minval=0.02, maxval=0.4),
    jax.random.uniform(ratio, (num_boxes, 256), minval=0.3, maxval=1 / 0.3),
    jax.random.randint(corner, (num_boxes, 256, 2), 0, jnp.asarray(size)),
    size,
  )
  return jnp.where(jax.random.bernoulli(used, probability, (num_boxes, 1)), edges, 0)


def choose_classes(uniform: jax.Array, label: jax.Array) -> jax.Array:
  """Chooses at random half of the classes that occur in each image.

  The half is rounded down: bool[B, K]. [ClassMix, trainSSL.py]

  Args:
    uniform: f32[B, K], draws in [0, 1): the classes with the smallest among those that occur are
      chosen.
    label: i32[B, H, W], classes 0..K-1; other values are no class.
  """
  occurs = jnp.any(label[..., None] == jnp.arange(uniform.shape[-1]), axis=(1, 2))
  rank = jnp.argsort(jnp.argsort(jnp.where(occurs, uniform, jnp.inf)))
  return rank < jnp.sum(occurs, axis=-1, keepdims=True) // 2


def cut_masks(uniform: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Builds masks that are False in one box of half the image's area.

  True around it: bool[N, height, width]. [ClassMix, transformmasks.py]

  Args:
    uniform: f32[N, 3], draws in [0, 1): of the box's width, half of the image's to all of it, its
      left and its top edge.
    size: (height, width) in pixels.
  """
  height, width = size
  whole_number = lambda uniform, count: jnp.floor(uniform * count).astype(jnp.int32)  # 0..count-1
  box_width = width // 2 + whole_number(uniform[:, 0], width - width // 2 + 1)
  # With an odd width the narrowest box is higher than the image; the official code stops there.
  box_height = jnp.minimum(jnp.round(height * width / 2 / box_width).astype(jnp.int32), height)
  left = whole_number(uniform[:, 1], width - box_width + 1)
  top = whole_number(uniform[:, 2], height - box_height + 1)
  return ~edge_masks(jnp.stack([top, left, top + box_height, left + box_width], axis=1), size)


class CowDraws(NamedTuple):
  """The noise behind one batch of cow masks, and its smoothing.

  noise: f32[N, height, width], standard normal; sigma: f32[N], standard deviation of its smoothing
    in pixels.
  """

  noise: jax.Array
  sigma: jax.Array


# The deviation is drawn log-uniformly between these, pixels. [ClassMix, trainSSL.py; French et al.
# 2020, Milking CowMask]
COW_SIGMA = (8.0, 32.0)


def draw_cow(key: jax.Array, num_masks: int, size: tuple[int, int]) -> CowDraws:
  noise, sigma = jax.random.split(key)
  low, high = np.log(COW_SIGMA)
  sigma = jnp.exp(jax.random.uniform(sigma, (num_masks,), minval=low, maxval=high))
  return CowDraws(jax.random.normal(noise, (num_masks, *size)), sigma)


def cow_masks(draws: CowDraws, *, share: float = 0.5, max_sigma: float = COW_SIGMA[1]) -> jax.Array:
  """Builds masks of blobs, where smoothed noise is above its threshold.

  True above it: bool[N, height, width]. [ClassMix, transformmasks.py]

  Args:
    share: of pixels expected to be False: the threshold is this quantile of the normal distribution
      with the smoothed noise's own mean and deviation.
    max_sigma: no deviation in `draws` is greater.
  """
  reach = int(4 * max_sigma + 0.5)  # SciPy's gaussian_filter
  smooth = gaussian.blur(
    draws.noise[..., None], draws.sigma, radius=(reach, reach), truncate=4.0, border="symmetric"
  )
  mean, deviation = (moment(smooth, axis=(1, 2), keepdims=True) for moment in (jnp.mean, jnp.std))
  return (smooth > mean + deviation * jax.scipy.stats.norm.ppf(share))[..., 0]
