import gc
import itertools
import logging
import os
import threading
import time

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import geometry, photometry, pipeline, sources, synthetic, views
from pseudoseg_jax.data.geometry import Geometry
from pseudoseg_jax.data.skipped import Skipped

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
  with pipeline.train_batches(options, **where) as feed:
    return list(itertools.islice(feed, count))


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
  labeled = {
    "image": ((2, 24, 28, 3), "float32"),
    "label": ((2, 24, 28), "int32"),
    "valid": ((2, 24, 28), "bool"),
  }
  assert shapes == {"labeled": labeled, "unlabeled": unlabeled, "partner": unlabeled}
  padding = ~batch["unlabeled"]["valid"]
  assert np.all(batch["unlabeled"]["weak"][padding] == 0) and np.all(
    batch["unlabeled"]["strong"].swapaxes(0, 1)[:, padding] == 0
  )
  outside = ~batch["labeled"]["valid"]
  assert np.all(batch["labeled"]["image"][outside] == 0) and np.all(
    batch["labeled"]["label"][outside] == 255
  )


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
  assert np.any(
    np.stack(ids[:2]) != np.stack([batch["unlabeled"]["id"] for batch in take(2, spec(seed=8))])
  )
  other = take(1, spec(unlabeled=ONE, seed=8))[0]["unlabeled"]
  first = of_one_image["unlabeled"]
  assert np.any(first["window"] != other["window"]) and np.any(first["strong"] != other["strong"])
  assert len(np.unique(first["window"], axis=0)) > 1  # nor do positions share draws


def test_partner_is_independent_of_unlabeled(batches, of_one_image):
  ids = {
    name: np.concatenate([batch[name]["id"] for batch in batches])
    for name in ("unlabeled", "partner")
  }
  assert np.any(ids["unlabeled"] != ids["partner"])
  for name in ("window", "strong"):
    assert np.any(of_one_image["unlabeled"][name] != of_one_image["partner"][name])


def test_strong_views_are_the_weak_crop_under_different_light():
  only_brightness = photometry.Photometry(
    1.0, 0.5, contrast=0, saturation=0, hue=0, grayscale_probability=0, blur_probability=0
  )
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
      name: tf.constant(
        [pipeline.stream_seed(options.seed, f"unlabeled/{name}"), position], tf.int64
      )
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
  assert take(3, spec(unlabeled=unlabeled, needs=Needs()))[0]["unlabeled"]["weak"].shape == (
    4,
    24,
    28,
    3,
  )


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
    lambda: spec(
      labeled=unlabeled_only,
      unlabeled=None,
      batch_size_labeled_global=0,
      needs=Needs(weak_label="tags"),
    )
  )
  for part in (
    "without masks",
    "unlabeled: got no source",
    "batch_size_labeled_global: got 0",
    "'tags'",
  ):
    assert part in text


def test_image_labels_follow_their_images_into_all_streams():
  # Each row tells its image.
  labels = np.eye(11, 7, dtype=np.float32) + np.arange(11, dtype=np.float32)[:, None]
  needs = Needs(partner=True, ids=True, weak_label="image")
  for batch in take(3, spec(needs=needs, unlabeled_image_labels=labels)):
    for stream in ("unlabeled", "partner"):
      assert batch[stream]["image_label"].dtype == np.float32
      np.testing.assert_array_equal(batch[stream]["image_label"], labels[batch[stream]["id"]])
    assert (
      batch["labeled"]["image_label"].shape == (2, 7)
      and batch["labeled"]["image_label"].dtype == np.float32
    )


def test_image_labels_of_labeled_images_are_those_of_their_whole_masks():
  # Crops that show a part.
  labels, far = np.zeros((11, 7), np.float32), Geometry((8, 8), scales=(2.0,))
  whole = {tuple(np.isin(np.arange(7), SCENES.label(row)).astype(float)) for row in range(11)}
  batch = take(
    1, spec(needs=Needs(weak_label="image"), unlabeled_image_labels=labels, geometry=far)
  )[0]["labeled"]
  for found, label in zip(batch["image_label"], batch["label"], strict=True):
    assert tuple(found) in whole and set(np.unique(label)) - {255} < set(np.flatnonzero(found))


