"""Perturbations of feature maps [B, h, w, C] and of images; every random number is an argument."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def drop_channels(x: jax.Array, kept: jax.Array, *, rate: float = 0.5) -> jax.Array:
  """Whole channels set to 0, the others divided by 1 - rate. [Tompson et al. 2015; PyTorch's Dropout2d]

  Args:
    x: f32[B, h, w, C]; kept: bool[B, C]; rate: the share that is dropped.
  """
  return jnp.where(kept[:, None, None], x / (1 - rate), 0.0)


def unit(x: jax.Array, *, tiny: float) -> jax.Array:
  """Every row of the leading axis at Euclidean length 1; `tiny` is added to the length it is divided by."""
  length = jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)), keepdims=True))
  return x / (length + tiny)


def adversarial_direction(
  divergence: Callable[[jax.Array], jax.Array], start: jax.Array, *, xi: float, tiny: float = 1e-12
) -> jax.Array:
  """The direction in which a small step changes the prediction most: one step of power iteration. [Miyato et al. 2018, VAT]

  Args:
    divergence: perturbation [B, ...] -> f32[], how far the predictions of all rows are from the unperturbed ones, summed. Near 0 it
      is quadratic, so its gradient is of the order of xi.
    start: random directions [B, ...].
    xi: length of the trial step; too small a one is lost in float32.

  Returns:
    [B, ...] of length 1 a row, without gradient.
  """
  return jax.lax.stop_gradient(unit(jax.grad(divergence)(xi * unit(start, tiny=tiny)), tiny=tiny))
