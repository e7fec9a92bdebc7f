"""Predictions remembered over crops and mirrors, and the two methods that compare a network with
itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from pseudoseg_jax import checks, optim
from pseudoseg_jax.contract import IGNORE_LABEL, Network, Task
from pseudoseg_jax.data import geometry
from pseudoseg_jax.methods import pi_model, temporal_ensembling
from pseudoseg_jax.ops import losses, memory

K, GRID, SIZE = 3, (12, 16), (40, 40)


def field(y, x):
  """Class probabilities that are linear in the position within the image, each of its axes 0..1."""
  return np.stack([0.1 + 0.5 * y, 0.2 + 0.3 * x, 0.7 - 0.5 * y - 0.3 * x], axis=-1).astype(
    np.float32
  )


def centres(size):
  return np.meshgrid(*((np.arange(length) + 0.5) / length for length in size), indexing="ij")


def make_crop(size, scale, offset, flip, convention):
  """A view of an image [*size] that shows the field: values, valid, flip, window, each with a batch
  axis of one.

  Padding holds 1e6, which must be seen nowhere.
  """
  draws = geometry.Draws(tf.constant(flip), tf.constant(scale, tf.float64), tf.constant(offset))
  view = geometry.crop(tf.constant(255 * field(*centres(size))), None, draws, SIZE, convention)
  values = tf.where(view.valid[..., tf.newaxis], view.rgb, 1e6)
  return tuple(
    jnp.asarray(part)[None]
    for part in (values.numpy(), view.valid.numpy(), flip, view.window.numpy())
  )


# Size of the image, scale, offset, mirrored, convention: larger and smaller than the crop, which is
# then padded, with other aspect ratios. Scales are those at which the views themselves are exact:
# at most 1, and 1 with antialiasing.
CROPS = [
  ((240, 320), 0.25, (20, 0), False, "opencv"),
  ((240, 320), 0.25, (7, 33), True, "opencv"),
  ((60, 100), 0.5, (0, 10), True, "opencv"),
  ((100, 70), 1.0, (61, 31), True, "opencv"),  # one pixel more than fits, as CPS draws
  ((30, 26), 1.0, (0, 0), False, "tensorflow"),
  ((30, 70), 1.0, (0, 20), True, "tensorflow"),
]


@pytest.fixture(scope="module")
def through_cells():
  return jax.jit(memory.crop_to_cells, static_argnums=4), jax.jit(
    memory.cells_to_crop, static_argnums=4
  )


@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_the_cells_seen_in_a_crop_hold_the_field_at_their_centres(crop, through_cells):
  values, valid, flip, window = make_crop(*crop)
  cells, seen = through_cells[0](values, valid, flip, window, GRID)
  y, x = centres(GRID)
  np.testing.assert_allclose(cells[0][seen[0]], field(y, x)[seen[0]], rtol=0, atol=2e-5)
  assert np.all(cells[0][~seen[0]] == 0)

  # Seen are the centres between those of the outermost valid pixels, in both axes.
  def between(at, start, extent, pixels):
    half = extent / pixels / 2
    return (at >= max(start, 0) + half) & (at <= min(start + extent, 1) - half)

  top, left, height, width = np.asarray(window[0])
  np.testing.assert_array_equal(
    seen[0], between(y, top, height, SIZE[0]) & between(x, left, width, SIZE[1])
  )
  assert np.mean(seen) > 0.1


@pytest.mark.parametrize("later", CROPS, ids=str)
def test_a_linear_field_comes_back_exact_in_every_other_crop(later, through_cells):
  wanted, valid, flip, window = make_crop(*later)
  top, left, height, width = np.asarray(window[0])
  y, x = centres(SIZE)
  y, x = top + height * y, left + width * (x[:, ::-1] if flip else x)
  # In the outer half cell of the image the outermost cells are repeated.
  inner = (np.abs(y - 0.5) < 0.5 - 0.5 / GRID[0]) & (np.abs(x - 0.5) < 0.5 - 0.5 / GRID[1])
  for earlier in CROPS:
    cells, seen = through_cells[0](*make_crop(*earlier), GRID)
    got, known = through_cells[1](cells, seen, flip, window, SIZE)
    assert not np.any(known & ~valid)
    error = np.where(known[0], np.max(np.abs(got[0] - wanted[0]), axis=-1), 0)
    assert np.max(error[inner]) < 3e-5
    assert np.max(error) < 0.5 * 0.5 / GRID[0] + 0.3 * 0.5 / GRID[1]
    if earlier == later:
      assert np.sum(known) > 0.6 * np.sum(valid)


def test_a_mirrored_crop_is_the_crop_to_the_bit():
  values = jax.random.uniform(jax.random.key(0), (1, 8, 8, K))
  valid, window = jnp.ones((1, 8, 8), bool), jnp.array([[0.0, 0, 1, 1]])
  plain, mirrored = jnp.array([False]), jnp.array([True])
  cells, seen = memory.crop_to_cells(values[:, :, ::-1], valid, mirrored, window, (8, 8))
  np.testing.assert_array_equal(cells, values)
  for flip, want in ((plain, values), (mirrored, values[:, :, ::-1])):
    got, known = memory.cells_to_crop(cells, seen, flip, window, (8, 8))
    np.testing.assert_array_equal(got, want)
    assert np.all(known)


def test_each_cell_is_bias_corrected_by_its_own_visits():
  decay, rows, ids = 0.6, jnp.zeros((1, 1, 3, K)), jnp.array([0])
  rng = np.random.default_rng(0)
  # Three visits of three cells.
  seen = np.array([[True, True, False], [True, False, False], [True, True, False]])
  said = rng.dirichlet(np.ones(K), (3, 3)).astype(np.float32)
  for visit in range(3):
    rows = memory.visited(rows, ids, said[visit][None, None], seen[visit][None, None], decay=decay)
  cells, known = memory.unbiased(rows)
  for cell in range(2):
    average, visits = np.zeros(K), said[seen[:, cell], cell]
    for z in visits:
      average = decay * average + (1 - decay) * z
    np.testing.assert_allclose(cells[0, 0, cell], average / (1 - decay ** len(visits)), rtol=1e-6)
  np.testing.assert_array_equal(known, [[[True, True, False]]])
  assert np.all(cells[0, 0, 2] == 0)


def test_an_image_twice_in_a_batch_is_visited_twice_in_order():
  stored, ids = memory.empty(4, 2, (1, 1)), jnp.array([1, 3, 1])
  said = jnp.array([[1.0, 0], [0.5, 0.5], [0, 1]])[:, None, None]
  rows = memory.visited(
    memory.read(stored, ids, 2), ids, said, jnp.ones((3, 1, 1), bool), decay=0.5
  )
  stored = memory.write(stored, ids, rows)
  np.testing.assert_array_equal(stored[0], [[0, 0], [0.25, 0.5], [0, 0], [0.25, 0.25]])


def test_half_precision_keeps_the_average_through_many_visits():
  said, seen = (
    jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(K), (1, 2, 2)), jnp.float32),
    jnp.ones((1, 2, 2), bool),
  )
  ids = jnp.array([0])

  def visit(_, stored):
    return memory.write(
      stored, ids, memory.visited(memory.read(stored, ids, K), ids, said, seen, decay=0.9)
    )

  stored = jax.lax.fori_loop(0, 200, visit, memory.empty(1, K, (2, 2)))
  cells, _ = memory.unbiased(memory.read(stored, ids, K))
  np.testing.assert_allclose(cells, said, rtol=0, atol=2 * 2**-12 / (1 - 0.9))


def test_the_memory_of_the_usual_data_sets_is_bounded_by_the_grid():
  assert memory.num_bytes(10582, 21, (64, 64)) == 2 * 64 * 64 * 10582 * 21  # VOC: 1.7 GiB
  assert memory.num_bytes(2975, 19, (64, 64)) < 0.45 * 2**30  # Cityscapes
  stored = memory.empty(0, 5, (4, 6))  # nothing to learn from: a memory all the same
  assert stored.nbytes == memory.num_bytes(0, 5, (4, 6)) == memory.num_bytes(1, 5, (4, 6))


def make_task(num_unlabeled=4):
  """A linear classifier of pixels. At learning rate 1 it moves by minus its gradient; the
  supervised loss has none.
  """

  def apply(params, batch_stats, images, *, train, groups=1, dropout=None):
    return images @ params["kernel"], batch_stats

  network = Network(lambda key: ({"kernel": jax.random.normal(key, (3, K))}, {}), apply)
  criterion = lambda logits, label: 0.0 * jnp.sum(logits)
  return Task(K, 10, network, optim.sgd(lambda step: 1.0, momentum=0.0), criterion, num_unlabeled)


def make_batch(seed, strong_views):
  rng = np.random.default_rng(seed)
  images = lambda *lead: jnp.asarray(rng.normal(size=(2, *lead, 33, 33, 3)), jnp.float32)
  valid = jnp.ones((2, 33, 33), bool).at[1].set(False)  # the second crop is padding
  place = {
    "id": jnp.array([2, 0]),
    "flip": jnp.array([False, True]),
    "window": jnp.array([[0.0, 0, 1, 1], [0.1, 0.2, 0.5, 0.5]]),
  }
  return {
    "labeled": {"image": images(), "label": jnp.full((2, 33, 33), IGNORE_LABEL), "valid": valid},
    "unlabeled": {"weak": images(), "strong": images(strong_views), "valid": valid} | place,
  }


def test_nothing_is_learned_from_a_first_visit_and_the_second_has_the_first_as_target():
  method = temporal_ensembling.temporal_ensembling(
    make_task(), weight=1.0, rampup_fraction=0.0, grid=(33, 33)
  )
  first, update = method.init(jax.random.key(0)), jax.jit(method.update)
  batch = make_batch(0, 1)
  draws = method.draw(jax.random.key(1), batch)
  second, metrics = update(first, batch, draws)
  assert metrics["loss_consistency"] == 0 and metrics["known_fraction"] == 0
  jax.tree.map(
    np.testing.assert_array_equal, first.nets["student"].params, second.nets["student"].params
  )
  # Only the image that was shown is remembered: not the one that was all padding, nor those not in
  # the batch.
  assert np.flatnonzero(np.any(second.memory["predictions"] != 0, axis=(0, 2))).tolist() == [2]

  # The same crop again, by a network that has not moved: the target is what it says (to float16),
  # and no gradient is left.
  panels, kept = method.show(second, batch, draws)
  _, prediction, target = (panel.values for panel in panels)
  np.testing.assert_allclose(target[0], prediction[0], rtol=0, atol=2e-3)
  assert np.all(kept[0]) and not np.any(kept[1])
  # The other way round it is a target, and something is learned; padding is known nowhere.
  mirrored = batch | {"unlabeled": batch["unlabeled"] | {"flip": jnp.array([True, True])}}
  third, metrics = update(second, mirrored, draws)
  assert metrics["loss_consistency"] > 0 and metrics["known_fraction"] == 1
  np.testing.assert_allclose(
    metrics["loss_consistency"],
    jnp.mean(losses.squared_distance(prediction[0], target[0, :, ::-1])),
    rtol=1e-3,
  )
  assert np.any(third.nets["student"].params["kernel"] != second.nets["student"].params["kernel"])


def test_a_step_copies_nothing_of_the_memory():
  method = temporal_ensembling.temporal_ensembling(make_task(num_unlabeled=100_000), grid=(8, 8))
  state, batch = jax.eval_shape(method.init, jax.random.key(0)), make_batch(0, 1)
  step = jax.jit(method.step, donate_argnums=0).lower(state, batch, jax.random.key(1)).compile()
  used = step.memory_analysis()
  assert used.alias_size_in_bytes >= memory.num_bytes(100_000, K, (8, 8)) > 30e6
  assert used.temp_size_in_bytes < 3e6


@pytest.mark.parametrize("strong_views", [1, 2])
def test_the_pi_model_learns_from_both_passes_alike(strong_views):
  method = pi_model.pi_model(
    make_task(), weight=1.0, rampup_fraction=0.0, strong_views=strong_views
  )
  state, update = method.init(jax.random.key(0)), jax.jit(method.update)
  batch = make_batch(0, strong_views)
  unlabeled, draws = batch["unlabeled"], method.draw(jax.random.key(1), batch)
  panels, _ = method.show(state, batch, draws)
  one, other = (panel.values for panel in panels[:2])
  strong = jnp.moveaxis(unlabeled["strong"], 1, 0)
  np.testing.assert_array_equal(
    (one, other), strong if strong_views == 2 else (unlabeled["weak"], strong[0])
  )

  after, metrics = update(state, batch, draws)
  kernel = state.nets["student"].params["kernel"]
  valid = jnp.broadcast_to(unlabeled["valid"][..., None], one.shape[:3] + (K,))

  def by_hand(kernel, target_kernel):
    """Over the valid pixels of labeled and unlabeled images; both passes are of one mind on the
    labeled ones, without dropout.
    """
    squares = jnp.square(jax.nn.softmax(one @ kernel) - jax.nn.softmax(other @ target_kernel))
    return jnp.sum(jnp.where(valid, squares, 0)) / jnp.sum(valid) / 2

  loss, gradients = jax.value_and_grad(by_hand, argnums=(0, 1))(kernel, kernel)
  np.testing.assert_allclose(metrics["loss_consistency"], loss, rtol=1e-5)
  np.testing.assert_allclose(
    kernel - after.nets["student"].params["kernel"], sum(gradients), rtol=0, atol=1e-5
  )
  assert all(np.max(np.abs(gradient)) > 1e-3 for gradient in gradients)


def test_bad_options_are_told_together():
  with pytest.raises(checks.InputError, match=r"(?s)rampup_fraction: got 2.*strong_views: got 3"):
    pi_model.pi_model(make_task(), strong_views=3, rampup_fraction=2)
  with pytest.raises(
    checks.InputError, match=r"(?s)decay: got 1.0.*grid: got \(64, 0\).*strong_views: got 2"
  ):
    temporal_ensembling.temporal_ensembling(make_task(), strong_views=2, decay=1.0, grid=(64, 0))
