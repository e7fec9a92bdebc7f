"""What a teacher's prediction is worth: hard labels, and weights by confidence."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def hard_label(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """logits [..., K] -> the likeliest class i32[...] and its probability f32[...]; neither carries a
  gradient.
  """
  logits = jax.lax.stop_gradient(logits)
  return jnp.argmax(logits, axis=-1), jnp.max(jax.nn.softmax(logits), axis=-1)


def confidence_weight(confidence: jax.Array, *, threshold: float, per: str = "batch") -> jax.Array:
  """How much each pixel's consistency counts.

  Args:
    confidence: f32[B, H, W], the teacher's greatest probability; threshold: what counts as
      confident, from it on.
    per: "batch": one number for all pixels, the share of confident ones (French et al. 2020,
      ClassMix); "pixel": 1 where confident, else 0; "none": 1.

  Returns:
    f32[] or f32[B, H, W], without gradient.
  """
  if per == "none":
    return jnp.ones([])
  confident = (jax.lax.stop_gradient(confidence) >= threshold).astype(confidence.dtype)
  return confident if per == "pixel" else jnp.mean(confident)
