"""What every method must hold, in one test body for all of them; a new method joins by standing in
the table.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import optim
from pseudoseg_jax.config import defaults_of
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.data import boxes, pipeline, synthetic, tags
from pseudoseg_jax.data.geometry import Geometry
from pseudoseg_jax.engine import loop, mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints
from pseudoseg_jax.methods import mean_teacher
from pseudoseg_jax.methods.table import METHODS
from pseudoseg_jax.models.table import NETWORKS, make_network
from pseudoseg_jax.ops import losses, schedules
from pseudoseg_jax.ops.boxes import box_planes

K, SIZE, BATCH, SEED, NUM_UNLABELED = len(synthetic.CLASSES), 33, 8, 3, 32
OTHER_CLASSES = (4,)  # of a second domain, for methods that learn several
# Their parameters have the scope of the module, so that all tests of a case follow each other and
# what it compiled can be let go of.
CASES = {name: {} for name in METHODS} | {
  f"mean_teacher:{convention}": options
  for convention, options in mean_teacher.CONVENTIONS.items()
  if convention != "torchsemiseg"
}
CASES["pseudoseg:image_labels"] = {"image_labels": True}
# Images of 33 pixels are too small for more.
CASES["gct"] = {"detector_width": 8, "detector_stages": 2}
CASES["learn_pseudo:no_background"] = {
  "background": False,
  "trust_unseen": False,
  "decay_pseudo_rate": True,
}
CASES["self_correcting:none"] = {"correction": "none", "background": False}
CASES["self_correcting:convolutional"] = {"correction": "convolutional", "hidden": 8}
CASES["self_correcting:on_labeled"] = {
  "correction": "convolutional",
  "learn_weak": False,
  "detach_primary": False,
}
CASES["self_correcting:em_fixed"] = {"correction": "em_fixed"}
CASES["ael:paper"] = {"on_labeled": False, "min_confidence": 0.0, "paste_power": 1.0}
CASES["cct:image_labels"] = {
  "image_labels": True,
  "decoders": {"vat": 1, "context": 1, "object": 2},
  "distance": "kl",
  "bootstrapped": True,
}
CASES["classmix:cow"] = {"mask": "cow", "loss": "mse", "color_jitter": True, "blur": True}
CASES["pi_model:weak_and_strong"] = {"strong_views": 1}
CASES["temporal_ensembling:weak"] = {
  "strong_views": 0,
  "grid": (16, 24),
  "shared_batch_norm": False,
}
CASES["cutmix_seg:cutout"] = {
  "mask": "cutout",
  "area_range": (0.0, 1.0),
  "strong_views": 1,
  "frozen_batch_norm": "backbone",
}
CASES["gct:separate"] = CASES["gct"] | {"shared_batch_norm": False}
CASES["cross_prob:kl"] = {"distance": "kl"}


@functools.cache
def make_method(case, total_steps=20, width=4, weight_factor=1.0, network=None):
  rate = functools.partial(schedules.poly, base=0.05, total_steps=total_steps)
  network = network or make_network("tiny", num_classes=K, width=width)
  task = Task(
    K,
    total_steps,
    network,
    optim.sgd(rate, weight_decay=1e-4),
    losses.cross_entropy_mean,
    NUM_UNLABELED,
    OTHER_CLASSES,
  )
  factory = METHODS[case.split(":")[0]]
  options = defaults_of(factory) | CASES[case]
  if "weight" in options:
    options["weight"] *= weight_factor
  return factory(task, **options)


@functools.cache
def make_mesh(devices):
  return meshes.make_mesh(jax.devices()[:devices])


@functools.cache
def make_step(case, devices):
  return loop.jit_step(make_method(case), make_mesh(devices), SEED)


def make_boxes(rng, most=3):
  """Up to `most` boxes an image, as the pipeline lays them out."""
  corner, extent = rng.uniform(0, 0.6, (BATCH, most, 2)), rng.uniform(0.1, 0.4, (BATCH, most, 2))
  kind = rng.integers(-1, K, size=(BATCH, most, 1))
  return np.where(
    kind < 0, np.array([-1.0, 0, 0, 0, 0]), np.concatenate([kind, corner, corner + extent], -1)
  ).astype(np.float32)


def make_batch(index, needs):
  """A batch as the pipeline lays it out; every fifth label is void, some padding is invalid."""
  rng = np.random.default_rng(index)

  def images(*lead):
    return rng.normal(size=(BATCH, *lead, SIZE, SIZE, 3)).astype(np.float32)

  label = rng.integers(0, K, size=(BATCH, SIZE, SIZE)).astype(np.int32)
  label[:, ::5] = IGNORE_LABEL
  valid = np.ones((BATCH, SIZE, SIZE), bool)
  valid[:, -3:] = False
  batch = {"labeled": {"image": images(), "label": label, "valid": valid}}
  weak_labels = {
    None: dict,
    "image": lambda: {"image_label": rng.integers(0, 2, size=(BATCH, K)).astype(np.float32)},
    "boxes": lambda: {"boxes": make_boxes(rng)},
  }[needs.weak_label]
  batch["labeled"] |= weak_labels()
  for stream, wanted in {"unlabeled": needs.unlabeled, "partner": needs.partner}.items():
    if wanted:
      batch[stream] = {"weak": images(), "valid": valid} | weak_labels()
      if needs.labeled_too:
        batch[stream]["label"] = np.where(np.arange(BATCH)[:, None, None] % 4, IGNORE_LABEL, label)
      if needs.ids:
        corner, extent = rng.uniform(-0.1, 0.4, (BATCH, 2)), rng.uniform(0.4, 0.9, (BATCH, 2))
        batch[stream]["id"] = rng.permutation(NUM_UNLABELED)[:BATCH].astype(np.int32)
        batch[stream]["flip"] = rng.integers(0, 2, BATCH).astype(bool)
        batch[stream]["window"] = np.concatenate([corner, extent], axis=1).astype(np.float32)
      if needs.strong_views:
        batch[stream]["strong"] = images(needs.strong_views)
  if needs.domains:
    other_label = rng.integers(0, OTHER_CLASSES[0], size=label.shape).astype(np.int32)
    batch["labeled_1"] = {"image": images(), "label": other_label, "valid": valid}
    batch["unlabeled_1"] = {"weak": images(), "valid": valid}
  return batch


def run(case, devices, steps, state=None):
  """The state after `steps` (a range) and the metrics of each of them."""
  method, mesh, step = make_method(case), make_mesh(devices), make_step(case, devices)
  state = loop.jit_init(method, mesh, SEED) if state is None else state
  told = []
  for index in steps:
    # Waits for all devices: simulated ones share their threads, and a second step under way may
    # leave the first without.
    state, metrics = jax.block_until_ready(
      step(state, meshes.global_batch(mesh, make_batch(index, method.needs)))
    )
    told.append(jax.device_get(metrics))
  return state, told


def assert_equal_trees(a, b, check=np.testing.assert_array_equal):
  jax.tree.map(check, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def four_steps():
  """Each case's state and metrics after four uninterrupted steps on eight devices, run once."""
  return functools.cache(lambda case: run(case, 8, range(4)))


