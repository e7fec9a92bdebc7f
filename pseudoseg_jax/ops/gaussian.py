"""Gaussian blur of a batch on the device.

Each image has a deviation of its own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def kernel_size(size: tuple[int, int]) -> tuple[int, int]:
  """Computes the height and width of ClassMix's blur kernel.

  For images of (height, width): a tenth, odd. [ClassMix, transformsgpu.py]
  """
  height, width = (math.ceil(0.1 * side) for side in size)
  return height - 1 + height % 2, width - 1 + width % 2


def blur(
  x: jax.Array,
  sigma: jax.Array,
  *,
  radius: tuple[int, int],
  truncate: float = math.inf,
  border: str = "reflect",
) -> jax.Array:
  """Blurs each image along both of its axes.

  Args:
    x: f32[B, H, W, C].
    sigma: f32[B] or f32[1], standard deviation in pixels, above 0.
    radius: the kernel reaches so many pixels up and down, and left and right.
    truncate: and no more than round(truncate * sigma), as SciPy's option of that name.
    border: NumPy's name of the padding: "reflect" mirrors about the outermost pixels (PyTorch's and
      kornia's name too), "symmetric" about their outer edges (SciPy calls this one "reflect").
  """
  for axis, reach in ((1, radius[0]), (2, radius[1])):
    x = _blur_axis(x, sigma, axis, reach, truncate, border)
  return x


def _blur_axis(x, sigma, axis, reach, truncate, border):
  size = x.shape[axis]
  padded = jnp.take(x, np.pad(np.arange(size), reach, mode=border), axis=axis)
  # One product with a banded matrix, as in `resize`: row i holds the kernel around i.
  distance = np.arange(size + 2 * reach) - reach - np.arange(size)[:, None]
  sigma = sigma[:, None, None]
  inside = np.abs(distance) <= jnp.minimum(jnp.floor(truncate * sigma + 0.5), reach)
  kernel = jnp.where(inside, jnp.exp(-0.5 * jnp.square(distance / sigma)), 0)
  kernel = jnp.broadcast_to(
    kernel / jnp.sum(kernel, axis=-1, keepdims=True), (len(x), *distance.shape)
  )
  product = "bij,bjwc->biwc" if axis == 1 else "bij,bhjc->bhic"
  return jnp.einsum(product, kernel, padded, precision=jax.lax.Precision.HIGHEST)
