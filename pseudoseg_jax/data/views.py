"""One stored image -> the views a batch holds of it (the layout is in contract.py). All draws come from seeds."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from pseudoseg_jax.data import geometry as geometry_ops
from pseudoseg_jax.data import photometry as photometry_ops


def labeled_view(
  image: tf.Tensor, label: tf.Tensor, *, draws: geometry_ops.Draws, crop_size: tuple[int, int], mean: tuple, std: tuple
) -> dict[str, tf.Tensor]:
  """Mirror, scale, normalise, crop, as CPS's released code.

  Args:
    image: uint8 [h, w, 3].
    label: uint8 [h, w].

  Returns:
    "image" f32 [H, W, 3], normalised, 0 on padding; "label" i32 [H, W], IGNORE_LABEL on padding.
  """
  image, label = geometry_ops.mirror(image, draws.flip), geometry_ops.mirror(label, draws.flip)
  scaled = geometry_ops.scaled_size(tf.shape(image)[:2], draws.scale)
  origin = geometry_ops.crop_origin(scaled, draws.offset, crop_size)
  rgb = geometry_ops.crop_image(image, scaled, origin, crop_size) / 255.0
  valid = geometry_ops.valid_mask(scaled, origin, crop_size)
  return {
    "image": _normalized(rgb, valid, mean, std),
    "label": geometry_ops.crop_label(label, scaled, origin, crop_size),
  }


def unlabeled_views(
  image: tf.Tensor,
  *,
  draws: geometry_ops.Draws,
  crop_size: tuple[int, int],
  photometry: photometry_ops.Photometry,
  photometry_draws: list[photometry_ops.Draws],
  mean: tuple,
  std: tuple,
) -> dict[str, tf.Tensor]:
  """A weak view and, of the same crop, one strong view for each of `photometry_draws`.

  Strong views are made of the crop with padding in the mean colour, and are 0 on padding after normalisation, as weak ones.

  Returns:
    "weak" f32 [H, W, 3], "strong" f32 [S, H, W, 3] where S > 0, "valid" bool [H, W], "flip" bool [], "window" f32 [4].
  """
  image = geometry_ops.mirror(image, draws.flip)
  scaled = geometry_ops.scaled_size(tf.shape(image)[:2], draws.scale)
  origin = geometry_ops.crop_origin(scaled, draws.offset, crop_size)
  rgb = geometry_ops.crop_image(image, scaled, origin, crop_size) / 255.0
  valid = geometry_ops.valid_mask(scaled, origin, crop_size)
  views = {
    "weak": _normalized(rgb, valid, mean, std),
    "valid": valid,
    "flip": draws.flip,
    "window": geometry_ops.window(scaled, origin, crop_size, draws.flip),
  }
  if photometry_draws:
    rgb = tf.where(valid[..., tf.newaxis], rgb, tf.constant(mean, tf.float32))
    max_sigma = photometry.blur_sigma_pixels[1]
    strong = [photometry_ops.strong_view(rgb, view_draws, max_sigma) for view_draws in photometry_draws]
    views["strong"] = tf.stack([_normalized(view, valid, mean, std) for view in strong])
  return views


def _normalized(rgb, valid, mean, std):
  # Constants and mask of the image's full shape: TensorFlow's broadcast along the last axis takes three times as long.
  mean, std = (np.broadcast_to(np.float32(value), rgb.shape) for value in (mean, std))
  inside = tf.repeat(tf.cast(valid, tf.float32)[..., tf.newaxis], rgb.shape[-1], axis=-1)
  return photometry_ops.normalize(rgb, mean, std) * inside
