"""Outer outlines of a mask's regions, by local rules.

Image libraries walk along the outlines instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# The eight neighbors of a pixel, (row, column), counter-clockwise from the right; those across an
# edge are the even ones.
_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def outside(mask: jax.Array) -> jax.Array:
  """Finds the pixels outside of the mask that are joined to the border.

  A path over edges, outside of the mask too, joins them to the image's border; holes are not
  joined.

  Args:
    mask: bool[B, H, W].

  Returns:
    bool[B, H, W].
  """
  height, width = mask.shape[1:]

  def nearest(where, axis):
    """Locates the last True up to here and the next from here on.

    Both are places along the axis.
    """
    place = jax.lax.broadcasted_iota(jnp.int32, mask.shape, axis)
    last = jax.lax.cummax(jnp.where(where, place, -1), axis=axis)
    return last, jax.lax.cummin(jnp.where(where, place, height + width), axis=axis, reverse=True)

  def spread(reached):
    for axis in (1, 2):
      (last, next_), (last_wall, next_wall) = nearest(reached, axis), nearest(mask, axis)
      reached |= (last > last_wall) | (next_ < next_wall)
    return reached

  def more(carry):
    return carry[1]

  def round_(carry):
    reached, _ = carry
    after = spread(reached)
    return after, jnp.any(after != reached)

  border = jnp.ones((height, width), bool).at[1:-1, 1:-1].set(False)
  return jax.lax.while_loop(more, round_, (border & ~mask, jnp.bool_(True)))[0]


def corners(mask: jax.Array) -> jax.Array:
  """Counts how often the outer outline of a pixel's region turns at the pixel.

  The count is 0..4.

  Summed over a region, pixels that touch at a corner belonging together, it is the number of points
  of its outer contour with straight parts reduced to their ends: OpenCV's
  findContours(RETR_EXTERNAL, CHAIN_APPROX_SIMPLE), but for regions of one pixel. As there, the
  outline of a region inside another's hole counts for nothing.

  Args:
    mask: bool[B, H, W].

  Returns:
    i32[B, H, W], 0 outside the mask.
  """
  height, width = mask.shape[1:]

  def neighbors(array, beyond):
    padded = jnp.pad(array, ((0, 0), (1, 1), (1, 1)), constant_values=beyond)
    return [
      padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
      for row, column in _AROUND
    ]

  free, open_ = neighbors(~mask, True), neighbors(outside(mask), True)
  turns = jnp.zeros(mask.shape, jnp.int32)
  # The outline passes a pixel once for each run of free neighbors, from the neighbor before the
  # run to the one after it; a run of one corner pixel is cut short, and over a run of three
  # neighbors it goes straight on.
  for i in range(8):
    begins = free[i] & ~free[i - 1] & open_[i]
    passes = True if i % 2 == 0 else free[(i + 1) % 8]
    straight = free[(i + 1) % 8] & free[(i + 2) % 8] & ~free[(i + 3) % 8]
    turns += begins & passes & ~straight
  return jnp.where(mask, turns, 0)
