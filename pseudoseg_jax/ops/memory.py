"""Predictions remembered for every image of a list.

They are in the image's own frame, whatever crops they are made on.

The frame is a grid of gh x gw cells over the whole image; crops come and go by linear
interpolation, rows and columns apart, with no scatter. A value is known only where all that it is
interpolated from is known: fields that are linear in position pass from any crop by way of the
memory to any other one exactly, except within half a cell of the image's border, where the
outermost cells are repeated. An area mean over each cell's pixels would be biased in the cells that
a crop cuts.

The memory holds Z, f16[gh, N, gw * K]: a moving average of class probabilities for each cell, 0
where nothing was seen.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pseudoseg_jax.contract import Array

# of a sum of weights: leaves room for the round-off of positions, below 1e-3 pixels.
_COMPLETE = 1 - 1e-3


def _shape(num_images: int, num_classes: int, grid: tuple[int, int]) -> tuple[int, int, int]:
  # Rows of cells first: the memory is split over devices by image rows, and every device writes its
  # part of every image. Columns and classes are one axis: long runs for all devices, which some
  # would pad if it were the few classes alone.
  return grid[0], max(num_images, 1), grid[1] * num_classes


def empty(num_images: int, num_classes: int, grid: tuple[int, int]) -> Array:
  """Makes the memory Z of `num_images` images, with nothing seen.

  f16[gh, N, gw * K]. Half precision has 11 bits where bfloat16 has 8: round-off stays below 2^-12 /
  (1 - decay).
  """
  return jnp.zeros(_shape(num_images, num_classes, grid), jnp.float16)


def num_bytes(num_images: int, num_classes: int, grid: tuple[int, int]) -> int:
  """Computes the bytes of the memory over all devices: 2 gh gw N K."""
  return 2 * math.prod(_shape(num_images, num_classes, grid))


def read(memory: Array, ids: Array, num_classes: int) -> Array:
  """Reads Z of some images.

  [gh, N, gw * K], i32[B] -> f32[B, gh, gw, K].
  """

  def one(index):
    return jax.lax.dynamic_index_in_dim(memory, index, axis=1, keepdims=False)

  # One image after the other, in `write` too: a gather or scatter of so large an array may cost a
  # transposed copy of it.
  rows = jax.lax.map(one, ids).astype(jnp.float32)
  return rows.reshape(*rows.shape[:2], -1, num_classes)


def write(memory: Array, ids: Array, rows: Array) -> Array:
  """Replaces the Z of some images in the memory, in place.

  Args:
    rows: f32[B, gh, gw, K], the same for equal ids. They must be made of what `read` gave: that
      makes the compiler read first. Else it keeps a copy of the whole memory.
  """

  def one(memory, image):
    index, row = image
    row = row.reshape(len(memory), -1).astype(memory.dtype)
    return jax.lax.dynamic_update_index_in_dim(memory, row, index, axis=1), None

  return jax.lax.scan(one, memory, (ids, rows))[0]


def unbiased(rows: Array) -> tuple[Array, Array]:
  """Frees Z of its start-up bias, which gives the average prediction.

  Z of a cell seen n times sums to 1 - decay^n over the classes; so Z / sum(Z) = Z / (1 - decay^n),
  by each cell's own n, without counting. [smlaine2/tempens train.py, "sparse updates"]

  Args:
    rows: Z, f32[B, gh, gw, K].

  Returns:
    Probabilities f32[B, gh, gw, K], 0 where nothing was seen, and seen, bool[B, gh, gw].
  """
  total = jnp.sum(rows, axis=-1)
  return rows / jnp.where(total > 0, total, 1)[..., None], total > 0


def visited(rows: Array, ids: Array, cells: Array, seen: Array, *, decay: float) -> Array:
  """Averages new predictions into the cells that are seen.

  Z <- decay * Z + (1 - decay) * z. [Laine & Aila 2017, temporal ensembling]

  An image that occurs twice is visited twice, in the order of the rows, and both rows end up the
  same.

  Args:
    rows: Z, f32[B, gh, gw, K]; ids: i32[B], of which images.
    cells: z, probabilities f32[B, gh, gw, K]; seen: bool[B, gh, gw].
  """
  first = jnp.argmax(ids[:, None] == ids, axis=1)  # the first row of the same image

  def visit(rows, image):
    index, new, seen = image
    old = rows[index]
    return rows.at[index].set(
      jnp.where(seen[..., None], decay * old + (1 - decay) * new, old)
    ), None

  return jax.lax.scan(visit, rows, (first, cells, seen))[0][first]


def crop_to_cells(
  values: Array, valid: Array, flip: Array, window: Array, grid: tuple[int, int]
) -> tuple[Array, Array]:
  """Reads a crop at the centers of the image's cells.

  Mirrored crops are mirrored back.

  Args:
    values: f32[B, H, W, K]; valid: bool[B, H, W], False on padding.
    flip: bool[B]; window: f32[B, 4], where the crop lies in its image (data.geometry.window).

  Returns:
    f32[B, gh, gw, K], and seen, bool[B, gh, gw]: where the center lies between the centers of valid
    pixels; 0 elsewhere.
  """
  height, width = values.shape[1:3]
  top, left, extent_y, extent_x = jnp.split(window, 4, axis=1)
  rows = _cells_in_crop(grid[0], height, top, extent_y)
  columns = _cells_in_crop(grid[1], width, left, extent_x)
  columns = jnp.where(flip[:, None], width - 1 - columns, columns)
  return _interpolate(values, valid, _linear(rows, height), _linear(columns, width))


def cells_to_crop(
  cells: Array, seen: Array, flip: Array, window: Array, size: tuple[int, int]
) -> tuple[Array, Array]:
  """Reads the image's cells at the pixels of a crop.

  This is the way back from `crop_to_cells`.

  Args:
    cells: f32[B, gh, gw, K]; seen: bool[B, gh, gw]; flip, window: as there; size: (H, W) of the
      crop.

  Returns:
    f32[B, H, W, K], and known, bool[B, H, W]: where the pixel lies in the image and between seen
    cells; 0 elsewhere.
  """
  grid = cells.shape[1:3]
  top, left, extent_y, extent_x = jnp.split(window, 4, axis=1)
  rows = _pixels_in_image(size[0], grid[0], top, extent_y)
  columns = _pixels_in_image(size[1], grid[1], left, extent_x)
  columns = jnp.where(flip[:, None], columns[:, ::-1], columns)
  return _interpolate(cells, seen, _linear(rows, grid[0]), _linear(columns, grid[1]))


def _cells_in_crop(num_cells: int, num_pixels: int, start: Array, extent: Array) -> Array:
  """Locates the center of each cell among the centers of the crop's pixels.

  f32[B, cells]; 0 is the center of the first pixel.
  """
  # Written so that cells and pixels that coincide do so without round-off; below likewise.
  return (
    (jnp.arange(num_cells) + 0.5) * (num_pixels / num_cells) - start * num_pixels
  ) / extent - 0.5


def _pixels_in_image(num_pixels: int, num_cells: int, start: Array, extent: Array) -> Array:
  """Locates the center of each pixel among the centers of the cells.

  f32[B, pixels]; the image's rim is on the outermost cells.
  """
  position = (
    start * num_cells + (jnp.arange(num_pixels) + 0.5) * (num_cells / num_pixels) * extent - 0.5
  )
  inside = jnp.abs(position - (num_cells - 1) / 2) < num_cells / 2
  return jnp.where(inside, jnp.clip(position, 0, num_cells - 1), position)


def _linear(position: Array, size: int) -> Array:
  """Computes the weights of linear interpolation.

  Positions f32[B, M] among `size` samples -> f32[B, M, size]; less than 1 in sum outside.
  """
  return jnp.maximum(1 - jnp.abs(position[..., None] - jnp.arange(size)), 0)


def _interpolate(values: Array, known: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
  """Interpolates known values by weights of rows and of columns.

  f32[B, h, w, K], bool[B, h, w] by weights f32[B, M, h], f32[B, N, w] -> f32[B, M, N, K],
  bool[B, M, N].
  """
  parts = jnp.concatenate(
    [jnp.where(known[..., None], values, 0), known[..., None].astype(values.dtype)], axis=-1
  )
  parts = jnp.einsum(
    "bmh,bnw,bhwk->bmnk", rows, columns, parts, precision=jax.lax.Precision.HIGHEST
  )
  values, share = parts[..., :-1], parts[..., -1]
  complete = share > _COMPLETE
  return jnp.where(
    complete[..., None], values / jnp.where(complete, share, 1)[..., None], 0
  ), complete
