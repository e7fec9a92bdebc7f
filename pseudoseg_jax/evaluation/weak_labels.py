"""Weak labels of the images that are predicted.

They are shown to a predictor beside the image, or are the only classes it may predict.

They are of two kinds: "boxes", f32[M, 5] of an image as `data.boxes` has them, and "image", f32[K]
of 0 and 1, its image-level labels. Either becomes K planes, one a class: 1 inside the boxes of the
class, or everywhere if the class is in the image, else 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from pseudoseg_jax.contract import Array, Predictor
from pseudoseg_jax.data import boxes

if TYPE_CHECKING:
  from pseudoseg_jax.data.classes import Classes
  from pseudoseg_jax.data.sources import Source

# Ends the name of a predictor whose answers are kept to the classes in the image.
IMAGE_LABELS = "+image_labels"

WeakLabel = Callable[[int], np.ndarray]  # row of a source -> the weak label of that image

_ABSENT = -1e9  # finite, so that sums over windows, scales and flips are too


def mask_logits(logits: Array, planes: Array) -> Array:
  """Masks the logits f32[B, H, W, K] of classes that are not in the image.

  These classes cannot win, nor count in a softmax.

  Args:
    planes: f32[B, H, W, K]; class k is in image b if planes[b, ..., k] is above 1/2 anywhere.
      Images for which no class is named keep their logits.
  """
  present = jnp.any(planes > 0.5, axis=(1, 2), keepdims=True)
  return jnp.where(present | ~jnp.any(present, axis=-1, keepdims=True), logits, _ABSENT)


def planes_of(kind: str, label: np.ndarray, size: tuple[int, int], num_classes: int) -> np.ndarray:
  """Draws the planes of one image in levels, uint8[h, w, K] of 0 and 255.

  A box holds the pixels whose middle it holds.

  Args:
    size: (height, width) of the image.
  """
  planes = np.zeros((*size, num_classes), np.uint8)
  if kind == "image":
    planes[..., label > 0.5] = 255
    return planes
  y, x = ((np.arange(side) + 0.5) / side for side in size)
  for index, top, left, bottom, right in label[label[:, 0] >= 0]:
    planes[np.ix_((top <= y) & (y < bottom), (left <= x) & (x < right), [int(index)])] = 255
  return planes


class WithChannels:
  """A source whose images carry planes of weak labels as further channels.

  They come after the image's own channels and are made when an image is asked for.

  To be normalized with mean 0 and std 1, so that a network sees 0..1, and 0 on padding.

  Args:
    source: the images.
    num_classes: K.
    weak_labels: kind -> weak labels of the rows; each adds K channels, in their order.
  """

  def __init__(self, source: Source, num_classes: int, weak_labels: Mapping[str, WeakLabel]):
    self.ids, self.dtype, self.has_labels = source.ids, source.dtype, source.has_labels
    self.channels = source.channels + len(weak_labels) * num_classes
    self.size, self.label = source.size, source.label
    self._source, self._num_classes, self._weak_labels = source, num_classes, dict(weak_labels)

  def __len__(self) -> int:
    return len(self.ids)

  def image(self, row: int) -> np.ndarray:
    image = self._source.image(row)
    planes = [
      planes_of(kind, of_row(row), image.shape[:2], self._num_classes)
      for kind, of_row in self._weak_labels.items()
    ]
    return np.concatenate([image, *(plane.astype(image.dtype) for plane in planes)], axis=-1)

  def predictor(self, predict: Predictor, *, masked: bool = False) -> Predictor:
    """Returns `predict`, for images of this source.

    It is shown the image alone, or with the planes of its weak label.

    Args:
      masked: keep its predictions to the classes in the image; wants weak labels of the kind
        "image".
    """

    def logits(state, images):
      image, kind = images[..., : self._source.channels], predict.weak_label
      shown = image if not kind else jnp.concatenate([image, self._planes(images, kind)], axis=-1)
      answer = predict(state, shown)
      return mask_logits(answer, self._planes(images, "image")) if masked else answer

    return dataclasses.replace(predict, logits=logits)

  def _planes(self, images: Array, kind: str) -> Array:
    first = self._source.channels + list(self._weak_labels).index(kind) * self._num_classes
    return images[..., first : first + self._num_classes]


def image_labels_of_masks(source: Source, num_classes: int) -> WeakLabel:
  """Returns the image-level labels f32[K] of each row, read off its mask.

  They are read once they are asked for.
  """

  @functools.cache
  def of_row(row: int) -> np.ndarray:
    return (np.bincount(source.label(row).ravel(), minlength=256)[:num_classes] > 0).astype(
      np.float32
    )

  return of_row


def boxes_of_masks(source: Source, classes: Classes) -> WeakLabel:
  """Returns the boxes f32[M, 5] of each row, read off its mask.

  They are read once they are asked for.
  """
  return functools.cache(lambda row: boxes.boxes_of_masks(_Row(source, row), classes)[0])


class _Row:
  """The mask of one row, as a source."""

  has_labels = True

  def __init__(self, source: Source, row: int):
    self._source, self._row = source, row

  def __len__(self) -> int:
    return 1

  def label(self, row: int) -> np.ndarray:
    return self._source.label(self._row)
