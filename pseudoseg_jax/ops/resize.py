"""Bilinear and nearest resizing of maps [B, H, W, ...].

Bilinear resizing comes in the two conventions of the field, chosen by name.

`jax.image.resize` smooths when it shrinks and has no align-corners mode, hence this file. Bilinear
resizing is linear and separable: two products with small constant matrices, whose gradient is again
two products (no scatter), fast everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax.contract import Array


def _source_positions(size_in: int, size_out: int, align_corners: bool) -> np.ndarray:
  """Locates each output row among the input rows.

  f64 [size_out] in 0..size_in-1.
  """
  row = np.arange(size_out)
  if align_corners:
    return row * ((size_in - 1) / max(size_out - 1, 1))
  return np.clip((row + 0.5) * (size_in / size_out) - 0.5, 0, size_in - 1)


def interpolation_matrix(size_in: int, size_out: int, *, align_corners: bool) -> np.ndarray:
  """Builds the matrix that resizes one axis linearly.

  f32 [size_out, size_in], at most two entries a row, which sum to one.
  """
  position = _source_positions(size_in, size_out, align_corners)
  below = np.minimum(position.astype(np.int64), size_in - 1)
  above = np.minimum(below + 1, size_in - 1)
  fraction = position - below
  matrix = np.zeros((size_out, size_in))
  np.add.at(matrix, (np.arange(size_out), below), 1 - fraction)
  np.add.at(matrix, (np.arange(size_out), above), fraction)
  return matrix.astype(np.float32)


def _bilinear(x: Array, size: tuple[int, int], align_corners: bool) -> Array:
  for axis, size_out in ((1, size[0]), (2, size[1])):
    if x.shape[axis] == size_out:
      continue  # both conventions are the identity then
    matrix = jnp.asarray(
      interpolation_matrix(x.shape[axis], size_out, align_corners=align_corners), x.dtype
    )
    # HIGHEST: the default may round float32 to TF32 or bfloat16 on accelerators, which would shift
    # class boundaries.
    x = jnp.moveaxis(
      jnp.tensordot(matrix, x, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis
    )
  return x


def bilinear_align_corners(x: Array, size: tuple[int, int]) -> Array:
  """Resizes bilinearly so that corner pixels stay corner pixels.

  Row i reads at i (H - 1) / (H' - 1). PyTorch's `interpolate(mode="bilinear", align_corners=True)`;
  DeepLab's upsampling.

  Args:
    x: float [B, H, W, ...].
    size: (H', W').

  Returns:
    float [B, H', W', ...] of the same dtype.
  """
  return _bilinear(x, size, align_corners=True)


def bilinear_half_pixel(x: Array, size: tuple[int, int]) -> Array:
  """Resizes bilinearly with pixels as areas, without antialiasing.

  Row i reads at (i + 1/2) H / H' - 1/2, clipped to the map. PyTorch's `interpolate(mode="bilinear",
  align_corners=False)`, OpenCV's `INTER_LINEAR`.

  Args:
    x: float [B, H, W, ...].
    size: (H', W').

  Returns:
    float [B, H', W', ...] of the same dtype.
  """
  return _bilinear(x, size, align_corners=False)


def nearest(x: Array, size: tuple[int, ...]) -> Array:
  """Resizes to the nearest row and column in PyTorch's default convention.

  Row i reads row floor(i H / H').

  Args:
    x: any dtype [B, H, W, ...], for instance labels.
    size: (H', W').

  Returns:
    The same dtype, [B, H', W', ...].
  """
  rows = np.arange(size[0]) * x.shape[1] // size[0]
  columns = np.arange(size[1]) * x.shape[2] // size[1]
  return x[:, rows][:, :, columns]
