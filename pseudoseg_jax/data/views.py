"""One stored image -> the views a batch holds of it (the layout is in contract.py). All draws come from seeds."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from pseudoseg_jax.data import geometry as geometry_ops
from pseudoseg_jax.data import photometry as photometry_ops


def labeled_view(
  image: tf.Tensor,
  label: tf.Tensor,
  *,
  draws: geometry_ops.Draws,
  crop_size: tuple[int, int],
  mean: tuple,
  std: tuple,
  convention: str = "opencv",
) -> dict[str, tf.Tensor]:
  """The geometry alone, normalised.

  Args:
    image: uint8 [h, w, 3].
    label: uint8 [h, w].
    convention: of the geometry, as `Geometry.convention`.

  Returns:
    "image" f32 [H, W, 3], normalised, 0 on padding; "label" i32 [H, W], IGNORE_LABEL on padding; "valid" bool [H, W].
  """
  view = geometry_ops.crop(image, label, draws, crop_size, convention)
  return {"image": _normalized(view.rgb, view.valid, mean, std), "label": view.label, "valid": view.valid}


def unlabeled_views(
  image: tf.Tensor,
  *,
  truth: tf.Tensor | None = None,
  draws: geometry_ops.Draws,
  crop_size: tuple[int, int],
  photometry: photometry_ops.Photometry,
  photometry_draws: list[photometry_ops.Draws],
  mean: tuple,
  std: tuple,
  convention: str = "opencv",
) -> dict[str, tf.Tensor]:
  """A weak view and, of the same crop, one strong view for each of `photometry_draws`.

  Strong views are made of the crop with padding in the mean colour, and are 0 on padding after normalisation, as weak ones.

  Args:
    image: uint8 [h, w, 3].
    truth: uint8 [h, w], the image's own mask, for pictures; or None.
    convention: of the geometry, as `Geometry.convention`.

  Returns:
    "weak" f32 [H, W, 3], "strong" f32 [S, H, W, 3] where S > 0, "valid" bool [H, W], "flip" bool [], "window" f32 [4];
    "truth" i32 [H, W] where it was given, IGNORE_LABEL on padding.
  """
  rgb, truth, valid, window = geometry_ops.crop(image, truth, draws, crop_size, convention)
  views = {"weak": _normalized(rgb, valid, mean, std), "valid": valid, "flip": draws.flip, "window": window}
  if truth is not None:
    views["truth"] = truth
  if photometry_draws:
    rgb = tf.where(valid[..., tf.newaxis], rgb, tf.constant(mean, tf.float32))
    options = dict(convention=photometry.convention, valid=valid)
    max_sigma = photometry.blur_sigma_pixels[1]
    strong = [photometry_ops.strong_view(rgb, view_draws, max_sigma, **options) for view_draws in photometry_draws]
    views["strong"] = tf.stack([_normalized(view, valid, mean, std) for view in strong])
  return views


def _normalized(rgb, valid, mean, std):
  # Constants and mask of the image's full shape: TensorFlow's broadcast along the last axis takes three times as long.
  mean, std = (np.broadcast_to(np.float32(value), rgb.shape) for value in (mean, std))
  inside = tf.repeat(tf.cast(valid, tf.float32)[..., tf.newaxis], rgb.shape[-1], axis=-1)
  return photometry_ops.normalize(rgb, mean, std) * inside
