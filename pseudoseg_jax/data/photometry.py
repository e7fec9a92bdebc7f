"""Strong augmentation: color jitter, grayscale, blur.

TensorFlow ops on one image [h, w, C] in [0, 1], every random draw an argument. Saturation, hue and
grayscale mean something for RGB alone: images of other than three channels are spared them, and
their contrast is about each channel's own mean.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.data.geometry import check_convention, compiled

# Channel means and deviations of ImageNet, for RGB in [0, 1]: what pretrained backbones expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's greyscale


@dataclasses.dataclass(frozen=True)
class Photometry:
  """Settings of the photometry of strong views.

  The defaults are those of UniMatch (Yang et al. 2023).

  jitter_probability: of the four color changes together, which come in random order.
  brightness, contrast, saturation: factors are uniform in 1 -+ this; with "tensorflow", brightness
    is a summand in -+ this.
  hue: shifts are uniform in -+ this, as a fraction of the color circle.
  grayscale_probability, blur_probability: of the two other changes, in this order after the jitter.
  blur_sigma_pixels: the Gaussian's standard deviation is uniform between these two.
  convention: of the jitter, a name in `geometry.CONVENTIONS`. "tensorflow" adds, stretches about
    each channel's mean and scales HSV's saturation, as tf.image and PseudoSeg (Zou et al. 2021) do;
    all others blend with black, the mean gray and the grayscale, as PIL and UniMatch do, but in
    floating point: up to 11 gray levels from their 8-bit hue, under 2 on average.
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
    for name in (
      "jitter_probability",
      "grayscale_probability",
      "blur_probability",
      "brightness",
      "contrast",
      "saturation",
    ):
      if not 0 <= getattr(self, name) <= 1:
        problems.add(name, got=getattr(self, name), allowed="0..1")
    if not 0 <= self.hue <= 0.5:
      problems.add("hue", got=self.hue, allowed="0..0.5 (half the color circle)")
    if (
      len(self.blur_sigma_pixels) != 2
      or not 0 < self.blur_sigma_pixels[0] <= self.blur_sigma_pixels[1]
    ):
      problems.add(
        "blur_sigma_pixels", got=self.blur_sigma_pixels, allowed="(least, greatest), both above 0"
      )
    check_convention(self.convention, problems)
    problems.raise_if_any()


