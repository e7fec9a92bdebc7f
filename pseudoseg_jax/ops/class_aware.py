"""Softmax and cross entropy among the classes known to be in an image.

The other classes are neither raised nor lowered.

Wang et al., "Learning Pseudo Labels for Semi-and-Weakly Supervised Semantic Segmentation", Pattern
Recognition 2022; facts from the official code (YudeWang/Learning-Pseudo-Label, lib/net/loss.py).
With z = logits / temperature and S the classes in the image, r_c = exp(z_c) / (sum over S of exp(z)
+ 1e-5), also for c outside S, where it may exceed 1. The code takes exponentials of logits as they
are; here no logit overflows, and where the code's values are finite they are the same.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pseudoseg_jax.contract import IGNORE_LABEL

_LOG_TINY = math.log(1e-5)


def _present(image_label: jax.Array) -> jax.Array:
  return (image_label > 0)[:, None, None, :]


def _log_ratio(logits: jax.Array, image_label: jax.Array, temperature: float) -> jax.Array:
  """Computes log r_c: f32[B, H, W, K]."""
  scores = logits / temperature
  inside = jnp.where(_present(image_label), scores, -jnp.inf)
  greatest = jax.lax.stop_gradient(jnp.maximum(jnp.max(inside, axis=-1, keepdims=True), _LOG_TINY))
  total = jnp.sum(jnp.exp(inside - greatest), axis=-1, keepdims=True) + jnp.exp(
    _LOG_TINY - greatest
  )
  return scores - greatest - jnp.log(total)


def softmax(logits: jax.Array, image_label: jax.Array, *, temperature: float = 1.0) -> jax.Array:
  """Computes r_c for the classes in the image, 0 for all others.

  The sum over classes is 1e-5 / (sum over S of exp(z) + 1e-5) less than 1.

  Args:
    logits: f32[B, H, W, K].
    image_label: [B, K], above 0 for the classes in the image.

  Returns:
    f32[B, H, W, K]; all 0 for an image without any class.
  """
  return jnp.exp(
    jnp.where(_present(image_label), _log_ratio(logits, image_label, temperature), -jnp.inf)
  )


def log_softmax(
  logits: jax.Array, image_label: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
  """Computes log(r_c + 1e-5) for every class.

  This includes the classes that are not in the image, where it may exceed 0. Arguments as of
  `softmax`.
  """
  return jnp.logaddexp(_log_ratio(logits, image_label, temperature), _LOG_TINY)


def cross_entropy(
  logits: jax.Array, image_label: jax.Array, label: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
  """Computes -log(r_y + 1e-5) of each pixel, at most 11.51.

  It is 0 where the label y is IGNORE_LABEL. The logits of classes outside S get no gradient, except
  that of a label which is not in S itself.

  Args:
    logits, image_label: as of `softmax`.
    label: i32[B, H, W], 0..K-1 or IGNORE_LABEL.

  Returns:
    f32[B, H, W].
  """
  hit = label[..., None] == jnp.arange(logits.shape[-1])
  likelihood = log_softmax(logits, image_label, temperature=temperature)
  return jnp.where(label == IGNORE_LABEL, 0, -jnp.sum(jnp.where(hit, likelihood, 0), axis=-1))


def best_class(logits: jax.Array, image_label: jax.Array) -> jax.Array:
  """Finds the class of the greatest logit among those in the image.

  i32[B, H, W], without gradient; of equal ones the first.

  Class 0 for an image without any class. The official argmax of probabilities is 0 also where all
  of them underflow; here it is the best class.
  """
  return jnp.argmax(jnp.where(_present(image_label), logits, -jnp.inf), axis=-1)
