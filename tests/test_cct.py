"""CCT: who learns from what, what each perturbation does, how the parts of a large crop share
memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import cct
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import components, losses, outlines, perturb, schedules

K, SIZE, BATCH = 4, 33, 2
FEW = {"vat": 1, "cutout": 1, "object": 2}


def zero(logits, label):
  return 0.0 * jnp.sum(logits)


@functools.cache
def make_task(supervised=True, other_classes=()):
  # At learning rate 1 without momentum the parameters move by minus their gradient.
  optimizer = optim.sgd(lambda step: 1.0, momentum=0.0)
  criterion = losses.cross_entropy_mean if supervised else zero
  network = make_network("tiny", num_classes=K, width=4)
  return Task(K, 10, network, optimizer, criterion, other_classes=other_classes)


def make_batch(*suffixes, seed=0, num_classes=K):
  rng = np.random.default_rng(seed)
  images = lambda: jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  batch = {}
  for suffix in ("", *suffixes):
    valid = jnp.ones((BATCH, SIZE, SIZE), bool).at[:, -4:].set(False)
    label = (
      jnp.asarray(rng.integers(0, 2, size=(BATCH, SIZE, SIZE)), jnp.int32)
      .at[:, -4:]
      .set(IGNORE_LABEL)
    )
    batch[f"labeled{suffix}"] = {"image": images(), "label": label, "valid": valid}
    batch[f"unlabeled{suffix}"] = {
      "weak": images(),
      "valid": valid,
      "image_label": jnp.ones((BATCH, num_classes)),
    }
  return batch


def step(method, batch):
  state = method.init(jax.random.key(0))
  return state, *jax.jit(method.step)(state, batch, jax.random.key(1))


def moved_groups(before, after):
  """Names of the parameter groups that differ."""
  moved = jax.tree.map(
    lambda old, new: bool(np.any(old != new)), before.nets["main"].params, after.nets["main"].params
  )
  return {group for group, leaves in moved.items() if any(jax.tree.leaves(leaves))}


@pytest.mark.slow
@pytest.mark.parametrize(
  "options, supervised, groups",
  [
    ({"weight": 0.0}, True, {"backbone", "head"}),
    ({"decoders": FEW}, False, {"backbone", "auxiliary"}),
    ({"weight": 0.0, "image_labels": True, "weak_weight": 0.0}, False, {"classifier"}),
    (
      {"weight": 0.0, "image_labels": True, "classification_weight": 0.0},
      False,
      {"backbone", "auxiliary"},
    ),
  ],
)
def test_every_loss_trains_its_own_decoders_and_the_encoder_learns_from_all_but_the_classifier(
  options, supervised, groups
):
  method = cct.cct(
    make_task(supervised), **{"decoders": {"context": 1}, "rampup_fraction": 0.0} | options
  )
  before, after, _ = step(method, make_batch())
  assert moved_groups(before, after) == groups


@pytest.mark.slow
def test_every_domain_has_decoders_of_its_own_and_the_same_encoder():
  method = cct.cct_domains(make_task(other_classes=(7,)), decoders={"context": 1})
  batch = make_batch("_1")
  before, after, metrics = step(method, batch)
  assert moved_groups(before, after) == {"backbone", "head", "auxiliary", "head_1", "auxiliary_1"}
  terms = [value for name, value in metrics.items() if name.startswith("loss_")]
  assert len(terms) == 4 and float(metrics["loss"]) == pytest.approx(
    sum(map(float, terms)), rel=1e-6
  )
  images = jnp.zeros((2, SIZE, SIZE, 3))
  domains = {name: predict.domain for name, predict in method.predictors.items()}
  assert domains == {"main": 0, "main_1": 1}
  assert [predict(after, images).shape[-1] for predict in method.predictors.values()] == [K, 7]


def test_the_consistency_starts_at_e_to_the_minus_5_and_grows_every_step():
  method = cct.cct(make_task(), decoders={"context": 1}, rampup_fraction=0.4)
  state, batch = method.init(jax.random.key(0)), make_batch()
  update, draws = jax.jit(method.update), method.draw(jax.random.key(1), batch)
  at = [
    update(state.replace(step=jnp.int32(index)), batch, draws)[1]["loss_consistency"]
    for index in (0, 2, 4, 9)
  ]
  np.testing.assert_allclose(np.array(at) / at[-1], [np.exp(-5), np.exp(-1.25), 1, 1], rtol=1e-5)


def test_one_decoder_of_many_is_in_memory_at_a_time():
  def temporary_bytes(count):
    method = cct.cct(make_task(), decoders={"feature_noise": count})
    state, batch = jax.eval_shape(method.init, jax.random.key(0)), make_batch()
    draws = jax.eval_shape(method.draw, jax.random.key(0), batch)
    return (
      jax.jit(method.update)
      .lower(state, batch, draws)
      .compile()
      .memory_analysis()
      .temp_size_in_bytes
    )

  logits = BATCH * 40 * 40 * K * 4  # bytes
  assert temporary_bytes(24) - temporary_bytes(2) < 2 * logits


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_vats_perturbation_has_its_length_in_float32(scale):
  features = jax.random.uniform(jax.random.key(0), (2, 10, 10, 64))
  start = jax.random.uniform(jax.random.key(1), features.shape, minval=-0.5, maxval=0.5)
  decoder = heads.subpixel_decoder(64, 5, doublings=3)
  params = decoder.init(jax.random.key(2))[0]
  decode = lambda x: decoder.apply(params, {}, scale * x, train=True)[0]
  change = cct.vat_perturbation(decode, features, start, xi=0.1, eps=2.0)
  np.testing.assert_allclose(jnp.sqrt(jnp.sum(change**2, axis=(1, 2, 3))), 2.0, rtol=1e-4)
  target = jax.nn.softmax(decode(features))
  away = lambda change: jnp.sum(losses.kl_from_target(decode(features + change), target))
  # Further than a random step of that length.
  assert away(change) > 2 * away(2.0 * perturb.unit(start, tiny=0.0))


def test_context_and_objects_are_two_halves_of_the_features():
  features = jnp.ones((1, 2, 2, 3))
  # Its upper left corners of cells: two of four.
  foreground = jnp.zeros((1, 4, 4), bool).at[0, :3, :2].set(True)
  kept = cct.perturbed(
    "context", features, None, cct.Prediction(foreground, None), None, xi=0.1, eps=2.0
  )
  rest = cct.perturbed(
    "object", features, None, cct.Prediction(foreground, None), None, xi=0.1, eps=2.0
  )
  np.testing.assert_array_equal(kept[0, :, :, 0], [[1, 0], [1, 0]])
  np.testing.assert_array_equal(kept + rest, features)


def test_feature_drop_takes_the_strongest_positions():
  features = jnp.array([[[[1.0, 3.0], [4.0, 4.0]], [[3.0, 2.0], [0.0, 0.0]]]])  # means 2, 4; 2.5, 0
  got = perturb.drop_features(features, jnp.float32(0.625))  # at least 2.5 falls
  np.testing.assert_array_equal(jnp.any(got != 0, axis=-1), [[[True, False], [False, False]]])


def walked_corners(region):
  """Turns of the outer outline of one region, bool[H, W], walked pixel by pixel with the outside on
  the right.
  """
  around = outlines._AROUND
  cells = set(zip(*np.nonzero(region)))
  start = min(cells)
  neighbor = lambda cell, way: (cell[0] + around[way % 8][0], cell[1] + around[way % 8][1])
  # The first pixel's left and upper neighbors are free; where the walk ends is the first one found
  # clockwise from there.
  before = next((way for way in (3, 2, 1, 0, 7, 6, 5) if neighbor(start, way) in cells), None)
  cell, back, turns, incoming = start, before, 0, (before + 4) % 8
  while True:
    way = next(way % 8 for way in range(back + 1, back + 9) if neighbor(cell, way) in cells)
    turns += way != incoming
    cell, back, incoming = neighbor(cell, way), (way + 4) % 8, way
    if (cell, back) == (start, before):
      return turns


def test_corners_are_those_of_a_walk_around_each_region():
  rng = np.random.default_rng(0)
  mask = np.stack([rng.random((16, 18)) < share for share in (0.15, 0.3, 0.5, 0.7, 0.9)])
  names, corners, free = (
    np.asarray(f(jnp.asarray(mask)))
    for f in (components.connected, outlines.corners, outlines.outside)
  )
  checked = 0
  for image in range(len(mask)):
    around = np.pad(free[image], 1, constant_values=True)
    for name in set(names[image][mask[image]]):
      region = names[image] == name
      touches = any(
        around[1 + y : 17 + y, 1 + x : 19 + x][region].any()
        for y, x in ((0, 1), (1, 0), (0, -1), (-1, 0))
      )
      want = walked_corners(region) if touches and region.sum() > 1 else 0
      assert corners[image][region].sum() == want
      checked += region.sum() > 1
  assert checked > 10


def test_what_lies_in_a_hole_is_not_outside():
  mask = (
    jnp.zeros((1, 7, 7), bool)
    .at[0, 1:6, 1:6]
    .set(True)
    .at[0, 2:5, 2:5]
    .set(False)
    .at[0, 3, 3]
    .set(True)
  )
  free = outlines.outside(mask)[0]
  assert free.sum() == 49 - 25 and not free[2, 2]
  corners = outlines.corners(mask)[0]
  # The square's; none of its hole and the dot in it.
  assert corners.sum() == 4 and corners[1, 1] == 1 and corners[3, 3] == 0
  winding = (
    jnp.ones((1, 5, 5), bool)
    .at[0, 4, 1]
    .set(False)
    .at[0, 1:4, 1]
    .set(False)
    .at[0, 1, 1:4]
    .set(False)
  )
  assert outlines.outside(winding)[0].sum() == 6  # a channel with a bend, open below


def test_a_rectangle_of_the_share_asked_for_lies_in_each_large_object_whatever_is_drawn():
  comb = np.zeros((1, 40, 60), bool)
  comb[0, 5:35:2, 10:40] = comb[0, 5:34, 10] = True  # 30 columns, 29 rows, with many corners
  comb[0, 10:20, 50:58] = True  # a box: four
  objects = perturb.large_objects(jnp.asarray(comb))
  assert objects.large.sum() == 1
  for uniform, first in ((0.0, (5, 10)), (1 - 1e-7, (5 + 16, 10 + 17))):
    erased = perturb.guided_cutout(objects, jnp.full((1, 40 * 60, 2), uniform), (40, 60))
    rows, columns = np.nonzero(erased[0])
    assert (rows.min(), columns.min()) == first and erased.sum() == int(28 * 0.4) * int(29 * 0.4)


def test_bootstrapping_keeps_the_pixels_that_are_below_the_threshold():
  right = np.array([0.1, 0.3, 0.5, 0.8])
  logits = jnp.log(jnp.stack([right, 1 - right], axis=-1))[None, None]
  label = jnp.zeros((1, 1, 4), jnp.int32)
  value = lambda label, threshold: losses.bootstrapped_cross_entropy(
    logits, label, threshold=threshold
  )
  np.testing.assert_allclose(value(label, 0.4), -np.log([0.1, 0.3]).mean(), rtol=1e-5)
  # One an image at least, below the next.
  np.testing.assert_allclose(value(label, 0.0), -np.log(0.1), rtol=1e-5)
  np.testing.assert_allclose(
    value(label.at[0, 0, 0].set(IGNORE_LABEL), 0.4), -np.log(0.3), rtol=1e-5
  )
  assert schedules.annealed_threshold(0, start=0.25, end=0.9, length_steps=4) == 0.25


def test_pseudo_masks_have_a_class_where_sure_and_background_where_nothing_is():
  cam = jnp.array([[[[0.9, 0.2], [0.1, 0.31], [0.04, 0.0], [0.2, 0.06]]]])
  valid = jnp.ones((1, 1, 4), bool)
  np.testing.assert_array_equal(cct.pseudo_mask(cam, valid), [[[1, 2, 0, IGNORE_LABEL]]])
  np.testing.assert_array_equal(
    cct.pseudo_mask(cam, valid, background=False), [[[0, 1, IGNORE_LABEL, IGNORE_LABEL]]]
  )
  np.testing.assert_array_equal(cct.pseudo_mask(cam, ~valid), [[[IGNORE_LABEL] * 4]])


def test_an_image_that_is_all_background_gives_a_finite_step():
  method = cct.cct(make_task(), decoders=FEW, image_labels=True, min_confidence=0.999)
  batch = make_batch()
  batch["unlabeled"] = jax.tree.map(jnp.zeros_like, batch["unlabeled"])
  _, after, metrics = step(method, batch)
  assert (
    metrics["kept_fraction"] == 0 and metrics["loss_consistency"] == 0 and metrics["loss_weak"] == 0
  )
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.nets["main"].params))


def test_options_that_cannot_work_are_told_together():
  with pytest.raises(checks.InputError) as error:
    cct.cct(
      make_task(),
      decoders={"vatt": 1},
      distance="js",
      min_confidence=0.5,
      rampup="sigmoidal",
      xi=0.0,
    )
  for part in (
    "did you mean 'vat'?",
    "at least one auxiliary decoder",
    "0.5 with distance 'js'",
    "'sigmoidal'",
    "xi: got 0.0",
  ):
    assert part in str(error.value)