class Draws(NamedTuple):
  """The random draws of one view's photometry.

  jitter, grayscale, blur: bool[], whether. order: i32[4], the jitter's turns: 0 brightness, 1
    contrast, 2 saturation, 3 hue.
  brightness, contrast, saturation: f32[], factors ("tensorflow": brightness is a summand). hue:
    f32[], shift. sigma: pixels.
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
  """Draws the photometry of one example's views.

  It is a pure function of the seed (i64[2]).
  """
  uniform = tf.random.stateless_uniform([num_views, 12], seed)
  order = tf.argsort(uniform[:, 8:])
  unchanged = 0 if photometry.convention == "tensorflow" else 1

  def between(value: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + (high - low) * value

  def view(number: int) -> Draws:
    u = tf.unstack(uniform[number, :8])
    return Draws(
      jitter=u[0] < photometry.jitter_probability,
      order=order[number],
      brightness=between(
        u[1], unchanged - photometry.brightness, unchanged + photometry.brightness
      ),
      contrast=between(u[2], 1 - photometry.contrast, 1 + photometry.contrast),
      saturation=between(u[3], 1 - photometry.saturation, 1 + photometry.saturation),
      hue=between(u[4], -photometry.hue, photometry.hue),
      grayscale=u[5] < photometry.grayscale_probability,
      blur=u[6] < photometry.blur_probability,
      sigma=between(u[7], *photometry.blur_sigma_pixels),
    )

  return [view(number) for number in range(num_views)]


def strong_view(
  rgb: tf.Tensor,
  draws: Draws,
  max_sigma: float,
  convention: str = "opencv",
  valid: tf.Tensor | None = None,
) -> tf.Tensor:
  """Applies one view's draws: jitter, then grayscale, then blur.

  f32 [h, w, C] in [0, 1], before and after.
  """
  rgb = tf.cond(draws.jitter, lambda: color_jitter(rgb, draws, convention, valid), lambda: rgb)
  if rgb.shape[-1] == 3:
    rgb = tf.cond(draws.grayscale, lambda: grayscale(rgb), lambda: rgb)
  return tf.cond(draws.blur, lambda: gaussian_blur(rgb, draws.sigma, max_sigma), lambda: rgb)


def color_jitter(
  rgb: tf.Tensor, draws: Draws, convention: str = "opencv", valid: tf.Tensor | None = None
) -> tf.Tensor:
  """Applies the four color changes in the order drawn.

  Each result is clipped to [0, 1].

  Args:
    rgb: f32 [h, w, C] in [0, 1].
    convention: as `Photometry.convention`.
    valid: bool [h, w], of which pixels a channel's mean is taken; None for all of them. The mean
      gray takes all of them.
  """
  is_rgb = rgb.shape[-1] == 3
  if convention == "tensorflow":
    brightness, saturation = add_brightness, scale_saturation
  else:
    brightness, saturation = adjust_brightness, adjust_saturation

  def contrast(rgb, factor):
    if convention == "tensorflow" or not is_rgb:
      return tf.clip_by_value(stretch_contrast(rgb, factor, valid), 0.0, 1.0)
    return adjust_contrast(rgb, factor)

  def turn(rgb: tf.Tensor, change: tf.Tensor) -> tf.Tensor:
    return tf.switch_case(
      change,
      [
        lambda: brightness(rgb, draws.brightness),
        lambda: contrast(rgb, draws.contrast),
        lambda: saturation(rgb, draws.saturation) if is_rgb else rgb,
        lambda: adjust_hue(rgb, draws.hue) if is_rgb else rgb,
      ],
    )

  return tf.foldl(turn, draws.order, initializer=rgb)


@compiled
def add_brightness(rgb: tf.Tensor, summand: tf.Tensor) -> tf.Tensor:
  """Adds a summand to all channels; 0 changes nothing.

  The result is clipped to [0, 1].
  """
  return tf.clip_by_value(rgb + summand, 0.0, 1.0)


@compiled
def adjust_brightness(rgb: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with black: factor 0 is black, 1 changes nothing."""
  return tf.clip_by_value(rgb * factor, 0.0, 1.0)


@compiled
def stretch_contrast(
  rgb: tf.Tensor, factor: tf.Tensor, valid: tf.Tensor | None = None
) -> tf.Tensor:
  """Moves each channel away from its own mean over the valid pixels.

  Factor 1 changes nothing. The result may leave [0, 1].
  """
  inside = tf.ones(rgb.shape[:2]) if valid is None else tf.cast(valid, tf.float32)
  mean = tf.stack([_sum(channel * inside) for channel in tf.unstack(rgb, axis=-1)]) / tf.maximum(
    _sum(inside), 1.0
  )
  return rgb * factor + mean * (1.0 - factor)


