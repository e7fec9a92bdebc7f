"""Self-attention over the positions of an image.

It spreads a map to what looks alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pseudoseg_jax.contract import Array


def propagate(key: Array, query: Array, value: Array, valid: Array) -> Array:
  """Averages `value` over all positions by self-attention.

  Every position gets the mean of `value` over all positions, weighted by softmax(query . key /
  sqrt(D)). [PseudoSeg, SGC]

  Positions that are not valid give nothing, and receive the even mean over all positions, valid or
  not: -1e9 is added to their scores, of which float32 keeps nothing else. Their gradient passes all
  the same, as in the official code.

  Args:
    key, query: f32[B, h, w, D].
    value: f32[B, h, w, C].
    valid: bool[B, h, w].

  Returns:
    f32[B, h, w, C].
  """
  shape = value.shape
  key, query, value = (
    array.reshape(shape[0], -1, array.shape[-1]) for array in (key, query, value)
  )
  valid = valid.reshape(shape[0], -1)
  scores = jnp.einsum("bid,bjd->bij", query, key) * key.shape[-1] ** -0.5
  scores = scores + jnp.where(valid[:, :, None] & valid[:, None, :], 0.0, -1e9)
  return jnp.einsum("bij,bjc->bic", jax.nn.softmax(scores), value).reshape(shape)
