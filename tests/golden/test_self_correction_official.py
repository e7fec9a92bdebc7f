"""Self-correcting networks: the closed form of the linear correction, and the loss on its soft
label.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax.ops import fusion, losses


def last(array):
  """[N, C, ...] -> [N, ..., C]."""
  return jnp.asarray(np.moveaxis(array, 1, -1))


def close(got, want):
  np.testing.assert_allclose(np.asarray(got), want, atol=1e-6, rtol=1e-5)


def check_loss(primary, q, value, gradient):
  got, got_gradient = jax.value_and_grad(
    lambda logits: jnp.mean(losses.soft_cross_entropy(logits, q))
  )(primary)
  close(got, value)
  close(got_gradient, last(gradient))


@pytest.mark.golden("self_correction_linear")
def test_linear_correction(golden):
  primary, ancillary = last(golden["primary_logits"]), last(golden["ancillary_logits"])
  for index, alpha in enumerate(golden["alphas"]):
    of = golden.under(f"alpha{index}_")
    logits = fusion.self_corrected(primary, ancillary, float(alpha))
    q = jax.nn.softmax(logits)
    close(q, last(of["q"]))
    close(
      losses.kl_divergence(primary, logits) + alpha * losses.kl_divergence(ancillary, logits),
      of["objective_at_q"],
    )
    check_loss(primary, q, of["soft_ce_mean_over_pixels"], of["grad_primary_logits"])


@pytest.mark.golden("self_correction_linear")
def test_without_correction(golden):
  primary, q = last(golden["primary_logits"]), jax.nn.softmax(last(golden["ancillary_logits"]))
  check_loss(primary, q, golden["no_self_correction_soft_ce"], golden["no_self_correction_grad"])
