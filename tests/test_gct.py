"""GCT: what flaw maps say, who learns from which loss, what the detector can see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import gct
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.detector import least_side
from pseudoseg_jax.models.layers import BatchNorm
from pseudoseg_jax.models.table import as_network
from pseudoseg_jax.ops import flaws, losses

K, SIZE, BATCH = 4, 33, 2


class Small(nn.Module):
  @nn.compact
  def __call__(self, x, *, train, groups=1):
    x = nn.Conv(4, (1, 1), use_bias=False, name="conv")(x)
    return nn.Conv(K, (1, 1), name="classifier")(
      nn.relu(BatchNorm(name="bn")(x, train=train, groups=groups))
    )


NETWORK = as_network(Small())
# At learning rate 1 without momentum the task models move by minus their gradient.
TASK = Task(K, 10, NETWORK, optim.sgd(lambda step: 1.0, momentum=0.0), losses.cross_entropy_mean)
SMALL = {"detector_width": 4, "detector_stages": 1, "rampup_fraction": 0.0, "threshold": 0.3}


@functools.cache
def make_batch():
  rng = np.random.default_rng(0)
  images = lambda: jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  label = (
    jnp.asarray(rng.integers(0, K, size=(BATCH, SIZE, SIZE)), jnp.int32)
    .at[:, -4:]
    .set(IGNORE_LABEL)
  )
  return {
    "labeled": {"image": images(), "label": label},
    "unlabeled": {"weak": images(), "valid": jnp.ones((BATCH, SIZE, SIZE), bool)},
  }


@jax.jit
def update(state, batch, draws, weights):
  """A step with these weights; traced, so that one program serves them all."""
  return gct.gct(TASK, **SMALL, **weights).update(state, batch, draws)


@functools.cache
def start():
  method, batch = gct.gct(TASK, **SMALL), make_batch()
  return method.init(jax.random.key(0)), batch, method.draw(jax.random.key(1), batch)


def step(weight=0.0, flaw_correction_weight=0.0, detector_weight=10.0):
  """The state after a step from `start`."""
  weights = {
    "weight": weight,
    "flaw_correction_weight": flaw_correction_weight,
    "detector_weight": detector_weight,
  }
  return update(*start(), weights)[0]


def movement(before, after, role):
  """How far a network's parameters went, without the biases that Adam moves by round-off."""
  moved = jax.tree_util.tree_map_with_path(
    lambda path, old, new: 0.0 if "bias" in str(path) else float(jnp.abs(new - old).max()),
    before.nets[role].params,
    after.nets[role].params,
  )
  return max(jax.tree.leaves(moved))


def noise(*shape, seed=0):
  return jax.random.uniform(jax.random.key(seed), shape)


def test_a_wrong_pixel_is_a_flaw_around_it_and_a_perfect_prediction_has_none():
  label = jnp.zeros((2, SIZE, SIZE), jnp.int32)
  said = jax.nn.one_hot(label.at[1, 16, 20].set(1), K)
  perfect, spoilt = flaws.flaw_target(said, label, base_pixels=SIZE)
  assert not perfect.any()
  assert jnp.argmax(spoilt) == 16 * SIZE + 20 and spoilt.max() == pytest.approx(1)
  # Alike in rows and columns.
  np.testing.assert_allclose(spoilt[12:21, 16:25], spoilt[12:21, 16:25].T, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 21, 65, 129])
