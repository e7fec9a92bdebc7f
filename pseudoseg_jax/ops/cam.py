"""Class activation maps: where an image classifier sees each class."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pseudoseg_jax.contract import IGNORE_LABEL, Array


def class_activation_maps(features: Array, kernel: Array, image_label: Array) -> Array:
  """Computes the Grad-CAM of a linear classifier on the spatial mean.

  Each map is divided by its greatest value. [PseudoSeg, Grad-CAM]

  CAM_c = ReLU(sum_k w_ck A_k), w_ck the mean gradient of logit c by map k: for such a classifier
  kernel[k, c] / (h w), at every position and for every image alike, so that no gradient need be
  taken.

  Args:
    features: f32[B, h, w, C], what the classifier averages.
    kernel: f32[C, K'], the classifier's weights.
    image_label: [B, K'], 1 for classes that are in the image; maps of the others are 0.

  Returns:
    f32[B, h, w, K'] in 0..1. A map whose greatest value is below 1e-5 does not reach 1. Gradients
    are not stopped here.
  """
  height, width = features.shape[1:3]
  cam = jax.nn.relu(features @ kernel) / (height * width)
  cam = cam * image_label[:, None, None, :]
  greatest = jnp.max(cam, axis=(1, 2), keepdims=True)
  return cam / jnp.maximum(greatest, 1e-5)


def with_background(cam: Array, total: float = 1.0) -> Array:
  """Adds the background: what the strongest class leaves of `total`.

  [B, h, w, K'] -> [B, h, w, 1 + K']: class 0 is the background; the strongest is among the other
  classes.
  """
  return jnp.concatenate([total - jnp.max(cam, axis=-1, keepdims=True), cam], axis=-1)


def with_uncertain_background(cam: Array) -> Array:
  """Adds the background as `with_background`, but at most 1/2.

  It is for people to look at. What no map claims is background with a confidence of at most one
  half, for nothing there shows that it is background.
  """
  filled = with_background(cam)
  return filled.at[..., 0].min(0.5)


def image_labels(label: Array, num_classes: int) -> Array:
  """Finds the classes that occur in a mask i32[B, H, W].

  f32[B, K], 1 for every class that occurs; IGNORE_LABEL is no class.
  """
  # One class after the other: a [B, H, W, K] comparison would be the largest array of a training
  # step.
  label = label.reshape(label.shape[0], -1)
  found = [jnp.any(label == index, axis=-1) for index in range(min(num_classes, IGNORE_LABEL))]
  return jnp.stack(found, axis=-1).astype(jnp.float32)
