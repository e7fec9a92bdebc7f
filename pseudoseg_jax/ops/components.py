"""Connected regions of masks, on the device.

Functions here find which pixels are connected, how large each region is, and its bounding box.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


def connected(mask: jax.Array) -> jax.Array:
  """Names the region of every pixel.

  Pixels that touch at an edge or a corner belong together.

  Args:
    mask: bool[B, H, W].

  Returns:
    i32[B, H, W]: a region's name is the row-major index of its last pixel, its root; -1 outside the
    mask.
  """
  batch, height, width = mask.shape
  index = jnp.arange(height * width, dtype=jnp.int32).reshape(height, width)

  def spread(names):
    """Takes one round, in which names spread to the pixels they touch.

    The number of rounds grows with the logarithm of a region's length, however it winds.
    """
    near = jax.lax.reduce_window(
      names, jnp.int32(-1), jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME"
    ).reshape(batch, -1)
    flat = names.reshape(batch, -1)
    # The pixel that a name stands for learns of the greatest name that any pixel of that name
    # touches ...
    pixel = jnp.where((flat >= 0) & (near > flat), flat, height * width)  # out of range: dropped
    flat = jax.vmap(lambda names, pixel, near: names.at[pixel].max(near, mode="drop"))(
      flat, pixel, near
    )
    # ... and every pixel takes over what the pixel that names it is called by now.
    for _ in range(2):
      flat = jnp.where(flat < 0, -1, jnp.take_along_axis(flat, jnp.maximum(flat, 0), axis=1))
    return flat.reshape(names.shape)

  def more(carry):
    return carry[1]

  def round_(carry):
    names, _ = carry
    after = spread(names)
    return after, jnp.any(after != names)

  names, _ = jax.lax.while_loop(more, round_, (jnp.where(mask, index, -1), jnp.bool_(True)))
  return names


class Regions(NamedTuple):
  """The area and bounding box of each region, at its root: [B, H * W].

  Where no region has its root, area is 0.
  """

  area: jax.Array  # i32, pixels
  top: jax.Array  # i32, first row, ...
  left: jax.Array
  bottom: jax.Array  # last row + 1
  right: jax.Array


def regions(names: jax.Array) -> Regions:
  """Measures the area and bounding box of the regions of `connected`.

  The names of the regions are i32[B, H, W].
  """
  batch, height, width = names.shape
  flat = names.reshape(batch, -1)
  place = jnp.where(flat < 0, height * width, flat)  # out of range: dropped
  row = jnp.repeat(jnp.arange(height, dtype=jnp.int32), width)
  column = jnp.tile(jnp.arange(width, dtype=jnp.int32), height)

  def one(place):
    empty = jnp.zeros(height * width, jnp.int32)
    return Regions(
      area=empty.at[place].add(1, mode="drop"),
      top=jnp.full_like(empty, height).at[place].min(row, mode="drop"),
      left=jnp.full_like(empty, width).at[place].min(column, mode="drop"),
      bottom=empty.at[place].max(row + 1, mode="drop"),
      right=empty.at[place].max(column + 1, mode="drop"),
    )

  return jax.vmap(one)(place)
