"""Losses: first a map of values per pixel, then one mean.

The denominator of the mean stands at the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from pseudoseg_jax.contract import IGNORE_LABEL


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Computes the cross entropy of each pixel in nats.

  It is 0 where the label is IGNORE_LABEL.

  Args:
    logits: f32[..., K].
    label: i32[...], 0..K-1 or IGNORE_LABEL.

  Returns:
    f32[...].
  """
  # The true logit by comparison, not by gather: a gather's gradient is a scatter, slow everywhere;
  # this fuses.
  hit = label[..., None] == jnp.arange(logits.shape[-1])
  true_logit = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
  return jnp.where(label == IGNORE_LABEL, 0, jax.nn.logsumexp(logits, axis=-1) - true_logit)


def soft_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
  """Computes the cross entropy with soft targets per pixel, in nats.

  -sum over classes of target * log softmax(logits): [..., K] x [..., K] -> [...].
  """
  return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Computes the mean squared difference over classes, per pixel.

  Mean of (a - b)^2: [..., K] x [..., K] -> [...]. [Mean Teacher, official softmax_mse_loss]
  """
  return jnp.mean(jnp.square(a - b), axis=-1)


def kl_divergence(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
  """Computes KL(softmax(teacher) || softmax(student)) per pixel, in nats.

  [Mean Teacher, official softmax_kl_loss]
  """
  teacher = jax.nn.log_softmax(teacher_logits)
  return jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(student_logits)), axis=-1)


def kl_from_target(logits: jax.Array, target: jax.Array) -> jax.Array:
  """Computes KL(target || softmax(logits)) per pixel, in nats.

  [..., K] x probabilities [..., K] -> [...].
  """
  return soft_cross_entropy(logits, target) + jnp.sum(
    jax.scipy.special.xlogy(target, target), axis=-1
  )


def js_divergence(logits: jax.Array, target: jax.Array, *, tiny: float = 1e-5) -> jax.Array:
  """Computes the Jensen-Shannon divergence from the target, in nats.

  It is that of softmax(logits) and target probabilities, per pixel. [CCT, official softmax_js_loss]

  Half of KL(M || softmax(logits)) + KL(M || target + tiny), M their mean: the textbook has the
  arguments of each KL swapped.
  """
  middle = (jax.nn.softmax(logits) + target) / 2
  log_product = jax.nn.log_softmax(logits) + jnp.log(target + tiny)
  return jnp.sum(jax.scipy.special.xlogy(middle, middle) - middle * log_product / 2, axis=-1)


def disagreement(probabilities: jax.Array) -> jax.Array:
  """Computes the variance over N predictions, summed over classes.

  Per pixel: [N, ..., K] -> [...]. [CCT, pair-wise loss]
  """
  return jnp.sum(jnp.var(probabilities, axis=0), axis=-1)


def smooth_l1_distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Computes the mean smooth L1 distance over classes, per pixel.

  Mean of d^2 / 2 where d = |a - b| < 1, else d - 1/2: [..., K] x [..., K] -> [...].
  [French et al. 2020, code]
  """
  return jnp.mean(optax.huber_loss(a, b), axis=-1)


def binary_cross_entropy(
  probability: jax.Array, target: jax.Array, *, tiny: float = 1e-6
) -> jax.Array:
  """Computes the cross entropy of each class against all others, in nats.

  It is summed over classes: [..., K] x [..., K] -> [...].

  `tiny` is added in both logarithms, so the least value may be below 0. [French et al. 2020, code:
  robust_binary_crossentropy]
  """
  return -jnp.sum(
    target * jnp.log(probability + tiny) + (1 - target) * jnp.log(1 - probability + tiny), axis=-1
  )


def mean_over(values: jax.Array, weight: jax.Array) -> jax.Array:
  """Averages the values that `weight` keeps, 0 where it keeps nothing.

  sum(values * weight) / sum(weight), `weight` bool or count.

  The denominator is at least 1, so that a crop that is all padding gives 0 and a finite gradient.
  """
  weight = weight.astype(values.dtype)
  return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1)


def joint_mean(*values: jax.Array) -> jax.Array:
  """Averages over the pixels of several maps, as if they were one batch.

  It is not a mean of means.
  """
  total = jnp.asarray(sum(jnp.sum(value) for value in values))
  return total / sum(value.size for value in values)


def pixel_weight(label: jax.Array, class_weights: Sequence[float] = ()) -> jax.Array:
  """Computes the weight of each pixel, f32[...].

  It is 1, or with class_weights, K of them, that of its class; 0 without a label.
  """
  if not class_weights:
    return (label != IGNORE_LABEL).astype(jnp.float32)
  return jnp.sum(jax.nn.one_hot(label, len(class_weights)) * jnp.asarray(class_weights), axis=-1)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
  """Computes the weighted mean; 0 where all weights are 0.

  sum(values * weight) / sum(weight), as PyTorch's losses with `weight` have it.
  """
  total = jnp.sum(weight)
  return jnp.sum(values * weight) / jnp.where(total > 0, total, 1)


