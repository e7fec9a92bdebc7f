"""Learning Pseudo Labels: losses among the classes of an image, the running evaluation, and whom
the two networks learn from.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import learn_pseudo
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import class_aware, losses, schedules

K, SIZE, BATCH = 4, 17, 3
VOID = jnp.full((BATCH, SIZE, SIZE), IGNORE_LABEL)


def summed(logits, image_label, label):
  return class_aware.cross_entropy(logits, image_label, label).sum()


def test_a_pixel_is_told_apart_from_the_classes_of_its_image_alone():
  logits, image_label = jnp.log(jnp.array([[[[1.0, 3.0, 400.0]]]])), jnp.array([[1, 1, 0]])
  np.testing.assert_allclose(
    class_aware.softmax(logits, image_label)[0, 0, 0], [0.25, 0.75, 0], atol=1e-5
  )
  assert class_aware.best_class(logits, image_label).item() == 1
  value, gradient = jax.value_and_grad(summed)(logits, image_label, jnp.array([[[0]]]))
  np.testing.assert_allclose(value, np.log(4), atol=1e-4)
  np.testing.assert_allclose(gradient[0, 0, 0, :2], [-0.75, 0.75], atol=1e-4)
  assert gradient[0, 0, 0, 2] == 0


def test_extreme_logits_give_finite_values_and_gradients():
  rows = jnp.array([[1e4, -1e4, 1e4], [-1e4, -1e4, 1e4], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]])
  logits = rows[None, None]
  for image_label in ([[1, 1, 0]], [[1, 1, 1]], [[0, 0, 0]]):
    for label in range(3):
      value, gradient = jax.value_and_grad(summed)(
        logits, jnp.array(image_label), jnp.full((1, 1, 4), label)
      )
      assert np.isfinite(value) and np.isfinite(gradient).all()
  values = class_aware.cross_entropy(logits, jnp.array([[1, 1, 0]]), jnp.zeros((1, 1, 4), int))[
    0, 0
  ]
  # The least probability there is, for a class far behind another, and where 1e-5 outweighs all
  # classes in the image.
  np.testing.assert_allclose(values, [0, -np.log(1e-5), -np.log(1e-5), np.log(2)], atol=2e-5)
  probabilities = class_aware.softmax(logits, jnp.array([[1, 1, 0]]))[0, 0]
  np.testing.assert_allclose(
    probabilities, [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0.5, 0.5, 0]], atol=1e-5
  )


def test_the_best_class_is_one_of_the_image_and_of_equal_ones_the_first():
  logits = jnp.array([[[[9.0, -200.0, -150.0, -150.0]]]])
  best = lambda *image_label: class_aware.best_class(logits, jnp.array([image_label])).item()
  assert best(0, 1, 1, 1) == 2  # all their exponentials are 0 in float32
  assert best(0, 1, 0, 0) == 1
  assert best(0, 0, 0, 0) == 0


def test_true_labels_stand_in_for_a_whole_image_or_not_at_all():
  logits = jnp.broadcast_to(jnp.array([0.0, 2.0, 1.0]), (2, 1, 3, 3))
  label = jnp.array([[[2, IGNORE_LABEL, 0]], [[IGNORE_LABEL] * 3]])
  found = learn_pseudo.pseudo_label(logits, jnp.array([[1, 1, 1], [1, 0, 1]]), label)
  assert found.tolist() == [[[2, IGNORE_LABEL, 0]], [[2, 2, 2]]]


def test_running_counts_by_hand():
  memory = {"count_truth": jnp.ones(3), "count_predicted": jnp.zeros(3), "count_hit": jnp.zeros(3)}
  label, predicted = jnp.array([[[0, 0, 1, IGNORE_LABEL]]]), jnp.array([[[0, 1, 1, 1]]])
  memory = learn_pseudo.evaluated(memory, label, predicted, 0.5)
  assert {name: count.tolist() for name, count in memory.items()} == {
    "count_truth": [2.5, 1.5, 0.5],
    "count_predicted": [1, 3, 0],  # the pixel without a label looks wrong
    "count_hit": [1, 1, 0],
  }
  np.testing.assert_allclose(learn_pseudo.running_iou(memory), [1 / 2.5, 1 / 3.5, 0], rtol=1e-6)
  nothing = dict.fromkeys(memory, jnp.zeros(3))
  assert learn_pseudo.running_iou(nothing).tolist() == [0, 0, 0]


def test_the_weakest_class_of_an_image_says_how_much_it_counts():
  iou = jnp.array([0.9, 0.5, 0.0, 0.8])
  image_label = jnp.array([[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
  weight = learn_pseudo.sample_weight(iou, image_label, power=2.0)
  # What was never hit is trusted.
  np.testing.assert_allclose(weight, [0.25, 0.64, 0.81, 1, 1], rtol=1e-6)
  weight = learn_pseudo.sample_weight(iou, image_label, power=2.0, trust_unseen=False)
  np.testing.assert_allclose(weight, [0.25, 0.64, 0, 0, 1], rtol=1e-6)


def test_of_equal_greatest_logits_the_first_is_pulled():
  logits = jnp.array([[[[1.0], [3.0]], [[3.0], [2.0]]]])
  value, gradient = jax.value_and_grad(lambda logits: learn_pseudo.greatest_logits(logits).sum())(
    logits
  )
  assert value == 3 and gradient.ravel().tolist() == [0, 1, 0, 0]


def make_method(network=None, rate=lambda step: 1.0, **options):
  network = network or make_network("tiny", num_classes=K, width=4)
  return learn_pseudo.learn_pseudo(
    Task(K, 10, network, optim.sgd(rate, momentum=0.0), losses.cross_entropy_mean), **options
  )


def make_batch(known_label=VOID):
  rng = np.random.default_rng(0)
  images = lambda: jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  label = jnp.asarray(rng.integers(0, K, size=(BATCH, SIZE, SIZE)), jnp.int32)
  classes = jnp.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], jnp.float32)
  unlabeled = {
    "weak": images(),
    "valid": jnp.ones((BATCH, SIZE, SIZE), bool),
    "label": known_label,
    "image_label": classes,
  }
  return {
    "labeled": {"image": images(), "label": label, "image_label": jnp.ones((BATCH, K))},
    "unlabeled": unlabeled,
  }


@functools.cache
def default_step():
  method = make_method()
  return method, jax.jit(method.update)


def stepped(batch, memory=None):
  """A step of the method with its defaults, at learning rate 1."""
  method, update = default_step()
  state = method.init(jax.random.key(0))
  state = state if memory is None else state.replace(memory=memory)
  return state, *update(state, batch, method.draw(jax.random.key(1), batch))


def moved(before, after, role):
  changed = jax.tree.map(
    lambda old, new: bool(np.any(old != new)), before.nets[role].params, after.nets[role].params
  )
  return any(jax.tree.leaves(changed))


def test_the_loss_is_the_sum_of_its_terms():
  _, _, metrics = stepped(make_batch())
  terms = [
    metrics[f"loss_{name}"] for name in ("supervised", "pseudo", "classification", "progressive")
  ]
  np.testing.assert_allclose(metrics["loss"], sum(terms), rtol=1e-6)
  assert all(value > 0 for value in terms)


def test_pseudo_never_sees_the_labels_of_the_labeled_images_but_those_among_the_unlabeled_ones():
  batch = make_batch()
  other = batch | {"labeled": batch["labeled"] | {"label": (batch["labeled"]["label"] + 1) % K}}
  known = batch | {"unlabeled": batch["unlabeled"] | {"label": VOID.at[0].set(0)}}
  (before, after, _), (_, after_other, _), (_, after_known, _) = (
    stepped(each) for each in (batch, other, known)
  )
  assert moved(before, after, "pseudo")
  assert not moved(after, after_other, "pseudo") and moved(after, after_other, "hybrid")
  assert moved(after, after_known, "pseudo")


def test_an_image_labeled_void_throughout_is_an_unlabeled_one_and_a_batch_of_them_no_nan():
  void = make_batch()
  void["labeled"]["label"] = VOID
  _, _, metrics = stepped(void)
  assert metrics["loss_supervised"] == 0 and all(np.isfinite(value) for value in metrics.values())


def test_hybrid_learns_the_more_from_pseudo_the_better_pseudo_does():
  def told(hits):
    # The step's own batch adds a few hundred pixels to these.
    many = {
      "count_truth": jnp.full(K, 1e6),
      "count_predicted": jnp.full(K, 1e6),
      "count_hit": jnp.full(K, hits * 1e6),
    }
    return stepped(make_batch(), many)[2]

  poor, good = told(2 / 3), told(18 / 19)  # IoU 1/2 and 9/10
  np.testing.assert_allclose(
    [poor["sample_weight"], good["sample_weight"]], [0.5**8, 0.9**8], rtol=0.01
  )
  np.testing.assert_allclose(good["loss_progressive"] / poor["loss_progressive"], 1.8**8, rtol=0.02)
  np.testing.assert_allclose(good["running_iou"], 0.9, rtol=0.01)
  for name in ("loss_supervised", "loss_pseudo", "loss_classification"):
    assert good[name] == poor[name]


@pytest.mark.slow
@pytest.mark.parametrize("background, counted", [(True, K - 1), (False, K)])
def test_the_image_level_loss_leaves_the_background_out(background, counted):
  said = jnp.asarray(np.random.default_rng(1).normal(size=(2 * BATCH, SIZE, SIZE, K)), jnp.float32)
  network = make_network("tiny", num_classes=K, width=4)
  network = network._replace(
    apply=lambda params, batch_stats, images, **keywords: (said, batch_stats)
  )
  method = make_method(network, background=background)
  batch = make_batch()
  truth = np.concatenate([batch[half]["image_label"] for half in ("labeled", "unlabeled")])[
    :, -counted:
  ]
  probability = 1 / (1 + np.exp(-np.max(said, axis=(1, 2))[:, -counted:]))
  want = -np.mean(np.log(np.where(truth > 0, probability, 1 - probability)))
  _, metrics = method.step(method.init(jax.random.key(0)), batch, jax.random.key(1))
  np.testing.assert_allclose(metrics["loss_classification"], want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [False, True])
def test_the_rate_of_pseudo_stays_unless_it_shall_decay(decay):
  rate = functools.partial(schedules.poly, base=0.1, total_steps=10)
  method, batch = make_method(rate=rate, decay_pseudo_rate=decay), make_batch()
  # The end of the schedule, where the rate is 0.
  state = method.init(jax.random.key(0)).replace(step=jnp.array(10))
  after, _ = jax.jit(method.update)(state, batch, method.draw(jax.random.key(1), batch))
  assert not moved(state, after, "hybrid") and moved(state, after, "pseudo") == (not decay)


def test_options_that_cannot_be_are_told_together():
  with pytest.raises(checks.InputError) as told:
    make_method(rate=lambda step: 0.1 * step, score_momentum=1.0, score_power=-1.0)
  assert all(
    name in str(told.value)
    for name in ("score_momentum", "score_power", "decay_pseudo_rate", "warmup_steps")
  )