def test_a_blur_keeps_constants_and_reads_mirrored_pixels_beyond_the_border(size):
  assert flaws.blur_taps(size).sum() == pytest.approx(1)
  np.testing.assert_allclose(flaws.blur(jnp.ones((1, 7, 9)), size), 1, atol=1e-6)
  x = np.asarray(noise(1, 70, 80))
  taps = flaws.blur_taps(size)
  padded = np.pad(x[0], size // 2, mode="reflect")
  want = np.apply_along_axis(
    np.convolve, 1, np.apply_along_axis(np.convolve, 0, padded, taps, "valid"), taps, "valid"
  )
  np.testing.assert_allclose(flaws.blur(x, size)[0], want, atol=1e-6)


def test_a_map_without_flaws_above_a_tenth_beats_every_other():
  weak, strong = 0.02 + 0.05 * noise(1, SIZE, SIZE), noise(1, SIZE, SIZE)
  (handled_weak, clipped), (handled_strong, _) = (
    flaws.handle_flaws(raw, base_pixels=SIZE) for raw in (weak, strong)
  )
  np.testing.assert_array_equal(clipped, weak)
  assert jnp.ptp(handled_weak) == 0 and handled_weak.max() < 0
  assert (handled_strong.min(), handled_strong.max()) == (0, pytest.approx(1))


def test_equals_and_both_bad_keep_their_own_prediction():
  first, second = noise(1, 1, 4, K), noise(1, 1, 4, K, seed=1)
  of_first, of_second = jnp.array([[[0.2, 0.9, 0.1, 0.6]]]), jnp.array([[[0.2, 0.7, 0.5, 0.3]]])
  target_first, target_second, both_bad = flaws.dynamic_consistency(
    first, second, of_first, of_second, threshold=0.6
  )
  np.testing.assert_array_equal(both_bad, [[[False, True, False, False]]])
  own = [[[True, True, True, False]]], [[[True, True, False, True]]]
  np.testing.assert_array_equal(jnp.all(target_first == first, -1), own[0])
  np.testing.assert_array_equal(jnp.all(target_second == second, -1), own[1])
  np.testing.assert_array_equal(target_first[0, 0, 3], second[0, 0, 3])


def test_each_loss_reaches_its_own_network_alone():
  before, plain = start()[0], step()
  without_detector, consistent = step(detector_weight=0.0), step(weight=100.0, detector_weight=0.0)
  corrected = step(flaw_correction_weight=1e3, detector_weight=0.0)
  for role in gct.PAIR:
    assert movement(plain, without_detector, role) == 0
    assert movement(plain, consistent, role) > 1e-3 and movement(plain, corrected, role) > 1e-3
  assert movement(before, plain, "detector") > 1e-5
  for state in (without_detector, consistent, corrected):
    assert movement(before, state, "detector") == 0


def test_negative_flaws_count_as_zero_in_the_detectors_loss_but_not_in_its_gradient():
  state, batch, draws = start()
  detector = state.nets["detector"]
  # A classifier that is nothing but a bias of -1: the flaw map is -1 everywhere, clipped it is 0.
  params = detector.params | {
    "classifier": {"kernel": 0 * detector.params["classifier"]["kernel"], "bias": -jnp.ones(1)}
  }
  state = state.replace(nets=state.nets | {"detector": detector.replace(params=params)})
  weights = {"weight": 0.0, "flaw_correction_weight": 0.0, "detector_weight": 2.0}
  after, clipped = update(state, batch, draws, weights)
  as_it_is = gct.gct(TASK, **SMALL, **weights, relu_straight_through_flaw=False)
  unclipped = jax.jit(as_it_is.update)(state, batch, draws)[1]
  for role in gct.PAIR:
    net = state.nets[role]
    images = jnp.concatenate([batch["labeled"]["image"], batch["unlabeled"]["weak"]])
    said = jax.nn.softmax(NETWORK.apply(net.params, net.batch_stats, images, train=True)[0][:BATCH])
    target = flaws.flaw_target(said, batch["labeled"]["label"], base_pixels=SIZE)
    square, mean = jnp.mean(target**2), jnp.mean(target)
    # Mean of (0 - t)^2.
    np.testing.assert_allclose(clipped[f"loss_detector_{role}"], square, rtol=1e-4)
    # of (-1 - t)^2.
    np.testing.assert_allclose(unclipped[f"loss_detector_{role}"], square + 2 * mean + 1, rtol=1e-4)
  assert after.nets["detector"].params["classifier"]["bias"] > -1


def test_statistics_of_the_task_models_move_twice_and_those_of_the_detector_four_times():
  state, batch, _ = start()
  images = jnp.concatenate([batch["labeled"]["image"], batch["unlabeled"]["weak"]])
  detector = heads.flaw_detector(3 + K, width=4, stages=1)
  want = {role: net.batch_stats for role, net in state.nets.items()}
  for role in gct.PAIR * 2:
    logits, want[role] = NETWORK.apply(state.nets[role].params, want[role], images, train=True)
    said = jax.nn.softmax(logits)
    _, want["detector"] = detector.apply(
      state.nets["detector"].params, want["detector"], images, said, train=True
    )
  got = {role: net.batch_stats for role, net in step().nets.items()}
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_detector_refuses_images_too_small_for_its_stages(stages):
  detector = heads.flaw_detector(3 + K, width=2, stages=stages)
  born = jax.eval_shape(detector.init, jax.random.key(0))
  see = lambda side: jax.eval_shape(
    functools.partial(detector.apply, train=True),
    *born,
    jnp.zeros((1, side, side + 3, 3)),
    jnp.zeros((1, side, side + 3, K)),
  )
  side = least_side(stages)
  assert see(side)[0].shape == (1, side, side + 3)
  with pytest.raises(
    checks.InputError,
    match=f"{side - 1}x{side + 2}; allowed: sides of {side} pixels or more .* detector_stages",
  ):
    see(side - 1)


def test_the_detector_is_born_as_pytorchs_convolutions_are():
  params, _ = heads.flaw_detector(5, width=32, stages=2).init(jax.random.key(0))
  for name, channels in {"conv1": 5, "conv2": 32, "conv2_1": 64, "classifier": 64}.items():
    bound = (16 * channels) ** -0.5
    for leaf in params[name].values():
      assert jnp.abs(leaf).max() <= bound
    kernel = params[name]["kernel"]
    assert jnp.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_bad_options_are_told_at_once():
  options = {
    "threshold": 2.0,
    "rampup_fraction": -1.0,
    "dilations": -1,
    "detector_width": 1,
    "detector_stages": 0,
  }
  with pytest.raises(checks.InputError) as told:
    gct.gct(TASK, **options, kernel_base_pixels=-1, detector_learning_rate=0.0)
  for name in (*options, "kernel_base_pixels", "detector_learning_rate"):
    assert f"{name}: got" in str(told.value)
