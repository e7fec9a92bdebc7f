"""A teacher's predictions as targets: hard labels, and confidence weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def hard_label(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Finds the likeliest class and its probability.

  logits [..., K] -> the class i32[...] and its probability f32[...]; neither carries a gradient.
  """
  logits = jax.lax.stop_gradient(logits)
  return jnp.argmax(logits, axis=-1), jnp.max(jax.nn.softmax(logits), axis=-1)


def confidence_weight(confidence: jax.Array, *, threshold: float, per: str = "batch") -> jax.Array:
  """Computes how much each pixel's consistency counts.

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


def confident_mean(
  values: jax.Array,
  confidence: jax.Array,
  valid: jax.Array,
  *,
  min_confidence: float,
  per: str = "batch",
) -> tuple[jax.Array, jax.Array]:
  """Averages over all pixels, each times its confidence weight.

  Pixels that are not valid count as 0. The share of confident pixels takes padding in, and the mean
  divides by it too, as in the official code of French et al. 2020.

  Args:
    values: f32[B, H, W].
    confidence: f32[B, H, W], of the teacher.
    valid: bool, or a share, [B, H, W].
    min_confidence, per: see `confidence_weight`.

  Returns:
    The mean f32[], and the mean of the weight, f32[].
  """
  weight = confidence_weight(confidence, threshold=min_confidence, per=per)
  return jnp.mean(values * valid * weight), jnp.mean(weight)