@pytest.mark.parametrize(
  "case",
  [case if case in METHODS else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
  scope="module",
)
def test_a_step_keeps_the_state_and_compiles_once(case, four_steps):
  method = make_method(case)
  before = loop.abstract_state(method, make_mesh(8))
  state, told = four_steps(case)
  assert jax.tree.structure(before) == jax.tree.structure(state)
  jax.tree.map(
    lambda old, new: (
      (old.shape, old.dtype) == (new.shape, new.dtype) or pytest.fail(f"{old} became {new}")
    ),
    before,
    state,
  )
  assert state.step == 4
  assert make_step(case, 8)._cache_size() == 1
  for metrics in told:
    assert "loss" in metrics and "learning_rate" in metrics
    assert all(np.shape(value) == () and np.isfinite(value) for value in metrics.values())
  for name, predict in method.predictors.items():
    num_classes = (K, *OTHER_CLASSES)[predict.domain]
    images = jnp.zeros([2, SIZE, SIZE, 3 + (K if predict.weak_label else 0)])
    assert jax.eval_shape(predict, state, images).shape == (2, SIZE, SIZE, num_classes), name


@pytest.mark.parametrize("case", METHODS, scope="module")
def test_eight_devices_say_what_one_says(case, four_steps):
  eight, one = four_steps(case), run(case, 1, range(4))
  assert_equal_trees(
    eight[1], one[1], functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
  )
  # Sums are taken in another order: float32 round-off, grown by four steps.
  parameters = [{role: net.params for role, net in state.nets.items()} for state, _ in (eight, one)]
  assert_equal_trees(*parameters, functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-3))


