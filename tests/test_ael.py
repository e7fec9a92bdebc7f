"""AEL: who is drawn, pasted and mixed, and what the step learns from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import ael
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import balance, losses, mixing

K, SIZE, BATCH = 4, 17, 4


@functools.cache
def make_method(**options):
  network, optimizer = (
    make_network("tiny", num_classes=K, width=4),
    optim.sgd(lambda step: 1.0, momentum=0.0),
  )
  return ael.ael(Task(K, 10, network, optimizer, losses.cross_entropy_mean), **options)


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  images = lambda: jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  label = jnp.asarray(rng.integers(0, K - 1, size=(BATCH, SIZE, SIZE)), jnp.int32)
  return {"labeled": {"image": images(), "label": label}, "unlabeled": {"weak": images()}}


def take_step(method, batch):
  state = method.init(jax.random.key(0))
  after, metrics = jax.jit(method.update)(state, batch, method.draw(jax.random.key(1), batch))
  return state, after, metrics


def test_a_class_s_confidence_is_the_mean_of_its_true_probability_over_the_batch():
  probability = (
    jnp.array([[[[0.8, 0.2, 0.0], [0.4, 0.6, 0.0]]], [[[0.1, 0.9, 0.0], [0.3, 0.3, 0.4]]]]) + 1e-9
  )
  label = jnp.array([[[0, 0]], [[1, IGNORE_LABEL]]])
  np.testing.assert_allclose(
    balance.class_confidence(jnp.log(probability), label), [0.6, 0.9, 0.0], rtol=1e-5
  )
  bank = balance.moved_bank(jnp.array([0.5, 0.5, 0.5]), jnp.log(probability), label, 0.9)
  # The absent class looks less sure.
  np.testing.assert_allclose(bank, [0.51, 0.54, 0.45], rtol=1e-5)


def test_the_least_sure_class_is_always_learned_from_and_a_sure_one_never():
  rate = balance.sampling_rate(jnp.array([1.0, 0.5, 0.0]), 1.0)
  np.testing.assert_allclose(rate, [0.0, 0.5, 1.0])
  np.testing.assert_array_equal(balance.sampling_rate(jnp.ones(3), 1.0), 0.0)
  predicted = jnp.array([[[0, 1, 1, 2]]])
  uniform = jnp.broadcast_to(jnp.array([0.999, 0.4, 0.6, 0.001]), (3, 1, 4))
  assert balance.sampled(predicted, rate, uniform).tolist() == [[[False, False, True, True]]]


def test_ignored_labels_stay_in_the_denominator_and_nothing_kept_is_zero():
  logits, label = jnp.zeros((1, 1, 3, 2)), jnp.array([[[0, 1, IGNORE_LABEL]]])
  confidence = jnp.array([[[1.0, 0.5, 0.5]]])
  loss = functools.partial(balance.reweighted_loss, label=label, confidence=confidence, gamma=2.0)
  np.testing.assert_allclose(
    loss(logits, kept=jnp.ones((1, 1, 3), bool)), np.log(2) * 1.25 / 1.5, rtol=1e-6
  )
  value, gradient = jax.value_and_grad(functools.partial(loss, kept=jnp.zeros((1, 1, 3), bool)))(
    logits
  )
  assert value == 0 and (gradient == 0).all()


def test_classes_are_drawn_with_their_probabilities_and_only_candidates():
  bank = jnp.array([0.9, 0.1, 0.0, 0.5])
  drawn = ael.drawn_classes(
    bank, jax.random.gumbel(jax.random.key(0), (20_000, 4)), (0, 2, 3), power=0.5
  )
  share = np.bincount(drawn, minlength=4) / 20_000
  likely = np.exp(np.sqrt(1 - np.asarray(bank))) * [1, 0, 1, 1]
  np.testing.assert_allclose(share, likely / likely.sum(), atol=0.02)
  assert share[1] == 0


def test_another_image_is_never_the_same_and_has_the_class_where_one_has():
  priority = jax.random.uniform(jax.random.key(0), (500, 4, 4))
  holds = jnp.array([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]], bool)

  def chosen(*options):
    drawn = jax.vmap(lambda priority: ael.choose_partner(priority, *options))(priority)
    return [sorted(set(column.tolist())) for column in np.asarray(drawn).T]

  assert chosen(holds) == [[3], [0, 2, 3], [0, 1, 3], [2]]
  assert chosen() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
  assert ael.choose_partner(priority[0, :1, :1]).tolist() == [0]


def test_only_drawn_classes_of_images_that_are_pasted_come_through():
  image, label = jnp.zeros((2, 1, 3, 1)), jnp.array([[[0, 0, 0]], [[1, 2, IGNORE_LABEL]]])
  draws = {
    "classes": jnp.array([[0.0, 99.0, 0.0], [0.0, 99.0, 0.0]]),
    "source": jnp.zeros((2, 2)),
    "used": jnp.array([0.4, 0.6]),
  }
  numbered = image + jnp.arange(2.0)[:, None, None, None]
  source = ael.choose_source(
    numbered, label, jnp.full(3, 0.5), draws, probability=0.5, candidates=(), power=1.0
  )
  pasted_image, pasted_label = ael.copy_paste(numbered, label, source)
  assert pasted_label.tolist() == [[[1, 0, 0]], [[1, 2, IGNORE_LABEL]]]
  assert pasted_image[..., 0].tolist() == [[[1, 0, 0]], [[1, 1, 1]]]


def test_every_large_region_is_drawn_as_often_and_no_small_one():
  label = np.zeros((10, 10), np.int32)
  label[:3, :3], label[5:7, 5:9], label[9, 0] = 1, 1, 1  # 9 and 8 pixels, and a single one
  many = 400
  labels = jnp.broadcast_to(label, (many, 10, 10))
  priority = jax.random.uniform(jax.random.key(0), labels.shape)
  draw = functools.partial(ael.region_boxes, labels, jnp.ones(many, jnp.int32), priority)
  box, found = draw(min_area=0.01)
  assert found.all() and set(np.sum(box, axis=(1, 2)).tolist()) == {8, 9}
  assert abs(np.mean(box[:, 0, 0]) - 0.5) < 0.1
  box, found = draw(min_area=0.08)
  # Larger than the share, not as large.
  assert found.all() and (np.sum(box, axis=(1, 2)) == 9).all()
  assert not draw(min_area=0.09)[1].any()


def test_a_mix_takes_the_region_of_an_image_with_the_class_or_else_a_random_box():
  label = np.zeros((3, 8, 8), np.int32)
  label[2, 2:6, 1:4] = 1
  draws = {
    "classes": jnp.array([[0.0, 99.0, 0.0], [0.0, 99.0, 0.0], [0.0, 0.0, 99.0]]),  # 1, 1, 2
    "source": jnp.zeros((3, 3)),
    "region": jnp.zeros((3, 8, 8)),
    "box": mixing.BoxDraws(jnp.full((3, 1), 0.5), jnp.full((3, 1), 0.5), jnp.zeros((3, 1, 2))),
  }
  mix = ael.choose_mix(
    jnp.asarray(label), jnp.full(3, 0.5), draws, region_area=0.1, presence_area=0.1
  )
  assert mix.source.tolist() == [2, 2, 0] and mix.by_class.tolist() == [True, True, False]
  np.testing.assert_array_equal(mix.box[0], label[2] == 1)
  assert mix.box[2].sum() == 36 and mix.box[2, :6, :6].all()  # half of 64, in whole pixels
  mixed = mix.mixed(jnp.arange(3.0)[:, None, None] + jnp.zeros((3, 8, 8)))
  assert np.unique(mixed[0]).tolist() == [0, 2] and np.unique(mixed[2]).tolist() == [0, 2]


@functools.cache
def a_step():
  return take_step(
    make_method(auxiliary_weight=0.0, min_confidence=0.0, bank_momentum=0.9), make_batch()
  )


@pytest.mark.slow
def test_the_loss_is_the_sum_of_its_terms_and_the_first_average_a_copy():
  _, after, metrics = a_step()
  terms = [metrics[f"loss_{name}"] for name in ("supervised", "labeled", "unlabeled")]
  np.testing.assert_allclose(metrics["loss"], sum(terms), rtol=1e-6)
  assert all(value > 0 for value in terms) and metrics["kept_fraction"] > 0
  jax.tree.map(
    np.testing.assert_array_equal, after.nets["student"].params, after.nets["teacher"].params
  )


@pytest.mark.slow
def test_only_the_supervised_loss_reaches_the_second_head():
  before, after, _ = a_step()  # with no weight on it
  moved = jax.tree.map(
    lambda old, new: np.any(old != new), before.nets["student"].params, after.nets["student"].params
  )
  assert not any(jax.tree.leaves(moved["auxiliary"])) and any(jax.tree.leaves(moved["head"]))


def test_the_bank_forgets_a_class_that_never_comes():
  before, after, metrics = a_step()
  bank, memory = before.memory["confidence"], after.memory["confidence"]
  np.testing.assert_allclose(memory[K - 1], 0.9 * bank[K - 1], rtol=1e-6)  # no label is K - 1
  assert (memory[: K - 1] > 0.9 * bank[: K - 1]).all()
  np.testing.assert_allclose(metrics["class_confidence_least"], memory.min())


def test_with_no_confident_pixel_the_teacher_teaches_nothing():
  _, _, metrics = take_step(make_method(min_confidence=1.0), make_batch())
  assert metrics["loss_unlabeled"] == metrics["loss_labeled"] == metrics["kept_fraction"] == 0
  assert metrics["loss_supervised"] > 0


def test_the_pseudo_label_shown_is_the_first_image_s_and_inside_the_box_it_is_not_kept():
  method, batch = make_method(min_confidence=0.0), make_batch()
  state = method.init(jax.random.key(0))
  panels, kept = jax.jit(method.show)(state, batch, method.draw(jax.random.key(1), batch))
  weak, second, box, mixed, label = (panel.values for panel in panels)
  inside = box > 0
  assert inside.any() and kept.any() and not (kept & inside).any()
  np.testing.assert_array_equal(mixed, np.where(inside[..., None], second, weak))
  np.testing.assert_array_equal(weak, batch["unlabeled"]["weak"])
  np.testing.assert_allclose(label.sum(-1), 1, rtol=1e-5)


def test_the_auxiliary_head_drops_channels_only_with_a_key():
  head = heads.auxiliary(6, K, features=40, dropout=0.5)
  params, stats = head.init(jax.random.key(0))
  features = jax.random.normal(jax.random.key(1), (2, 5, 5, 6))
  run = functools.partial(head.apply, params, stats, features)
  without, moved = run(train=True)
  first, second = (run(train=True, dropout=jax.random.key(seed))[0] for seed in (2, 3))
  assert without.shape == (2, 5, 5, K) and np.any(first != without) and np.any(first != second)
  assert any(
    np.any(old != new)
    for old, new in zip(jax.tree.leaves(stats), jax.tree.leaves(moved), strict=True)
  )
  np.testing.assert_array_equal(run(train=False, dropout=jax.random.key(2))[0], run(train=False)[0])


def test_bad_options_are_told_all_at_once():
  with pytest.raises(checks.InputError) as error:
    make_method(
      min_confidence=1.5, gamma=-1.0, paste_draws=0, paste_classes=(2, K), region_area=-0.1
    )
  for part in (
    "min_confidence: got 1.5",
    "gamma: got -1.0",
    "paste_draws: got 0",
    f"some of 0..{K - 1}",
    "region_area",
  ):
    assert part in str(error.value)
