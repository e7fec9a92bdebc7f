import itertools

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import geometry, photometry, pipeline, sources, synthetic, views
from pseudoseg_jax.data.geometry import Geometry

SCENES = synthetic.SyntheticScenes(11, (32, 40))
ONE = sources.Subset(SCENES, SCENES.ids[:1])
ALL = Needs(partner=True, strong_views=2, ids=True)


def spec(**changes):
  options = dict(
    labeled=SCENES,
    unlabeled=SCENES,
    batch_size_labeled_global=2,
    batch_size_unlabeled_global=4,
    geometry=Geometry((24, 28)),
    needs=ALL,
    seed=7,
  )
  return pipeline.PipelineSpec(**{**options, **changes})


@pytest.fixture(scope="module")
def batches():
  """Steps 0..10 of the plain spec: 44 unlabeled positions, four epochs of eleven."""
  return take(11, spec())


@pytest.fixture(scope="module")
def of_one_image():
  """A batch in which only draws can differ."""
  return take(1, spec(unlabeled=ONE))[0]


def take(count, options, **where):
  return list(itertools.islice(pipeline.train_batches(options, **where), count))


def assert_equal(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


def test_batch_has_the_layout_of_the_contract(batches):
  batch = batches[0]
  shapes = jax.tree.map(lambda value: (value.shape, value.dtype.name), batch)
  unlabeled = {
    "weak": ((4, 24, 28, 3), "float32"),
    "strong": ((4, 2, 24, 28, 3), "float32"),
    "valid": ((4, 24, 28), "bool"),
    "id": ((4,), "int32"),
    "flip": ((4,), "bool"),
    "window": ((4, 4), "float32"),
  }
  labeled = {"image": ((2, 24, 28, 3), "float32"), "label": ((2, 24, 28), "int32"), "valid": ((2, 24, 28), "bool")}
  assert shapes == {"labeled": labeled, "unlabeled": unlabeled, "partner": unlabeled}
  padding = ~batch["unlabeled"]["valid"]
  assert np.all(batch["unlabeled"]["weak"][padding] == 0) and np.all(batch["unlabeled"]["strong"].swapaxes(0, 1)[:, padding] == 0)
  outside = ~batch["labeled"]["valid"]
  assert np.all(batch["labeled"]["image"][outside] == 0) and np.all(batch["labeled"]["label"][outside] == 255)


@pytest.mark.parametrize(
  ("needs", "keys"),
  [
    (Needs(unlabeled=False), {"labeled": {"image", "label", "valid"}}),
    (Needs(), {"labeled": {"image", "label", "valid"}, "unlabeled": {"weak", "valid"}}),
  ],
)
def test_batch_holds_only_what_is_needed(needs, keys):
  batch = take(1, spec(needs=needs, unlabeled_image_labels=np.ones((11, 7), np.float32)))[0]
  assert {stream: set(values) for stream, values in batch.items()} == keys


def test_restart_gives_the_same_bytes(batches):
  assert_equal(batches[:3], take(3, spec()))
  assert_equal(batches[5:7], take(2, spec(), start_step=5))


def test_start_far_beyond_32_bits_is_immediate(batches):
  far = take(1, spec(needs=Needs(unlabeled=False)), start_step=2**40)[0]
  assert np.any(far["labeled"]["image"] != batches[0]["labeled"]["image"])


def test_processes_together_make_the_global_batch(batches):
  parts = [take(3, spec(), process_index=index, process_count=2) for index in range(2)]
  joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*parts)]
  assert_equal(batches[:3], joined)


def test_every_epoch_is_a_permutation_of_its_own(batches):
  epochs = np.concatenate([batch["unlabeled"]["id"] for batch in batches]).reshape(4, 11)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(11), (4, 1)))
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_example_row_of_a_single_image_is_zero():
  assert int(pipeline.example_row(tf.constant(5, tf.int64), 1, seed=0, stream="labeled")) == 0


