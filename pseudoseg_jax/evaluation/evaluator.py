"""Scores of predictors on a set of images.

Every image counts once, whatever the batch size, devices or processes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

_SCORE_BYTES = 2 << 30  # of a batch, on each device: on huge canvases batches have fewer images
_BATCHES_AHEAD = 2  # read while the device computes
_RESULTS_BEHIND = 2  # left on the device, so that waiting for one never idles it
_LOOK_SECONDS = 0.002  # between looks at whether a result is there


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
  flags: Callable[[Protocol], str] = lambda padded: f"pad_multiple={padded.pad_multiple}",
) -> Evaluator:
  """Builds an evaluator of named predictors over a source.

  It compiles once per canvas (see `inference`) and keeps that for every call.

  Where scores do not depend on the canvas, images of many sizes share a few. Where they do, the log
  names the options that make the canvases fewer.

  Args:
    predictors: name -> (state, images f32[B, H, W, C]) -> logits f32[B, H, W, K], as in
      `contract.Method`.
    source: images with labels, of any sizes.
    protocol: how an image is shown to the network. Images of many sizes want "slide" or a
      `pad_multiple`.
    mean, std: of the source's C channels in [0, 1].
    batch_size: images of all devices and processes together, fewer where the canvas is huge; a
      multiple of the mesh's devices.
    mesh: with an axis "data"; the state handed in must be replicated over it. None: wherever the
      state is.
    with_labels: False: nothing will be scored, only predicted, and the source need have no labels.
    flags: the options that a user must set so that the protocol becomes another one, which pads.

  Raises:
    InputError: no images, no labels, an unusable protocol, mean or std of other channels.
  """
  problems = checks.Problems("the predictors cannot be evaluated")
  if not len(source):
    problems.add("evaluated images", got="none", allowed="at least one")
  if with_labels and not source.has_labels:
    problems.add(
      "evaluated images",
      got="no labels",
      allowed="images with labels",
      remedy="give the source a label pattern",
    )
  if batch_size < 1:
    problems.add("batch_size", got=batch_size, allowed="1 or more")
  for name, values in {"mean": mean, "std": std}.items():
    if len(values) != source.channels:
      problems.add(
        name, got=tuple(values), allowed=f"{source.channels} values, as the images have channels"
      )
  problems.raise_if_any()
  inference.check_protocol(protocol)

  sizes = tuple(tuple(source.size(row)) for row in range(len(source)))
  protocol, remark = _compiling_seldom(protocol, sizes, flags)
  images = collections.Counter(inference.canvas_size(size, protocol) for size in sizes)
  devices = 1 if mesh is None else mesh.shape["data"]
  score_bytes = 4 * len(classes.names)
  batch_sizes = {
    canvas: devices
    * max(
      1,
      min(-(-min(batch_size, count) // devices), _SCORE_BYTES // (score_bytes * math.prod(canvas))),
    )
    for canvas, count in images.items()
  }
  count, label = _compiled(predictors, len(classes.names), protocol, mean, std, mesh)
  return Evaluator(
    count,
    label,
    tuple(predictors),
    source,
    sizes,
    protocol,
    batch_sizes,
    mesh,
    [remark] * bool(remark),
  )


def _compiling_seldom(
  protocol: Protocol, sizes: Sequence[tuple[int, int]], flags: Callable[[Protocol], str]
) -> tuple[Protocol, str]:
  """Returns the protocol with few canvases, if its scores stay the same.

  Else it returns the protocol as it is. The second result is the remark for the log: what was
  changed, or how to get few canvases.
  """
  few, changed = inference.bounded(protocol, sizes)
  if not (changed and inference.sees_padding(protocol)):
    return few, changed
  many, fewer = (
    len({inference.canvas_size(size, shown) for size in sizes}) for shown in (protocol, few)
  )
  return protocol, (
    f"{many} image sizes: the network is compiled for each of them, when it first comes; {flags(few)} makes them {fewer}, but "
    "scores near the padded borders may change a little"
  )


@dataclasses.dataclass(frozen=True)
class _Batch:
  """The images of one batch and their canvas.

  rows: of the source, None on padding. canvas: (height, width) that all of them are laid on.
  """

  rows: tuple[int | None, ...]
  canvas: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """An evaluator of predictors over a source, made by `make_evaluator`.

  With several processes, every one must make the same calls; all get the same results.

  Calling it with a state returns {predictor: Scores}.
  """

  count: Callable  # (state, images, labels, sizes) -> {predictor: (confusion matrix, ids)}
  label: Callable  # likewise -> {predictor: (ids, confidence)}; looks at no labels
  # of the predictors, in their order: the jitted function returns them sorted.
  names: tuple[str, ...]
  source: Source
  sizes: tuple[tuple[int, int], ...]  # of its images, height and width
  protocol: Protocol
  # Canvas -> images of all devices and processes together.
  batch_sizes: Mapping[tuple[int, int], int]
  mesh: Mesh | None
  remarks: list[str]  # told when first scores are asked for

  def __call__(self, state: State) -> dict[str, Scores]:
    """Computes {predictor: Scores} of a state over all images.

    Raises:
      InputError: an image or label cannot be used; names the file.
    """
    while self.remarks:
      log.info("%s", self.remarks.pop())
    # Added up in int64 on the host: a large set has more pixels than an int32 can count.
    totals: dict[str, np.ndarray] = {}
    progress = Progress(len(self.source), functools.partial(log.info, extra={"slot": "evaluation"}))
    with self._run(self.count, state, range(len(self.source)), with_labels=True) as batches:
      for rows, results in batches:
        for name, (matrix, _) in results.items():
          totals[name] = totals.get(name, 0) + np.asarray(matrix, np.int64)
        progress.more(sum(row is not None for row in rows))
    absent_classes = self.protocol.absent_classes
    return {
      name: confusion.scores(totals[name], absent_classes=absent_classes) for name in self.names
    }

  def predictions(self, state: State, rows: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """Predicts the class ids of each row, with what is compiled already.

    The result is {predictor: [uint8[h, w] class ids of each row]}. Labels are not read.

    Where the protocol does not look ("center_crop"), ids are IGNORE_LABEL.
    """
    wanted: dict[str, dict[int, np.ndarray]] = {}
    with self._run(self.count, state, dict.fromkeys(rows), with_labels=False) as batches:
      for members, results in batches:
        for name, (_, ids) in results.items():
          for row, image_ids in zip(members, np.asarray(ids), strict=True):
            if row is not None:
              height, width = self.sizes[row]
              wanted.setdefault(name, {})[row] = image_ids[:height, :width]
    return {name: [wanted[name][row] for row in rows] for name in self.names}

  def stream(
    self, state: State, rows: Sequence[int]
  ) -> Iterator[tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Yields each of the rows with its class ids and their confidence.

    An item is a row and {predictor: (class ids uint8[h, w], confidence uint8[h, w])}. The rows come
    in an order of the evaluator's own.

    Labels are not read. Confidence is 255 times the greatest class probability, rounded: of the
    mean probabilities over windows, flips and scales, or the softmax of the mean logits. Where the
    protocol does not look, ids are IGNORE_LABEL and confidence 0.
    """
    with self._run(self.label, state, rows, with_labels=False) as batches:
      for members, results in batches:
        results = {name: tuple(map(np.asarray, results[name])) for name in self.names}
        for index, row in enumerate(members):
          if row is not None:
            height, width = self.sizes[row]
            yield (
              row,
              {
                name: tuple(plane[index, :height, :width] for plane in planes)
                for name, planes in results.items()
              },
            )

  @contextlib.contextmanager
  def _run(
    self, compute: Callable, state: State, rows: Iterable[int], *, with_labels: bool
  ) -> Iterator[Iterator[tuple[tuple[int | None, ...], PyTree]]]:
    """Yields an iterator over batches of the rows with their results.

    A row that is None is no image. Whatever ends the context, threads and reading end with it.
    """
    threads = concurrent.futures.ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 1))
    try:
      yield self._results(threads, compute, state, self._plan(rows), with_labels)
    finally:
      threads.shutdown(cancel_futures=True)  # waits for what is being read

  def _results(self, threads, compute, state, batches, with_labels):
    """Yields the results of the batches, while further ones are read.

    It reads ahead in threads, feeds the device without waiting for it, and yields results a few
    batches later.
    """
    reading: collections.deque = collections.deque()
    computing: collections.deque = collections.deque()
    for batch in [*batches, *[None] * _BATCHES_AHEAD]:
      if batch is not None:
        loads = [
          threads.submit(self._load, row, with_labels) for row in self._local_rows(batch.rows)
        ]
        reading.append((batch, loads))
      if reading and (batch is None or len(reading) > _BATCHES_AHEAD):
        ready, loads = reading.popleft()
        computing.append(
          (ready.rows, compute(state, *self._to_devices(ready, [load.result() for load in loads])))
        )
      if len(computing) > _RESULTS_BEHIND:
        yield _waited_for(computing.popleft())
    yield from map(_waited_for, computing)

  def _plan(self, rows: Iterable[int]) -> list[_Batch]:
    """Groups the rows into batches of images that share a canvas.

    The last batch of each canvas is padded. The batches are the same in every process.
    """
    by_canvas: dict[tuple[int, int], list[int]] = {}
    # Images that need the same number of windows together, so that no device waits for another and
    # calls are full.
    for row in sorted(
      rows, key=lambda row: inference.windows_needed(self.sizes[row], self.protocol)
    ):
      by_canvas.setdefault(inference.canvas_size(self.sizes[row], self.protocol), []).append(row)
    batches = []
    for canvas, members in sorted(by_canvas.items()):
      size = self.batch_sizes[canvas]
      for start in range(0, len(members), size):
        part = members[start : start + size]
        batches.append(_Batch((*part, *[None] * (size - len(part))), canvas))
    return batches

  def _local_rows(self, rows: tuple) -> list:
    """Selects the rows of a global batch that this process's devices hold."""
    if self.mesh is None:
      return list(rows)
    sharding = NamedSharding(self.mesh, PartitionSpec("data"))
    indices = sharding.addressable_devices_indices_map((len(rows),)).values()
    return [
      row
      for start, stop, _ in sorted(index[0].indices(len(rows)) for index in indices)
      for row in rows[start:stop]
    ]

  def _load(self, row: int | None, with_labels: bool) -> tuple[np.ndarray, np.ndarray]:
    """Reads one image and its label; padding is an image without pixels."""
    if row is None:
      return np.zeros((0, 0, self.source.channels), self.source.dtype), np.zeros((0, 0), np.uint8)
    image = self.source.image(row)
    label = (
      self.source.label(row) if with_labels else np.full(image.shape[:2], IGNORE_LABEL, np.uint8)
    )
    expected = self.sizes[row]
    if image.shape[:2] != expected or label.shape != expected:
      problems = checks.Problems(f"cannot evaluate image '{self.source.ids[row]}'")
      problems.add(
        "height x width",
        got=f"image {image.shape[:2]}, label {label.shape}",
        allowed=f"both {expected}",
      )
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
    return tuple(
      jax.make_array_from_process_local_data(sharding, x, (whole, *x.shape[1:]))
      for x in (images, labels, sizes)
    )