@pytest.mark.parametrize("case", METHODS, scope="module")
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(case, four_steps, tmp_path):
  whole, told = four_steps(case)
  half, _ = run(case, 8, range(2))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(half)
  # The step that follows overwrites the donated state while the save is still under way.
  run(case, 8, range(2, 3), half)
  checkpoints.close()
  restored = Checkpoints(tmp_path).restore(loop.abstract_state(make_method(case), make_mesh(8)))
  resumed, told_after = run(case, 8, range(2, 4), restored)
  assert_equal_trees(whole, resumed)
  assert_equal_trees(told[2:], told_after)


@pytest.mark.parametrize("case", CASES, scope="module")
def test_panels_are_what_their_kinds_say(case):
  method = make_method(case)
  if not method.needs.unlabeled:
    assert method.show is None
    return
  batch = make_batch(0, method.needs)
  draws = jax.eval_shape(lambda: method.draw(jax.random.key(0), batch))
  panels, kept = jax.eval_shape(
    method.show, jax.eval_shape(method.init, jax.random.key(0)), batch, draws
  )
  assert "classes" in [panel.kind for panel in panels]
  assert len({panel.name for panel in panels}) == len(panels)
  assert kept.shape[0] == BATCH and kept.dtype == bool
  for panel in panels:
    last = {"image": (3,), "classes": (K,), "heat": ()}[panel.kind]
    shape = panel.values.shape
    assert len(shape) == 3 + len(last) and shape[0] == BATCH and shape[3:] == last, panel.name


class _Unlabeled:
  """Images whose masks must not be asked for."""

  has_labels = True

  def __init__(self, scenes):
    self.ids, self.image, self.size = scenes.ids, scenes.image, scenes.size
    self.channels, self.dtype = scenes.channels, scenes.dtype

  def __len__(self):
    return len(self.ids)

  def label(self, row):
    raise AssertionError("the mask of an unlabeled image was opened")


def boxes_of(scenes):
  return boxes.pad_boxes(boxes.boxes_of_masks(scenes, synthetic.CLASSES))


def make_batches(needs, scenes, unlabeled, image_labels, unlabeled_boxes, batch_size=BATCH):
  return pipeline.train_batches(
    pipeline.PipelineSpec(
      labeled=scenes,
      unlabeled=unlabeled,
      batch_size_labeled_global=batch_size,
      batch_size_unlabeled_global=batch_size,
      geometry=Geometry((48, 48), scales=(1.0,)),
      needs=needs,
      unlabeled_image_labels=image_labels if needs.weak_label == "image" else None,
      labeled_boxes=boxes_of(scenes) if needs.weak_label == "boxes" else None,
      unlabeled_boxes=unlabeled_boxes if needs.weak_label == "boxes" else None,
      seed=SEED,
    )
  )


