"""Strong augmentation: colour jitter, greyscale, blur.

TensorFlow ops on one RGB image in [0, 1], every random draw an argument.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.data.geometry import check_convention

# Channel means and deviations of ImageNet, for RGB in [0, 1]: what pretrained backbones expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's greyscale


@dataclasses.dataclass(frozen=True)
class Photometry:
  """How strong views are drawn; the defaults are those of UniMatch (Yang et al. 2023).

  jitter_probability: of the four colour changes together, which come in random order.
  brightness, contrast, saturation: factors are uniform in 1 -+ this; with "tensorflow", brightness is a summand in -+ this.
  hue: shifts are uniform in -+ this, as a fraction of the colour circle.
  grayscale_probability, blur_probability: of the two other changes, in this order after the jitter.
  blur_sigma_pixels: the Gaussian's standard deviation is uniform between these two.
  convention: of the jitter. "opencv" blends with black, the mean grey and the greyscale, as PIL and UniMatch do; "tensorflow"
    adds, stretches about each channel's mean and scales HSV's saturation, as tf.image and PseudoSeg (Zou et al. 2021) do.
  """

  jitter_probability: float = 0.8
  brightness: float = 0.5
  contrast: float = 0.5
  saturation: float = 0.5
  hue: float = 0.25
  grayscale_probability: float = 0.2
  blur_probability: float = 0.5
  blur_sigma_pixels: tuple[float, float] = (0.1, 2.0)
  convention: str = "opencv"

  def __post_init__(self):
    problems = checks.Problems("photometry cannot be used")
    for name in ("jitter_probability", "grayscale_probability", "blur_probability", "brightness", "contrast", "saturation"):
      if not 0 <= getattr(self, name) <= 1:
        problems.add(name, got=getattr(self, name), allowed="0..1")
    if not 0 <= self.hue <= 0.5:
      problems.add("hue", got=self.hue, allowed="0..0.5 (half the colour circle)")
    if len(self.blur_sigma_pixels) != 2 or not 0 < self.blur_sigma_pixels[0] <= self.blur_sigma_pixels[1]:
      problems.add("blur_sigma_pixels", got=self.blur_sigma_pixels, allowed="(least, greatest), both above 0")
    check_convention(self.convention, problems)
    problems.raise_if_any()


class Draws(NamedTuple):
  """What is done to one view.

  jitter, grayscale, blur: bool[], whether. order: i32[4], the jitter's turns: 0 brightness, 1 contrast, 2 saturation, 3 hue.
  brightness, contrast, saturation: f32[], factors ("tensorflow": brightness is a summand). hue: f32[], shift. sigma: pixels.
  """

  jitter: tf.Tensor
  order: tf.Tensor
  brightness: tf.Tensor
  contrast: tf.Tensor
  saturation: tf.Tensor
  hue: tf.Tensor
  grayscale: tf.Tensor
  blur: tf.Tensor
  sigma: tf.Tensor


def draw(photometry: Photometry, num_views: int, seed: tf.Tensor) -> list[Draws]:
  """Draws the photometry of one example's views, a pure function of the seed (i64[2])."""
  uniform = tf.random.stateless_uniform([num_views, 12], seed)
  order = tf.argsort(uniform[:, 8:])
  unchanged = 1 if photometry.convention == "opencv" else 0

  def between(value: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + (high - low) * value

  def view(number: int) -> Draws:
    u = tf.unstack(uniform[number, :8])
    return Draws(
      jitter=u[0] < photometry.jitter_probability,
      order=order[number],
      brightness=between(u[1], unchanged - photometry.brightness, unchanged + photometry.brightness),
      contrast=between(u[2], 1 - photometry.contrast, 1 + photometry.contrast),
      saturation=between(u[3], 1 - photometry.saturation, 1 + photometry.saturation),
      hue=between(u[4], -photometry.hue, photometry.hue),
      grayscale=u[5] < photometry.grayscale_probability,
      blur=u[6] < photometry.blur_probability,
      sigma=between(u[7], *photometry.blur_sigma_pixels),
    )

  return [view(number) for number in range(num_views)]


def strong_view(
  rgb: tf.Tensor, draws: Draws, max_sigma: float, convention: str = "opencv", valid: tf.Tensor | None = None
) -> tf.Tensor:
  """Applies one view's draws: jitter, then greyscale, then blur. RGB f32 [h, w, 3] in [0, 1], before and after."""
  jittered = tf.cond(draws.jitter, lambda: color_jitter(rgb, draws, convention, valid), lambda: rgb)
  grayed = tf.cond(draws.grayscale, lambda: grayscale(jittered), lambda: jittered)
  return tf.cond(draws.blur, lambda: gaussian_blur(grayed, draws.sigma, max_sigma), lambda: grayed)


def color_jitter(rgb: tf.Tensor, draws: Draws, convention: str = "opencv", valid: tf.Tensor | None = None) -> tf.Tensor:
  """The four colour changes in the order drawn, each result clipped to [0, 1].

  Args:
    rgb: f32 [h, w, 3] in [0, 1].
    convention: as `Photometry.convention`.
    valid: bool [h, w], of which pixels "tensorflow" takes the mean; None for all of them.
  """
  if convention == "tensorflow":
    changes = (
      lambda rgb: tf.clip_by_value(rgb + draws.brightness, 0.0, 1.0),
      lambda rgb: tf.clip_by_value(stretch_contrast(rgb, draws.contrast, valid), 0.0, 1.0),
      lambda rgb: tf.clip_by_value(tf.image.adjust_saturation(rgb, draws.saturation), 0.0, 1.0),
      lambda rgb: tf.clip_by_value(tf.image.adjust_hue(rgb, draws.hue), 0.0, 1.0),
    )
  else:
    changes = (
      lambda rgb: adjust_brightness(rgb, draws.brightness),
      lambda rgb: adjust_contrast(rgb, draws.contrast),
      lambda rgb: adjust_saturation(rgb, draws.saturation),
      lambda rgb: tf.image.adjust_hue(rgb, draws.hue),
    )

  def turn(rgb: tf.Tensor, change: tf.Tensor) -> tf.Tensor:
    return tf.switch_case(change, [functools.partial(make, rgb) for make in changes])

  return tf.foldl(turn, draws.order, initializer=rgb)


def stretch_contrast(rgb: tf.Tensor, factor: tf.Tensor, valid: tf.Tensor | None = None) -> tf.Tensor:
  """Moves each channel away from its own mean over the valid pixels; factor 1 changes nothing. The result may leave [0, 1]."""
  height, width, channels = rgb.shape
  if valid is None:
    mean = tf.reduce_mean(rgb, axis=(0, 1))
  else:
    inside = tf.reshape(tf.cast(valid, tf.float32), (1, -1))
    mean = (inside @ tf.reshape(rgb, (-1, channels)))[0] / tf.maximum(tf.reduce_sum(inside), 1.0)
  # The mean as a whole row of pixels: a broadcast along the last axis of three is several times slower.
  row = tf.tile(mean * (1.0 - factor), (width,))
  return tf.reshape(tf.reshape(rgb, (height, width * channels)) * factor + row, (height, width, channels))


def adjust_brightness(rgb: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with black: factor 0 is black, 1 changes nothing."""
  return tf.clip_by_value(rgb * factor, 0.0, 1.0)


def adjust_contrast(rgb: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with the image's mean grey: factor 0 is even grey, 1 changes nothing."""
  mean_gray = tf.reduce_sum(tf.reduce_mean(rgb, axis=(0, 1)) * _LUMA)
  return tf.clip_by_value(rgb * factor + mean_gray * (1.0 - factor), 0.0, 1.0)


def adjust_saturation(rgb: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with the image's own greyscale: factor 0 is greyscale, 1 changes nothing."""
  return tf.clip_by_value(rgb * factor + grayscale(rgb) * (1.0 - factor), 0.0, 1.0)


def grayscale(rgb: tf.Tensor) -> tf.Tensor:
  """Luma (ITU-R 601) in all three channels."""
  height, width = rgb.shape[:2]
  # One matrix product sums and spreads; a broadcast of a [h, w, 1] sum is several times slower.
  return tf.reshape(tf.reshape(rgb, (-1, 3)) @ tf.constant([[weight] * 3 for weight in _LUMA]), (height, width, 3))


def gaussian_blur(rgb: tf.Tensor, sigma: tf.Tensor, max_sigma: float) -> tf.Tensor:
  """Gaussian blur, edges repeated.

  Args:
    sigma: f32[], standard deviation in pixels, at most max_sigma.
    max_sigma: the kernel reaches three of these to each side.
  """
  radius = math.ceil(3 * max_sigma)
  height, width, channels = rgb.shape
  tap = tf.range(-radius, radius + 1, dtype=tf.float32)
  kernel = tf.exp(-0.5 * (tap / sigma) ** 2)
  kernel = tf.tile((kernel / tf.reduce_sum(kernel))[:, tf.newaxis], (1, channels))
  row = tf.clip_by_value(tf.range(-radius, height + radius), 0, height - 1)
  column = tf.clip_by_value(tf.range(-radius, width + radius), 0, width - 1)
  rgb = tf.gather(rgb, row, axis=0)[tf.newaxis]
  rgb = tf.nn.depthwise_conv2d(rgb, kernel[:, tf.newaxis, :, tf.newaxis], strides=[1] * 4, padding="VALID")
  rgb = tf.gather(rgb, column, axis=2)
  return tf.nn.depthwise_conv2d(rgb, kernel[tf.newaxis, :, :, tf.newaxis], strides=[1] * 4, padding="VALID")[0]


def normalize(rgb, mean=IMAGENET_MEAN, std=IMAGENET_STD):
  """(rgb - mean) / std by channel, of f32 [..., 3] in [0, 1]; TensorFlow, NumPy and JAX arrays alike."""
  return (rgb - mean) / std
