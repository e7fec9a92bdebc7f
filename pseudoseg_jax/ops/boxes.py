"""Bounding boxes as planes of pixels, one plane a class."""

from __future__ import annotations

import jax.numpy as jnp

from pseudoseg_jax.contract import Array


def box_planes(boxes: Array, size: tuple[int, int], num_classes: int) -> Array:
  """Marks the pixels whose center is in a box, in the plane of its class.

  Where boxes overlap, several planes are 1.

  Args:
    boxes: f32[B, M, 5]: class index, then top, left, bottom, right as fractions of the view; class
      -1 for no box.
    size: (H, W) of the view in pixels.

  Returns:
    f32[B, H, W, num_classes] of 0 and 1.
  """
  kind, top, left, bottom, right = jnp.moveaxis(boxes, -1, 0)

  def between(first, last, length):
    centre = (jnp.arange(length) + 0.5) / length
    return ((first[..., None] <= centre) & (centre < last[..., None])).astype(boxes.dtype)

  of_class = (kind[..., None] == jnp.arange(num_classes)).astype(boxes.dtype)
  count = jnp.einsum(
    "bmh,bmw,bmk->bhwk", between(top, bottom, size[0]), between(left, right, size[1]), of_class
  )
  return (count > 0).astype(boxes.dtype)


def with_background(planes: Array, *, background: bool) -> Array:
  """Adds the plane that is 1 where no box of any object lies.

  Args:
    planes: f32[B, H, W, K] in 0..1; those that resizing made fractional count as 1 from 1/2 on.
    background: class 0 is the background, and its plane is the one that is set; boxes of it mean
      nothing. Else the plane is appended, as the last.

  Returns:
    f32[B, H, W, K], or K + 1 planes without a background class, of 0 and 1; no pixel is 0 in all of
    them.
  """
  inside = planes >= 0.5
  objects = inside[..., 1:] if background else inside
  outside = ~jnp.any(objects, axis=-1, keepdims=True)
  return jnp.concatenate([outside, objects] if background else [objects, outside], axis=-1).astype(
    planes.dtype
  )