def test_lacking_image_labels_are_asked_for_by_their_option():
  needs = Needs(weak_label="image")
  assert "config.data.image_labels=FILE (CSV/JSON" in message(lambda: spec(needs=needs))
  text = message(lambda: spec(needs=needs, unlabeled_image_labels=np.ones((10, 7), np.float32)))
  assert "got shape (10, 7)" in text and "a row for each of 11 images" in text


def test_boxes_follow_their_images_into_all_streams():
  boxes = np.full((11, 2, 5), -1, np.float32)
  # a class an image.
  boxes[:, 0] = np.stack(
    [np.arange(11), *[np.full(11, edge) for edge in (0.0, 0.0, 1.0, 1.0)]], axis=1
  )
  needs = Needs(partner=True, ids=True, weak_label="boxes")
  batch = take(1, spec(needs=needs, labeled_boxes=boxes, unlabeled_boxes=boxes))[0]
  assert batch["labeled"]["boxes"].shape == (2, 2, 5) and np.all(
    batch["labeled"]["boxes"][:, 1, 0] == -1
  )
  for stream in ("unlabeled", "partner"):
    np.testing.assert_array_equal(batch[stream]["boxes"][:, 0, 0], batch[stream]["id"])
    for (_, top, left, bottom, right), valid in zip(
      batch[stream]["boxes"][:, 0], batch[stream]["valid"]
    ):
      rows, columns = np.nonzero(valid)  # the box is the whole image
      expected = (
        rows.min() / 24,
        columns.min() / 28,
        (rows.max() + 1) / 24,
        (columns.max() + 1) / 28,
      )
      np.testing.assert_allclose((top, left, bottom, right), expected, atol=1e-5)


def test_lacking_boxes_are_asked_for_by_their_option():
  text = message(
    lambda: spec(needs=Needs(weak_label="boxes"), labeled_boxes=np.zeros((10, 2, 5), np.float32))
  )
  assert (
    "boxes of the unlabeled images: got none" in text
    and "config.data.boxes=FILE (folder of VOC XML, or COCO JSON)" in text
  )
  assert "labeled_boxes: got shape (10, 2, 5)" in text
  of_labeled = take(
    1,
    spec(
      needs=Needs(unlabeled=False, weak_label="boxes"),
      labeled_boxes=np.zeros((11, 2, 5), np.float32),
    ),
  )
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
  assert batch["labeled"]["image"].shape == (2, 24, 28, 1) and batch["unlabeled"][
    "strong"
  ].shape == (4, 2, 24, 28, 1)
  quarters = batch["unlabeled"]["weak"] * 255 * 4
  np.testing.assert_allclose(quarters, np.round(quarters), atol=1e-3)
  assert np.any(np.round(quarters) % 4)


def test_channels_that_do_not_fit_are_told():
  text = message(lambda: spec(labeled=_Deep(SCENES)))
  assert (
    "images of 3 channels; allowed: 1" in text
    and "mean: got 3 values; allowed: 1, one a channel" in text
  )


@pytest.mark.parametrize("convention", geometry.CONVENTIONS)
def test_truth_lies_under_the_geometry_of_its_image(convention):
  # Taller than the images: padding in all.
  options = Geometry((34, 28), scales=(1.0,), convention=convention)
  needs = Needs(partner=True)
  batch = take(
    1,
    spec(
      unlabeled=_Gray(SCENES),
      geometry=options,
      needs=needs,
      with_truth=True,
      mean=(0,) * 3,
      std=(1,) * 3,
    ),
  )[0]
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
  assert "with_truth: got unlabeled images without masks" in message(
    lambda: spec(unlabeled=without, with_truth=True)
  )


