"""Forward passes, descent and averages, on a network of one convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pseudoseg_jax import nets, optim, rng
from pseudoseg_jax.contract import Head, State, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import distances, losses, resize


def make_task(**options):
  optimizer = optim.sgd(lambda step: 0.1 / (1 + step), **options)
  return Task(
    3, 10, make_network("tiny", num_classes=3, width=4), optimizer, losses.cross_entropy_mean
  )


def images(seed, batch=2):
  return jax.random.normal(jax.random.key(seed), [batch, 16, 16, 3])


def test_fused_passes_are_separate_passes():
  task = make_task()
  net = nets.create(task, jax.random.key(0))
  a, b = images(1), images(2)
  (fused_a, fused_b), fused = nets.forward(task.network, net, a, b)
  (only_a,), middle = nets.forward(task.network, net, a)
  (only_b,), apart = nets.forward(task.network, middle, b)
  close = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5)
  jax.tree.map(close, (fused_a, fused_b, fused.batch_stats), (only_a, only_b, apart.batch_stats))


def test_backbone_then_head_then_resizing_is_the_network():
  task = make_task()
  net, x = nets.create(task, jax.random.key(0)), images(1)
  (whole,), after_whole = nets.forward(task.network, net, x)
  (maps,), halfway = nets.encode(task.network, net, x)
  (scores,), after = nets.decode(task.network, halfway, maps)
  np.testing.assert_allclose(resize.bilinear_align_corners(scores, x.shape[1:3]), whole, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    after.batch_stats,
    after_whole.batch_stats,
  )
  assert tuple(one.shape[-1] for one in maps) == nets.map_channels(task.network)


def test_a_head_stands_beside_the_network_and_leaves_it_as_it_was():
  plain = nets.create(make_task(), jax.random.key(0))
  headed = nets.create(make_task(), jax.random.key(0), classifier=heads.image_classifier(8, 3))
  assert set(headed.params) == {*plain.params, "classifier"}
  assert headed.params["classifier"]["kernel"].shape == (8, 3)
  for part, leaves in plain.params.items():
    jax.tree.map(np.testing.assert_array_equal, leaves, headed.params[part])


def test_batches_of_different_sizes_pass_one_after_the_other():
  task = make_task()
  net = nets.create(task, jax.random.key(0))
  (a, b), _ = nets.forward(task.network, net, images(1, 2), images(2, 3))
  assert a.shape == (2, 16, 16, 3) and b.shape == (3, 16, 16, 3)


def test_a_teacher_shares_no_array_with_its_student_and_has_no_momentum():
  student = nets.create(make_task(), jax.random.key(0))
  teacher = nets.teacher_of(student)
  for old, new in zip(
    jax.tree.leaves(student.params), jax.tree.leaves(teacher.params), strict=True
  ):
    np.testing.assert_array_equal(old, new)
    assert old.unsafe_buffer_pointer() != new.unsafe_buffer_pointer()
  assert not jax.tree.leaves(teacher.opt_state)


def descend_by(optimizer, params, gradient, steps):
  state = optimizer.transform.init(params)
  for step in range(steps):
    direction, state = optimizer.transform.update(gradient, state, params)
    rates = optim.by_path(optimizer.multiplier, params)
    params = jax.tree.map(
      lambda p, d, r, step=step: p - optimizer.learning_rate(step) * r * d, params, direction, rates
    )
  return params


def test_sgd_is_pytorch_s_by_hand():
  params = {
    "backbone": {"kernel": jnp.array(2.0), "scale": jnp.array(2.0)},
    "head": {"kernel": jnp.array(2.0)},
  }
  gradient = jax.tree.map(jnp.ones_like, params)
  optimizer = optim.sgd(
    lambda step: 0.5, momentum=0.9, weight_decay=0.1, factors={"^(?!backbone)": 10.0}
  )
  got = descend_by(optimizer, params, gradient, 2)
  # kernel: v1 = 1.2, p1 = 1.4; v2 = 0.9 * 1.2 + 1.14 = 2.22, p2 = 0.29. The scale does not decay: v
  # = 1, 1.9. The head: rate 5.
  np.testing.assert_allclose(got["backbone"]["kernel"], 0.29, rtol=1e-6)
  np.testing.assert_allclose(got["backbone"]["scale"], 2 - 0.5 - 0.95, rtol=1e-6)
  np.testing.assert_allclose(got["head"]["kernel"], -4 - 5 * (0.9 * 1.2 + 1 - 0.4), rtol=1e-6)


def test_adamw_is_optax_s():
  params, gradient = {"kernel": jnp.array([1.0, -2.0])}, {"kernel": jnp.array([0.3, 0.1])}
  ours = descend_by(optim.adamw(lambda step: 0.01, weight_decay=0.1), params, gradient, 3)
  theirs, rule = params, optax.adamw(0.01, weight_decay=0.1)
  state = rule.init(params)
  for _ in range(3):
    updates, state = rule.update(gradient, state, theirs)
    theirs = optax.apply_updates(theirs, updates)
  np.testing.assert_allclose(ours["kernel"], theirs["kernel"], rtol=1e-6)


def test_the_average_leaves_statistics_alone_unless_asked():
  task = make_task()
  student = nets.create(task, jax.random.key(0))
  teacher = nets.teacher_of(nets.create(task, jax.random.key(1)))
  (_,), student = nets.forward(task.network, student, images(0))
  own = nets.ema(teacher, student, 0.75)
  both = nets.ema(teacher, student, 0.75, statistics="average")
  jax.tree.map(np.testing.assert_array_equal, own.batch_stats, teacher.batch_stats)
  kernel = lambda net: jax.tree.leaves(net.params)[-1]
  np.testing.assert_allclose(
    kernel(own), 0.75 * kernel(teacher) + 0.25 * kernel(student), rtol=1e-6
  )
  assert any(
    np.any(a != b)
    for a, b in zip(
      jax.tree.leaves(both.batch_stats), jax.tree.leaves(own.batch_stats), strict=True
    )
  )


def test_keys_of_streams_and_steps_differ_and_repeat():
  key = jax.random.key(0)
  assert rng.stream(key, "a") == rng.stream(key, "a") != rng.stream(key, "b")
  assert rng.step_key(0, 1) == rng.step_key(0, 1) != rng.step_key(0, 2) != rng.step_key(1, 2)


def one_step(optimizer, *, made_by=None, learning=None):
  """A state of two networks before and after a descent of both, by the loss sum(a) + 2 sum(b)."""
  head = Head(lambda key: ({"kernel": jnp.ones(3), "bias": jnp.ones(2)}, {}), apply=None)
  net = lambda: nets.create_from_head(head, jax.random.key(0), made_by or optimizer)
  state = State(step=jnp.array(7), nets={"a": net(), "b": net()}, memory={"seen": jnp.zeros(2)})

  def objective(live):
    terms = {
      role: weight * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(live[role].params))
      for role, weight in (("a", 1.0), ("b", 2.0))
      if role in live
    }
    return nets.Outcome(terms, live, {"told": jnp.array(5.0)}, {"seen": jnp.ones(2)})

  return state, *nets.descend(optimizer, state, objective, learning=learning)


def test_a_descent_sums_the_losses_moves_the_clock_and_keeps_what_is_remembered():
  before, after, metrics = one_step(optim.sgd(lambda step: 0.1 * step, momentum=0.0))
  assert after.step == 8 and after.nets["a"].step == 1
  assert metrics["loss_a"] == 5 and metrics["loss_b"] == 10 and metrics["loss"] == 15
  assert metrics["told"] == 5 and metrics["learning_rate"] == np.float32(0.7)
  np.testing.assert_allclose(after.nets["a"].params["bias"], 1 - 0.7, rtol=1e-6)
  np.testing.assert_allclose(after.nets["b"].params["bias"], 1 - 1.4, rtol=1e-6)
  assert after.memory["seen"].tolist() == [1, 1] and before.memory["seen"].tolist() == [0, 0]


def test_who_does_not_learn_stays():
  optimizer = optim.sgd(lambda step: 0.1, momentum=0.0)
  before, after, metrics = one_step(optimizer, learning=["b"])
  assert after.nets["a"] is before.nets["a"] and "loss_a" not in metrics
  named = {"b": optimizer, "not there": optimizer}
  assert one_step(named, made_by=optimizer)[1].nets["a"].step == 0
  with pytest.raises(KeyError, match="studnet"):
    one_step(optimizer, learning=["studnet"])


def test_a_plain_optax_transformation_descends_as_optax_says():
  before, after, metrics = one_step(optax.adam(0.1))
  rule = optax.adam(0.1)
  params = before.nets["b"].params
  updates, _ = rule.update(
    jax.tree.map(lambda leaf: 2 * jnp.ones_like(leaf), params), rule.init(params)
  )
  expected = optax.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, after.nets["b"].params, expected)
  assert "learning_rate" not in metrics


def test_a_network_of_another_optimizer_is_refused_and_so_is_a_frozen_one():
  with pytest.raises(ValueError, match="network 'a' was made with another optimizer"):
    one_step(optim.sgd(lambda step: 0.1), made_by=optim.adamw(lambda step: 0.1))
  task = make_task()
  state = nets.init_student_and_teacher(task)(jax.random.key(0))

  def objective(live):
    kernels = jax.tree.leaves(live["teacher"].params)
    return nets.Outcome({"any": sum(jnp.sum(leaf) for leaf in kernels)}, live)

  with pytest.raises(ValueError, match="'teacher' .* frozen does not learn"):
    nets.descend(task.optimizer, state, objective, learning=["teacher"])


@pytest.mark.parametrize("name", distances.DISTANCES)
def test_distances_are_what_the_table_says(name):
  rng = np.random.default_rng(0)
  logits, target = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, target))
  gap = np.abs(logits - target)
  expected = {
    "mse": np.mean((p - q) ** 2, -1),
    "sse": np.sum((p - q) ** 2, -1),
    "bce": -np.sum(q * np.log(p + 1e-6) + (1 - q) * np.log(1 - p + 1e-6), -1),
    "kl": np.sum(q * np.log(q / p), -1),
    "logit_mse": np.mean(gap**2, -1),
    "logit_sse_by_root": np.sum(gap**2, -1) / np.sqrt(3),
    "logit_huber_by_root": np.sum(np.where(gap < 1, gap**2 / 2, gap - 0.5), -1) / np.sqrt(3),
  }
  got = distances.per_pixel(name, logits, target)
  np.testing.assert_allclose(got, expected[name], rtol=2e-5, atol=1e-6)
  gradient = jax.grad(lambda target: distances.per_pixel(name, logits, target).sum())(target)
  np.testing.assert_array_equal(gradient, 0)
