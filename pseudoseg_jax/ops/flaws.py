"""Flaw maps: smooth maps of where a prediction is wrong.

GCT's flaw detector learns them, and they decide which model learns from which.

Ke et al., "Guided Collaborative Training for Pixel-wise Semi-Supervised Learning", ECCV 2020; facts
from the official code (ZHKKKe/PixelSSL, pixelssl/ssl_algorithm/ssl_gct.py). Flaw maps are
f32[B, H, W]. Blurs have their sizes from `base_pixels`, the side of the training crop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax.contract import Array

_HIGHEST = jax.lax.Precision.HIGHEST


def odd(size: float) -> int:
  """Makes the size of a kernel odd: rounded down, then one more if even."""
  return int(size) // 2 * 2 + 1


def blur_taps(size: int) -> np.ndarray:
  """Computes the Gaussian kernel of one axis.

  f64 [size], size odd; its sum is 1. [GCT, GaussianBlurLayer]

  Its deviation is 0.3 ((size - 1) / 2 - 1) + 0.8 pixels, cut off at 4 deviations; tails beyond the
  window are mirrored into it about its outer edges.
  """
  sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
  reach = int(4 * sigma + 0.5)
  distance = np.arange(-reach, reach + 1)
  weight = np.exp(-0.5 * np.square(distance / sigma))
  # Which tap a pixel of the window and its surroundings falls on.
  mirrored = np.pad(np.arange(size), reach, mode="symmetric")
  taps = np.zeros(size)
  np.add.at(taps, mirrored[reach + size // 2 + distance], weight / weight.sum())
  return taps


def _blur_matrix(length: int, size: int) -> np.ndarray:
  """Builds the matrix that blurs one axis of `length` pixels, f32.

  The axis is mirrored about its outermost pixels, as often as needed.
  """
  mirrored = np.pad(np.arange(length), size // 2, mode="reflect")
  rows, taps = np.indices((length, size))
  matrix = np.zeros((length, length))
  np.add.at(matrix, (rows, mirrored[rows + taps]), blur_taps(size))
  return matrix.astype(np.float32)


def blur(x: Array, size: int) -> Array:
  """Blurs f32[B, H, W] with `blur_taps(size)` along both axes.

  It takes two products with small matrices, however large the kernel.
  """
  height, width = x.shape[1:]
  x = jnp.einsum("ih,bhw->biw", _blur_matrix(height, size), x, precision=_HIGHEST)
  return jnp.einsum("jw,biw->bij", _blur_matrix(width, size), x, precision=_HIGHEST)


def dilate(x: Array) -> Array:
  """Takes the greatest value of the 3x3 pixels around each: f32[B, H, W].

  Only pixels of the map count.
  """
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME")


def _normalized(x: Array, low: Array, high: Array) -> Array:
  return (x - low) / (high - low + 1e-9)


def _extremes(x: Array) -> tuple[Array, Array]:
  return jnp.min(x, axis=(1, 2), keepdims=True), jnp.max(x, axis=(1, 2), keepdims=True)


def difference(probabilities: Array, label: Array) -> Array:
  """Measures how far probabilities are from the one-hot label.

  Half the sum over classes of |one-hot label - probability|: f32[B, H, W] in 0..1; 1/2 where the
  label is no class.

  Args:
    probabilities: f32[B, H, W, K]; label: i32[B, H, W].
  """
  hit = label[..., None] == jnp.arange(probabilities.shape[-1])
  return jnp.sum(jnp.abs(hit - probabilities), axis=-1) / 2


def flaw_target(
  probabilities: Array, label: Array, *, base_pixels: int, dilations: int = 1
) -> Array:
  """Measures how wrong a prediction is around each pixel, by its label.

  f32[B, H, W] in 0..1, without gradient. [GCT, pipeline C]

  The difference is blurred, then dilated and blurred again; at last each image is scaled to 0..1,
  so that the official factor on the difference (0.5) changes nothing. A perfect prediction gives 0.
  The paper dilates before the first blur.

  Args:
    probabilities, label: see `difference`.
    dilations: how often it is dilated and blurred; 1 in the official runs.
  """
  flaws = blur(jax.lax.stop_gradient(difference(probabilities, label)), odd(base_pixels / 8))
  for _ in range(dilations):
    flaws = blur(dilate(flaws), odd(base_pixels / 4))
  return _normalized(flaws, *_extremes(flaws))


def handle_flaws(raw: Array, *, base_pixels: int, min_flaw: float = 0.1) -> tuple[Array, Array]:
  """Prepares the flaw detector's maps for their comparison.

  Negatives are set to 0, maps are blurred, and each is scaled to 0..1. [GCT, flaw-map handler]

  A map that does not exceed `min_flaw` is flawless: its handled values are all the same, 0 or
  below. They can be below 0, because officially the map is set to 0 but scaled as before; it then
  wins every comparison.

  Args:
    raw: f32[B, H, W].

  Returns:
    The handled maps, and the raw ones with negatives at 0; no gradient passes.
  """
  clipped = jnp.maximum(jax.lax.stop_gradient(raw), 0)
  flaws = blur(clipped, odd(base_pixels / 16))
  low, high = _extremes(flaws)
  return _normalized(jnp.where(high > min_flaw, flaws, 0), low, high), clipped


def dynamic_consistency(
  first: Array, second: Array, flaws_first: Array, flaws_second: Array, *, threshold: float
):
  """Chooses per pixel the target of each of two models.

  Each model learns from the other where that one is less wrong, else from itself.
  [GCT, equation of L_dc]

  A flaw above the threshold counts as 1. Where the two are equal, each learns from itself, so where
  both are bad neither learns by consistency.

  Args:
    first, second: probabilities f32[B, H, W, K] of two models; flaws_first, flaws_second: their
      handled maps f32[B, H, W].

  Returns:
    The targets of both, f32[B, H, W, K], without gradient, and where both are bad, bool[B, H, W].
  """
  first, second = jax.lax.stop_gradient((first, second))
  bad_first, bad_second = flaws_first > threshold, flaws_second > threshold
  flaws_first, flaws_second = (
    jnp.where(bad_first, 1.0, flaws_first),
    jnp.where(bad_second, 1.0, flaws_second),
  )
  target_first = jnp.where((flaws_second >= flaws_first)[..., None], first, second)
  target_second = jnp.where((flaws_first >= flaws_second)[..., None], second, first)
  return target_first, target_second, bad_first & bad_second