@pytest.mark.parametrize("case", CASES, scope="module")
def test_masks_of_unlabeled_images_are_never_opened(case):
  needs = make_method(case).needs
  scenes = synthetic.SyntheticScenes(16, (48, 48))
  batches = make_batches(
    needs, scenes, _Unlabeled(scenes), np.ones((16, K), np.float32), boxes_of(scenes)
  )
  for _ in range(3):
    batch = next(batches)
    assert set(batch) == {"labeled"} | ({"unlabeled"} if needs.unlabeled else set()) | (
      {"partner"} if needs.partner else set()
    )
    for stream in set(batch) - {"labeled"}:
      assert ("label" in batch[stream]) == needs.labeled_too


@pytest.mark.parametrize("case", CASES, scope="module")
def test_a_step_is_a_function_of_state_batch_and_key(case):
  method = make_method(case)
  batch = make_batch(0, method.needs)

  def numbers(seed):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [
      jax.random.key_data(leaf) if is_key(leaf) else leaf
      for leaf in jax.tree.leaves(method.draw(jax.random.key(seed), batch))
    ]

  assert_equal_trees(numbers(1), numbers(1))
  assert all(np.any(a != b) for a, b in zip(numbers(1), numbers(2), strict=True))


@pytest.mark.parametrize("case", CASES, scope="module")
def test_every_training_pass_has_a_key_for_dropout(case):
  passes = []

  def watched(run):
    def call(*args, train, dropout=None, **keywords):
      if train:
        passes.append(dropout is not None)
      return run(*args, train=train, dropout=dropout, **keywords)

    return call

  tiny = make_network("tiny", num_classes=K, width=4)
  method = make_method(
    case, network=tiny._replace(apply=watched(tiny.apply), decode=watched(tiny.decode))
  )
  batch = make_batch(0, method.needs)
  jax.eval_shape(
    method.step, jax.eval_shape(method.init, jax.random.key(0)), batch, jax.random.key(1)
  )
  assert passes and all(passes)


NOTHING_UNLABELED = ("supervised", "ancillary")


# These are quick to compile; the others take minutes together.
QUICK = ("cps", "cutmix_seg", "mean_teacher", "single_pseudo")


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK))
    for case in CASES
    if ":" not in case and case not in NOTHING_UNLABELED
  ],
)
def test_the_factor_of_unlabeled_losses_multiplies_what_is_learnt_without_labels(case):
  """The loss is a straight line over the factor, and not a level one."""
  options = defaults_of(METHODS[case]) | CASES[case]
  # A network of chance is sure of nothing, and its IoUs are low.
  options |= {
    name: value
    for name, value in {"min_confidence": 0.0, "score_power": 1.0}.items()
    if name in options
  }
  network = make_network("tiny", num_classes=K, width=4)
  task = Task(
    K,
    20,
    network,
    optim.sgd(lambda step: 0.05),
    losses.cross_entropy_mean,
    NUM_UNLABELED,
    OTHER_CLASSES,
  )

  # Compiling is what takes the time here.
  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def step(factor, state, batch):
    after, metrics = METHODS[case](
      task._replace(unlabeled_weight=lambda step: factor), **options
    ).step(state, batch, jax.random.key(0))
    return after, metrics["loss"]

  batch = make_batch(7, make_method(case).needs)
  # After one step a teacher is no copy any more, and a memory knows the images.
  state, _ = step(1.0, METHODS[case](task, **options).init(jax.random.key(1)), batch)
  at = [float(step(factor, state, batch)[1]) for factor in (0.0, 1.0, 2.0)]
  assert at[1] - at[0] > 1e-6
  np.testing.assert_allclose(at[2] - at[1], at[1] - at[0], rtol=1e-3, atol=1e-6)


