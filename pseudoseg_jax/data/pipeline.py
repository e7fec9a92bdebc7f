"""Training batches: an endless, restartable stream that is a pure function of (seed, position).

  position -> (epoch, place in the epoch's shuffle) -> row -> load -> geometry -> views

Every random draw is seeded by (seed, stream name, position). So resuming at step s needs only s, and one process or eight
feed the same global batches. Labeled, unlabeled and partner streams have orders and draws of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import geometry as geometry_ops
from pseudoseg_jax.data import photometry as photometry_ops
from pseudoseg_jax.data import views
from pseudoseg_jax.data.geometry import Geometry
from pseudoseg_jax.data.photometry import IMAGENET_MEAN, IMAGENET_STD, Photometry
from pseudoseg_jax.data.sources import Source

# TensorFlow only feeds; on an accelerator it would take the memory that JAX needs.
tf.config.set_visible_devices([], "GPU")

_NUM_WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class PipelineSpec:
  """What training batches are made of.

  labeled: a source with masks. unlabeled: a source of which only images are read; None where the method needs none.
  batch_size_labeled_global, batch_size_unlabeled_global: images a step over all processes.
  needs: what the method wants besides labeled images (`Method.needs`).
  mean, std: of values in [0, 1], one a channel.
  unlabeled_image_labels: f32[N, K], 0 and 1 for each of the N unlabeled images (`tags.read_tags`); None for no such labels.
  labeled_boxes, unlabeled_boxes: f32[N, M, 5], the boxes of each of the N images as `geometry.crop_boxes` says, M the most that
    one has, rows without a box of class -1; None for no boxes.
  with_truth: "unlabeled" also carries "truth", i32[B, H, W], the image's own mask under the same geometry: for pictures of data
    whose masks are known, never for training. Without it, masks of unlabeled images are not opened.

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

  def __post_init__(self):
    problems = checks.Problems("the input pipeline cannot be built")
    if not self.labeled.has_labels:
      problems.add("labeled", got="a source without masks", remedy="give it a label_pattern")
    for role, source in (("labeled", self.labeled), ("unlabeled", self.unlabeled)):
      if source is not None and len(source) == 0:
        problems.add(role, got="no image", allowed="at least one")
    if self.needs.unlabeled and self.unlabeled is None:
      problems.add("unlabeled", got="no source", allowed="a source of images", remedy="the method learns from unlabeled images")
    for name, used in (("labeled", True), ("unlabeled", self.needs.unlabeled)):
      size = getattr(self, f"batch_size_{name}_global")
      if used and size < 1:
        problems.add(f"batch_size_{name}_global", got=size, allowed="1 or more")
    if self.needs.weak_label not in (None, "image", "boxes"):
      problems.add("needs.weak_label", got=repr(self.needs.weak_label), allowed="None, 'image' or 'boxes'")
    if self.with_truth and not (self.unlabeled is not None and self.unlabeled.has_labels):
      problems.add("with_truth", got="unlabeled images without masks", allowed="a source with masks", remedy="leave it out")
    self._check_channels(problems)
    self._check_image_labels(problems)
    self._check_boxes(problems)
    problems.raise_if_any()

  def _check_channels(self, problems: checks.Problems) -> None:
    channels = self.labeled.channels
    if self.unlabeled is not None and self.unlabeled.channels != channels:
      problems.add("unlabeled", got=f"images of {self.unlabeled.channels} channels", allowed=f"{channels}, as the labeled ones")
    for name in ("mean", "std"):
      if len(getattr(self, name)) != channels:
        problems.add(
          name, got=f"{len(getattr(self, name))} values", allowed=f"{channels}, one a channel", remedy=f"set config.data.{name}"
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
        "unlabeled_image_labels", got=f"shape {labels.shape}", allowed=f"a row for each of {len(self.unlabeled)} images"
      )

  def _check_boxes(self, problems: checks.Problems) -> None:
    for role, boxes, source in (
      ("labeled", self.labeled_boxes, self.labeled), ("unlabeled", self.unlabeled_boxes, self.unlabeled)
    ):  # fmt: skip
      if boxes is None:
        if self.needs.weak_label == "boxes":
          problems.add(
            f"boxes of the {role} images",
            got="none",
            allowed="a list of boxes an image; the method learns from them",
            remedy="config.data.boxes=FILE (folder of VOC XML, or COCO JSON)",
          )
      elif source is not None and (boxes.ndim != 3 or boxes.shape[2] != 5 or len(boxes) != len(source)):
        problems.add(f"{role}_boxes", got=f"shape {boxes.shape}", allowed=f"[{len(source)}, M, 5], a row for each image")


