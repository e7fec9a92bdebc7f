"""Self-correcting networks: what boxes become, what the corrected label is, who learns from it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, nets, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import self_correcting as methods
from pseudoseg_jax.methods.supervised import supervised
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import boxes, fusion, losses, schedules

K, SIZE, BATCH = 3, 33, 2


def zero(logits, label):
  return 0.0 * jnp.sum(logits)


NETWORK = make_network("tiny", num_classes=K, width=4)


@functools.cache
def make_method(factory=methods.self_correcting, criterion=losses.cross_entropy_mean, **options):
  # At learning rate 1 without momentum the parameters move by minus their gradient.
  return factory(
    Task(K, 10, NETWORK, optim.sgd(lambda step: 1.0, momentum=0.0), criterion), **options
  )


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  images = lambda: jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  label = jnp.asarray(rng.integers(0, K, size=(BATCH, SIZE, SIZE)), jnp.int32)
  given = jnp.tile(jnp.array([[1, 0.1, 0.2, 0.7, 0.6], [2, 0.5, 0.5, 1.0, 1.0]]), (BATCH, 1, 1))
  valid = jnp.ones((BATCH, SIZE, SIZE), bool).at[:, -4:].set(False)
  labeled = {"image": images(), "label": label, "boxes": given}
  return {"labeled": labeled, "unlabeled": {"weak": images(), "valid": valid, "boxes": given}}


@functools.cache
def compiled_step(**options):
  return jax.jit(make_method(**options).step)


def step(batch, number=0, **options):
  """The state before and after step `number` of the method with these options, and the step's
  metrics.
  """
  state = make_method(**options).init(jax.random.key(0)).replace(step=jnp.int32(number))
  return state, *compiled_step(**options)(state, batch, jax.random.key(1))


def largest_change(before, after, role):
  apart = jax.tree.map(
    lambda old, new: jnp.max(jnp.abs(old - new)), before.nets[role].params, after.nets[role].params
  )
  return max(map(float, jax.tree.leaves(apart)))


def test_a_box_holds_the_pixels_whose_centres_it_holds():
  given = jnp.array(
    [[[1, 0.25, 0.0, 0.75, 0.5], [2, 0.5, 0.3, 1.0, 1.0], [-1, 0.0, 0.0, 1.0, 1.0]]]
  )
  planes = boxes.box_planes(given, (4, 4), K)
  np.testing.assert_array_equal(planes[0, ..., 0], 0)
  np.testing.assert_array_equal(
    planes[0, ..., 1], [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
  )
  # One pixel in both.
  np.testing.assert_array_equal(
    planes[0, ..., 2], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
  )


def test_background_is_where_no_box_lies():
  planes = jnp.array([[[[0.0, 0.4, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]]])
  np.testing.assert_array_equal(
    boxes.with_background(planes, background=True)[0, 0], [[1, 0, 0], [0, 1, 1], [1, 0, 0]]
  )
  without = boxes.with_background(planes, background=False)[0, 0]
  np.testing.assert_array_equal(without, [[0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0]])


def test_a_silent_box_encoder_halves_the_first_and_the_deepest_map():
  network, seen = NETWORK, []

  def decode(params, batch_stats, maps, **keywords):
    seen.append(maps)
    return network.decode(params, batch_stats, maps, **keywords)

  task = Task(
    K, 10, network._replace(decode=decode), optim.sgd(lambda step: 1.0), losses.cross_entropy_mean
  )
  encoder, run = methods.box_network(task, background=True)
  net = nets.create(task, jax.random.key(0), box_encoder=encoder)
  net.params["box_encoder"] = jax.tree.map(jnp.zeros_like, net.params["box_encoder"])
  images, planes = make_batch()["unlabeled"]["weak"], jnp.ones((BATCH, SIZE, SIZE, K))
  _, attention, _ = run(net, images, planes, train=False)
  plain = nets.infer_maps(network, net, images)
  for got, want, factor in zip(seen[0], plain, (0.5, 1.0, 0.5), strict=True):
    np.testing.assert_allclose(got, factor * want, rtol=1e-6)
  assert [a.shape for a in attention] == [plain[-1].shape, plain[0].shape]


def test_boxes_change_what_the_ancillary_model_says():
  method = make_method(methods.ancillary)
  state, image = method.init(jax.random.key(0)), make_batch()["labeled"]["image"]
  shown = (
    jnp.concatenate([image, jnp.full((BATCH, SIZE, SIZE, K), plane)], -1) for plane in (0.0, 1.0)
  )
  said = [method.predictors["ancillary"](state, images) for images in shown]
  assert np.max(np.abs(said[0] - said[1])) > 1e-3


def test_no_other_label_is_nearer_to_both_opinions_than_the_linear_correction():
  logits = jax.random.normal(jax.random.key(0), (3, 50, 5)) * 3
  primary, ancillary, noise = logits
  for alpha in (0.0, 0.5, 30.0):
    objective = lambda q, alpha=alpha: (
      losses.kl_divergence(primary, q) + alpha * losses.kl_divergence(ancillary, q)
    )
    q = fusion.self_corrected(primary, ancillary, alpha)
    assert np.all(objective(q + 0.1 * noise) >= objective(q))
  np.testing.assert_array_equal(fusion.self_corrected(primary, ancillary, 0.0), primary)
  np.testing.assert_allclose(fusion.self_corrected(primary, ancillary, 1e7), ancillary, atol=1e-5)


def test_alpha_follows_the_slides_curve():
  steps = np.array([0, 10, 20, 30, 40, 60])  # of 60: one grid cell of the slide is 10
  alpha = schedules.exp_decay(steps, start=30.0, end=0.5, rate=6.0, total_steps=60)
  np.testing.assert_allclose(alpha, [29.6, 11.0, 3.9, 1.4, 0.55, 0.5], atol=0.45)


def test_em_fixed_takes_the_likeliest_class_that_has_a_box():
  logits = jnp.tile(jnp.array([0.0, -1.0, 9.0]), (1, 1, 4, 1))
  planes = jnp.array([[[[0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]]], jnp.float32)
  label = functools.partial(methods.em_fixed_label, logits, planes, background_bias=3.0)
  # Class 1 lies 1 below the background: biases 5 and 3 lift it above, equal ones do not.
  np.testing.assert_array_equal(label(foreground_bias=5.0, background=True)[0, 0], [0, 1, 2, 2])
  np.testing.assert_array_equal(label(foreground_bias=3.0, background=True)[0, 0], [0, 0, 2, 2])
  np.testing.assert_array_equal(
    label(foreground_bias=5.0, background=False)[0, 0], [IGNORE_LABEL, 1, 2, 2]
  )


# Without the masks; alpha is 30 at step 0 and 0 at step 10.
FROM_BOXES = dict(criterion=zero, alpha_end=0.0, alpha_decay=200.0)


def test_the_networks_own_opinion_teaches_it_nothing_and_the_ancillary_models_does():
  # Were the label's gradient not stopped, the primary model would move at alpha 0 too.
  change = {}
  for number in (0, 10):
    before, after, told = step(make_batch(), number, **FROM_BOXES)
    change[float(told["alpha"])] = largest_change(before, after, "primary")
    assert largest_change(before, after, "ancillary") == 0
    assert jax.tree.all(
      jax.tree.map(
        np.array_equal, before.nets["ancillary"].batch_stats, after.nets["ancillary"].batch_stats
      )
    )
  assert change[0.0] < 1e-6 and change[30.0] > 1e-2


def test_an_image_without_any_valid_pixel_gives_a_finite_step():
  batch = make_batch()
  batch["unlabeled"] |= {
    "valid": jnp.zeros((BATCH, SIZE, SIZE), bool),
    "boxes": jnp.full((BATCH, 2, 5), -1.0),
  }
  before, after, told = step(batch, **FROM_BOXES)
  assert told["loss_weak"] == 0 and largest_change(before, after, "primary") == 0


def test_the_correction_net_learns_nothing_from_boxes_alone():
  before, after, told = step(make_batch(), criterion=zero, correction="convolutional", hidden=4)
  assert told["loss_weak"] > 0 and largest_change(before, after, "primary") > 1e-3
  assert largest_change(before, after, "correction") == 0


@pytest.mark.slow
def test_from_masks_the_correction_net_learns_without_moving_the_primary_model_otherwise():
  before, after, _ = step(make_batch(), correction="convolutional", hidden=4, learn_weak=False)
  assert largest_change(before, after, "correction") > 5e-4
  alone = make_method(supervised)
  student = (
    alone.init(jax.random.key(0)).nets["student"].replace(params=before.nets["primary"].params)
  )
  state, _ = jax.jit(alone.step)(
    before.replace(nets={"student": student}), make_batch(), jax.random.key(1)
  )
  apart = jax.tree.map(
    lambda a, b: np.max(np.abs(a - b)), after.nets["primary"].params, state.nets["student"].params
  )
  assert max(jax.tree.leaves(apart)) < 1e-6


def test_the_correction_net_sees_three_pixels_and_both_opinions():
  head = heads.correction_net(K, hidden=4)
  params, _ = head.init(jax.random.key(0))
  assert params["conv1"]["kernel"].shape == (3, 3, 2 * K, 4) and params["conv2"][
    "kernel"
  ].shape == (3, 3, 4, K)
  still = jnp.zeros((1, 9, 9, K))
  run = lambda *logits: head.apply(params, {}, *logits, train=True)[0]
  for one in ((still.at[:, 4, 4].set(5.0), still), (still, still.at[:, 4, 4].set(5.0))):
    felt = np.any(np.abs(run(*one) - run(still, still)) > 0, axis=(0, 3))
    assert (
      felt[4, 4]
      and not felt[:2].any()
      and not felt[7:].any()
      and not felt[:, :2].any()
      and not felt[:, 7:].any()
    )


def test_every_stage_says_which_networks_it_goes_on_with():
  assert make_method().given_nets == ("ancillary",)
  assert make_method(correction="em_fixed").given_nets == ()
  assert make_method(correction="convolutional", learn_weak=False).given_nets == ("ancillary",)
  assert make_method(correction="convolutional").given_nets == (
    "ancillary",
    "primary",
    "correction",
  )


def test_options_that_cannot_work_are_told_together():
  with pytest.raises(checks.InputError) as error:
    make_method(correction="lienar", learn_weak=False, alpha_start=0.1, alpha_decay=-1.0, hidden=0)
  for part in (
    "mean 'linear'?",
    "take method 'supervised'",
    "start >= end >= 0",
    "alpha_decay: got -1",
    "hidden: got 0",
  ):
    assert part in str(error.value)


def discs(count, seed):
  """Noisy images of a disc of one color, class 1, on a ground of another."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:SIZE, :SIZE]
  images, labels, given = [], [], []
  for _ in range(count):
    radius, centre = rng.uniform(5, 9), rng.uniform(9, SIZE - 9, 2)
    inside = np.hypot(y - centre[0], x - centre[1]) < radius
    image = np.where(inside[..., None], rng.normal(size=3), rng.normal(size=3))
    images.append(image + rng.normal(0, 0.4, image.shape))
    labels.append(inside)
    rows, columns = np.nonzero(inside)
    given.append(
      [[1, *np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / SIZE]]
    )
  return np.array(images, np.float32), np.array(labels, np.int32), np.array(given, np.float32)