# What a method can meet: heads with dropout or without statistics, as many branches as there are.
# UniMatch's DeepLabv3+ and PixelSSL's PSPNet are of the same make as the first and the third, and
# only the baseline runs on them here.
KINDS = ("deeplabv3plus", "deeplabv3plus_tf", "pspnet", "hrnet")
# Methods that ask for more than logits meet all kinds, the others the one that has dropout.
OF_MAPS = (
  "ael",
  "ancillary",
  "cct",
  "cutmix_seg:cutout",
  "pseudoseg",
  "self_correcting",
  "unimatch",
)
PAIRS = [("supervised", name) for name in NETWORKS if name != "tiny"]
PAIRS += [
  (case, name)
  for case in CASES
  for name in KINDS
  if case in OF_MAPS or (":" not in case and name == "deeplabv3plus_tf")
]
PAIRS += [(case, "deeplabv3plus on efficientnet_lite0") for case in CASES if ":" not in case]
PAIRS += [(case, "pspnet on efficientnet_lite0") for case in OF_MAPS]
PAIRS = list(dict.fromkeys(PAIRS))


@functools.cache
def large_network(name):
  name, _, backbone = name.partition(" on ")
  backbone = backbone or ("hrnet_w18_small_v1" if name == "hrnet" else "")
  return make_network(name, num_classes=K, **({"backbone": backbone} if backbone else {}))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_every_method_traces_on_every_kind_of_network(case, name):
  method = make_method(case, network=large_network(name))
  before = jax.eval_shape(method.init, jax.random.key(0))
  after, metrics = jax.eval_shape(
    method.step, before, make_batch(0, method.needs), jax.random.key(1)
  )
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), before) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), after
  )
  assert metrics["loss"].shape == ()


def with_weak_labels(images, scenes, kind):
  """Images as a predictor with weak labels of that kind is shown them, `kind` None: as others do."""
  if kind is None:
    return images
  known = (
    box_planes(boxes_of(scenes), images.shape[1:3], K)
    if kind == "boxes"
    else tags.tags_of_masks(scenes, K)[:, None, None]
  )
  return np.concatenate([images, np.broadcast_to(known, (*images.shape[:3], K))], axis=-1)


# A stage that goes on with what an earlier run made learns nothing from chance weights: see its own
# tests.
LEARNERS = [
  case
  for case in CASES
  if ":" not in case and not make_method(case).needs.domains and not make_method(case).given_nets
]


@pytest.mark.slow
@pytest.mark.parametrize("case", LEARNERS)
def test_learns_on_the_synthetic_scenes(case):
  steps = 300
  # A tenth of the published weights: in so few steps from scratch the unlabeled images have nothing
  # to teach yet.
  method, mesh = make_method(case, steps, 8, 0.1), make_mesh(1)
  scenes = synthetic.SyntheticScenes(32, (48, 48))
  others = synthetic.SyntheticScenes(32, (48, 48), seed=1)
  batches = make_batches(
    method.needs, scenes, others, tags.tags_of_masks(others, K), boxes_of(others)
  )
  step, state = loop.jit_step(method, mesh, SEED), loop.jit_init(method, mesh, SEED)
  for _ in range(steps):
    state, _ = step(state, meshes.global_batch(mesh, next(batches)))
  images, labels = (
    np.stack([read(row) for row in range(32)]) for read in (scenes.image, scenes.label)
  )
  spec = pipeline.PipelineSpec
  normalized = ((images / 255 - np.asarray(spec.mean)) / np.asarray(spec.std)).astype(np.float32)
  valid = labels != IGNORE_LABEL
  always_background = np.mean(labels[valid] == 0)
  for name, predict in method.predictors.items():
    prediction = np.argmax(
      predict(state, with_weak_labels(normalized, scenes, predict.weak_label)), -1
    )
    accuracy = np.mean((prediction == labels)[valid])
    found = {k for k in range(1, K) if np.mean(prediction[labels == k] == k) > 0.2}
    assert accuracy > always_background + 0.05, (name, accuracy, always_background)
    assert len(found) >= 2, (name, found)
