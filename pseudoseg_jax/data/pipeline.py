"""Training batches: an endless stream that can restart at any step.

The stream is a pure function of (seed, position):

  position -> (epoch, place in the epoch's shuffle) -> row -> load -> geometry -> views

Every random draw is seeded by (seed, stream name, position). So resuming at step s needs only s,
and one process or eight feed the same global batches. Labeled, unlabeled and partner streams have
orders and draws of their own.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, NoReturn

import numpy as np
import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL, Needs
from pseudoseg_jax.data import (
  boxes,
  geometry as geometry_ops,
  operations,
  photometry as photometry_ops,
  views,
)
from pseudoseg_jax.data.geometry import Geometry
from pseudoseg_jax.data.photometry import IMAGENET_MEAN, IMAGENET_STD, Photometry
from pseudoseg_jax.data.skipped import Skipped
from pseudoseg_jax.data.sources import Joined, Source, Subset

# TensorFlow only feeds; on an accelerator it would take the memory that JAX needs.
tf.config.set_visible_devices([], "GPU")

_PATIENCE_SECONDS = 5.0  # of `Feed.close` and of an ending process, with reads that are under way

_NUM_WORKERS = min(
  16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)


@dataclasses.dataclass(frozen=True)
class PipelineSpec:
  """The settings from which training batches are made.

  labeled: a source with masks. unlabeled: a source of which only images are read; None where the
    method needs none.
  batch_size_labeled_global, batch_size_unlabeled_global: images a step over all processes.
  needs: what the method needs besides labeled images (`Method.needs`).
  mean, std: of values in [0, 1], one a channel.
  unlabeled_image_labels: f32[N, K], 0 and 1 for each of the N unlabeled images (`tags.read_tags`);
    None for no such labels.
  labeled_boxes, unlabeled_boxes: f32[N, M, 5], the boxes of each of the N images as in
    `geometry.crop_boxes`, M the most that one has, rows without a box of class -1; None for no
    boxes.
  with_truth: "unlabeled" also carries "truth", i32[B, H, W], the image's own mask under the same
    geometry: for pictures of data whose masks are known, never for training. Without it, masks of
    unlabeled images are not opened.
  labeled_photometry: labeled images also get a strong view's photometry.
  labeled_operations: how many of `operations.augment` each labeled image gets before it is cropped;
    RGB of 8 bits only.
  skipped: an image that cannot be used, or whose mask cannot, is noted there and replaced by the
    first of those after it (by row, the first after the last) that can: the same one in every
    process and after resuming. None: it ends the run.

  Raises:
    InputError: all settings that do not fit together, at once.
  """

  labeled: Source
  unlabeled: Source | None
  batch_size_labeled_global: int
  batch_size_unlabeled_global: int
  geometry: Geometry
  photometry: Photometry = Photometry()
  needs: Needs = Needs()
  seed: int = 0
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  unlabeled_image_labels: np.ndarray | None = None
  labeled_boxes: np.ndarray | None = None
  unlabeled_boxes: np.ndarray | None = None
  with_truth: bool = False
  labeled_photometry: bool = False
  labeled_operations: int = 0
  skipped: Skipped | None = None

  def __post_init__(self):
    problems = checks.Problems("the input pipeline cannot be built")
    if not self.labeled.has_labels:
      problems.add("labeled", got="a source without masks", remedy="give it a label_pattern")
    for role, source in (("labeled", self.labeled), ("unlabeled", self.unlabeled)):
      if source is not None and len(source) == 0:
        problems.add(role, got="no image", allowed="at least one")
    if self.needs.unlabeled and self.unlabeled is None:
      problems.add(
        "unlabeled",
        got="no source",
        allowed="a source of images",
        remedy="the method learns from unlabeled images",
      )
    for name, used in (("labeled", True), ("unlabeled", self.needs.unlabeled)):
      size = getattr(self, f"batch_size_{name}_global")
      if used and size < 1:
        problems.add(f"batch_size_{name}_global", got=size, allowed="1 or more")
    if self.needs.weak_label not in (None, "image", "boxes"):
      problems.add(
        "needs.weak_label", got=repr(self.needs.weak_label), allowed="None, 'image' or 'boxes'"
      )
    if self.with_truth and not (self.unlabeled is not None and self.unlabeled.has_labels):
      problems.add(
        "with_truth",
        got="unlabeled images without masks",
        allowed="a source with masks",
        remedy="leave it out",
      )
    if self.needs.labeled_too and self.needs.ids:
      problems.add(
        "needs.labeled_too",
        got="needs.ids as well",
        allowed="one of them: ids are rows of the unlabeled images alone",
      )
    self._check_channels(problems)
    self._check_image_labels(problems)
    self._check_boxes(problems)
    self._check_operations(problems)
    problems.raise_if_any()

  def _check_channels(self, problems: checks.Problems) -> None:
    channels = self.labeled.channels
    if self.unlabeled is not None and self.unlabeled.channels != channels:
      problems.add(
        "unlabeled",
        got=f"images of {self.unlabeled.channels} channels",
        allowed=f"{channels}, as the labeled ones",
      )
    for name in ("mean", "std"):
      if len(getattr(self, name)) != channels:
        problems.add(
          name,
          got=f"{len(getattr(self, name))} values",
          allowed=f"{channels}, one a channel",
          remedy=f"set config.data.{name}",
        )

  def _check_image_labels(self, problems: checks.Problems) -> None:
    labels = self.unlabeled_image_labels
    if labels is None:
      if self.needs.weak_label == "image":
        problems.add(
          "image-level labels of the unlabeled images",
          got="none",
          allowed="one list of classes an image; the method learns from them",
          remedy="config.data.image_labels=FILE (CSV/JSON of tags per image, or a folder of VOC XML)",
        )
    elif self.unlabeled is not None and (labels.ndim != 2 or len(labels) != len(self.unlabeled)):
      problems.add(
        "unlabeled_image_labels",
        got=f"shape {labels.shape}",
        allowed=f"a row for each of {len(self.unlabeled)} images",
      )

  def _check_boxes(self, problems: checks.Problems) -> None:
    for role, given, source in (
      ("labeled", self.labeled_boxes, self.labeled),
      ("unlabeled", self.unlabeled_boxes, self.unlabeled),
    ):
      if given is None:
        if self.needs.weak_label == "boxes" and (role == "labeled" or self.needs.unlabeled):
          problems.add(
            f"boxes of the {role} images",
            got="none",
            allowed="a list of boxes an image; the method learns from them",
            remedy="config.data.boxes=FILE (folder of VOC XML, or COCO JSON)",
          )
      elif source is not None and (
        given.ndim != 3 or given.shape[2] != 5 or len(given) != len(source)
      ):
        problems.add(
          f"{role}_boxes",
          got=f"shape {given.shape}",
          allowed=f"[{len(source)}, M, 5], a row for each image",
        )

  def _check_operations(self, problems: checks.Problems) -> None:
    where = "labeled_operations (config.views)"
    if self.labeled_operations < 0:
      problems.add(where, got=self.labeled_operations, allowed="0 or more")
    if self.labeled_operations <= 0:
      return
    if self.labeled.dtype != np.uint8 or self.labeled.channels != 3:
      got = f"images of {self.labeled.channels} channels, {np.dtype(self.labeled.dtype)}"
      problems.add(where, got=got, allowed="RGB of 8 bits", remedy="set it to 0")
    if self.needs.weak_label == "boxes":
      problems.add(
        where,
        got="a method that needs boxes, which would not turn with the images",
        remedy="set it to 0",
      )


class Feed(Iterator[dict[str, dict[str, np.ndarray]]]):
  """Endless batches in the layout of contract.Batch, made ahead of their use.

  `train_batches` makes them.

  It is to be closed, by `close` or `with`: reading ends then. One that nobody holds any more, or
  that is open when the process ends, is closed too. An error ends it as well. All methods may be
  called from any thread; a Ctrl-C gets through while a batch is waited for.
  """

  def __init__(self, streams: Mapping[str, _Stream]):
    self._feeder = _Feeder(streams)
    self._feeder.wanted.put(True)
    self._feeder.start()

  def __next__(self) -> dict[str, dict[str, np.ndarray]]:
    feeder = self._feeder
    if feeder.stopped:
      raise StopIteration
    feeder.wanted.put(True)  # the one after the one that is waited for
    made = feeder.made.get()
    if made is None or feeder.stopped:
      feeder.made.put(None)  # for whoever asks next
      raise StopIteration
    if isinstance(made, Exception):
      raise made
    return made

  def close(self) -> None:
    """Waits for the files that are being read, and begins no other.

    It waits at most a few seconds: files of a dead disk are left alone. Afterwards there are no
    more batches. Closing twice does nothing.
    """
    self._feeder.stop()
    self._feeder.join(_PATIENCE_SECONDS)

  def __enter__(self) -> Feed:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __del__(self):
    # Without waiting: the garbage collector may run anywhere, in a file's reader too.
    self._feeder.stop()


def train_batches(
  *specs: PipelineSpec, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Feed:
  """Makes endless batches from step `start_step` on.

  They have the layout of contract.Batch; close them.

  Each process gets its own contiguous rows of the global batch: process p of n the p-th n-th.
  Earlier steps are not iterated over.

  Args:
    specs: of one domain, or of several; the streams of further domains have their number in the
      name, "labeled_1".

  Raises:
    InputError: at once, batch sizes that the processes do not divide; while iterating, a file that
      cannot be used, by its path.
  """
  problems = checks.Problems("the input pipeline cannot be built")
  if not 0 <= process_index < process_count:
    problems.add("process_index", got=process_index, allowed=f"0..{process_count - 1}")
  if start_step < 0:
    problems.add("start_step", got=start_step, allowed="0 or more")
  wanted = []  # (name in the batch, spec, name, global batch)
  for number, spec in enumerate(specs):
    batch_sizes = {"labeled": spec.batch_size_labeled_global}
    if spec.needs.unlabeled:
      batch_sizes["unlabeled"] = spec.batch_size_unlabeled_global
      if spec.needs.partner:
        batch_sizes["partner"] = spec.batch_size_unlabeled_global
    wanted += [
      (f"{stream}_{number}" if number else stream, spec, stream, size)
      for stream, size in batch_sizes.items()
    ]
  for name, _, _, batch_size in wanted:
    if batch_size % process_count:
      problems.add(
        f"global batch of '{name}'",
        got=batch_size,
        allowed=f"a multiple of the {process_count} processes",
      )
  problems.raise_if_any()

  streams = {}
  for name, spec, stream, batch_size in wanted:
    rows = batch_size // process_count
    positions = tf.data.Dataset.range(start_step * rows, np.iinfo(np.int64).max).map(
      # The n-th row of this process -> its place in the stream of all processes' rows.
      lambda n, rows=rows, batch_size=batch_size: (
        n // rows * batch_size + process_index * rows + n % rows
      )
    )
    streams[name] = _stream(spec, stream, positions, rows)
  return Feed(streams)


class _Stream(NamedTuple):
  dataset: tf.data.Dataset
  loader: _Loader


class _Feeder(threading.Thread):
  """A thread that takes batches out of tf.data and alone holds its iterators.

  The destructor of such an iterator waits for the calls into Python that are under way for it,
  which need the interpreter's lock. While the interpreter is torn down no thread gets that lock any
  more, and a process would wait there for ever. Inside of one of those calls, where the garbage
  collector may run, the destructor would wait for itself. So it runs here and nowhere else: once
  the feed is stopped, at the latest by `_close_all`, before the interpreter goes.

  wanted: True for each batch to make, False for no more. A destructor may put it there at any
    moment: of Python's queues only this one allows that.
  made: the batches, maybe the error that ended them, at last None.
  """

  def __init__(self, streams: Mapping[str, _Stream]):
    # For the others Python waits before it calls `_close_all`
    super().__init__(name="feed", daemon=True)
    self.wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    self.made: queue.SimpleQueue[dict[str, dict[str, np.ndarray]] | Exception | None] = (
      queue.SimpleQueue()
    )
    self.stopped = False
    self._loaders = {name: loader for name, (_, loader) in streams.items()}
    self._iterators = {name: dataset.as_numpy_iterator() for name, (dataset, _) in streams.items()}

  def stop(self) -> None:
    """Lets reading end, and returns at once."""
    self.stopped = True
    self._end_reading()
    self.wanted.put(False)

  def run(self):
    while self.wanted.get() and not self.stopped:
      made = self._batch()
      self.made.put(made)
      if isinstance(made, Exception):
        break
    self._end_reading()
    self._iterators.clear()
    self.made.put(None)

  def _end_reading(self) -> None:
    for loader in self._loaders.values():
      loader.stopped = True

  def _batch(self) -> dict[str, dict[str, np.ndarray]] | Exception:
    batch = {}
    for name, iterator in self._iterators.items():
      try:
        batch[name] = next(iterator)
      except Exception as error:  # raised where the batch is asked for
        # What the source said, without TensorFlow's account of how it got there. An error of
        # TensorFlow's own is freed of the frames that it went through, as they hold the iterator.
        error.__cause__ = error.__context__ = None
        return self._loaders[name].first_failure() or error.with_traceback(None)
    return batch


@atexit.register
def _close_all() -> None:
  """Stops all feeders and waits for them at exit; see `_Feeder`."""
  feeders = [thread for thread in threading.enumerate() if isinstance(thread, _Feeder)]
  for feeder in feeders:
    feeder.stop()
  end = time.monotonic() + _PATIENCE_SECONDS
  for feeder in feeders:
    feeder.join(max(0.0, end - time.monotonic()))


def stream_seed(seed: int, stream: str) -> int:
  """Derives a number in 0 .. 2^63 - 1 for a named stream.

  It is the same in every process and release.
  """
  digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
  return int.from_bytes(digest[:8], "big") >> 1


def example_row(position: tf.Tensor, num_examples: int, seed: int, stream: str) -> tf.Tensor:
  """Returns the row that stands at a position (i64[]) of a stream.

  Each epoch of num_examples positions is a permutation of its own.
  """
  epoch, place = position // num_examples, position % num_examples
  order_seed = tf.stack([tf.constant(stream_seed(seed, f"{stream}/order"), tf.int64), epoch])
  return tf.random.experimental.index_shuffle(
    place, order_seed, tf.constant(num_examples - 1, tf.int64)
  )


def _stream(spec: PipelineSpec, stream: str, positions: tf.data.Dataset, rows: int) -> _Stream:
  examples = _labeled_examples(spec) if stream == "labeled" else _unlabeled_examples(spec, stream)
  loader = _Loader(examples, spec.skipped)
  geometry_seed = tf.constant(stream_seed(spec.seed, f"{stream}/geometry"), tf.int64)
  photometry_seed = tf.constant(stream_seed(spec.seed, f"{stream}/photometry"), tf.int64)
  num_photometries = (
    int(spec.labeled_photometry) if stream == "labeled" else spec.needs.strong_views
  )
  crop = dict(
    crop_size=spec.geometry.crop_size,
    mean=spec.mean,
    std=spec.std,
    convention=spec.geometry.convention,
  )
  wanted = {"weak", "valid", "strong", "label", "truth", "boxes"} | (
    {"id", "flip", "window"} if spec.needs.ids else set()
  )
  all_boxes = None if examples.boxes is None else tf.constant(examples.boxes, tf.float32)

  def example(position: tf.Tensor) -> dict[str, tf.Tensor]:
    row = example_row(position, len(examples.source), spec.seed, stream)
    loaded = loader(position, row)
    row = loaded.pop("row")
    image, image_label = loaded.pop("image"), loaded.pop("image_label", None)
    draws = geometry_ops.draw(
      spec.geometry, tf.shape(image)[:2], tf.stack([geometry_seed, position])
    )
    photometry_draws = []
    if num_photometries:
      photometry_draws = photometry_ops.draw(
        spec.photometry, num_photometries, tf.stack([photometry_seed, position])
      )
    options = crop | dict(
      draws=draws, boxes=None if all_boxes is None else all_boxes[row], photometry=spec.photometry
    )
    if stream == "labeled":
      made = views.labeled_view(
        image, loaded["label"], photometry_draws=next(iter(photometry_draws), None), **options
      )
    else:
      made = views.unlabeled_views(image, photometry_draws=photometry_draws, **loaded, **options)
      made["id"] = tf.cast(row, tf.int32)
      made = {name: value for name, value in made.items() if name in wanted}
    return made if image_label is None else made | {"image_label": image_label}

  options = tf.data.Options()
  options.deterministic = True
  options.autotune.enabled = False
  options.threading.private_threadpool_size = _NUM_WORKERS
  dataset = (
    positions.map(example, num_parallel_calls=_NUM_WORKERS)
    .batch(rows, drop_remainder=True)
    .prefetch(1)
    .with_options(options)
  )
  return _Stream(dataset, loader)


class _Examples(NamedTuple):
  """The examples from which a stream draws.

  read: (position, row) -> arrays by name: "image" [h, w, C], "label" and "truth" uint8 [h, w],
    "image_label" f32[K]; raises _Unusable.
  specs: of the arrays that are read, by name.
  boxes: f32[N, M, 5] of the images by row, or None.
  """

  source: Source
  read: Callable[[int, int], dict[str, np.ndarray]]
  specs: dict[str, tf.TensorSpec]
  boxes: np.ndarray | None


def _specs(spec: PipelineSpec, source: Source, *masks: str) -> dict[str, tf.TensorSpec]:
  specs = {"image": tf.TensorSpec([None, None, source.channels], source.dtype)}
  specs |= {name: tf.TensorSpec([None, None], tf.uint8) for name in masks}
  if spec.needs.weak_label == "image":
    specs["image_label"] = tf.TensorSpec([spec.unlabeled_image_labels.shape[1]], tf.float32)
  return specs


def _labeled_examples(spec: PipelineSpec) -> _Examples:
  source = spec.labeled
  seed = stream_seed(spec.seed, "labeled/operations")
  border = tuple(int(255 * value) for value in spec.mean)

  def read(position, row):
    image = _read(source, "image", row)
    label = _read(source, "label", row, of=image)
    found = {}
    if spec.needs.weak_label == "image":
      found["image_label"] = _classes_in(label, spec)  # before anything is moved out of the image
    if spec.labeled_operations:
      rng = np.random.default_rng([seed, position])
      image, label = operations.augment(image, label, spec.labeled_operations, rng, border)
    return found | {"image": image, "label": label}

  boxes_of_rows = spec.labeled_boxes if spec.needs.weak_label == "boxes" else None
  return _Examples(source, read, _specs(spec, source, "label"), boxes_of_rows)


def _unlabeled_examples(spec: PipelineSpec, stream: str) -> _Examples:
  labeled, unlabeled = spec.labeled, spec.unlabeled
  source, num_labeled, rest = unlabeled, 0, np.arange(len(unlabeled))
  if spec.needs.labeled_too:
    named = set(labeled.ids)
    rest = np.array([row for row in rest if unlabeled.ids[row] not in named], int)
    source, num_labeled = labeled, len(labeled)
    if len(rest):
      source = Joined(labeled, Subset(unlabeled, [unlabeled.ids[row] for row in rest]))
  image_labels = spec.unlabeled_image_labels
  with_truth = spec.with_truth and stream == "unlabeled"

  def read(position, row):
    image = _read(source, "image", row)
    found = {"image": image}
    if spec.needs.labeled_too:
      is_labeled = row < num_labeled
      found["label"] = (
        _read(source, "label", row, of=image)
        if is_labeled
        else np.full(image.shape[:2], IGNORE_LABEL, np.uint8)
      )
    if with_truth:
      found["truth"] = _read(source, "label", row, of=image)
    if spec.needs.weak_label == "image":
      given = row >= num_labeled
      found["image_label"] = (
        np.float32(image_labels[rest[row - num_labeled]])
        if given
        else _classes_in(found["label"], spec)
      )
    return found

  boxes_of_rows = None
  if spec.needs.weak_label == "boxes":
    boxes_of_rows = boxes.pad_boxes(
      [*spec.labeled_boxes[:num_labeled], *spec.unlabeled_boxes[rest]]
    )
  masks = [
    name
    for name, wanted in {"label": spec.needs.labeled_too, "truth": with_truth}.items()
    if wanted
  ]
  return _Examples(source, read, _specs(spec, source, *masks), boxes_of_rows)


def _classes_in(label: np.ndarray, spec: PipelineSpec) -> np.ndarray:
  """Marks every class of which the mask holds a pixel: f32[K], 1 if it does."""
  counts = np.bincount(label.ravel(), minlength=256)[: spec.unlabeled_image_labels.shape[1]]
  return (counts > 0).astype(np.float32)


class _Unusable(Exception):
  """An image or mask that the source cannot give.

  path: of its file. error: what the source raised.
  """

  def __init__(self, path: str, error: checks.InputError | OSError):
    super().__init__(path)
    self.path, self.error = path, error


def _path(source: Source, what: str, row: int) -> str:
  """Returns the path of the "image" or the "label" of a row.

  The id in a source without files.
  """
  path_of = getattr(source, f"{what}_path", None)
  return str(path_of(row)) if path_of else source.ids[row]


def _read(source: Source, what: str, row: int, of: np.ndarray | None = None) -> np.ndarray:
  """Reads the "image" or the "label" of a row.

  A label `of` the image that is given must have its size.

  Raises:
    _Unusable: whatever a user's file can cause.
  """
  try:
    pixels = getattr(source, what)(row)
    if of is not None and pixels.shape != of.shape[:2]:
      _raise_other_size(source, row, of, pixels)
    return pixels
  except (checks.InputError, OSError) as error:
    raise _Unusable(_path(source, what, row), error) from error


def _raise_other_size(source: Source, row: int, image: np.ndarray, label: np.ndarray) -> NoReturn:
  problems = checks.Problems(f"cannot use mask {_path(source, 'label', row)}")
  problems.add(
    "height x width",
    got=f"{label.shape[0]} x {label.shape[1]}",
    allowed=f"{image.shape[0]} x {image.shape[1]}, as its image {_path(source, 'image', row)}",
    remedy="one of the two files changed after they were checked: store both in one size and run the same command again",
  )
  problems.raise_if_any()


class _Loader:
  """A reader of examples inside a tf.data graph that remembers errors.

  The errors are those that a source raised, which TensorFlow would turn into text.

  stopped: set it when nobody will look at them any more, and no further file is read.
  """

  def __init__(self, examples: _Examples, skipped: Skipped | None):
    self.stopped = False
    self._examples = examples
    self._skipped = skipped
    self._failures: dict[int, Exception] = {}
    self._lock = threading.Lock()

  def __call__(self, position: tf.Tensor, row: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns the arrays of `_Examples.read`, by name, and "row" i64[].

    The row is another one where that of `row` is skipped.
    """
    specs = self._examples.specs | {"row": tf.TensorSpec([], tf.int64)}
    loaded = tf.numpy_function(self._load, (position, row), [spec.dtype for spec in specs.values()])
    return {
      name: tf.ensure_shape(tensor, spec.shape)
      for (name, spec), tensor in zip(specs.items(), loaded, strict=True)
    }

  def first_failure(self) -> Exception | None:
    with self._lock:
      return self._failures[min(self._failures)] if self._failures else None

  def _load(self, position: np.int64, row: np.int64) -> list[np.ndarray]:
    try:
      row, found = self._usable(int(position), int(row))
      return [*(found[name] for name in self._examples.specs), np.int64(row)]
    except Exception as error:
      with self._lock:
        self._failures[int(position)] = error
      raise

  def _usable(self, position: int, row: int) -> tuple[int, dict[str, np.ndarray]]:
    """Finds the first row from `row` on that can be used, and reads it.

    Once stopped, returns something of the right form.
    """
    count = len(self._examples.source)
    for candidate in (number % count for number in range(row, row + count)):
      if self.stopped:  # no exception: TensorFlow would print it
        return row, {
          name: np.zeros([n or 1 for n in spec.shape], spec.dtype.name)
          for name, spec in self._examples.specs.items()
        }
      try:
        return candidate, self._examples.read(position, candidate)
      except _Unusable as unusable:
        if self._skipped is None:
          raise unusable.error from None
        self._skipped.add(unusable.path, str(unusable.error))
        last = unusable.error
    problems = checks.Problems("there is nothing to train on")
    problems.add(
      "images",
      got=f"{count} of {count} that cannot be used, the last: {last}",
      allowed="one that can",
    )
    problems.raise_if_any()