def train_batches(
  spec: PipelineSpec, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
  """Endless batches from step `start_step` on, in the layout of contract.Batch.

  Each process gets its own contiguous rows of the global batch: process p of n the p-th n-th. Earlier steps are not
  iterated over.

  Raises:
    InputError: at once, batch sizes that the processes do not divide; while iterating, a file that cannot be used, by its path.
  """
  problems = checks.Problems("the input pipeline cannot be built")
  if not 0 <= process_index < process_count:
    problems.add("process_index", got=process_index, allowed=f"0..{process_count - 1}")
  if start_step < 0:
    problems.add("start_step", got=start_step, allowed="0 or more")
  batch_sizes = {"labeled": spec.batch_size_labeled_global}
  if spec.needs.unlabeled:
    batch_sizes["unlabeled"] = spec.batch_size_unlabeled_global
    if spec.needs.partner:
      batch_sizes["partner"] = spec.batch_size_unlabeled_global
  for stream, batch_size in batch_sizes.items():
    if batch_size % process_count:
      problems.add(f"global batch of '{stream}'", got=batch_size, allowed=f"a multiple of the {process_count} processes")
  problems.raise_if_any()

  streams = {}
  for stream, batch_size in batch_sizes.items():
    rows = batch_size // process_count
    positions = tf.data.Dataset.range(start_step * rows, np.iinfo(np.int64).max).map(
      # The n-th row of this process -> its place in the stream of all processes' rows.
      lambda n, rows=rows, batch_size=batch_size: n // rows * batch_size + process_index * rows + n % rows
    )
    streams[stream] = _stream(spec, stream, positions, rows)
  return _zip(streams)


def stream_seed(seed: int, stream: str) -> int:
  """A number in 0 .. 2^63 - 1 for a named stream, the same in every process and release."""
  digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
  return int.from_bytes(digest[:8], "big") >> 1


def example_row(position: tf.Tensor, num_examples: int, seed: int, stream: str) -> tf.Tensor:
  """The row that stands at a position (i64[]) of a stream; each epoch of num_examples positions is a permutation of its own."""
  epoch, place = position // num_examples, position % num_examples
  order_seed = tf.stack([tf.constant(stream_seed(seed, f"{stream}/order"), tf.int64), epoch])
  return tf.random.experimental.index_shuffle(place, order_seed, tf.constant(num_examples - 1, tf.int64))


def _stream(spec: PipelineSpec, stream: str, positions: tf.data.Dataset, rows: int) -> Iterator[dict[str, np.ndarray]]:
  source = spec.labeled if stream == "labeled" else spec.unlabeled
  with_truth = spec.with_truth and stream == "unlabeled"
  loader = _Loader(source, with_label=stream == "labeled" or with_truth)
  geometry_seed = tf.constant(stream_seed(spec.seed, f"{stream}/geometry"), tf.int64)
  photometry_seed = tf.constant(stream_seed(spec.seed, f"{stream}/photometry"), tf.int64)
  crop = dict(crop_size=spec.geometry.crop_size, mean=spec.mean, std=spec.std, convention=spec.geometry.convention)
  wanted = {"weak", "valid", "strong", "truth", "boxes"} | ({"id", "flip", "window"} if spec.needs.ids else set())
  all_image_labels = all_boxes = None
  if spec.needs.weak_label == "image":
    all_image_labels = tf.constant(spec.unlabeled_image_labels, tf.float32)
  if spec.needs.weak_label == "boxes":
    all_boxes = tf.constant(spec.labeled_boxes if stream == "labeled" else spec.unlabeled_boxes, tf.float32)

  def example(position: tf.Tensor) -> dict[str, tf.Tensor]:
    row = example_row(position, len(source), spec.seed, stream)
    loaded = loader(position, row)
    draws = geometry_ops.draw(spec.geometry, tf.shape(loaded[0])[:2], tf.stack([geometry_seed, position]))
    boxes = None if all_boxes is None else all_boxes[row]
    if stream == "labeled":
      image, label = loaded
      return views.labeled_view(image, label, boxes=boxes, draws=draws, **crop)
    photometry_draws = []
    if spec.needs.strong_views:
      photometry_draws = photometry_ops.draw(spec.photometry, spec.needs.strong_views, tf.stack([photometry_seed, position]))
    truth = loaded[1] if with_truth else None
    photometric = dict(photometry=spec.photometry, photometry_draws=photometry_draws)
    made = views.unlabeled_views(loaded[0], truth=truth, boxes=boxes, draws=draws, **photometric, **crop)
    made["id"] = tf.cast(row, tf.int32)
    made = {name: value for name, value in made.items() if name in wanted}
    return made if all_image_labels is None else made | {"image_label": all_image_labels[row]}

  options = tf.data.Options()
  options.deterministic = True
  options.autotune.enabled = False
  options.threading.private_threadpool_size = _NUM_WORKERS
  dataset = (
    positions.map(example, num_parallel_calls=_NUM_WORKERS).batch(rows, drop_remainder=True).prefetch(2).with_options(options)
  )
  return _batches(dataset, loader)


def _batches(dataset: tf.data.Dataset, loader: _Loader) -> Iterator[dict[str, np.ndarray]]:
  batches = dataset.as_numpy_iterator()
  while True:
    try:
      batch = next(batches)
    except tf.errors.OpError:
      failure = loader.first_failure()
      if failure is None:
        raise
      raise failure from None  # what the source said, without TensorFlow's account of how it got there
    yield batch


def _zip(streams: dict[str, Iterator[dict[str, np.ndarray]]]) -> Iterator[dict[str, dict[str, np.ndarray]]]:
  while True:
    yield {name: next(stream) for name, stream in streams.items()}


class _Loader:
  """Reads examples inside a tf.data graph, and remembers what a source raised, which TensorFlow would turn into text."""

  def __init__(self, source: Source, *, with_label: bool):
    self._source = source
    self._with_label = with_label
    self._failures: dict[int, Exception] = {}
    self._lock = threading.Lock()

  def __call__(self, position: tf.Tensor, row: tf.Tensor) -> list[tf.Tensor]:
    """(position, row) -> [image [h, w, C]] or [image, label uint8 [h, w]]; the label is read only where wanted."""
    dtypes = [tf.as_dtype(self._source.dtype), tf.uint8]
    loaded = tf.numpy_function(self._load, (position, row), dtypes[: 1 + self._with_label])
    for tensor, shape in zip(loaded, ((None, None, self._source.channels), (None, None))):
      tensor.set_shape(shape)
    return loaded

  def first_failure(self) -> Exception | None:
    with self._lock:
      return self._failures[min(self._failures)] if self._failures else None

  def _load(self, position: np.int64, row: np.int64) -> list[np.ndarray]:
    try:
      row = int(row)
      return [self._source.image(row), self._source.label(row)] if self._with_label else [self._source.image(row)]
    except Exception as error:
      with self._lock:
        self._failures[int(position)] = error
      raise