def test_tensorflow_convention_reaches_every_stream_and_the_jitter():
  # Larger than the images: padding in all.
  options = Geometry((48, 56), scales=(1.0,), convention="tensorflow")
  only_brightness = photometry.Photometry(1.0, 0.3, 0, 0, 0, 0, 0, convention="tensorflow")
  batch = take(1, spec(geometry=options, photometry=only_brightness, mean=(0,) * 3, std=(1,) * 3))[
    0
  ]
  for weak, strong, valid in zip(
    *(batch["unlabeled"][name] for name in ("weak", "strong", "valid"))
  ):
    kept = (strong[0] > 0.01) & (strong[0] < 0.99) & valid[..., None]
    # a summand, the same for all pixels.
    assert kept.any() and np.ptp((strong[0] - weak)[kept]) < 1e-5
  for stream in batch.values():
    # The corner above on the right is image only in a mirrored crop.
    flipped = stream["valid"][:, 0, -1]
    expected = np.zeros((len(flipped), 48, 56), bool)
    expected[~flipped, :32, :40] = True
    expected[flipped, :32, -40:] = True
    np.testing.assert_array_equal(stream["valid"], expected)


def test_batches_that_processes_cannot_share_are_told_before_iterating():
  text = message(lambda: pipeline.train_batches(spec(), process_index=3, process_count=3))
  for part in (
    "'labeled': got 2",
    "'unlabeled': got 4",
    "'partner': got 4",
    "process_index: got 3",
  ):
    assert part in text


class _Watched:
  """A source that knows how many of its images are being read; `before` is called in each of those
  reads.
  """

  channels, dtype, has_labels = 3, np.uint8, True

  def __init__(self, source=SCENES, before=lambda row: None, channels=3):
    """channels: fewer than it says are given."""
    self.ids, self.size, self.label = source.ids, source.size, source.label
    self.begun = self.ended = 0
    self._source, self._before, self._channels, self._lock = (
      source,
      before,
      channels,
      threading.Lock(),
    )

  def __len__(self):
    return len(self.ids)

  def image(self, row):
    with self._lock:
      self.begun += 1
    try:
      self._before(row)
      return self._source.image(row)[..., : self._channels]
    finally:
      with self._lock:
        self.ended += 1


def _feed_of(source, **options):
  return pipeline.train_batches(spec(labeled=source, unlabeled=source, needs=Needs(), **options))


def _feeders():
  return [thread for thread in threading.enumerate() if thread.name == "feed"]


def _native_threads():
  return len(os.listdir("/proc/self/task"))


