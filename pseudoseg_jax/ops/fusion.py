"""Two predictions of every pixel made one: calibrated fusion and sharpening."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pseudoseg_jax.contract import Array


def calibrated_fusion(decoder_logits: Array, sgc_logits: Array, *, calibrate: bool = True) -> Array:
  """Averages the softmaxes of two logits that are scaled alike.

  Both logits are divided by one root-mean-square. [PseudoSeg, calibrated fusion]

  The root-mean-square is taken over all elements of both inputs together (the whole batch): it sets
  how flat the two distributions are and leaves their ratio as it was. The paper writes a norm at
  each location; its code, followed here, has the one number.

  Args:
    decoder_logits, sgc_logits: f32[B, h, w, K], on one grid.
    calibrate: False leaves the logits as they are.

  Returns:
    f32[B, h, w, K], summing to one. Gradients are not stopped here.
  """
  if calibrate:
    square = (jnp.mean(jnp.square(decoder_logits)) + jnp.mean(jnp.square(sgc_logits))) / 2
    scale = jax.lax.rsqrt(square + 1e-8)
    decoder_logits, sgc_logits = scale * decoder_logits, scale * sgc_logits
  return (jax.nn.softmax(decoder_logits) + jax.nn.softmax(sgc_logits)) / 2


def sharpen(probabilities: Array, temperature: float) -> Array:
  """Sharpens probabilities by a temperature T.

  p^(1/T) / sum over classes of p^(1/T), f32[..., K]; T = 1 changes nothing, below 1 the likely
  gains.
  """
  raised = probabilities ** (1 / temperature)
  return raised / jnp.sum(raised, axis=-1, keepdims=True)


def self_corrected(primary_logits: Array, ancillary_logits: Array, alpha: Array | float) -> Array:
  """Corrects the primary logits by the ancillary ones.

  The result is the logits of the q that minimizes KL(q || p) + alpha KL(q || p_anc).
  [self-correcting networks, linear self-correction]

  (l + alpha l_anc) / (1 + alpha): softmax of it is the weighted geometric mean of p = softmax(l)
  and p_anc = softmax(l_anc).

  Args:
    primary_logits, ancillary_logits: f32[..., K].
    alpha: 0 gives p, infinitely large p_anc.

  Returns:
    f32[..., K]. Gradients are not stopped here.
  """
  return (primary_logits + alpha * ancillary_logits) / (1 + alpha)