def _waited_for(results: tuple) -> tuple:
  """Returns results once they are there.

  It waits in Python, so that a signal is acted on meanwhile.
  """
  while not all(leaf.is_ready() for leaf in jax.tree.leaves(results[1])):
    time.sleep(_LOOK_SECONDS)
  return results


def _compiled(predictors, num_classes, protocol, mean, std, mesh):
  """Returns two jitted functions of (state, images, labels, sizes).

  The first returns {predictor: (i32[K, K] of the whole batch, uint8 ids [B, H, W])}, the second
  {predictor: (uint8 ids [B, H, W], uint8 confidence [B, H, W])}.
  """
  if not 1 <= num_classes <= IGNORE_LABEL:
    raise checks.InputError(f"classes: got {num_classes}; allowed: 1..{IGNORE_LABEL}")

  def predicted(state, images, sizes):
    for name, predict in predictors.items():
      scores, passes = inference.infer(
        lambda x, p=predict: p(state, x), images, sizes, protocol=protocol, mean=mean, std=std
      )
      if scores.shape[-1] != num_classes:
        raise checks.InputError(
          f"predictor '{name}': got {scores.shape[-1]} classes; allowed: the data's {num_classes}"
        )
      looked_at = passes[..., 0] > 0
      ids = jnp.where(looked_at, jnp.argmax(scores, axis=-1), IGNORE_LABEL).astype(jnp.uint8)
      yield name, ids, looked_at, scores / jnp.maximum(passes, 1)

  def count(state, images, labels, sizes):
    return {
      name: (
        confusion.confusion_matrix(jnp.where(looked_at, labels, IGNORE_LABEL), ids, num_classes),
        ids,
      )
      for name, ids, looked_at, _ in predicted(state, images, sizes)
    }

  def label(state, images, labels, sizes):
    results = {}
    for name, ids, looked_at, means in predicted(state, images, sizes):
      probabilities = (
        means if protocol.summed == "probabilities" else jax.nn.softmax(means, axis=-1)
      )
      confidence = jnp.rint(255 * jnp.where(looked_at, jnp.max(probabilities, axis=-1), 0.0))
      results[name] = ids, confidence.astype(jnp.uint8)
    return results

  if mesh is None:
    return jax.jit(count), jax.jit(label)

  # Each device takes its own images through by itself: their windows stay apart, and only the
  # counts are added up.
  def count_on_each_device(state, images, labels, sizes):
    results = count(state, images, labels, sizes)
    return {name: (jax.lax.psum(matrix, "data"), ids) for name, (matrix, ids) in results.items()}

  split, whole = PartitionSpec("data"), PartitionSpec()

  def over_devices(function, specs):
    mapped = jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(whole, split, split, split),
      out_specs={name: specs for name in predictors},
      check_vma=False,
    )
    # Everything is told to everyone, so that any process can read any picture.
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))

  return over_devices(count_on_each_device, (whole, split)), over_devices(label, (split, split))