def _wait_until(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited for nothing"
    time.sleep(0.01)


def _raise_input_error(row):
  raise checks.InputError("a bad file")


def _unused(feed):
  pass


def _used(feed):
  next(feed), next(feed)


def _failed(feed):
  with pytest.raises(checks.InputError, match="a bad file"):
    next(feed)


def _failed_in_tensorflow(feed):
  with pytest.raises(tf.errors.OpError, match="Shape"):
    next(feed)


@pytest.mark.parametrize(
  ("use", "options"),
  [
    (_unused, dict(before=lambda row: time.sleep(0.1))),
    (_used, dict(before=lambda row: time.sleep(0.1))),
    (_failed, dict(before=_raise_input_error)),
    (_failed_in_tensorflow, dict(channels=2)),
  ],
)
def test_closed_feeds_read_no_more_and_leave_nothing_behind(use, options):
  source = _Watched(**options)
  gc.collect()
  gc.disable()
  try:
    feed = _feed_of(source)
    use(feed)
    begun = time.monotonic()
    feed.close()
    assert time.monotonic() - begun < 2
    assert source.begun == source.ended and not _feeders()
    # Their destructors must not be left to the garbage collector, which runs anywhere.
    assert not [kind for kind in map(type, gc.get_objects()) if kind.__name__ == "OwnedIterator"]
  finally:
    gc.enable()
  reads = source.begun
  feed.close()
  assert next(feed, None) is None and next(feed, None) is None
  time.sleep(0.2)
  assert source.begun == reads


def test_a_slow_read_does_not_keep_close_waiting(monkeypatch):
  monkeypatch.setattr(pipeline, "_PATIENCE_SECONDS", 0.2)
  goes_on = threading.Event()
  source = _Watched(before=lambda row: goes_on.wait(30))
  feed = _feed_of(source)
  _wait_until(lambda: source.begun)
  begun = time.monotonic()
  feed.close()
  assert time.monotonic() - begun < 2 and _feeders()
  goes_on.set()
  _wait_until(lambda: not _feeders())  # what was left alone ends by itself
  assert source.begun == source.ended


def test_close_wakes_up_whoever_waits():
  goes_on = threading.Event()
  source = _Watched(before=lambda row: goes_on.wait(30))
  feed = _feed_of(source)
  answers = []
  waiting = threading.Thread(target=lambda: answers.append(next(feed, "closed")))
  waiting.start()
  _wait_until(lambda: source.begun)
  threading.Timer(0.2, goes_on.set).start()
  feed.close()
  waiting.join(20)
  assert answers == ["closed"]


@pytest.mark.parametrize("use", [_unused, _used])
def test_feeds_that_nobody_holds_are_closed(use):
  source = _Watched(before=lambda row: time.sleep(0.02))
  feed = _feed_of(source)
  use(feed)
  del feed
  _wait_until(lambda: not _feeders() and source.begun == source.ended)


def test_feed_that_a_traceback_holds_reads_no_more():
  source = _Watched(before=_raise_input_error)
  try:
    next(_feed_of(source))
  except checks.InputError as error:
    kept = error  # with the frames that hold the feed
  _wait_until(lambda: not _feeders())
  assert kept.__traceback__ is not None and source.begun == source.ended
  assert len(take(2, spec())) == 2  # a new one in the same process


def test_garbage_collector_may_find_a_feed_inside_of_its_own_reads(monkeypatch):
  monkeypatch.setattr(pipeline, "_NUM_WORKERS", 1)  # reads come one after the other
  entered, goes_on = threading.Event(), threading.Event()

  def collect(row):
    if source.begun > 2:
      entered.set()
      assert goes_on.wait(30)
      gc.collect()

  source = _Watched(before=collect)
  feed = pipeline.train_batches(spec(labeled=source, needs=Needs(unlabeled=False)))
  next(feed)
  assert entered.wait(30)
  cycle = [feed]
  cycle.append(cycle)
  gc.disable()
  try:
    del feed, cycle
    assert _feeders()
    goes_on.set()
    _wait_until(lambda: not _feeders())
  finally:
    gc.enable()


def test_many_feeds_leave_no_threads():
  def opened():
    return pipeline.train_batches(spec(needs=Needs()))

  next(opened())
  _wait_until(lambda: not _feeders())
  before = _native_threads()
  together = [opened() for _ in range(4)]
  batches = [[next(feed) for feed in together] for _ in range(2)]
  for number in range(1, 4):
    assert_equal(batches[1][0], batches[1][number])
  del together[::2]
  for feed in together:
    feed.close()
  _wait_until(lambda: not _feeders() and _native_threads() <= before)


def test_further_domains_have_their_number_in_the_name():
  first, other = spec(needs=Needs(unlabeled=False)), spec(seed=8, needs=Needs())
  with pipeline.train_batches(first, other) as feed:
    batch = next(feed)
  assert list(batch) == ["labeled", "labeled_1", "unlabeled_1"]
  assert_equal({"labeled": batch["labeled"]}, take(1, first)[0])
  assert_equal({name: batch[f"{name}_1"] for name in ("labeled", "unlabeled")}, take(1, other)[0])
  text = message(lambda: pipeline.train_batches(first, other, process_index=0, process_count=3))
  assert "'unlabeled_1': got 4" in text


@pytest.fixture
def folder(tmp_path):
  """Opens images/NAME.png and masks/NAME.png of eleven scenes."""
  for kind in ("images", "masks"):
    (tmp_path / kind).mkdir()
  for row, name in enumerate("abcdefghijk"):
    Image.fromarray(SCENES.image(row)).save(tmp_path / "images" / f"{name}.png")
    Image.fromarray(SCENES.label(row)).save(tmp_path / "masks" / f"{name}.png")

  def opened(ids="abcdefghijk", **options):
    patterns = dict(image_pattern="images/{id}.png", label_pattern="masks/{id}.png")
    return sources.FolderSource(tmp_path, tuple(ids), num_classes=7, **patterns, **options)

  return opened


def _resized(path, size=(20, 16)):
  with Image.open(path) as image:
    image.resize(size, Image.Resampling.NEAREST).save(path)


@pytest.mark.parametrize("changed", ["images", "masks"])
@pytest.mark.parametrize(
  ("stream", "options"),
  [
    ("labeled", dict(needs=Needs(unlabeled=False))),
    (
      "labeled",
      dict(
        needs=Needs(unlabeled=False, weak_label="image"),
        unlabeled_image_labels=np.ones((11, 7), np.float32),
      ),
    ),
    ("unlabeled", dict(needs=Needs(labeled_too=True))),
    ("unlabeled", dict(needs=Needs(), with_truth=True)),
  ],
)
def test_mask_of_another_size_than_its_image_ends_the_run(folder, changed, stream, options):
  source = folder()
  path = source.root / changed / "c.png"
  parts = sources.Joined(
    sources.Subset(source, tuple("ab")), sources.Subset(source, tuple("cdefghijk"))
  )
  only_unlabeled = stream == "unlabeled" and not options["needs"].labeled_too
  made = spec(labeled=SCENES if only_unlabeled else parts, unlabeled=parts, **options)
  _resized(path)
  text = message(lambda: take(12, made))
  sizes = ("16 x 20", "32 x 40") if changed == "masks" else ("32 x 40", "16 x 20")
  assert f"got {sizes[0]}; allowed: {sizes[1]}, as its image {source.root / 'images/c.png'}" in text
  assert f"cannot use mask {source.root / 'masks/c.png'}" in text
  _resized(path, (40, 32))  # what it says: one size again
  assert len(take(12, made)) == 12


def test_mask_of_another_size_is_told_by_its_id_where_there_are_no_files():
  shifted = _Watched()
  shifted.label = lambda row: SCENES.label(row)[: -1 if row == 4 else None]
  text = message(
    lambda: take(
      12, spec(labeled=sources.Subset(shifted, shifted.ids), needs=Needs(unlabeled=False))
    )
  )
  assert f"cannot use mask {SCENES.ids[4]}" in text and "got 31 x 40; allowed: 32 x 40" in text


def _damage(path):
  path.write_bytes(path.read_bytes()[:-300])


def test_unreadable_files_are_replaced_by_the_next_ones(folder, caplog):
  source = folder()
  _damage(source.image_path(2))
  _damage(source.image_path(3))
  _damage(source.image_path(10))
  _damage(source.label_path(6))
  whole = folder(check=False)
  substitute = {2: 4, 3: 4, 10: 0}
  options = dict(labeled=whole, unlabeled=whole, needs=Needs(ids=True))
  skipped = Skipped()
  with caplog.at_level(logging.WARNING, "pseudoseg_jax"):
    found = take(11, spec(skipped=skipped, **options))
  expected = take(11, spec(needs=Needs(ids=True)))
  ids, wanted = (
    np.concatenate([batch["unlabeled"]["id"] for batch in batches]) for batches in (found, expected)
  )
  np.testing.assert_array_equal(ids, [substitute.get(row, row) for row in wanted])
  paths = {str(source.image_path(row)) for row in (2, 3, 10)} | {str(source.label_path(6))}
  reasons = skipped.reasons()
  assert set(reasons) == paths and all(path in reason for path, reason in reasons.items())
  # Each once, though met in several epochs.
  assert sum("skipped" in record.message for record in caplog.records) == 4

  # The same in every process, and after resuming.
  parts = [
    take(2, spec(skipped=Skipped(), **options), process_index=index, process_count=2, start_step=5)
    for index in range(2)
  ]
  joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*parts)]
  assert_equal(found[5:7], joined)
  # Without the option the run ends.
  assert "cannot read image" in message(lambda: take(11, spec(**options)))