@compiled
def adjust_contrast(rgb: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with the mean gray of the image.

  Factor 0 is even gray, 1 changes nothing.
  """
  height, width = rgb.shape[:2]
  mean_gray = _sum(_luma(rgb)) / (height * width)
  return tf.clip_by_value(rgb * factor + mean_gray * (1.0 - factor), 0.0, 1.0)


def _sum(plane: tf.Tensor) -> tf.Tensor:
  """Sums [h, w] in double precision.

  In single precision the rounding of 10^5 like values would add up to a tenth of a gray level.
  """
  return tf.cast(tf.reduce_sum(tf.cast(plane, tf.float64)), tf.float32)


def _luma(rgb: tf.Tensor) -> tf.Tensor:
  return sum(weight * channel for weight, channel in zip(_LUMA, tf.unstack(rgb, axis=-1)))


@compiled
def adjust_saturation(rgb: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with the image's own grayscale.

  Factor 0 is grayscale, 1 changes nothing.
  """
  return tf.clip_by_value(rgb * factor + grayscale(rgb) * (1.0 - factor), 0.0, 1.0)


@compiled
def scale_saturation(rgb: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Scales the S of HSV, up to 1, as tf.image.adjust_saturation.

  The greatest channel stays, the others keep their proportions.
  """
  value = tf.reduce_max(rgb, axis=-1, keepdims=True)
  chroma = value - tf.reduce_min(rgb, axis=-1, keepdims=True)
  factor = tf.minimum(factor, tf.math.divide_no_nan(value, chroma))
  return tf.clip_by_value(value - (value - rgb) * factor, 0.0, 1.0)


@compiled
def adjust_hue(rgb: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
  """Turns the H of HSV, as tf.image.adjust_hue.

  The shift is a fraction of the color circle: 1/3 turns red into green.
  """
  red, green, blue = tf.unstack(rgb, axis=-1)
  value = tf.maximum(tf.maximum(red, green), blue)
  least = tf.minimum(tf.minimum(red, green), blue)
  chroma = value - least
  per_chroma = 1.0 / tf.where(chroma > 0, chroma, 1.0)
  hue = tf.where(value == green, (blue - red) * per_chroma + 2.0, (red - green) * per_chroma + 4.0)
  hue = tf.where(value == red, (green - blue) * per_chroma, hue) + 6.0 * shift
  hue -= 6.0 * tf.floor(hue / 6.0)
  # How much of the chroma each channel has, around the circle: all within a sixth of its color,
  # none beyond two.
  shares = tf.abs(hue - 3.0) - 1.0, 2.0 - tf.abs(hue - 2.0), 2.0 - tf.abs(hue - 4.0)
  return tf.stack([least + chroma * tf.clip_by_value(share, 0.0, 1.0) for share in shares], axis=-1)


@compiled
def grayscale(rgb: tf.Tensor) -> tf.Tensor:
  """Computes luma (ITU-R 601), in all three channels."""
  return tf.repeat(_luma(rgb)[..., tf.newaxis], 3, axis=-1)


def gaussian_blur(rgb: tf.Tensor, sigma: tf.Tensor, max_sigma: float) -> tf.Tensor:
  """Blurs with a Gaussian, edges repeated.

  Args:
    sigma: f32[], standard deviation in pixels, at most max_sigma.
    max_sigma: the kernel reaches three of these to each side.
  """
  radius = math.ceil(3 * max_sigma)
  height, width, channels = rgb.shape
  tap = tf.range(-radius, radius + 1, dtype=tf.float32)
  kernel = tf.exp(-0.5 * (tap / sigma) ** 2)
  kernel /= tf.reduce_sum(kernel)
  # A row's values side by side make long vectors. The repeated edges are copied outside of XLA,
  # which would look them up by pixel.
  rows = tf.reshape(rgb, (height, width * channels))
  rows = tf.concat(
    [tf.repeat(rows[:1], radius, axis=0), rows, tf.repeat(rows[-1:], radius, axis=0)], axis=0
  )
  rows = _convolve(rows, kernel, axis=0, step=1)
  rows = tf.concat(
    [tf.tile(rows[:, :channels], (1, radius)), rows, tf.tile(rows[:, -channels:], (1, radius))],
    axis=1,
  )
  return tf.reshape(_convolve(rows, kernel, axis=1, step=channels), (height, width, channels))


@compiled
def _convolve(padded, kernel, *, axis, step):
  """Computes weighted sums along an axis of [m, n].

  The summed values lie `step` apart. Only places where all weights meet a value are in the result.
  """
  taps = kernel.shape[0]
  size = padded.shape[axis] - (taps - 1) * step
  parts = (
    padded[n * step :][:size] if axis == 0 else padded[:, n * step :][:, :size] for n in range(taps)
  )
  return sum(kernel[n] * part for n, part in enumerate(parts))


def normalize(rgb, mean=IMAGENET_MEAN, std=IMAGENET_STD):
  """Normalizes f32 [..., 3] in [0, 1]: (rgb - mean) / std by channel.

  TensorFlow, NumPy and JAX arrays alike.
  """
  return (rgb - mean) / std
