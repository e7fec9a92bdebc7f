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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL, Needs
from pseudoseg_jax.data import boxes, operations, views
from pseudoseg_jax.data import geometry as geometry_ops
from pseudoseg_jax.data import photometry as photometry_ops
from pseudoseg_jax.data.geometry import Geometry
from pseudoseg_jax.data.photometry import IMAGENET_MEAN, IMAGENET_STD, Photometry
from pseudoseg_jax.data.sources import Joined, Source, Subset

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
  labeled_photometry: labeled images also get a strong view's photometry.
  labeled_operations: how many of `operations.augment` each labeled image gets before it is cropped; RGB of 8 bits only.

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
    if self.needs.labeled_too and self.needs.ids:
      problems.add(
        "needs.labeled_too", got="needs.ids as well", allowed="one of them: ids are rows of the unlabeled images alone"
      )
    self._check_channels(problems)
    self._check_image_labels(problems)
    self._check_boxes(problems)
    self._check_operations(problems)
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
    for role, given, source in (
      ("labeled", self.labeled_boxes, self.labeled), ("unlabeled", self.unlabeled_boxes, self.unlabeled)
    ):  # fmt: skip
      if given is None:
        if self.needs.weak_label == "boxes" and (role == "labeled" or self.needs.unlabeled):
          problems.add(
            f"boxes of the {role} images",
            got="none",
            allowed="a list of boxes an image; the method learns from them",
            remedy="config.data.boxes=FILE (folder of VOC XML, or COCO JSON)",
          )
      elif source is not None and (given.ndim != 3 or given.shape[2] != 5 or len(given) != len(source)):
        problems.add(f"{role}_boxes", got=f"shape {given.shape}", allowed=f"[{len(source)}, M, 5], a row for each image")

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
      problems.add(where, got="a method that needs boxes, which would not turn with the images", remedy="set it to 0")


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
  examples = _labeled_examples(spec) if stream == "labeled" else _unlabeled_examples(spec, stream)
  loader = _Loader(examples)
  geometry_seed = tf.constant(stream_seed(spec.seed, f"{stream}/geometry"), tf.int64)
  photometry_seed = tf.constant(stream_seed(spec.seed, f"{stream}/photometry"), tf.int64)
  num_photometries = int(spec.labeled_photometry) if stream == "labeled" else spec.needs.strong_views
  crop = dict(crop_size=spec.geometry.crop_size, mean=spec.mean, std=spec.std, convention=spec.geometry.convention)
  wanted = {"weak", "valid", "strong", "label", "truth", "boxes"} | ({"id", "flip", "window"} if spec.needs.ids else set())
  all_boxes = None if examples.boxes is None else tf.constant(examples.boxes, tf.float32)

  def example(position: tf.Tensor) -> dict[str, tf.Tensor]:
    row = example_row(position, len(examples.source), spec.seed, stream)
    loaded = loader(position, row)
    image, image_label = loaded.pop("image"), loaded.pop("image_label", None)
    draws = geometry_ops.draw(spec.geometry, tf.shape(image)[:2], tf.stack([geometry_seed, position]))
    photometry_draws = []
    if num_photometries:
      photometry_draws = photometry_ops.draw(spec.photometry, num_photometries, tf.stack([photometry_seed, position]))
    options = crop | dict(draws=draws, boxes=None if all_boxes is None else all_boxes[row], photometry=spec.photometry)
    if stream == "labeled":
      made = views.labeled_view(image, loaded["label"], photometry_draws=next(iter(photometry_draws), None), **options)
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


class _Examples(NamedTuple):
  """What a stream draws from.

  read: (position, row) -> arrays by name: "image" [h, w, C], "label" and "truth" uint8 [h, w], "image_label" f32[K].
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
    image, label = source.image(row), source.label(row)
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
    found = {"image": source.image(row)}
    if spec.needs.labeled_too:
      unknown = np.full(found["image"].shape[:2], IGNORE_LABEL, np.uint8)
      found["label"] = labeled.label(row) if row < num_labeled else unknown
    if with_truth:
      found["truth"] = source.label(row)
    if spec.needs.weak_label == "image":
      given = row >= num_labeled
      found["image_label"] = np.float32(image_labels[rest[row - num_labeled]]) if given else _classes_in(found["label"], spec)
    return found

  boxes_of_rows = None
  if spec.needs.weak_label == "boxes":
    boxes_of_rows = boxes.pad_boxes([*spec.labeled_boxes[:num_labeled], *spec.unlabeled_boxes[rest]])
  masks = [name for name, wanted in {"label": spec.needs.labeled_too, "truth": with_truth}.items() if wanted]
  return _Examples(source, read, _specs(spec, source, *masks), boxes_of_rows)


def _classes_in(label: np.ndarray, spec: PipelineSpec) -> np.ndarray:
  """f32[K]: 1 for every class of which the mask holds a pixel."""
  counts = np.bincount(label.ravel(), minlength=256)[: spec.unlabeled_image_labels.shape[1]]
  return (counts > 0).astype(np.float32)


class _Loader:
  """Reads examples inside a tf.data graph, and remembers what a source raised, which TensorFlow would turn into text."""

  def __init__(self, examples: _Examples):
    self._examples = examples
    self._failures: dict[int, Exception] = {}
    self._lock = threading.Lock()

  def __call__(self, position: tf.Tensor, row: tf.Tensor) -> dict[str, tf.Tensor]:
    """The arrays of `_Examples.read`, by name."""
    specs = self._examples.specs
    loaded = tf.numpy_function(self._load, (position, row), [spec.dtype for spec in specs.values()])
    return {name: tf.ensure_shape(tensor, spec.shape) for (name, spec), tensor in zip(specs.items(), loaded, strict=True)}

  def first_failure(self) -> Exception | None:
    with self._lock:
      return self._failures[min(self._failures)] if self._failures else None

  def _load(self, position: np.int64, row: np.int64) -> list[np.ndarray]:
    try:
      found = self._examples.read(int(position), int(row))
      return [found[name] for name in self._examples.specs]
    except Exception as error:
      with self._lock:
        self._failures[int(position)] = error
      raise
