"""Perturbations of feature maps [B, h, w, C] and of images.

Every random number is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax.ops import components, outlines, resize


def drop_channels(x: jax.Array, kept: jax.Array, *, rate: float = 0.5) -> jax.Array:
  """Sets whole channels to 0 and divides the others by 1 - rate.

  [Tompson et al. 2015; PyTorch's Dropout2d]

  Args:
    x: f32[B, h, w, C]; kept: bool[B, C]; rate: the share that is dropped.
  """
  return jnp.where(kept[:, None, None], x / (1 - rate), 0.0)


def unit(x: jax.Array, *, tiny: float) -> jax.Array:
  """Scales every row of the leading axis to Euclidean length 1.

  `tiny` is added to the length it is divided by.
  """
  length = jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)), keepdims=True))
  return x / (length + tiny)


def adversarial_direction(
  divergence: Callable[[jax.Array], jax.Array], start: jax.Array, *, xi: float, tiny: float = 1e-12
) -> jax.Array:
  """Finds the direction in which a small step changes the prediction most.

  It takes one step of power iteration. [Miyato et al. 2018, VAT]

  Args:
    divergence: perturbation [B, ...] -> f32[], how far the predictions of all rows are from the
      unperturbed ones, summed. Near 0 it is quadratic, so its gradient is of the order of xi.
    start: random directions [B, ...].
    xi: length of the trial step; too small a one is lost in float32.

  Returns:
    [B, ...] of length 1 a row, without gradient.
  """
  return jax.lax.stop_gradient(unit(jax.grad(divergence)(xi * unit(start, tiny=tiny)), tiny=tiny))


def drop_features(x: jax.Array, share: jax.Array) -> jax.Array:
  """Sets the most active positions to 0.

  They are those where the mean over channels is at least `share` of its greatest value in the
  image. [CCT, F-Drop]

  Args:
    x: f32[B, h, w, C]; share: f32[], one for all images, from U(0.7, 0.9) in the paper.
  """
  attention = jnp.mean(x, axis=-1, keepdims=True)
  return jnp.where(attention < share * jnp.max(attention, axis=(1, 2), keepdims=True), x, 0.0)


def multiply_noise(x: jax.Array, noise: jax.Array) -> jax.Array:
  """Computes x + x * noise.

  x is f32[B, h, w, C]; noise is f32[h, w, C], one for all images, from U(-0.3, 0.3) in the paper.
  [CCT, F-Noise]
  """
  return x + x * noise


def keep_where(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Sets positions to 0 where the mask is False.

  Positions are those of f32[B, h, w, C]; the mask bool[B, H, W] is shrunk to their grid by nearest
  resizing.

  With the foreground of a prediction as the mask this removes the context (CCT, Con-Msk), with the
  rest the objects (Obj-Msk).
  """
  return jnp.where(resize.nearest(mask, x.shape[1:3])[..., None], x, 0.0)


class Objects(NamedTuple):
  """Regions of a mask, at their roots (see `components`): [B, H * W]."""

  large: jax.Array  # bool, whether there is a large region
  regions: components.Regions


def large_objects(foreground: jax.Array, *, min_corners: int = 51) -> Objects:
  """Finds the regions of a mask whose outer outline has many corners.

  Many are `min_corners` at least. Regions in the holes of others are none.

  An outline's length is counted in corners, so that a large box is not large. [CCT, G-Cutout]

  Args:
    foreground: bool[B, H, W].
  """
  names = components.connected(foreground)
  batch, pixels = len(names), names[0].size
  turns = outlines.corners(foreground).reshape(batch, -1)
  add = lambda name, turns: (
    jnp.zeros(pixels, jnp.int32).at[jnp.where(name < 0, pixels, name)].add(turns, mode="drop")
  )
  length = jax.vmap(add)(names.reshape(batch, -1), turns)
  return Objects(length >= min_corners, components.regions(names))


def guided_cutout(
  objects: Objects, position: jax.Array, size: tuple[int, ...], *, side_fraction: float = 0.4
) -> jax.Array:
  """Marks one rectangle in each large object, whatever else it covers.

  [CCT, G-Cutout]

  Args:
    objects: of masks of `size`, height and width in pixels.
    position: uniforms in [0, 1), [B, H * W, 2], x before y; only those at the roots of large
      objects are used.
    side_fraction: of a rectangle's sides by those of the object's bounding box, first to last
      pixel.

  Returns:
    bool[B, H, W], True in the rectangles.
  """
  height, width = size
  box = objects.regions

  def interval(first, beyond, uniform):
    extent = jnp.where(objects.large, beyond - 1 - first, 0)
    # Sides and offsets by table: rounded down from float64, as in the official code; float32 may
    # fall on the other side.
    sides = np.arange(max(size) + 1)
    most, side = (
      jnp.asarray(np.trunc(sides * share), jnp.int32)[extent]
      for share in (1 - side_fraction, side_fraction)
    )
    start = first + jnp.minimum(jnp.floor(uniform * (most + 1)).astype(jnp.int32), most)
    return start, start + side

  left, right = interval(box.left, box.right, position[..., 0])
  top, bottom = interval(box.top, box.bottom, position[..., 1])

  def covered(large, top, left, bottom, right):
    # How many rectangles cover a pixel: steps at their four corners, added up along both axes. Any
    # number of them costs the same.
    steps = jnp.zeros((height + 1, width + 1), jnp.int32)
    for row, column, step in (
      (top, left, 1),
      (top, right, -1),
      (bottom, left, -1),
      (bottom, right, 1),
    ):
      steps = steps.at[jnp.where(large, row, height + 1), column].add(step, mode="drop")
    return jnp.cumsum(jnp.cumsum(steps, axis=0), axis=1)[:height, :width] > 0

  return jax.vmap(covered)(objects.large, top, left, bottom, right)