@pytest.mark.slow
def test_images_with_boxes_make_the_primary_model_better():
  steps = 250
  rate = functools.partial(schedules.poly, base=0.2, total_steps=steps)
  task = Task(K, steps, NETWORK, optim.sgd(rate, weight_decay=1e-4), losses.cross_entropy_mean)
  images, labels, given = discs(20, seed=0)
  weak, _, weak_boxes = discs(96, seed=1)
  held, truth, held_boxes = discs(48, seed=2)

  def trained(method, **known):
    state, advance, rng = (
      method.init(jax.random.key(0)),
      jax.jit(method.step),
      np.random.default_rng(0),
    )
    for role, net in known.items():
      state.nets[role] = state.nets[role].replace(params=net.params, batch_stats=net.batch_stats)
    for index in range(steps):
      at = rng.integers(0, len(weak), 8)
      batch = {"labeled": {"image": images, "label": labels, "boxes": given}}
      batch["unlabeled"] = {
        "weak": weak[at],
        "boxes": weak_boxes[at],
        "valid": np.ones((8, SIZE, SIZE), bool),
      }
      state, _ = advance(state, batch, jax.random.key(index))
    return state

  def iou(method, state):
    """Of the discs of images that no run has seen; shown boxes where the method's predictor asks
    for them.
    """
    (predict,) = method.predictors.values()
    planes = boxes.box_planes(held_boxes, (SIZE, SIZE), K)
    found = (
      np.argmax(
        predict(state, np.concatenate([held, planes], -1) if predict.weak_label else held),
        -1,
      )
      == 1
    )
    return np.sum(found & (truth == 1)) / np.sum(found | (truth == 1))

  guide, alone, method = methods.ancillary(task), supervised(task), methods.self_correcting(task)
  guided = trained(guide)
  scores = (
    iou(alone, trained(alone)),
    iou(method, trained(method, ancillary=guided.nets["ancillary"])),
    iou(guide, guided),
  )
  assert all(better > worse + 0.05 for worse, better in itertools.pairwise(scores)), scores
