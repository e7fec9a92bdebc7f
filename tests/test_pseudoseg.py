"""PseudoSeg: where its gradients go, what its pseudo labels are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import pseudoseg
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import attention, cam as cams, fusion, losses, mixing

K, SIZE, BATCH = 4, 33, 2


@functools.cache
def make_method(supervised=True, **options):
  criterion = (
    losses.cross_entropy_mean if supervised else lambda logits, label: 0.0 * jnp.sum(logits)
  )
  # At learning rate 1 without momentum the parameters move by minus their gradient.
  task = Task(
    K,
    10,
    make_network("tiny", num_classes=K, width=4),
    optim.sgd(lambda step: 1.0, momentum=0.0),
    criterion,
  )
  return pseudoseg.pseudoseg(task, **options)


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  images = lambda: jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  valid = jnp.ones((BATCH, SIZE, SIZE), bool).at[:, -4:].set(False)
  label = (
    jnp.asarray(rng.integers(0, K, size=(BATCH, SIZE, SIZE)), jnp.int32)
    .at[:, -4:]
    .set(IGNORE_LABEL)
  )
  return {
    "labeled": {"image": images(), "label": label, "valid": valid},
    "unlabeled": {
      "weak": images(),
      "strong": images()[:, None],
      "valid": valid,
      "image_label": jnp.ones((BATCH, K)),
    },
  }


def moved_groups(method):
  """Names of the parameter groups that a step moves."""
  state = method.init(jax.random.key(0))
  batch = make_batch()
  after, _ = jax.jit(method.update)(state, batch, method.draw(jax.random.key(1), batch))
  moved = jax.tree.map(
    lambda old, new: bool(np.any(old != new)),
    state.nets["student"].params,
    after.nets["student"].params,
  )
  return {group for group, leaves in moved.items() if any(jax.tree.leaves(leaves))}


OFF = dict(supervised=False, weight=0.0, attention_weight=0.0, classification_weight=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
  "alone, groups",
  [
    ({"supervised": True}, {"backbone", "head"}),
    ({"attention_weight": 1.0}, {"attention"}),
    ({"classification_weight": 1.0}, {"backbone", "classifier"}),
    ({"classification_weight": 1.0, "image_labels": True}, {"backbone", "classifier"}),
    ({"weight": 1.0}, {"backbone", "head"}),
    ({"weight": 1.0, "image_labels": True}, {"backbone", "head"}),
  ],
)
def test_every_loss_trains_its_own_parameters_and_no_others(alone, groups):
  assert moved_groups(make_method(**OFF | alone)) == groups


def test_no_gradient_reaches_the_weak_view_without_image_labels():
  method = make_method()
  state, batch = method.init(jax.random.key(0)), make_batch()
  draws = method.draw(jax.random.key(1), batch)

  def loss(weak):
    return method.update(state, batch | {"unlabeled": batch["unlabeled"] | {"weak": weak}}, draws)[
      1
    ]["loss"]

  gradient = jax.jit(jax.grad(loss))(batch["unlabeled"]["weak"])
  np.testing.assert_array_equal(gradient, 0)


def test_pixels_in_the_cutout_box_teach_nothing():
  method = make_method(cutout_fraction=0.5)
  state, batch = method.init(jax.random.key(0)), make_batch()
  draws = method.draw(jax.random.key(1), batch) | {"cutout_centre": jnp.array([[16, 16], [0, 32]])}
  panels, kept = method.show(state, batch, draws)
  (strong,) = (panel.values for panel in panels if panel.name == "strong view")
  half = round(0.5 * SIZE / 2)
  np.testing.assert_array_equal(strong[0, 16 - half : 16 + half, 16 - half : 16 + half], 0)
  np.testing.assert_array_equal(
    strong[0, : 16 - half], batch["unlabeled"]["strong"][0, 0, : 16 - half]
  )
  np.testing.assert_array_equal(strong[1, :half, 32 - half :], 0)  # clipped at the border
  assert strong[1, half:].any(-1).all()
  assert not kept[0, 8, 8] and kept[0, 0, 0] and not kept[1, 0, -1]
  assert not kept[:, -1].any()  # padding


def test_an_image_without_any_valid_pixel_gives_a_finite_step():
  method = make_method()
  state, batch = method.init(jax.random.key(0)), make_batch()
  batch["unlabeled"]["valid"] = jnp.zeros_like(batch["unlabeled"]["valid"])
  after, metrics = jax.jit(method.update)(state, batch, method.draw(jax.random.key(1), batch))
  assert metrics["loss_consistency"] == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.nets["student"].params))


def test_options_that_cannot_work_are_told_together():
  with pytest.raises(checks.InputError) as error:
    make_method(source="decoder", attention_maps=(-1, -4), temperature=0.0, cutout_fraction=1.5)
  for part in (
    "attention, fused",
    "some of -1..-3",
    "temperature: got 0.0",
    "cutout_fraction: got 1.5",
  ):
    assert part in str(error.value)


def test_a_class_map_is_the_share_of_each_position_in_the_logit():
  features = jnp.array([[[[1.0, 0.0], [2.0, 1.0]]]])  # one row of two positions, two channels
  kernel = jnp.array([[1.0, -1.0, 2.0], [0.0, 4.0, 0.0]])
  cam = cams.class_activation_maps(features, kernel, jnp.array([[1, 1, 0]]))
  # Class 2 is not asked for.
  np.testing.assert_allclose(cam[0, 0], [[0.5, 0, 0], [1, 1, 0]], atol=1e-6)
  np.testing.assert_allclose(cams.with_background(cam)[0, 0, :, 0], [0.5, 0], atol=1e-6)


def test_a_map_without_a_positive_position_is_zero_and_finite():
  cam = cams.class_activation_maps(-jnp.ones((1, 2, 2, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)))
  np.testing.assert_array_equal(cam, 0)


def test_image_labels_are_the_classes_of_the_mask():
  label = jnp.array([[[0, 2], [IGNORE_LABEL, 2]], [[IGNORE_LABEL] * 2] * 2])
  np.testing.assert_array_equal(cams.image_labels(label, 4), [[1, 0, 1, 0], [0, 0, 0, 0]])


def test_attention_averages_over_what_looks_alike():
  features = 5 * jnp.array([[[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]])
  value = jnp.array([[[[1.0], [5.0], [3.0]]]])
  everywhere = jnp.ones((1, 1, 3), bool)
  np.testing.assert_allclose(
    attention.propagate(features, features, value, everywhere).ravel(), [2, 5, 2], atol=1e-5
  )
  without_last = everywhere.at[0, 0, 2].set(False)
  got = attention.propagate(features, features, value, without_last).ravel()
  # The invalid position gets the mean of all (1, 5, 3).
  np.testing.assert_allclose(got, [1, 5, 3], atol=1e-5)


def test_fusion_depends_on_the_ratio_of_the_two_opinions_alone():
  a, b = (jax.random.normal(jax.random.key(seed), (1, 3, 3, K)) for seed in (0, 1))
  once, louder = fusion.calibrated_fusion(a, b), fusion.calibrated_fusion(10 * a, 10 * b)
  np.testing.assert_allclose(once, louder, atol=1e-6)
  np.testing.assert_allclose(once.sum(-1), 1, atol=1e-6)


def test_sharpening_squares_at_one_half():
  np.testing.assert_allclose(
    fusion.sharpen(jnp.array([0.6, 0.3, 0.1]), 0.5), np.array([36, 9, 1]) / 46, atol=1e-6
  )
  np.testing.assert_allclose(fusion.sharpen(jnp.array([1.0, 0.0]), 0.5), [1, 0])


def test_unsure_pixels_are_left_out_but_counted():
  logits = jnp.log(jnp.array([[[[0.9, 0.1], [0.5, 0.5]]]]))
  target, kept = pseudoseg.pseudo_label(
    logits, logits, calibrate=False, temperature=1.0, min_confidence=0.8
  )
  np.testing.assert_allclose(target, jnp.exp(logits), atol=1e-6)
  np.testing.assert_array_equal(kept, [[[True, False]]])
  hard, _ = pseudoseg.pseudo_label(logits, -logits, source="fused", soft=False)
  assert hard.shape == target.shape and set(np.unique(hard)) == {0.0, 1.0}
  np.testing.assert_allclose(losses.soft_cross_entropy(logits, hard).shape, (1, 1, 2))


def test_cutout_boxes_are_clipped_at_the_border():
  box = mixing.cutout_masks(jnp.array([[0, 4], [2, 2]]), (5, 5), 1)
  assert box[0].sum() == 1 * 2 and box[0, 0, 3] and box[0, 0, 4]  # rows -1..0, columns 3..4
  assert box[1].sum() == 4 and box[1, 1:3, 1:3].all()
  assert not mixing.cutout_masks(jnp.array([[2, 2]]), (5, 5), 0).any()
