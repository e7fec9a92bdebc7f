"""Losses: first a map of per-pixel numbers, then one mean whose denominator stands at the call."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pseudoseg_jax.contract import IGNORE_LABEL


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Cross entropy of each pixel in nats, 0 where the label is IGNORE_LABEL.

  Args:
    logits: f32[..., K].
    label: i32[...], 0..K-1 or IGNORE_LABEL.

  Returns:
    f32[...].
  """
  # The true logit by comparison, not by gather: a gather's gradient is a scatter, slow everywhere; this fuses.
  hit = label[..., None] == jnp.arange(logits.shape[-1])
  true_logit = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
  return jnp.where(label == IGNORE_LABEL, 0, jax.nn.logsumexp(logits, axis=-1) - true_logit)


def soft_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
  """-sum over classes of target * log softmax(logits) per pixel, in nats: [..., K] x [..., K] -> [...]."""
  return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean over classes of (a - b)^2 per pixel: [..., K] x [..., K] -> [...]. [Mean Teacher, official softmax_mse_loss]"""
  return jnp.mean(jnp.square(a - b), axis=-1)


def kl_divergence(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
  """KL(softmax(teacher) || softmax(student)) per pixel, in nats. [Mean Teacher, official softmax_kl_loss]"""
  teacher = jax.nn.log_softmax(teacher_logits)
  return jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(student_logits)), axis=-1)


def mean_over(values: jax.Array, weight: jax.Array) -> jax.Array:
  """sum(values * weight) / sum(weight): the mean over what `weight` (bool or count) keeps, 0 where it keeps nothing.

  The denominator is at least 1, so that a crop that is all padding gives 0 and a finite gradient.
  """
  weight = weight.astype(values.dtype)
  return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1)


def joint_mean(*values: jax.Array) -> jax.Array:
  """One mean over the pixels of several maps, as if they were one batch (not a mean of means)."""
  return sum(jnp.sum(value) for value in values) / sum(value.size for value in values)


def cross_entropy_mean(logits: jax.Array, label: jax.Array, *, denominator: str = "valid") -> jax.Array:
  """Mean cross entropy over the pixels that have a label.

  denominator: "valid" divides by the pixels with a label (CPS and most others), "all" by all pixels (PixelSSL).
  """
  values = cross_entropy(logits, label)
  return jnp.mean(values) if denominator == "all" else mean_over(values, label != IGNORE_LABEL)


def ohem_kept(logits: jax.Array, label: jax.Array, *, min_confidence: float, min_kept: int) -> jax.Array:
  """Which pixels online hard example mining keeps, over all pixels given together.

  A pixel is kept where the probability of its true class is at most the threshold: `min_confidence`, or the min_kept-th
  smallest probability if that is larger, so that at least `min_kept` remain. Ignored pixels count as probability 1 in the
  ranking and are never kept. With min_kept = 0, or more than there are valid pixels, all valid pixels are kept.
  [TorchSemiSeg furnace/seg_opr/loss_opr.py, ProbOhemCrossEntropy2d]

  Args:
    logits: f32[..., K]; label: i32[...].

  Returns:
    bool[...]; no gradient flows into the selection.
  """
  valid = label != IGNORE_LABEL
  if min_kept == 0:
    return valid
  confidence = jnp.where(valid, jnp.exp(-cross_entropy(jax.lax.stop_gradient(logits), label)), 1.0)
  ranked = jnp.sort(confidence.reshape(-1))
  threshold = jnp.maximum(min_confidence, ranked[min(min_kept, ranked.size) - 1])
  return valid & ((confidence <= threshold) | (min_kept > jnp.sum(valid)))


def ohem_cross_entropy(
  logits: jax.Array, label: jax.Array, *, min_confidence: float = 0.7, min_kept: int, scope: str = "image"
) -> jax.Array:
  """Mean cross entropy over the pixels that OHEM keeps.

  Args:
    logits: f32[B, H, W, K]; label: i32[B, H, W].
    min_kept: pixels kept at least, per image or per batch as `scope` says.
    scope: "image" mines each image alone and averages the image losses (CPS on Cityscapes: one image a GPU);
      "batch" mines all pixels of the batch together (the official function on one process).
  """

  def mined(logits, label):
    kept = ohem_kept(logits, label, min_confidence=min_confidence, min_kept=min_kept)
    return mean_over(cross_entropy(logits, label), kept)

  return jnp.mean(jax.vmap(mined)(logits, label)) if scope == "image" else mined(logits, label)