def test_what_belongs_to_an_image_goes_with_its_substitute():
  def fails(row):
    if row in (2, 3):
      raise checks.InputError("a bad file")

  source = _Watched(before=fails)
  labels = np.eye(11, 7, dtype=np.float32) + np.arange(11, dtype=np.float32)[:, None]
  needs = Needs(ids=True, weak_label="image")
  for batch in take(
    6, spec(unlabeled=source, needs=needs, unlabeled_image_labels=labels, skipped=Skipped())
  ):
    assert not {2, 3} & {*batch["unlabeled"]["id"].tolist()}
    np.testing.assert_array_equal(
      batch["unlabeled"]["image_label"], labels[batch["unlabeled"]["id"]]
    )
  boxes = np.full((11, 1, 5), -1, np.float32)
  boxes[:, 0] = np.stack(
    [np.arange(11), *[np.full(11, edge) for edge in (0.0, 0.0, 1.0, 1.0)]], axis=1
  )
  needs = Needs(ids=True, weak_label="boxes")
  for batch in take(
    6,
    spec(
      unlabeled=source, needs=needs, labeled_boxes=boxes, unlabeled_boxes=boxes, skipped=Skipped()
    ),
  ):
    np.testing.assert_array_equal(batch["unlabeled"]["boxes"][:, 0, 0], batch["unlabeled"]["id"])


