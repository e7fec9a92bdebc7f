"""GCT's flaw detector.

It takes an image and a prediction of it, and finds where the prediction is wrong.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.layers import BatchNorm, normalize_batch
from pseudoseg_jax.ops import resize

_SLOPE = 0.2  # of the leaky ReLU


class EvenConv(nn.Module):
  """A 4x4 convolution with one pixel of padding and a bias.

  It is initialized as PyTorch's: all values uniform in +-1/sqrt(fan_in).
  """

  features: int
  stride: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (4, 4, x.shape[-1], self.features)
    bound = (16 * x.shape[-1]) ** -0.5
    uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    kernel, bias = self.param("kernel", uniform, shape), self.param("bias", uniform, shape[-1:])
    y = jax.lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      ((1, 1), (1, 1)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias


class HalfBatchNorm(nn.Module):
  """Batch norm of half the channels, instance norm of the others.

  The first half of the channels has batch norm, the others instance norm without parameters; a
  leaky ReLU follows. [GCT, IBNorm]
  """

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    half = (x.shape[-1] + 1) // 2
    by_batch = BatchNorm(negative_slope=_SLOPE, name="bnorm")(x[..., :half], train=train)
    others = x[..., half:]
    one = jnp.ones(others.shape[-1])
    # Every image is a batch of its own, in training and inference alike.
    by_image = normalize_batch(others[None], one, 0 * one, 1e-5, _SLOPE)[0][0]
    return jnp.concatenate([by_batch, by_image], axis=-1)


def least_side(stages: int) -> int:
  """Returns the shorter side of the smallest image that can be taken.

  It is in pixels. In that image every normalized map has two rows and columns.
  """
  side = 2
  for _ in range(stages - 1):
    side = 2 * (side + 1)
  return 2 * side


class FlawDetector(nn.Module):
  """The network that maps an image and a prediction of it to a flaw map.

  Image f32[B, H, W, C] and probabilities f32[B, H, W, K] -> flaw map f32[B, H, W], of any sign.
  [GCT, FlawDetector]

  The first stage halves the sides. Every further one halves them again, doubles the channels and
  loses one pixel more. The classifier halves them a last time.

  Raises:
    checks.InputError: an image too small for the stages.
  """

  width: int
  stages: int

  @nn.compact
  def __call__(self, images: Array, probabilities: Array, *, train: bool) -> Array:
    size = images.shape[1:3]
    if min(size) < least_side(self.stages):
      problems = checks.Problems("the flaw detector cannot see images of this size")
      allowed = f"sides of {least_side(self.stages)} pixels or more for {self.stages} stages"
      problems.add(
        "training crop",
        got=f"{size[0]}x{size[1]}",
        allowed=allowed,
        remedy="use a larger crop or fewer detector_stages",
      )
      problems.raise_if_any()

    def unit(name, x, features, stride):
      x = EvenConv(features, stride, name=f"conv{name}")(x)
      return HalfBatchNorm(name=f"ibn{name}")(x, train=train)

    x = unit("1", jnp.concatenate([images, probabilities], axis=-1), self.width, 2)
    for stage in range(2, self.stages + 1):
      features = self.width * 2 ** (stage - 1)
      x = unit(f"{stage}_1", unit(f"{stage}", x, features, 2), features, 1)
    x = EvenConv(1, 2, name="classifier")(x)
    return resize.bilinear_align_corners(x, size)[..., 0]