def test_other_seeds_give_other_orders_and_draws(batches, of_one_image):
  ids = [batch["unlabeled"]["id"] for batch in batches]
  assert np.any(np.stack(ids[:2]) != np.stack([batch["unlabeled"]["id"] for batch in take(2, spec(seed=8))]))
  other = take(1, spec(unlabeled=ONE, seed=8))[0]["unlabeled"]
  first = of_one_image["unlabeled"]
  assert np.any(first["window"] != other["window"]) and np.any(first["strong"] != other["strong"])
  assert len(np.unique(first["window"], axis=0)) > 1  # nor do positions share draws


def test_partner_is_independent_of_unlabeled(batches, of_one_image):
  ids = {name: np.concatenate([batch[name]["id"] for batch in batches]) for name in ("unlabeled", "partner")}
  assert np.any(ids["unlabeled"] != ids["partner"])
  for name in ("window", "strong"):
    assert np.any(of_one_image["unlabeled"][name] != of_one_image["partner"][name])


def test_strong_views_are_the_weak_crop_under_different_light():
  only_brightness = photometry.Photometry(1.0, 0.5, contrast=0, saturation=0, hue=0, grayscale_probability=0, blur_probability=0)
  batch = take(1, spec(photometry=only_brightness))[0]["unlabeled"]
  mean, std = np.float32(photometry.IMAGENET_MEAN), np.float32(photometry.IMAGENET_STD)
  weak, strong = batch["weak"] * std + mean, batch["strong"] * std + mean
  for row in range(4):
    dark = batch["valid"][row] & (weak[row].max(-1) < 0.6)  # below 1 whatever the factor
    bright_enough = weak[row][dark] > 0.05
    for view in range(2):
      factor = strong[row, view][dark][bright_enough] / weak[row][dark][bright_enough]
      assert np.ptp(factor) < 1e-2 and 0.5 <= factor.mean() <= 1.5
  assert np.any(batch["strong"][:, 0] != batch["strong"][:, 1])


def test_pipeline_does_what_the_ops_do_eagerly(batches):
  options = spec()
  batch = batches[1]["unlabeled"]  # positions 4..7
  for row, position in enumerate(range(4, 8)):
    image = tf.constant(SCENES.image(int(batch["id"][row])))
    seed = {
      name: tf.constant([pipeline.stream_seed(options.seed, f"unlabeled/{name}"), position], tf.int64)
      for name in ("geometry", "photometry")
    }
    eager = views.unlabeled_views(
      image,
      draws=geometry.draw(options.geometry, tf.shape(image)[:2], seed["geometry"]),
      crop_size=options.geometry.crop_size,
      photometry=options.photometry,
      photometry_draws=photometry.draw(options.photometry, 2, seed["photometry"]),
      mean=options.mean,
      std=options.std,
    )
    for name, value in eager.items():
      np.testing.assert_allclose(batch[name][row], value, atol=2e-5, err_msg=name)


class WithoutMasks:
  """A source that says it has masks and breaks when one is opened."""

  def __init__(self, source):
    self.ids, self.has_labels, self.image, self.size = source.ids, True, source.image, source.size
    self.channels, self.dtype = source.channels, source.dtype

  def __len__(self):
    return len(self.ids)

  def label(self, row):
    raise AssertionError("an unlabeled image's mask was opened")


def test_masks_of_unlabeled_images_are_never_opened(tmp_path):
  assert len(take(3, spec(unlabeled=WithoutMasks(SCENES), needs=Needs()))) == 3
  with pytest.raises(AssertionError, match="was opened"):  # the trap does work
    take(1, spec(labeled=WithoutMasks(SCENES), needs=Needs()))


def test_absent_and_broken_mask_files_do_not_matter_to_unlabeled_images(tmp_path):
  for name in "abc":
    Image.fromarray(SCENES.image(0)).save(tmp_path / f"{name}.jpg")
  (tmp_path / "a.png").write_bytes(b"broken")
  unlabeled = sources.FolderSource(tmp_path, tuple("abc"), image_pattern="{id}.jpg")
  assert take(3, spec(unlabeled=unlabeled, needs=Needs()))[0]["unlabeled"]["weak"].shape == (4, 24, 28, 3)


def test_broken_file_reaches_the_caller_by_its_path(tmp_path):
  for name in "abc":
    Image.fromarray(SCENES.image(0)).save(tmp_path / f"{name}.jpg")
  path = tmp_path / "b.jpg"
  path.write_bytes(path.read_bytes()[:-300])
  unlabeled = sources.FolderSource(tmp_path, tuple("abc"), image_pattern="{id}.jpg")
  text = message(lambda: take(3, spec(unlabeled=unlabeled, needs=Needs())))
  assert str(path) in text and "Traceback" not in text


