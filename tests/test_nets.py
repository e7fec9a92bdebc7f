"""Forward passes, descent and averages, on a network of one convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pseudoseg_jax import nets, optim, rng
from pseudoseg_jax.contract import Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import losses, resize


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
