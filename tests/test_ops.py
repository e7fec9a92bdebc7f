"""Losses, masks and schedules: numbers one can redo on paper, and the awkward cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.ops import losses, mixing, schedules


def test_cross_entropy_is_the_log_of_the_true_probability_and_zero_where_ignored():
  logits = jnp.log(jnp.array([[[6.0, 3.0, 1.0], [2.0, 2.0, 4.0]]]))
  got = losses.cross_entropy(logits, jnp.array([[0, IGNORE_LABEL]]))
  np.testing.assert_allclose(got, [[-np.log(0.6), 0.0]], rtol=1e-6)


def test_cross_entropy_is_finite_at_extreme_logits_with_its_gradient():
  logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
  value, gradient = jax.value_and_grad(
    lambda x: losses.cross_entropy(x, jnp.array([1, IGNORE_LABEL])).sum()
  )(logits)
  assert value == 2e4 and np.isfinite(gradient).all() and (gradient[1] == 0).all()


def test_mean_over_nothing_is_zero_with_a_finite_gradient():
  value, gradient = jax.value_and_grad(lambda x: losses.mean_over(x, jnp.zeros(3, bool)))(
    jnp.ones(3)
  )
  assert value == 0 and (gradient == 0).all()


def test_the_two_denominators_differ_by_the_share_of_valid_pixels():
  logits, label = jnp.zeros([1, 2, 2, 3]), jnp.array([[[0, 1], [IGNORE_LABEL, IGNORE_LABEL]]])
  valid, everything = (
    losses.cross_entropy_mean(logits, label, denominator=name) for name in ("valid", "all")
  )
  np.testing.assert_allclose([valid, everything], [np.log(3), np.log(3) / 2], rtol=1e-6)


def test_joint_mean_is_not_a_mean_of_means():
  np.testing.assert_allclose(losses.joint_mean(jnp.zeros([3, 2]), jnp.ones([2])), 2 / 8)


def test_ohem_per_image_mines_each_image_alone():
  confident, unsure = jnp.log(jnp.array([0.99, 0.01])), jnp.log(jnp.array([0.5, 0.5]))
  logits = jnp.stack([jnp.stack([confident] * 4), jnp.stack([unsure] * 4)])[:, None]  # [2, 1, 4, 2]
  label = jnp.zeros([2, 1, 4], jnp.int32)
  per_batch = losses.ohem_cross_entropy(logits, label, min_kept=2, scope="batch")
  per_image = losses.ohem_cross_entropy(logits, label, min_kept=2, scope="image")
  np.testing.assert_allclose(per_batch, np.log(2), rtol=1e-6)  # the confident image is dropped
  # it keeps its own ties.
  np.testing.assert_allclose(per_image, (np.log(2) - np.log(0.99)) / 2, rtol=1e-4)


def test_ohem_of_an_ignored_image_is_zero():
  loss = losses.ohem_cross_entropy(
    jnp.zeros([1, 2, 2, 3]), jnp.full([1, 2, 2], IGNORE_LABEL), min_kept=1
  )
  assert loss == 0


def test_kl_divergence_of_equal_distributions_is_zero_and_positive_otherwise():
  a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([3.0, 2.0, 0.0])
  np.testing.assert_allclose(losses.kl_divergence(a, a + 7), 0, atol=1e-6)
  assert losses.kl_divergence(a, b) > 0.1


def test_overlapping_boxes_cancel():
  half = jnp.full([1, 2], 0.0)
  draws = mixing.BoxDraws(area=half, aspect=None, position=jnp.zeros([1, 2, 2]))
  assert not mixing.box_masks(draws, (8, 8), area_range=(0.5, 0.5)).any()
  assert mixing.box_masks(draws, (8, 8), area_range=(0.5, 0.5), invert=False).all()


@pytest.mark.parametrize("boxes", [1, 3])
def test_boxes_cover_what_they_should_and_differ(boxes):
  masks = mixing.box_masks(
    mixing.draw_boxes(jax.random.key(0), 200, boxes=boxes), (48, 64), area_range=(0.5, 0.5)
  )
  assert masks.shape == (200, 48, 64) and masks.dtype == bool
  share = np.mean(masks, axis=(1, 2))
  # One box of half the area covers half; of three that share it some overlap cancels.
  assert abs(share.mean() - 0.5) < 0.02 if boxes == 1 else 0.25 < share.mean() < 0.4
  assert len({mask.tobytes() for mask in np.asarray(masks)}) > 190


def test_mix_takes_the_second_inside():
  mask = jnp.array([[[True, False]]])
  image = mixing.mix(mask, jnp.zeros([1, 1, 2, 3]), jnp.ones([1, 1, 2, 3]))
  label = mixing.mix(mask, jnp.array([[[1, 2]]]), jnp.array([[[3, 4]]]))
  assert image[0, 0, :, 0].tolist() == [1, 0] and label.tolist() == [[[3, 2]]]


def test_poly_ends_at_zero_and_shifts_are_clipped():
  options = {"base": 0.1, "total_steps": 10}
  assert schedules.poly(10, **options) == 0
  np.testing.assert_allclose(schedules.poly(0, shift_steps=-1, **options), 0.1)
  np.testing.assert_allclose(schedules.poly(1, shift_steps=-1, **options), 0.1)
  assert schedules.poly(9, shift_steps=1, **options) == 0


def test_schedules_trace():
  ramp = jax.jit(
    lambda step: schedules.sigmoid_rampup(step, 10) * schedules.poly(step, base=1.0, total_steps=20)
  )
  np.testing.assert_allclose(ramp(jnp.int32(10)), 0.5**0.9, rtol=1e-6)