def test_settings_that_do_not_fit_are_told_together():
  unlabeled_only = WithoutMasks(SCENES)
  unlabeled_only.has_labels = False
  text = message(
    lambda: spec(labeled=unlabeled_only, unlabeled=None, batch_size_labeled_global=0, needs=Needs(weak_label="tags"))
  )
  for part in ("without masks", "unlabeled: got no source", "batch_size_labeled_global: got 0", "'tags'"):
    assert part in text


def test_image_labels_follow_their_images_into_all_streams():
  labels = np.eye(11, 7, dtype=np.float32) + np.arange(11, dtype=np.float32)[:, None]  # each row tells its image
  needs = Needs(partner=True, ids=True, weak_label="image")
  for batch in take(3, spec(needs=needs, unlabeled_image_labels=labels)):
    for stream in ("unlabeled", "partner"):
      assert batch[stream]["image_label"].dtype == np.float32
      np.testing.assert_array_equal(batch[stream]["image_label"], labels[batch[stream]["id"]])
    assert batch["labeled"]["image_label"].shape == (2, 7) and batch["labeled"]["image_label"].dtype == np.float32


def test_image_labels_of_labeled_images_are_those_of_their_whole_masks():
  labels, far = np.zeros((11, 7), np.float32), Geometry((8, 8), scales=(2.0,))  # crops that show a part
  whole = {tuple(np.isin(np.arange(7), SCENES.label(row)).astype(float)) for row in range(11)}
  batch = take(1, spec(needs=Needs(weak_label="image"), unlabeled_image_labels=labels, geometry=far))[0]["labeled"]
  for found, label in zip(batch["image_label"], batch["label"], strict=True):
    assert tuple(found) in whole and set(np.unique(label)) - {255} < set(np.flatnonzero(found))


def test_lacking_image_labels_are_asked_for_by_their_option():
  needs = Needs(weak_label="image")
  assert "config.data.image_labels=FILE (CSV/JSON" in message(lambda: spec(needs=needs))
  text = message(lambda: spec(needs=needs, unlabeled_image_labels=np.ones((10, 7), np.float32)))
  assert "got shape (10, 7)" in text and "a row for each of 11 images" in text


def test_boxes_follow_their_images_into_all_streams():
  boxes = np.full((11, 2, 5), -1, np.float32)
  boxes[:, 0] = np.stack([np.arange(11), *[np.full(11, edge) for edge in (0.0, 0.0, 1.0, 1.0)]], axis=1)  # a class an image
  needs = Needs(partner=True, ids=True, weak_label="boxes")
  batch = take(1, spec(needs=needs, labeled_boxes=boxes, unlabeled_boxes=boxes))[0]
  assert batch["labeled"]["boxes"].shape == (2, 2, 5) and np.all(batch["labeled"]["boxes"][:, 1, 0] == -1)
  for stream in ("unlabeled", "partner"):
    np.testing.assert_array_equal(batch[stream]["boxes"][:, 0, 0], batch[stream]["id"])
    for (_, top, left, bottom, right), valid in zip(batch[stream]["boxes"][:, 0], batch[stream]["valid"]):
      rows, columns = np.nonzero(valid)  # the box is the whole image
      expected = rows.min() / 24, columns.min() / 28, (rows.max() + 1) / 24, (columns.max() + 1) / 28
      np.testing.assert_allclose((top, left, bottom, right), expected, atol=1e-5)


def test_lacking_boxes_are_asked_for_by_their_option():
  text = message(lambda: spec(needs=Needs(weak_label="boxes"), labeled_boxes=np.zeros((10, 2, 5), np.float32)))
  assert "boxes of the unlabeled images: got none" in text and "config.data.boxes=FILE (folder of VOC XML, or COCO JSON)" in text
  assert "labeled_boxes: got shape (10, 2, 5)" in text
  of_labeled = take(1, spec(needs=Needs(unlabeled=False, weak_label="boxes"), labeled_boxes=np.zeros((11, 2, 5), np.float32)))
  assert of_labeled[0]["labeled"]["boxes"].shape == (2, 2, 5)  # which asks for no others


