"""UniMatch and FixMatch: what a box, a threshold and a perturbation do to the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import Task
from pseudoseg_jax.methods import unimatch
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import losses, mixing

K, SIZE, BATCH = 4, 33, 2


@functools.cache
def make_step(factory=unimatch.unimatch, **options):
  """The method, and its update jitted."""
  network = make_network("tiny", num_classes=K, width=4)
  method = factory(
    Task(K, 10, network, optim.sgd(lambda step: 0.1), losses.cross_entropy_mean), **options
  )
  return method, jax.jit(method.update)


def make_batch(views, seed=0):
  rng = np.random.default_rng(seed)
  images = lambda *lead: jnp.asarray(rng.normal(size=(BATCH, *lead, SIZE, SIZE, 3)), jnp.float32)
  valid = jnp.ones((BATCH, SIZE, SIZE), bool)
  stream = lambda rows: {
    "weak": images(),
    "strong": images(views),
    "valid": valid.at[:, -rows:].set(False),
  }
  label = jnp.asarray(rng.integers(0, K, size=(BATCH, SIZE, SIZE)), jnp.int32)
  return {
    "labeled": {"image": images(), "label": label, "valid": valid},
    "unlabeled": stream(4),
    "partner": stream(9),
  }


@functools.cache
def first_state():
  return make_step()[0].init(jax.random.key(0))


def metrics_of(step, batch, **recorded):
  method, update = step
  return update(first_state(), batch, method.draw(jax.random.key(1), batch) | recorded)[1]


def test_the_mean_is_over_valid_pixels_sure_or_not():
  logits = jnp.log(jnp.array([[[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]]]]))
  valid = jnp.array([[[True, True, True, False]]])
  target = unimatch.pseudo_label(logits, valid)
  others = jnp.zeros_like(logits)  # cross entropy log 2 in each pixel
  np.testing.assert_allclose(
    unimatch.consistency(others, target, min_confidence=0.7), 2 / 3 * np.log(2), rtol=1e-6
  )
  np.testing.assert_allclose(unimatch.kept_fraction(target, min_confidence=0.7), 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(
    unimatch.consistency(others, target, min_confidence=0.0), np.log(2), rtol=1e-6
  )


def test_a_batch_of_padding_teaches_nothing_and_stays_finite():
  target = unimatch.pseudo_label(jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2), bool))
  value, gradient = jax.value_and_grad(
    lambda x: unimatch.consistency(x, target, min_confidence=0.0)
  )(jnp.ones((1, 2, 2, 3)))
  assert value == 0 and not gradient.any()


def test_the_partner_teaches_inside_the_box_alone_with_its_own_confidence_and_padding():
  # One image of four pixels, two views; 0 where the image is right and surely so, 1 where its
  # partner is.
  label = lambda *rows: unimatch.PseudoLabel(*(jnp.array([[row]]) for row in rows))
  own = label([0, 0, 0, 0], [0.99, 0.5, 0.99, 0.99], [True, True, True, False])
  partner = label([1, 1, 1, 1], [0.5, 0.99, 0.99, 0.99], [True, True, False, True])
  box = jnp.array([[[[False, True, True, False]], [[True, True, False, True]]]])
  probability = jnp.array([[0.2, 0.8], [0.3, 0.7], [0.4, 0.6], [0.1, 0.9]])
  logits = jnp.log(jnp.stack([probability, probability]))[:, None]
  got = unimatch.strong_consistency(logits, own, partner, box, min_confidence=0.95)
  # View 1: pixel 0 says 0 and pixel 1 says 1; 2 and 3 are padding. View 2: pixel 0 is unsure, 1 and
  # 3 say 1, 2 says 0.
  views = -(np.log(0.2) + np.log(0.7)) / 2, -(np.log(0.7) + np.log(0.4) + np.log(0.9)) / 4
  np.testing.assert_allclose(got, np.mean(views), rtol=1e-6)


@pytest.mark.slow
def test_two_equal_views_of_unperturbed_features_say_what_fixmatch_says():
  batch = make_batch(2)
  for stream in ("unlabeled", "partner"):
    batch[stream]["strong"] = batch[stream]["strong"][:, [0, 0]]
  one_view = batch | {
    name: batch[name] | {"strong": batch[name]["strong"][:, :1]}
    for name in ("unlabeled", "partner")
  }
  box = jnp.zeros((BATCH, 2, SIZE, SIZE), bool).at[:, :, 5:20, 8:30].set(True)
  two = metrics_of(make_step(drop_rate=0.0, min_confidence=0.6), batch, box=box)
  one = metrics_of(make_step(unimatch.fixmatch, min_confidence=0.6), one_view, box=box[:, :1])
  np.testing.assert_allclose(two["loss_supervised"], one["loss_supervised"], rtol=1e-5)
  np.testing.assert_allclose(2 * two["loss_strong"], one["loss_strong"], rtol=1e-4)
  np.testing.assert_allclose(two["kept_fraction"], one["kept_fraction"], rtol=1e-6)
  assert 0 < one["kept_fraction"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_partner_matters_where_there_is_a_box(probability):
  batch, other = make_batch(1), make_batch(1, seed=1)
  step = make_step(unimatch.fixmatch, box_probability=probability, min_confidence=0.0)
  one, two = (
    metrics_of(step, batch | {"partner": partner})["loss_strong"]
    for partner in (batch["partner"], other["partner"])
  )
  assert (one != two) == (probability > 0)


def test_a_network_that_is_never_sure_learns_from_labels_alone():
  metrics = metrics_of(make_step(min_confidence=1.0), make_batch(2))
  assert (
    metrics["kept_fraction"] == 0 and metrics["loss_strong"] == 0 and metrics["loss_features"] == 0
  )
  assert metrics["loss"] == metrics["loss_supervised"] > 0


def test_options_that_cannot_work_are_told_together():
  with pytest.raises(checks.InputError) as error:
    make_step(min_confidence=95.0, drop_rate=1.0, box_probability=-0.5)
  for part in ("min_confidence: got 95.0", "drop_rate: got 1.0", "box_probability: got -0.5"):
    assert part in str(error.value)


def test_a_box_is_the_first_try_that_lies_inside():
  # A quarter of 10x20 pixels at twice the image's own ratio: sqrt(1/2) x sqrt(1/8) of the sides, 7
  # x 7 pixels.
  area, ratio = jnp.array([0.25, 0.25]), jnp.full((2, 3), 2.0)
  corner = jnp.array([[[4, 0], [3, 13], [0, 0]], [[4, 0], [0, 14], [9, 19]]])
  edges = mixing.fitting_boxes(area, ratio, corner, (10, 20))
  # of the second image no try fits.
  np.testing.assert_array_equal(edges, [[3, 13, 10, 20], [0, 0, 0, 0]])
  assert mixing.edge_masks(edges, (10, 20)).sum() == 49


@pytest.mark.parametrize("size", [(321, 321), (100, 400)])
def test_drawn_boxes_have_the_published_sizes(size):
  edges = np.asarray(mixing.draw_fitting_boxes(jax.random.key(0), 4000, size))
  used = edges[:, 2] > 0
  np.testing.assert_allclose(used.mean(), 0.5, atol=0.03)
  height, width = (edges[used, 2:] - edges[used, :2]).T / np.array(size)[:, None]
  np.testing.assert_allclose(np.mean(height * width), 0.206, atol=0.01)
  assert edges.min() >= 0 and (edges[:, 2:] <= size).all()
  assert 0.015 < np.min(height * width) and np.max(height * width) <= 0.4
  # 0.3 and its inverse, but for whole pixels.
  assert 0.25 < np.min(height / width) and np.max(height / width) < 4
