"""Distances of predictions from their targets, per pixel.

There is one table for all methods. Each distance is (logits f32[..., K], target_logits f32[..., K])
-> f32[...]; the target gets no gradient. Methods name them as their papers and codes do, and state
which of these they mean. Distances from probabilities are in `losses`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pseudoseg_jax.ops import losses


def _of_probabilities(distance: Callable) -> Callable:
  return lambda logits, target_logits: distance(
    jax.nn.softmax(logits), jax.nn.softmax(target_logits)
  )


def _sum_by_root(mean_over_classes: Callable) -> Callable:
  """Turns a mean over K classes into their sum, divided by the root of K."""
  return lambda logits, target_logits: (
    logits.shape[-1] ** 0.5 * mean_over_classes(logits, target_logits)
  )


DISTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  # of probabilities: squared differences, their mean and their sum over classes; cross entropy of
  # each class against all others; KL(target || prediction) in nats
  "mse": _of_probabilities(losses.squared_distance),
  "sse": _of_probabilities(lambda p, q: jnp.sum(jnp.square(p - q), axis=-1)),
  "bce": _of_probabilities(losses.binary_cross_entropy),
  "kl": losses.kl_divergence,
  # of logits: mean over classes; sum by the root of their number
  "logit_mse": losses.squared_distance,
  "logit_sse_by_root": _sum_by_root(losses.squared_distance),
  "logit_huber_by_root": _sum_by_root(losses.smooth_l1_distance),
}


def per_pixel(name: str, logits: jax.Array, target_logits: jax.Array) -> jax.Array:
  """Measures one of DISTANCES; no gradient passes through the target."""
  return DISTANCES[name](logits, jax.lax.stop_gradient(target_logits))