class _Deep:
  """Grey images of more than 8 bits: levels a quarter apart."""

  channels, dtype = 1, np.float32

  def __init__(self, source):
    self.ids, self.has_labels, self.label, self.size = source.ids, True, source.label, source.size
    self.image = lambda row: np.float32(source.image(row)[..., :1] / 4)

  def __len__(self):
    return len(self.ids)


def test_grey_images_of_16_bits_become_batches_unrounded():
  options = dict(mean=(0.0,), std=(1.0,), geometry=Geometry((24, 28), scales=(1.0,)))
  batch = take(1, spec(labeled=_Deep(SCENES), unlabeled=_Deep(SCENES), **options))[0]
  assert batch["labeled"]["image"].shape == (2, 24, 28, 1) and batch["unlabeled"]["strong"].shape == (4, 2, 24, 28, 1)
  quarters = batch["unlabeled"]["weak"] * 255 * 4
  np.testing.assert_allclose(quarters, np.round(quarters), atol=1e-3)
  assert np.any(np.round(quarters) % 4)


def test_channels_that_do_not_fit_are_told():
  text = message(lambda: spec(labeled=_Deep(SCENES)))
  assert "images of 3 channels; allowed: 1" in text and "mean: got 3 values; allowed: 1, one a channel" in text


@pytest.mark.parametrize("convention", geometry.CONVENTIONS)
def test_truth_lies_under_the_geometry_of_its_image(convention):
  options = Geometry((34, 28), scales=(1.0,), convention=convention)  # taller than the images: padding in all
  needs = Needs(partner=True)
  batch = take(1, spec(unlabeled=_Gray(SCENES), geometry=options, needs=needs, with_truth=True, mean=(0,) * 3, std=(1,) * 3))[0]
  truth, valid = batch["unlabeled"]["truth"], batch["unlabeled"]["valid"]
  assert truth.dtype == np.int32 and "truth" not in batch["partner"]
  assert np.all(truth[~valid] == 255) and not valid.all() and len(np.unique(truth)) > 2
  np.testing.assert_allclose(batch["unlabeled"]["weak"][valid][:, 0] * 255, truth[valid], atol=1e-3)


class _Gray(WithoutMasks):
  """Images that show their own masks."""

  def __init__(self, source):
    super().__init__(source)
    self.label = source.label
    self.image = lambda row: np.repeat(source.label(row)[..., None], 3, -1)


def test_truth_of_images_without_masks_is_refused():
  without = WithoutMasks(SCENES)
  without.has_labels = False
  assert "with_truth: got unlabeled images without masks" in message(lambda: spec(unlabeled=without, with_truth=True))


def test_tensorflow_convention_reaches_every_stream_and_the_jitter():
  options = Geometry((48, 56), scales=(1.0,), convention="tensorflow")  # larger than the images: padding in all
  only_brightness = photometry.Photometry(1.0, 0.3, 0, 0, 0, 0, 0, convention="tensorflow")
  batch = take(1, spec(geometry=options, photometry=only_brightness, mean=(0,) * 3, std=(1,) * 3))[0]
  for weak, strong, valid in zip(*(batch["unlabeled"][name] for name in ("weak", "strong", "valid"))):
    kept = (strong[0] > 0.01) & (strong[0] < 0.99) & valid[..., None]
    assert kept.any() and np.ptp((strong[0] - weak)[kept]) < 1e-5  # a summand, the same for all pixels
  for stream in batch.values():
    flipped = stream["valid"][:, 0, -1]  # the corner above on the right is image only in a mirrored crop
    expected = np.zeros((len(flipped), 48, 56), bool)
    expected[~flipped, :32, :40] = True
    expected[flipped, :32, -40:] = True
    np.testing.assert_array_equal(stream["valid"], expected)


def test_batches_that_processes_cannot_share_are_told_before_iterating():
  text = message(lambda: pipeline.train_batches(spec(), process_index=3, process_count=3))
  for part in ("'labeled': got 2", "'unlabeled': got 4", "'partner': got 4", "process_index: got 3"):
    assert part in text
