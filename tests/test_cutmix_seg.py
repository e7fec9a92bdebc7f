"""CutMix-Seg, ICT and VAT: what the student sees, what it learns from, and where the gradients
stop.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, nets, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import cutmix_seg, ict, vat
from pseudoseg_jax.models.layers import Conv, ConvBN
from pseudoseg_jax.models.table import compose
from pseudoseg_jax.ops import losses, targets

K, SIZE, BATCH = 4, 33, 2
FACTORIES = {"cutmix_seg": cutmix_seg.cutmix_seg, "ict": ict.ict, "vat": vat.vat}


class Backbone(nn.Module):
  @nn.compact
  def __call__(self, x, **keywords):
    return (ConvBN(4, 3, stride=2, name="unit")(x, **keywords),)


class Head(nn.Module):
  @nn.compact
  def __call__(self, maps, **keywords):
    return Conv(K, use_bias=True, name="classifier")(ConvBN(4, name="unit")(maps[-1], **keywords))


NETWORK = compose(Backbone(), Head())


@functools.cache
def make_method(name="cutmix_seg", **options):
  task = Task(K, 10, NETWORK, optim.sgd(lambda step: 0.1), losses.cross_entropy_mean)
  return FACTORIES[name](task, **options)


def make_batch(needs, seed=0):
  rng = np.random.default_rng(seed)
  images = lambda *lead: jnp.asarray(rng.normal(size=(BATCH, *lead, SIZE, SIZE, 3)), jnp.float32)
  label = (
    jnp.asarray(rng.integers(0, K, size=(BATCH, SIZE, SIZE)), jnp.int32)
    .at[:, -4:]
    .set(IGNORE_LABEL)
  )
  batch = {"labeled": {"image": images(), "label": label}}
  for index, stream in enumerate(("unlabeled", "partner")[: 1 + needs.partner]):
    # partner: twice the padding.
    valid = jnp.ones((BATCH, SIZE, SIZE), bool).at[:, -3 * (index + 1) :].set(False)
    batch[stream] = {"weak": images(), "valid": valid}
    if needs.strong_views:
      batch[stream]["strong"] = images(1)
  return batch


def start(method):
  batch = make_batch(method.needs)
  return method.init(jax.random.key(0)), batch, method.draw(jax.random.key(1), batch)


def test_in_the_box_is_the_second_image_outside_the_first():
  method = make_method(strong_views=1)
  state, batch, draws = start(method)
  panels, kept = method.show(state, batch, draws)
  first, second, mask, mixed, _ = (panel.values for panel in panels)
  box = mask > 0
  np.testing.assert_array_equal(first, batch["unlabeled"]["weak"])
  np.testing.assert_array_equal(second, batch["partner"]["weak"])
  np.testing.assert_array_equal(mixed[box], batch["partner"]["strong"][:, 0][box])
  np.testing.assert_array_equal(mixed[~box], batch["unlabeled"]["strong"][:, 0][~box])
  np.testing.assert_array_equal(
    kept, jnp.where(box, batch["partner"]["valid"], batch["unlabeled"]["valid"])
  )
  np.testing.assert_allclose(mask.mean((1, 2)), 0.5, atol=0.03)


def test_cutout_keeps_the_box_and_zeroes_the_rest():
  method = make_method(mask="cutout", area_range=(0.3, 0.3))
  assert not method.needs.partner
  state, batch, draws = start(method)
  panels, kept = method.show(state, batch, draws)
  weak, mask, cut, _ = (panel.values for panel in panels)
  np.testing.assert_array_equal(cut, jnp.where(mask[..., None] > 0, weak, 0))
  np.testing.assert_array_equal(kept, (mask > 0) & batch["unlabeled"]["valid"])
  np.testing.assert_allclose(mask.mean((1, 2)), 0.3, atol=0.03)


def test_the_mean_is_over_all_pixels_and_the_confident_share_too():
  values = jnp.array([[[4.0, 2.0, 6.0, 100.0]]])
  sure = jnp.array([[[0.99, 0.5, 0.5, 0.98]]])
  valid = jnp.array([[[True, True, True, False]]])
  loss = functools.partial(targets.confident_mean, values, sure, valid, min_confidence=0.97)
  assert loss() == (12 / 4 * 2 / 4, 2 / 4)
  assert loss(per="pixel") == (4 / 4, 2 / 4)
  assert loss(per="none") == (12 / 4, 1)


@pytest.mark.parametrize("name", FACTORIES)
def test_without_a_confident_pixel_the_unlabeled_images_teach_nothing(name):
  method = make_method(name, min_confidence=1.0)
  state, batch, draws = start(method)
  after, metrics = jax.jit(method.update)(state, batch, draws)
  assert metrics["confident_fraction"] == 0 and metrics["loss_consistency"] == 0
  assert metrics["loss"] == metrics["loss_supervised"] > 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.nets["student"].params))


@pytest.mark.parametrize("name", FACTORIES)
def test_the_teacher_is_the_average_with_its_statistics(name):
  method = make_method(name, decay=0.5, min_confidence=0.0)
  state, batch, draws = start(method)
  after, metrics = jax.jit(method.update)(state, batch, draws)
  assert metrics["loss_consistency"] > 0
  student, teacher = after.nets["student"], after.nets["teacher"]
  want = jax.tree.map(
    lambda old, new: (old + new) / 2, state.nets["teacher"].params, student.params
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), teacher.params, want)
  own = state.nets["teacher"].batch_stats
  if name != "vat":  # whose teacher is in inference mode
    passes = batch["unlabeled"]["weak"], batch["partner"]["weak"]
    own = nets.forward(NETWORK, state.nets["teacher"], *passes)[1].batch_stats
  want = jax.tree.map(lambda old, new: (old + new) / 2, own, student.batch_stats)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), teacher.batch_stats, want)


@pytest.mark.parametrize(
  "frozen, moves", [("none", {"backbone", "head"}), ("backbone", {"head"}), ("all", set())]
)
def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_scale(frozen, moves):
  method = make_method(frozen_batch_norm=frozen)
  state, batch, draws = start(method)
  after, _ = jax.jit(method.update)(state, batch, draws)

  def moved(part):
    pairs = zip(
      *(jax.tree.leaves(getattr(one.nets["student"], part[0])[part[1]]) for one in (state, after)),
      strict=True,
    )
    return any(np.any(old != new) for old, new in pairs)

  assert {name for name in ("backbone", "head") if moved(("batch_stats", name))} == moves
  assert moved(("params", "backbone")) and moved(("params", "head"))


def test_freezing_the_backbone_alone_leaves_the_head_its_batch_statistics():
  net = make_method().init(jax.random.key(0)).nets["student"]
  images = make_batch(make_method().needs)["labeled"]["image"]
  (half,), _ = nets.forward_with(NETWORK, "backbone")(net, images, dropout=None)
  (got,), _ = nets.forward_with(NETWORK, "all")(net, images, dropout=None)
  np.testing.assert_allclose(got, nets.infer(NETWORK, net, images), atol=1e-6)
  scores, _ = NETWORK.decode(
    net.params, net.batch_stats, nets.infer_maps(NETWORK, net, images), train=True
  )
  np.testing.assert_allclose(half, NETWORK.upsample(scores, images.shape[1:3]), atol=1e-5)
  assert np.abs(half - got).max() > 1e-2


def test_the_ramp_multiplies_the_term():
  method, steep = (
    make_method(min_confidence=0.0),
    make_method(min_confidence=0.0, rampup_fraction=1.0),
  )
  state, batch, draws = start(method)
  state = state.replace(step=jnp.int32(5))  # of 10
  whole, risen = (
    jax.jit(one.update)(state, batch, draws)[1]["loss_consistency"] for one in (method, steep)
  )
  np.testing.assert_allclose(risen / whole, np.exp(-5 * 0.5**2), rtol=1e-5)


def test_a_blend_s_confidence_is_the_blend_of_confidences():
  sure, unsure = jnp.log(jnp.array([[[[0.9, 0.1]]]])), jnp.log(jnp.array([[[[0.2, 0.8]]]]))
  target, confidence = ict.blended_prediction(jnp.array([0.5]), sure, unsure)
  np.testing.assert_allclose(target.ravel(), [0.55, 0.45], rtol=1e-6)
  np.testing.assert_allclose(confidence.ravel(), [0.85], rtol=1e-6)


def test_shares_of_blends_lie_near_the_ends():
  method = make_method("ict")
  batch = {"unlabeled": {"weak": jnp.zeros((4000, 1, 1, 3))}}
  share = np.asarray(method.draw(jax.random.key(0), batch)["share"])
  assert ((share >= 0) & (share <= 1)).all()
  np.testing.assert_allclose(share.mean(), 0.5, atol=0.03)
  np.testing.assert_allclose(share.var(), 0.25 / 1.2, atol=0.01)  # of Beta(a, a): 1 / (4 (2a + 1))


def test_the_adaptive_radius_is_half_the_length_of_central_differences():
  image = jnp.zeros((1, 3, 4, 1)).at[0, 0, 0, 0].set(3.0).at[0, 0, 2, 0].set(7.0)
  # Down: -3 and -7 over three rows; across, first row: 7 - 3 = 4 and 0.
  np.testing.assert_allclose(vat.adaptive_radius(image, 2.0), [np.sqrt(9 + 49 + 16)], rtol=1e-6)
  assert vat.adaptive_radius(jnp.ones((1, 3, 4, 1))) == 0


def test_the_adversarial_change_has_the_radius_and_hurts_more_than_noise():
  method = make_method("vat", radius=0.05)
  state, batch, draws = start(method)
  teacher = state.nets["teacher"]
  panels, _ = method.show(state, batch, draws)
  image, seen, _, target = (panel.values for panel in panels)
  length = jnp.sqrt(jnp.sum(jnp.square(seen - image), axis=(1, 2, 3)))
  np.testing.assert_allclose(length, vat.adaptive_radius(image, 0.05), rtol=1e-4)
  scaled = (
    draws["noise"]
    * (length / jnp.sqrt(jnp.sum(jnp.square(draws["noise"]), axis=(1, 2, 3))))[:, None, None, None]
  )

  def harm(images):
    return jnp.sum(losses.kl_divergence(nets.infer(NETWORK, teacher, images), jnp.log(target)))

  assert harm(seen) > 3 * harm(image + scaled)


def test_options_that_cannot_work_are_told_together():
  with pytest.raises(checks.InputError) as error:
    make_method(
      mask="cow",
      distance="mse",
      boxes=0,
      area_range=(0.5, 0.2),
      strong_views=2,
      frozen_batch_norm="head",
      decay=1.5,
    )
  for part in (
    "mask: got",
    "distance: got 'mse'",
    "boxes: got 0",
    "area_range",
    "strong_views",
    "'head'",
    "decay: got 1.5",
  ):
    assert part in str(error.value)
  with pytest.raises(checks.InputError, match="beta"):
    make_method("ict", beta=0.0)
  with pytest.raises(checks.InputError, match="radius"):
    make_method("vat", radius=-1.0)
