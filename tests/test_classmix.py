"""ClassMix: what is chosen, what is pasted, what the options do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import classmix
from pseudoseg_jax.models.table import make_network
from pseudoseg_jax.ops import losses, mixing

K, SIZE, BATCH = 4, 33, 3


@functools.cache
def make_method(in_channels=3, **options):
  network = make_network("tiny", num_classes=K, width=4, in_channels=in_channels)
  task = Task(K, 10, network, optim.sgd(lambda step: 0.1), losses.cross_entropy_mean)
  return classmix.classmix(task, **options)


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  images = lambda: jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 3)), jnp.float32)
  label = jnp.asarray(rng.integers(0, K, size=(BATCH, SIZE, SIZE)), jnp.int32)
  return {"labeled": {"image": images(), "label": label}, "unlabeled": {"weak": images()}}


def test_half_of_the_classes_that_occur_are_chosen():
  label = jnp.array([[[0, 2, 3]], [[1, 1, IGNORE_LABEL]], [[0, 1, 1]]])
  uniform = jnp.array([[0.9, 0.0, 0.2, 0.3], [0.0, 0.1, 0.0, 0.0], [0.5, 0.4, 0.0, 0.0]])
  chosen = mixing.choose_classes(uniform, label)
  # One of three, never the class that does not occur; none of one; one of two.
  np.testing.assert_array_equal(chosen, [[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])


def test_every_class_is_chosen_as_often_as_every_other():
  label = jnp.tile(jnp.array([[[0, 1, 2, 4]]]), (4000, 1, 1))
  chosen = mixing.choose_classes(jax.random.uniform(jax.random.key(0), (4000, 5)), label)
  np.testing.assert_array_equal(chosen.sum(-1), 2)
  np.testing.assert_allclose(chosen.mean(0), [0.5, 0.5, 0.5, 0, 0.5], atol=0.03)


def test_an_image_is_pasted_on_the_next_and_the_last_on_the_first():
  images = jnp.arange(3.0).reshape(3, 1, 1) * jnp.ones((3, 1, 2))
  got = classmix.paste_on_next(jnp.array([[[True, False]]] * 3), images)
  np.testing.assert_array_equal(got[:, 0], [[0, 1], [1, 2], [2, 0]])


def test_what_the_student_sees_is_pasted_where_its_label_is():
  method = make_method()
  state, batch = method.init(jax.random.key(0)), make_batch()
  panels, _ = jax.jit(method.show)(state, batch, method.draw(jax.random.key(1), batch))
  weak, teacher, here, mixed = (panel.values for panel in panels)
  here = here.astype(bool)
  np.testing.assert_array_equal(mixed, jnp.where(here[..., None], weak, jnp.roll(weak, -1, axis=0)))
  for image, label in zip(here, jnp.argmax(teacher, axis=-1), strict=True):
    pasted, left = set(np.unique(label[image])), set(np.unique(label[~image]))
    # Whole classes, half of them.
    assert not pasted & left and len(pasted) == len(pasted | left) // 2


@pytest.mark.parametrize("size", [(32, 32), (33, 21), (5, 9)])
def test_cut_boxes_have_half_the_area_and_lie_inside(size):
  masks = mixing.cut_masks(jax.random.uniform(jax.random.key(0), (300, 3)), size)
  # The height is rounded, at most half a row of at most the whole width; narrow boxes of odd images
  # are as high as the image.
  outside = np.prod(size) - np.sum(~masks, axis=(1, 2))
  assert np.abs(outside - np.prod(size) / 2).max() <= size[1] / 2 + size[0] / 2
  assert np.abs(outside.mean() / np.prod(size) - 0.5) < 0.05
  for extreme in (0.0, 1 - 2**-23):
    mask = mixing.cut_masks(jnp.full((1, 3), extreme), size)[0]
    assert 0 < mask.sum() < mask.size


def test_cow_masks_hold_about_half_of_the_image_in_blobs():
  masks = mixing.cow_masks(mixing.draw_cow(jax.random.key(0), 20, (64, 48)))
  assert masks.shape == (20, 64, 48) and np.abs(np.mean(masks) - 0.5) < 0.1
  assert np.mean(masks[:, :, 1:] != masks[:, :, :-1]) < 0.05  # neighbors are nearly always alike
  assert len({mask.tobytes() for mask in np.asarray(masks)}) == 20


@pytest.mark.parametrize("options", [{"color_jitter": True}, {"blur": True}])
def test_jitter_and_blur_change_the_mixed_image_of_some_batches_and_no_label(options):
  method, plain = make_method(**options), make_method()
  state, batch = method.init(jax.random.key(0)), make_batch()
  show = jax.jit(method.show)
  draws = method.draw(jax.random.key(1), batch)
  chance = "jitters" if "color_jitter" in options else "blurs"
  off, on = (show(state, batch, draws | {chance: jnp.float32(value)})[0] for value in (0.99, 0.0))
  want = jax.jit(plain.show)(state, batch, draws)[0]
  for got in (off, on):
    np.testing.assert_array_equal(got[1].values, want[1].values)
    np.testing.assert_array_equal(got[2].values, want[2].values)
  np.testing.assert_array_equal(off[3].values, want[3].values)
  assert np.abs(on[3].values - want[3].values).mean() > 0.01


@pytest.mark.slow
def test_jittered_images_stay_in_the_range_of_images():
  method = make_method(color_jitter=True)
  state, batch = method.init(jax.random.key(0)), make_batch()
  draws = method.draw(jax.random.key(1), batch) | {"jitters": jnp.float32(0.0)}
  mixed = method.show(state, batch, draws)[0][3].values
  rgb = mixed * np.array(Task._field_defaults["std"]) + np.array(Task._field_defaults["mean"])
  assert -1e-5 < rgb.min() and rgb.max() < 1 + 1e-5


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_no_gradient_reaches_the_teacher(loss):
  logits = jax.random.normal(jax.random.key(0), (2, 3, 3, K))
  gradient = jax.grad(lambda teacher: classmix.consistency(loss, 2 * logits, teacher).sum())(
    logits + 1
  )
  np.testing.assert_array_equal(gradient, 0)


def test_the_first_step_makes_the_teacher_the_student():
  method = make_method(weight=2.0)
  batch = make_batch()
  state, metrics = jax.jit(method.update)(
    method.init(jax.random.key(0)), batch, method.draw(jax.random.key(1), batch)
  )
  jax.tree.map(
    np.testing.assert_array_equal, state.nets["teacher"].params, state.nets["student"].params
  )
  assert list(method.predictors) == ["student", "teacher"]
  np.testing.assert_allclose(
    metrics["loss"], metrics["loss_supervised"] + metrics["loss_unsupervised"], rtol=1e-6
  )


def test_options_that_cannot_work_are_told_together():
  with pytest.raises(checks.InputError) as error:
    make_method(
      in_channels=4,
      mask="clas",
      loss="ce",
      weight_by="image",
      min_confidence=2.0,
      color_jitter=True,
    )
  for part in (
    "did you mean 'class'?",
    "loss: got 'ce'",
    "weight_by",
    "min_confidence: got 2.0",
    "images of 4 channels",
  ):
    assert part in str(error.value)


def test_one_image_cannot_be_mixed():
  batch = {"unlabeled": {"weak": make_batch()["unlabeled"]["weak"][:1]}}
  with pytest.raises(checks.InputError, match="batch_size_global.unlabeled"):
    make_method().draw(jax.random.key(0), batch)
