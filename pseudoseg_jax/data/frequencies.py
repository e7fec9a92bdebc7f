"""Class frequencies in masks, and weights that favor rare classes."""

from __future__ import annotations

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.data.sources import Source

WEIGHTS = ("inverse", "effective")


def count_pixels(source: Source, num_classes: int, *, skip_unreadable: bool = False) -> np.ndarray:
  """Counts the pixels of each class in each image's mask, i64 [N, K].

  Pixels without a label are of no class. Reads all masks.

  Args:
    skip_unreadable: a mask that cannot be read has no pixel. The pipeline reports it when it leaves
      its image out.

  Raises:
    InputError or OSError: a mask that cannot be read, unless those are skipped.
  """
  counts = np.zeros((len(source), num_classes), np.int64)
  for row in range(len(source)):
    try:
      counts[row] = np.bincount(source.label(row).ravel(), minlength=256)[:num_classes]
    except (checks.InputError, OSError):
      if not skip_unreadable:
        raise
  return counts


def class_weights(pixels: np.ndarray, by: str) -> np.ndarray:
  """Computes a weight for each class, more for rare ones.

  The mean over all labeled pixels is 1.

  Args:
    pixels: of `count_pixels`.
    by: "inverse": one over the class's share of the pixels. "effective": one over the effective
      number of the images that hold it, (1 - b^n) / (1 - b) with b = (N - 1) / N of N images (Cui
      et al., "Class-Balanced Loss", CVPR 2019, equation 2); much milder, since pixels of one image
      are no independent samples.

  Returns:
    f64 [K]; 1 for a class that has no pixel, which occurs in no label.
  """
  per_class = pixels.sum(axis=0)
  seen = per_class > 0
  if by == "inverse":
    raw = 1 / np.where(seen, per_class, 1)
  else:
    images = np.count_nonzero(pixels, axis=0)
    base = (len(pixels) - 1) / len(pixels)
    raw = (1 - base) / (1 - np.power(base, np.where(seen, images, 1)))
  mean = np.sum(raw * per_class) / max(per_class.sum(), 1)
  return np.where(seen, raw / (mean or 1), 1.0)


def repeat_factors(pixels: np.ndarray, threshold: float) -> np.ndarray:
  """Computes how often each image is drawn relative to others, f64 [N].

  A factor is 1 or more: how often the image is met where others are met once. An image's factor is
  the largest of its classes', max(1, sqrt(threshold / share of the images that hold the class));
  repeat-factor sampling (Gupta et al., LVIS, CVPR 2019, section 5.1).
  """
  holds = pixels > 0
  share = np.maximum(holds.mean(axis=0), 1 / max(len(pixels), 1))
  return np.max(np.where(holds, np.maximum(1, np.sqrt(threshold / share)), 1), axis=1, initial=1)


def repeated_rows(factors: np.ndarray, seed: int) -> np.ndarray:
  """Repeats each row as often as its factor; a fraction is a chance.

  The chance is drawn once.
  """
  whole = np.floor(factors).astype(int)
  more = np.random.default_rng(seed).random(len(factors)) < factors - whole
  return np.repeat(np.arange(len(factors)), whole + more)
