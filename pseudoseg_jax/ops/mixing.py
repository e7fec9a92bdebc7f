"""Masks that choose between two images, and the mixing itself; on the device, inside the jitted step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class BoxDraws(NamedTuple):
  """Uniform draws in [0, 1) behind one batch of box masks; N masks of `boxes` boxes each."""

  area: jax.Array  # [N, boxes], proportion within area_range (edge length where by_area is off)
  aspect: jax.Array | None  # [N, boxes], None where the aspect ratio is fixed
  position: jax.Array  # [N, boxes, 2], y before x


def draw_boxes(key: jax.Array, num_masks: int, *, boxes: int = 3, random_aspect_ratio: bool = True) -> BoxDraws:
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
  """Masks of random boxes; where boxes of one mask overlap they cancel (the value is flipped in each).

  Defaults are those of CPS+CutMix: 3 boxes a mask that together take a quarter to half of the area.
  [French et al. 2020, mask_gen.py BoxMaskGenerator; TorchSemiSeg CPS+CutMix mask_gen.py]

  Args:
    draws: uniforms; the number of boxes and whether the aspect ratio is random are read off their shapes.
    size: (height, width) in pixels.
    by_area: the drawn proportion is a box's area; otherwise its edge length (then `aspect` is the second edge's draw).
    within_bounds: boxes lie inside the image; otherwise their centres do.
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
  # With a fixed aspect ratio both edges are one array in the official code, so its factor acts twice; kept as it is.
  shares = shares * (1 / boxes if draws.aspect is None else (1 / boxes) ** 0.5)

  size_yx = jnp.asarray(size, shares.dtype)
  edges = jnp.round(shares * size_yx)  # half to even, like NumPy
  if within_bounds:
    start = jnp.round((size_yx - edges) * draws.position)
    stop = start + edges
  else:
    centre = jnp.round(size_yx * draws.position)
    start, stop = jnp.trunc(centre - edges / 2), jnp.trunc(centre + edges / 2)
    # A negative start wraps, as a NumPy slice does in the official code: such a box comes out (nearly always) empty.
    start = jnp.where(start < 0, jnp.maximum(start + size_yx, 0), start)
  rows, columns = jnp.arange(size[0]), jnp.arange(size[1])
  in_rows = (rows >= start[..., :1]) & (rows < stop[..., :1])  # [N, boxes, H]
  in_columns = (columns >= start[..., 1:]) & (columns < stop[..., 1:])
  inside = in_rows[..., :, None] & in_columns[..., None, :]
  odd = jnp.sum(inside, axis=1) % 2 == 1
  return odd if invert else ~odd


def mix(mask: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
  """Takes `second` where the mask is true and `first` elsewhere; mask bool[B, H, W], the others [B, H, W] or [B, H, W, C]."""
  if first.ndim == mask.ndim + 1:
    mask = mask[..., None]
  return jnp.where(mask, second, first)


def cutout_masks(centre_yx: jax.Array, size: tuple[int, int], half_side_pixels: int) -> jax.Array:
  """One square box for each image, clipped at the border: bool[N, height, width], True inside. [DeVries & Taylor 2017]

  Args:
    centre_yx: i32[N, 2], row and column.
    size: (height, width) in pixels.
    half_side_pixels: rows centre - half .. centre + half - 1 are inside, columns likewise.
  """
  rows = jnp.arange(size[0]) - centre_yx[:, :1]
  columns = jnp.arange(size[1]) - centre_yx[:, 1:]
  in_rows = (rows >= -half_side_pixels) & (rows < half_side_pixels)
  in_columns = (columns >= -half_side_pixels) & (columns < half_side_pixels)
  return in_rows[:, :, None] & in_columns[:, None, :]