@pytest.mark.parametrize("error", [checks.InputError("a bad file"), OSError("the disk is gone")])
def test_nothing_readable_ends_the_run_also_where_files_may_be_skipped(error):
  def fails(row):
    raise error

  skipped = Skipped()
  text = message(
    lambda: take(1, spec(unlabeled=_Watched(before=fails), needs=Needs(), skipped=skipped))
  )
  assert "11 of 11" in text and str(error) in text and set(skipped.reasons()) == set(SCENES.ids)


def test_errors_of_ours_are_never_skipped():
  def fails(row):
    raise AssertionError("a bug")

  with pytest.raises(AssertionError, match="a bug"):
    take(1, spec(unlabeled=_Watched(before=fails), needs=Needs(), skipped=Skipped()))


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_files_without_a_readable_header_are_told_at_opening_and_skipped(folder, kind, caplog):
  root = folder().root
  for name in "bk":
    (root / kind / f"{name}.png").write_bytes(b"broken")
  assert str(root / kind / "k.png") in message(folder)
  skipped = Skipped()
  with caplog.at_level(logging.WARNING, "pseudoseg_jax"):
    source = folder(skipped=skipped)
  assert source.ids == tuple("abcdefghijk")  # by number the same images, whatever was damaged since
  assert set(skipped.reasons()) == {str(root / kind / f"{name}.png") for name in "bk"}
  assert "b.png" in caplog.text and "file 2" in caplog.text
  take(6, spec(labeled=source, needs=Needs(unlabeled=False), skipped=skipped))
  assert len(skipped.reasons()) == 2
  for name in "acdefghij":
    (root / kind / f"{name}.png").write_bytes(b"broken")
  assert "a.png" in message(lambda: folder(skipped=Skipped()))  # none is left