def cross_entropy_mean(
  logits: jax.Array,
  label: jax.Array,
  *,
  denominator: str = "valid",
  class_weights: Sequence[float] = (),
) -> jax.Array:
  """Averages the cross entropy over the pixels that have a label.

  Each pixel is weighted as its class.

  Args:
    denominator: "valid" divides by the pixels with a label (CPS and most others), or by their
      weights; "all" by all pixels (PixelSSL).
  """
  values, weight = cross_entropy(logits, label), pixel_weight(label, class_weights)
  return jnp.mean(values * weight) if denominator == "all" else weighted_mean(values, weight)


def focal_mean(
  logits: jax.Array, label: jax.Array, *, gamma: float = 2.0, class_weights: Sequence[float] = ()
) -> jax.Array:
  """Averages the focal loss, in which easy pixels count little.

  It is the mean of (1 - p)^gamma times the cross entropy, p the probability of the true class.

  Lin et al., "Focal loss", ICCV 2017, equation 4, of the softmax. optax's focal loss takes each
  class for a yes or no of its own, so that its logits are no softmax's, which all methods here take
  their confidences from.
  """
  values, weight = cross_entropy(logits, label), pixel_weight(label, class_weights)
  # 1 - p by expm1: exact where p is nearly 1. Its gradient at gamma < 1 would be infinite at p = 1,
  # as a power's at 0.
  wrong = jnp.maximum(-jnp.expm1(-values), jnp.finfo(values.dtype).tiny)
  return weighted_mean(wrong**gamma * values, weight)


def dice_loss(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Computes the Dice loss over the classes that the batch's labels hold.

  1 - 2 |P Y| / (|P| + |Y|), averaged over these classes; rare and frequent ones count alike.

  Sums are over all labeled pixels of the batch; P are probabilities, which stand without a square
  as in most of today's codes (Milletari et al., V-Net, 3DV 2016, section 3, squares them). optax's
  loss knows neither pixels without a label nor absent classes.

  Args:
    logits: f32[B, H, W, K]; label: i32[B, H, W].

  Returns:
    f32[], 0..1; 0 where no pixel has a label.
  """
  truth = jax.nn.one_hot(label, logits.shape[-1])  # all 0 for the ignore label
  probability = jax.nn.softmax(logits) * (label != IGNORE_LABEL)[..., None]
  axes = tuple(range(logits.ndim - 1))
  size_truth, size_said = jnp.sum(truth, axes), jnp.sum(probability, axes)
  overlap = 2 * jnp.sum(probability * truth, axes) / jnp.maximum(size_truth + size_said, 1e-6)
  return mean_over(1 - overlap, size_truth > 0)


def ohem_kept(
  logits: jax.Array, label: jax.Array, *, min_confidence: float, min_kept: int
) -> jax.Array:
  """Selects the pixels that online hard example mining keeps.

  The selection is over all pixels given together.

  A pixel is kept where the probability of its true class is at most the threshold:
  `min_confidence`, or the min_kept-th smallest probability if that is larger, so that at least
  `min_kept` remain. Ignored pixels count as probability 1 in the ranking and are never kept. With
  min_kept = 0, or more than there are valid pixels, all valid pixels are kept. [TorchSemiSeg
  furnace/seg_opr/loss_opr.py, ProbOhemCrossEntropy2d]

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
  logits: jax.Array,
  label: jax.Array,
  *,
  min_confidence: float = 0.7,
  min_kept: int,
  scope: str = "image",
  class_weights: Sequence[float] = (),
) -> jax.Array:
  """Averages the cross entropy over the pixels that OHEM keeps.

  Args:
    logits: f32[B, H, W, K]; label: i32[B, H, W].
    min_kept: pixels kept at least, per image or per batch according to `scope`.
    scope: "image" mines each image alone and averages the image losses (CPS on Cityscapes: one
      image a GPU); "batch" mines all pixels of the batch together (the official function on one
      process).
    class_weights: of the pixels that are kept; they have no part in which ones are.
  """

  def mined(logits, label):
    kept = ohem_kept(logits, label, min_confidence=min_confidence, min_kept=min_kept)
    return weighted_mean(cross_entropy(logits, label), kept * pixel_weight(label, class_weights))

  return jnp.mean(jax.vmap(mined)(logits, label)) if scope == "image" else mined(logits, label)


def bootstrapped_cross_entropy(
  logits: jax.Array, label: jax.Array, *, threshold: jax.Array | float, min_kept: int = 1
) -> jax.Array:
  """Averages the cross entropy over pixels of low confidence.

  These are the pixels whose true class has a probability below a threshold.
  [CCT, ab-CE, official abCE_loss]

  The threshold is raised to the (min_kept B + 1)-th smallest probability if that is larger (to the
  largest if there are fewer). Nothing kept, or no pixel with a label: 0. No gradient flows into the
  selection.

  Args:
    logits: f32[B, H, W, K]; label: i32[B, H, W].
    min_kept: pixels kept at least, times the number of images.
  """
  valid = label != IGNORE_LABEL
  confidence = jnp.where(
    valid, jnp.exp(-cross_entropy(jax.lax.stop_gradient(logits), label)), jnp.inf
  )
  ranked = jnp.sort(confidence.reshape(-1))
  rank = jnp.clip(jnp.sum(valid) - 1, 0, min_kept * len(label))
  return mean_over(
    cross_entropy(logits, label), valid & (confidence < jnp.maximum(threshold, ranked[rank]))
  )
