"""The comparisons of the CPS paper: single-network pseudo supervision and cross probability
consistency.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import Task
from pseudoseg_jax.methods import cps, cross_prob, single_pseudo, supervised
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import losses

K, SIZE, BATCH = 4, 33, 2


def make_method(factory, **options):
  # At learning rate 1 without momentum the parameters move by minus their gradient.
  optimizer = optim.sgd(lambda step: 1.0, momentum=0.0)
  return factory(
    Task(K, 10, make_network("tiny", num_classes=K, width=4), optimizer, losses.cross_entropy_mean),
    **options,
  )


@functools.cache
def make_batch():
  rng = np.random.default_rng(0)
  images = lambda: jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  label = jnp.asarray(rng.integers(0, K, size=(BATCH, SIZE, SIZE)), jnp.int32)
  return {
    "labeled": {"image": images(), "label": label},
    "unlabeled": {"weak": images()},
    "partner": {"weak": images()},
  }


def stepped(method, state, **recorded):
  draws = method.draw(jax.random.key(1), make_batch()) | recorded
  return jax.jit(method.update)(state, make_batch(), draws)


def twins(factory, **options):
  """A method of two networks and its state with the same network twice, and that network."""
  method = make_method(factory, **options)
  state = method.init(jax.random.key(0))
  net = state.nets["a"]
  return method, state.replace(nets={"a": net, "b": net}), net


def assert_equal_nets(a, b):
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
  jax.tree.map(close, (a.params, a.batch_stats), (b.params, b.batch_stats))


MASK = jnp.zeros((BATCH, SIZE, SIZE), bool).at[:, 3:20, 5:30].set(True)


@pytest.mark.slow
@pytest.mark.parametrize(
  "pair, single, recorded",
  [
    (cps.cps, single_pseudo.single_pseudo, {}),
    (cps.cps_cutmix, single_pseudo.single_pseudo_cutmix, {"mask": MASK}),
    (
      functools.partial(cps.cps_cutmix, on_labeled=True),
      functools.partial(single_pseudo.single_pseudo_cutmix, on_labeled=True),
      {"mask": MASK},
    ),
  ],
)
def test_cross_supervision_of_two_equal_networks_is_twice_self_supervision(pair, single, recorded):
  method, state, net = twins(pair, weight=0.7)
  after, metrics = stepped(method, state, **recorded)
  method = make_method(single, weight=0.7)
  alone, told = stepped(
    method, method.init(jax.random.key(0)).replace(nets={"student": net}), **recorded
  )
  np.testing.assert_allclose(metrics["loss_cross"], 2 * told["loss_pseudo"], rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], 2 * told["loss"], rtol=1e-5)
  for role in ("a", "b"):
    assert_equal_nets(after.nets[role], alone.nets["student"])


def test_a_pseudo_label_of_oneself_pulls_towards_its_corner():
  logits = jnp.log(jnp.array([[[[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]]]))
  value, gradient = jax.value_and_grad(single_pseudo.self_supervision)(logits)
  np.testing.assert_allclose(value, -(np.log(0.6) + np.log(0.5)) / 2, rtol=1e-6)
  np.testing.assert_allclose(
    gradient[0, 0], np.array([[-0.4, 0.3, 0.1], [0.2, -0.5, 0.3]]) / 2, atol=1e-6
  )


def test_each_network_moves_towards_the_other_that_stands_still():
  # (0.6, 0.4) and (0.1, 0.9) are 0.25 + 0.25 apart, counted in both directions.
  a, b = jnp.log(jnp.array([[[[0.6, 0.4]]]])), jnp.log(jnp.array([[[[0.1, 0.9]]]]))
  cross = lambda a, b: cross_prob.cross_consistency((a, b), distance="l2")
  value, gradients = jax.value_and_grad(cross, (0, 1))(a, b)
  np.testing.assert_allclose(value, 1.0, rtol=1e-6)
  # Each term has one moving side, so the gradient is that of the distance counted once, with both
  # sides moving.
  once = jax.grad(lambda a, b: jnp.sum(jnp.square(jax.nn.softmax(a) - jax.nn.softmax(b))), (0, 1))(
    a, b
  )
  np.testing.assert_allclose(gradients, once, atol=1e-6)


def test_kl_counts_both_directions():
  a, b = jnp.log(jnp.array([[[[0.5, 0.5]]]])), jnp.log(jnp.array([[[[0.25, 0.75]]]]))
  value, (of_a, _) = jax.value_and_grad(
    lambda a, b: cross_prob.cross_consistency((a, b), distance="kl"), (0, 1)
  )(a, b)
  there = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
  back = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
  np.testing.assert_allclose(value, there + back, rtol=1e-5)
  np.testing.assert_allclose(of_a[0, 0, 0], [0.25, -0.25], atol=1e-6)  # softmax minus the other's


def test_equal_networks_have_nothing_to_tell_each_other():
  method, state, net = twins(cross_prob.cross_prob)
  after, metrics = stepped(method, state)
  assert metrics["loss_cross"] < 1e-9  # up to round-off
  alone = make_method(supervised.supervised)
  plain, _ = stepped(alone, alone.init(jax.random.key(0)).replace(nets={"student": net}))
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
  jax.tree.map(close, after.nets["a"].params, plain.nets["student"].params)


def test_an_unknown_distance_names_the_known_ones():
  with pytest.raises(checks.InputError, match="kl, l2"):
    make_method(cross_prob.cross_prob, distance="mse")
