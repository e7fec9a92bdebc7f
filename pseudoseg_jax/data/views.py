"""The views that a batch holds of a stored image.

The layout is in contract.py. All draws come from seeds.
"""

from __future__ import annotations

import tensorflow as tf

from pseudoseg_jax.data import geometry as geometry_ops, photometry as photometry_ops


def labeled_view(
  image: tf.Tensor,
  label: tf.Tensor,
  *,
  boxes: tf.Tensor | None = None,
  draws: geometry_ops.Draws,
  crop_size: tuple[int, int],
  mean: tuple,
  std: tuple,
  photometry: photometry_ops.Photometry | None = None,
  photometry_draws: photometry_ops.Draws | None = None,
  convention: str = "opencv",
) -> dict[str, tf.Tensor]:
  """Makes the view of a labeled image, normalized.

  It applies the geometry and, where `photometry_draws` are given, one strong view's photometry.

  Args:
    image: [h, w, C] of levels 0..255, uint8 or f32.
    label: uint8 [h, w].
    boxes: f32 [M, 5] of the stored image, as in `geometry.crop_boxes`; or None.
    mean, std: C values each.
    convention: of the geometry, as `Geometry.convention`.

  Returns:
    "image" f32 [H, W, C], normalized, padding as the convention defines; "label" i32 [H, W],
    IGNORE_LABEL on padding; "valid" bool [H, W]; "boxes" f32 [M, 5] of the view where some were
    given.
  """
  rgb, label, valid, window, opacity = geometry_ops.crop(image, label, draws, crop_size, convention)
  if photometry_draws is not None:
    rgb = _strong(_filled(rgb, opacity, mean), valid, photometry, photometry_draws)
  views = {"image": normalized(rgb, opacity, mean, std), "label": label, "valid": valid}
  if boxes is not None:
    views["boxes"] = geometry_ops.crop_boxes(boxes, window, draws.flip, crop_size)
  return views


def unlabeled_views(
  image: tf.Tensor,
  *,
  label: tf.Tensor | None = None,
  truth: tf.Tensor | None = None,
  boxes: tf.Tensor | None = None,
  draws: geometry_ops.Draws,
  crop_size: tuple[int, int],
  photometry: photometry_ops.Photometry,
  photometry_draws: list[photometry_ops.Draws],
  mean: tuple,
  std: tuple,
  convention: str = "opencv",
) -> dict[str, tf.Tensor]:
  """Makes a weak view and, of the same crop, strong views.

  There is one strong view for each of `photometry_draws`.

  Strong views are made of the crop with padding in the mean color, and are 0 on padding after
  normalization, as weak ones. Black padding ("pillow") is part of the image instead, in weak and
  strong views.

  Args:
    image: [h, w, C] of levels 0..255, uint8 or f32.
    label: uint8 [h, w], what may be learned of the image's mask; or None.
    truth: uint8 [h, w], the image's own mask, for pictures; or None.
    boxes: f32 [M, 5] of the stored image, as in `geometry.crop_boxes`; or None.
    mean, std: C values each.
    convention: of the geometry, as `Geometry.convention`.

  Returns:
    "weak" f32 [H, W, C], "strong" f32 [S, H, W, C] where S > 0, "valid" bool [H, W], "flip" bool
    [], "window" f32 [4]; where they were given, "label" and "truth" i32 [H, W], IGNORE_LABEL on
    padding, and "boxes" f32 [M, 5] of the view.
  """
  rgb, truth, valid, window, opacity = geometry_ops.crop(image, truth, draws, crop_size, convention)
  views = {
    "weak": normalized(rgb, opacity, mean, std),
    "valid": valid,
    "flip": draws.flip,
    "window": window,
  }
  if truth is not None:
    views["truth"] = truth
  if label is not None:  # in a graph, nothing but the mask is cropped a second time
    views["label"] = geometry_ops.crop(image, label, draws, crop_size, convention).label
  if boxes is not None:
    views["boxes"] = geometry_ops.crop_boxes(boxes, window, draws.flip, crop_size)
  if photometry_draws:
    rgb = _filled(rgb, opacity, mean)
    strong = [_strong(rgb, valid, photometry, view_draws) for view_draws in photometry_draws]
    views["strong"] = tf.stack([normalized(view, opacity, mean, std) for view in strong])
  return views


def _strong(rgb, valid, photometry, draws):
  max_sigma = photometry.blur_sigma_pixels[1]
  return photometry_ops.strong_view(
    rgb, draws, max_sigma, convention=photometry.convention, valid=valid
  )


@geometry_ops.compiled
def _filled(rgb, opacity, mean):
  opacity = opacity[..., tf.newaxis]
  return rgb * opacity + tf.constant(mean, tf.float32) * (1.0 - opacity)


@geometry_ops.compiled
def normalized(rgb: tf.Tensor, opacity: tf.Tensor, mean: tuple, std: tuple) -> tf.Tensor:
  """Normalizes f32 [H, W, C] in [0, 1], over the mean color, which is 0.

  `opacity`, f32 or bool [H, W], is the share of rgb.
  """
  return photometry_ops.normalize(rgb, mean, std) * tf.cast(opacity, tf.float32)[..., tf.newaxis]
