"""A network's confidence in each class, and what AEL derives from it.

AEL derives which classes are drawn, which pixels count, and how much.

Hu et al., "Semi-Supervised Semantic Segmentation via Adaptive Equalization Learning", NeurIPS 2021;
facts from the official code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pseudoseg_jax.ops import losses


def class_confidence(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Averages the probability of the true class over the pixels of each class.

  f32[K], 0 for a class without pixels. [AEL, eq. 4]

  One mean over the whole batch, as in the official code; the paper averages the means of the
  images.

  Args:
    logits: f32[B, H, W, K]; no gradient passes.
    label: i32[B, H, W], 0..K-1; others are no class.
  """
  probability = jnp.exp(-losses.cross_entropy(jax.lax.stop_gradient(logits), label))
  hit = label[..., None] == jnp.arange(logits.shape[-1])
  total = jnp.sum(jnp.where(hit, probability[..., None], 0), axis=(0, 1, 2))
  return total / jnp.maximum(jnp.sum(hit, axis=(0, 1, 2)), 1)


def moved_bank(bank: jax.Array, logits: jax.Array, label: jax.Array, momentum: float) -> jax.Array:
  """Updates the confidence bank f32[K] with a labeled batch.

  It is a running average of `class_confidence`. A class that the batch lacks counts as confidence
  0, as in the official code: rare classes seem to have low confidence.
  """
  return momentum * bank + (1 - momentum) * class_confidence(logits, label)


def class_probabilities(
  bank: jax.Array, candidates: tuple[int, ...] = (), *, power: float = 1.0
) -> jax.Array:
  """Computes the probability with which each class is drawn.

  It is the softmax over classes of (1 - confidence)^power, f32[K] -> f32[K]. [AEL, eq. 9]

  Args:
    candidates: the classes that may be drawn, the others get 0; () for all.
  """
  scores = (1 - bank) ** power
  if candidates:
    scores = jnp.where(jnp.isin(jnp.arange(bank.size), jnp.array(candidates)), scores, -jnp.inf)
  return jax.nn.softmax(scores)


def presence(label: jax.Array, num_classes: int, min_area: float) -> jax.Array:
  """Tells which classes cover at least the share `min_area` of each image.

  The share is that of an image's pixels: i32[B, H, W] -> bool[B, K]. [AEL, image bank]
  """
  area = jnp.sum(label[..., None] == jnp.arange(num_classes), axis=(1, 2))
  return area >= min_area * label[0].size


def sampling_rate(bank: jax.Array, beta: float) -> jax.Array:
  """Computes the share of each class's pixels that is learned from.

  f32[K] in 0..1, 1 for the class of the least confidence. [AEL, section 3]

  Args:
    beta: 0 learns from all pixels.
  """
  doubt = 1 - bank
  return (doubt / (jnp.max(doubt) + 1e-12)) ** beta


def sampled(predicted: jax.Array, rate: jax.Array, uniform: jax.Array) -> jax.Array:
  """Samples pixels by adaptive equalization sampling.

  A pixel is kept with the rate of the class that is predicted there.

  Args:
    predicted: i32[B, H, W], classes.
    rate: f32[K], of `sampling_rate`.
    uniform: f32[K, H, W] in [0, 1), one map a class, which all images share as in the official
      code.

  Returns:
    bool[B, H, W].
  """
  kept = jnp.moveaxis(uniform > 1 - rate[:, None, None], 0, -1)
  return jnp.any((predicted[..., None] == jnp.arange(rate.size)) & kept, axis=-1)


def reweighted_loss(
  logits: jax.Array, label: jax.Array, confidence: jax.Array, kept: jax.Array, gamma: float
) -> jax.Array:
  """Averages the cross entropy by dynamic re-weighting.

  It is the sum of w * cross entropy / sum of w over the batch, w = confidence^gamma where kept.
  [AEL, eq. 12]

  One quotient over the batch, as in the official code; the paper has one for each image. Pixels
  labeled IGNORE_LABEL, which were below a threshold, stay in the denominator.

  Args:
    logits: f32[B, H, W, K]; label: i32[B, H, W]; confidence: f32[B, H, W], of the label; kept:
      bool[B, H, W].
    gamma: 0 lets all kept pixels count alike.
  """
  weight = jax.lax.stop_gradient(confidence) ** gamma * kept
  return jnp.sum(weight * losses.cross_entropy(logits, label)) / (jnp.sum(weight) + 1e-12)
