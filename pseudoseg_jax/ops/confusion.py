"""Confusion matrices and the scores read from them.

They are counted on the device, and summed and divided on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Pixels counted by one matrix product: far below 2^24, up to which float32 counts every integer.
_CHUNK = 1 << 16

ABSENT_CLASSES = ("skip", "zero")


def confusion_matrix(label: jax.Array, prediction: jax.Array, num_classes: int) -> jax.Array:
  """Counts pixels by (true class, predicted class).

  A product of one-hot vectors rather than a scatter: accelerators count with their matrix units, no
  two pixels fight for one cell, and 0 and 1 are exact in every matrix precision. Chunks are added
  up as integers, so the counts are exact.

  Args:
    label: integers of any shape; values outside 0..num_classes-1 (255 = ignore) are not counted.
    prediction: integers of the same shape, 0..num_classes-1.

  Returns:
    i32[K, K], row = truth. One call may count up to 2^31 - 1 pixels; add further calls up on the
    host (`scores` takes int64).
  """
  chunk = min(_CHUNK, max(label.size, 1))
  padding = -label.size % chunk
  label = jnp.pad(label.ravel().astype(jnp.int32), (0, padding), constant_values=-1).reshape(
    -1, chunk
  )
  prediction = jnp.pad(prediction.ravel().astype(jnp.int32), (0, padding)).reshape(-1, chunk)

  def count(matrix, pixels):
    # Out of range = all zeros.
    truth, predicted = (jax.nn.one_hot(ids, num_classes, dtype=jnp.float32) for ids in pixels)
    return matrix + jnp.einsum("pt,pk->tk", truth, predicted).astype(jnp.int32), None

  return jax.lax.scan(count, jnp.zeros((num_classes, num_classes), jnp.int32), (label, prediction))[
    0
  ]


class Scores(NamedTuple):
  """The scores of one predictor on one set of images.

  iou: f64[K], intersection over union as fractions; NaN = the class is in neither truth nor
    prediction.
  miou: mean of `iou`, where NaN is left out (or counts as 0, see `scores`).
  pixel_accuracy: share of the labeled pixels that are right.
  matrix: i64[K, K], row = truth; its sum is the number of labeled pixels.
  """

  iou: np.ndarray
  miou: float
  pixel_accuracy: float
  matrix: np.ndarray

  def __repr__(self) -> str:
    shown = " ".join("-" if np.isnan(value) else f"{100 * value:.2f}" for value in self.iou)
    return f"Scores(mIoU {100 * self.miou:.2f} %, pixel accuracy {100 * self.pixel_accuracy:.2f} %, IoU % by class: {shown})"


def scores(matrix: np.ndarray, *, absent_classes: str = "skip") -> Scores:
  """Computes the IoU per class, its mean and the pixel accuracy.

  They are those of a confusion matrix [K, K] (row = truth). NaN where nothing was seen.

  Args:
    absent_classes: what a class in neither truth nor prediction does to the mean: "skip" leaves it
      out, "zero" counts it as 0.
  """
  matrix = np.asarray(matrix, np.int64)
  hit = np.diag(matrix)
  union = matrix.sum(0) + matrix.sum(1) - hit
  iou = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
  counted = np.nan_to_num(iou) if absent_classes == "zero" else iou[union > 0]
  labeled = matrix.sum()
  return Scores(
    iou=iou,
    miou=float(counted.mean()) if union.any() else float("nan"),
    pixel_accuracy=float(hit.sum() / labeled) if labeled else float("nan"),
    matrix=matrix,
  )
