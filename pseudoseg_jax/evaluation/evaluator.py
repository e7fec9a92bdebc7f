"""Scores predictors on a set of images: every image counts once, whatever the batch size, devices or processes."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL, Predictor, PyTree, State
from pseudoseg_jax.evaluation import inference
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.evaluation.progress import Progress
from pseudoseg_jax.ops import confusion
from pseudoseg_jax.ops.confusion import Scores

if TYPE_CHECKING:
  from pseudoseg_jax.data.classes import Classes
  from pseudoseg_jax.data.sources import Source

log = logging.getLogger("pseudoseg_jax")

_FEW_CANVASES = 8  # compiled for without a word
_BATCHES_AHEAD = 2  # read while the device computes
_RESULTS_BEHIND = 2  # left on the device, so that waiting for one never idles it


def make_evaluator(
  predictors: Mapping[str, Predictor],
  source: Source,
  classes: Classes,
  *,
  protocol: Protocol,
  mean: Sequence[float],
  std: Sequence[float],
  batch_size: int,
  mesh: Mesh | None = None,
  with_labels: bool = True,
) -> Evaluator:
  """An evaluator of named predictors over a source; it compiles once per canvas (see `inference`) and keeps that for every call.

  Args:
    predictors: name -> (state, images f32[B, H, W, C]) -> logits f32[B, H, W, K], as in `contract.Method`.
    source: images with labels, of any sizes.
    protocol: how an image is shown to the network. Images of many sizes want "slide" or a `pad_multiple`.
    mean, std: of the source's C channels in [0, 1].
    batch_size: images of all devices and processes together; rounded up to a multiple of the mesh's devices.
    mesh: with an axis "data"; the state handed in must be replicated over it. None: wherever the state is.
    with_labels: False: nothing will be scored, only predicted, and the source need have no labels.

  Raises:
    InputError: no images, no labels, an unusable protocol, mean or std of other channels.
  """
  problems = checks.Problems("the predictors cannot be evaluated")
  if not len(source):
    problems.add("evaluated images", got="none", allowed="at least one")
  if with_labels and not source.has_labels:
    problems.add("evaluated images", got="no labels", allowed="images with labels", remedy="give the source a label pattern")
  if batch_size < 1:
    problems.add("batch_size", got=batch_size, allowed="1 or more")
  for name, values in {"mean": mean, "std": std}.items():
    if len(values) != source.channels:
      problems.add(name, got=tuple(values), allowed=f"{source.channels} values, as the images have channels")
  problems.raise_if_any()
  inference.check_protocol(protocol)

  if mesh is not None:
    batch_size += -batch_size % mesh.shape["data"]
  batches = _plan([source.size(row) for row in range(len(source))], protocol, batch_size)
  count, label = _compiled(predictors, len(classes.names), protocol, mean, std, mesh)
  return Evaluator(count, label, names=tuple(predictors), source=source, protocol=protocol, batches=batches, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class _Batch:
  """rows: of the source, None on padding. canvas: (height, width) that all of them are laid on."""

  rows: tuple[int | None, ...]
  canvas: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Made by `make_evaluator`. With several processes, every one must make the same calls; all get the same answers.

  Calling it with a state returns {predictor: Scores}.
  """

  count: Callable  # (state, images, labels, sizes) -> {predictor: (confusion matrix, ids)}
  label: Callable  # likewise -> {predictor: (ids, confidence)}; looks at no labels
  names: tuple[str, ...]  # of the predictors, in their order: the jitted function returns them sorted
  source: Source
  protocol: Protocol
  batches: tuple[_Batch, ...]
  mesh: Mesh | None

  def __call__(self, state: State) -> dict[str, Scores]:
    """{predictor: Scores} of a state over all images.

    Raises:
      InputError: an image or label cannot be used; names the file.
    """
    canvases = len({batch.canvas for batch in self.batches})
    if canvases > _FEW_CANVASES:
      log.info("%d image sizes: the network is compiled for each of them; a pad_multiple makes them fewer", canvases)
    # Added up in int64 on the host: a large set has more pixels than an int32 can count.
    totals: dict[str, np.ndarray] = {}
    progress = Progress(len(self.source), log.info)
    for batch, results in self._run(self.count, state, self.batches, with_labels=True):
      for name, (matrix, _) in results.items():
        totals[name] = totals.get(name, 0) + np.asarray(matrix, np.int64)
      progress.more(sum(row is not None for row in batch.rows))
    absent_classes = self.protocol.absent_classes
    return {name: confusion.scores(totals[name], absent_classes=absent_classes) for name in self.names}

  def predictions(self, state: State, rows: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """{predictor: [uint8[h, w] class ids of each row]}, with what is compiled already; labels are not read.

    Where the protocol does not look ("center_crop"), ids are IGNORE_LABEL.
    """
    wanted: dict[str, dict[int, np.ndarray]] = {}
    sizes = {row: self.source.size(row) for row in rows}
    batches = _plan(list(sizes.values()), self.protocol, len(self.batches[0].rows), rows=list(sizes))
    for batch, results in self._run(self.count, state, batches, with_labels=False):
      for name, (_, ids) in results.items():
        for row, image_ids in zip(batch.rows, np.asarray(ids), strict=True):
          if row is not None:
            height, width = sizes[row]
            wanted.setdefault(name, {})[row] = image_ids[:height, :width]
    return {name: [wanted[name][row] for row in rows] for name in self.names}

  def stream(self, state: State, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Each of the rows with {predictor: (class ids uint8[h, w], confidence uint8[h, w])}, in an order of its own.

    Labels are not read. Confidence is 255 times the greatest class probability, rounded: of the mean probabilities over windows,
    flips and scales, or the softmax of the mean logits. Where the protocol does not look, ids are IGNORE_LABEL and confidence 0.
    """
    batches = _plan([self.source.size(row) for row in rows], self.protocol, len(self.batches[0].rows), rows=rows)
    for batch, results in self._run(self.label, state, batches, with_labels=False):
      results = {name: tuple(map(np.asarray, results[name])) for name in self.names}
      for index, row in enumerate(batch.rows):
        if row is not None:
          height, width = self.source.size(row)
          yield row, {name: tuple(plane[index, :height, :width] for plane in planes) for name, planes in results.items()}

  def _run(self, compute, state, batches, *, with_labels: bool) -> Iterator[tuple[_Batch, PyTree]]:
    """Reads ahead in threads, feeds the device without waiting for it, and yields results a few batches later."""
    threads = concurrent.futures.ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 1))
    reading: collections.deque = collections.deque()
    computing: collections.deque = collections.deque()
    try:
      for batch in [*batches, *[None] * _BATCHES_AHEAD]:
        if batch is not None:
          loads = [threads.submit(self._load, row, with_labels) for row in self._local_rows(batch.rows)]
          reading.append((batch, loads))
        if reading and (batch is None or len(reading) > _BATCHES_AHEAD):
          ready, loads = reading.popleft()
          computing.append((ready, compute(state, *self._to_devices(ready, [load.result() for load in loads]))))
        if len(computing) > _RESULTS_BEHIND:
          yield computing.popleft()
      yield from computing
    finally:
      threads.shutdown(cancel_futures=True)

  def _local_rows(self, rows: tuple) -> list:
    """Those rows of a global batch that this process's devices hold."""
    if self.mesh is None:
      return list(rows)
    sharding = NamedSharding(self.mesh, PartitionSpec("data"))
    indices = sharding.addressable_devices_indices_map((len(rows),)).values()
    return [row for start, stop, _ in sorted(index[0].indices(len(rows)) for index in indices) for row in rows[start:stop]]

  def _load(self, row: int | None, with_labels: bool) -> tuple[np.ndarray, np.ndarray]:
    """One image and its label; padding is an image of one pixel that has no label."""
    if row is None:
      return np.zeros((1, 1, self.source.channels), self.source.dtype), np.full((1, 1), IGNORE_LABEL, np.uint8)
    image = self.source.image(row)
    label = self.source.label(row) if with_labels else np.full(image.shape[:2], IGNORE_LABEL, np.uint8)
    expected = tuple(self.source.size(row))
    if image.shape[:2] != expected or label.shape != expected:
      problems = checks.Problems(f"cannot evaluate image '{self.source.ids[row]}'")
      problems.add("height x width", got=f"image {image.shape[:2]}, label {label.shape}", allowed=f"both {expected}")
      problems.raise_if_any()
    return image, label

  def _to_devices(self, batch: _Batch, loaded) -> tuple:
    images = np.zeros((len(loaded), *batch.canvas, self.source.channels), self.source.dtype)
    labels = np.full((len(loaded), *batch.canvas), IGNORE_LABEL, np.uint8)
    sizes = np.zeros((len(loaded), 2), np.int32)
    for index, (image, label) in enumerate(loaded):
      sizes[index] = height, width = label.shape
      images[index, :height, :width] = image
      labels[index, :height, :width] = label
    if self.mesh is None:
      return images, labels, sizes
    sharding = NamedSharding(self.mesh, PartitionSpec("data"))
    whole = len(batch.rows)
    return tuple(jax.make_array_from_process_local_data(sharding, x, (whole, *x.shape[1:])) for x in (images, labels, sizes))


def _plan(sizes, protocol, batch_size, rows=None) -> tuple[_Batch, ...]:
  """Batches of images that share a canvas, the last one of each canvas padded. The same in every process."""
  by_canvas: dict[tuple[int, int], list[int]] = {}
  for row, size in zip(range(len(sizes)) if rows is None else rows, sizes, strict=True):
    by_canvas.setdefault(inference.canvas_size(size, protocol), []).append(row)
  batches = []
  for canvas, members in sorted(by_canvas.items()):
    for start in range(0, len(members), batch_size):
      part = members[start : start + batch_size]
      batches.append(_Batch(tuple(part) + (None,) * (batch_size - len(part)), canvas))
  return tuple(batches)


def _compiled(predictors, num_classes, protocol, mean, std, mesh):
  """Two jitted functions of (state, images, labels, sizes): {predictor: (i32[K, K] of the whole batch, uint8 ids [B, H, W])}, and
  {predictor: (uint8 ids [B, H, W], uint8 confidence [B, H, W])}."""
  if not 1 <= num_classes <= IGNORE_LABEL:
    raise checks.InputError(f"classes: got {num_classes}; allowed: 1..{IGNORE_LABEL}")

  def predicted(state, images, sizes):
    for name, predict in predictors.items():
      scores, passes = inference.infer(lambda x, p=predict: p(state, x), images, sizes, protocol=protocol, mean=mean, std=std)
      if scores.shape[-1] != num_classes:
        raise checks.InputError(f"predictor '{name}': got {scores.shape[-1]} classes; allowed: the data's {num_classes}")
      looked_at = passes[..., 0] > 0
      ids = jnp.where(looked_at, jnp.argmax(scores, axis=-1), IGNORE_LABEL).astype(jnp.uint8)
      yield name, ids, looked_at, scores / jnp.maximum(passes, 1)

  def count(state, images, labels, sizes):
    return {
      name: (confusion.confusion_matrix(jnp.where(looked_at, labels, IGNORE_LABEL), ids, num_classes), ids)
      for name, ids, looked_at, _ in predicted(state, images, sizes)
    }

  def label(state, images, labels, sizes):
    results = {}
    for name, ids, looked_at, means in predicted(state, images, sizes):
      probabilities = means if protocol.summed == "probabilities" else jax.nn.softmax(means, axis=-1)
      confidence = jnp.rint(255 * jnp.where(looked_at, jnp.max(probabilities, axis=-1), 0.0))
      results[name] = ids, confidence.astype(jnp.uint8)
    return results

  if mesh is None:
    return jax.jit(count), jax.jit(label)

  # Each device takes its own images through by itself: their windows stay apart, and only the counts are added up.
  def count_on_each_device(state, images, labels, sizes):
    results = count(state, images, labels, sizes)
    return {name: (jax.lax.psum(matrix, "data"), ids) for name, (matrix, ids) in results.items()}

  split, whole = PartitionSpec("data"), PartitionSpec()

  def over_devices(function, specs):
    mapped = jax.shard_map(
      function, mesh=mesh, in_specs=(whole, split, split, split), out_specs={name: specs for name in predictors}, check_vma=False
    )  # fmt: skip
    # Everything is told to everyone, so that any process can read any picture.
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))

  return over_devices(count_on_each_device, (whole, split)), over_devices(label, (split, split))
