"""EfficientNet-Lite for dense prediction.

It is EfficientNet (Tan and Le 2019) without squeeze-excitation and with ReLU6, small and quick on
CPUs.

Source: tensorflow/tpu, models/official/efficientnet/lite. Tensors are named as in the PyPI package
efficientnet_lite_pytorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.layers import BatchNorm, Conv, DepthwiseConv

# name -> (width, depth): factors on the channels and on the repeats of the stages.
VERSIONS: Mapping[str, tuple[float, float]] = {
  "efficientnet_lite0": (1.0, 1.0),
  "efficientnet_lite1": (1.0, 1.1),
  "efficientnet_lite2": (1.1, 1.2),
}
HEAD_CHANNELS = 1280


class Stage(NamedTuple):
  """A stage of the published network.

  repeats: blocks.
  features: channels that each puts out.
  expansion: of the channels inside a block.
  stride: of the first block.
  """

  repeats: int
  kernel_size: int
  stride: int
  expansion: int
  features: int


STAGES = (
  Stage(1, 3, 1, 1, 16),
  Stage(2, 3, 2, 6, 24),
  Stage(2, 5, 2, 6, 40),
  Stage(3, 3, 2, 6, 80),
  Stage(3, 5, 1, 6, 112),
  Stage(4, 5, 2, 6, 192),
  Stage(1, 3, 1, 6, 320),
)
_LAST_OF_A_STRIDE = (1, 2, 4, 6)  # stages whose outputs are the maps at strides 4, 8, 16, 32


def _rounded(features: float) -> int:
  """Rounds to a multiple of 8, at most a tenth below."""
  near = max(8, int(features + 4) // 8 * 8)
  return near if near >= 0.9 * features else near + 8


def stages_of(version: str) -> tuple[Stage, ...]:
  """Returns the stages of a version.

  Widths are rounded to multiples of 8, repeats are rounded up; the first and the last stage keep
  their one block.
  """
  width, depth = VERSIONS[version]
  scaled = [stage._replace(features=_rounded(width * stage.features)) for stage in STAGES]
  inner = [stage._replace(repeats=math.ceil(depth * stage.repeats)) for stage in scaled[1:-1]]
  return scaled[0], *inner, scaled[-1]


class Unit(nn.Module):
  """A convolution, batch norm and, if `active`, a ReLU6.

  The convolution has TensorFlow's "SAME" padding. features None: depthwise.
  """

  features: int | None
  kernel_size: int = 1
  stride: int = 1
  dilation: int = 1
  active: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    settings = {
      "stride": self.stride,
      "dilation": self.dilation,
      "same": True,
      "dtype": self.dtype,
      "name": "conv",
    }
    if self.features is None:
      x = DepthwiseConv(self.kernel_size, **settings)(x)
    else:
      x = Conv(self.features, self.kernel_size, **settings)(x)
    slope, ceiling = (0.0, 6.0) if self.active else (1.0, jnp.inf)
    return BatchNorm(momentum=0.99, eps=1e-3, negative_slope=slope, ceiling=ceiling, name="bn")(
      x, train=train, groups=groups
    )


class Block(nn.Module):
  """An inverted bottleneck.

  A 1x1 convolution to more channels, a depthwise one, a 1x1 back; added to its input where the
  shapes agree.

  drop: probability that an image's residual is left out in training, where a "dropout" key is
    given; the others are scaled up.
  """

  stage: Stage
  stride: int
  dilation: int
  drop: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    mode, y = {"train": train, "groups": groups}, x
    if self.stage.expansion != 1:
      y = Unit(self.stage.expansion * x.shape[-1], dtype=self.dtype, name="expand")(y, **mode)
    y = Unit(
      None, self.stage.kernel_size, self.stride, self.dilation, dtype=self.dtype, name="depthwise"
    )(y, **mode)
    y = Unit(self.stage.features, active=False, dtype=self.dtype, name="project")(y, **mode)
    if self.stride != 1 or x.shape[-1] != self.stage.features:
      return y
    if self.drop and train and self.has_rng("dropout"):
      kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.drop, (x.shape[0], 1, 1, 1))
      y = jnp.where(kept, y / (1 - self.drop), 0)
    return x + y


def strides_and_dilations(
  stages: tuple[Stage, ...], output_stride: int
) -> list[list[tuple[int, int]]]:
  """Returns (stride, dilation) of every block of every stage.

  A stage that may not stride any more dilates instead, after its first block.
  """
  plan, stride_so_far, dilation = [], 2, 1
  for stage in stages:
    stride, first_dilation = stage.stride, dilation
    if stride_so_far * stride > output_stride:
      stride, dilation = 1, dilation * stride
    stride_so_far *= stride
    plan.append([(stride, first_dilation), *[(1, dilation)] * (stage.repeats - 1)])
  return plan


class EfficientNetLite(nn.Module):
  """The EfficientNet-Lite backbone.

  version: one of VERSIONS.
  output_stride: 8, 16 or 32.
  drop_connect: of the last block, rising from 0 of the first; 0.2 published.
  """

  version: str = "efficientnet_lite0"
  output_stride: int = 16
  drop_connect: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, ...]:
    """Computes the last maps at strides 4, 8, 16 and 32.

    The input is images [B, H, W, C]. The strides are those of the published network; sides are
    rounded up. With output stride 16 the last is at stride 16, with 8 the last two are at 8.
    """
    mode, stages = {"train": train, "groups": groups}, stages_of(self.version)
    x = Unit(32, 3, stride=2, dtype=self.dtype, name="stem")(x, **mode)
    count, index, outputs = sum(stage.repeats for stage in stages), 0, []
    for number, plan in enumerate(strides_and_dilations(stages, self.output_stride)):
      for stride, dilation in plan:
        drop = self.drop_connect * index / count
        x = Block(stages[number], stride, dilation, drop, dtype=self.dtype, name=f"block{index}")(
          x, **mode
        )
        index += 1
      if number in _LAST_OF_A_STRIDE:
        outputs.append(x)
    return tuple(outputs)


class ImageClassifier(nn.Module):
  """The published head, which classifies whole images.

  [..., [B, h, w, C]] -> logits f32[B, num_classes]. Segmentation leaves it out.
  """

  num_classes: int = 1000
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: tuple[Array, ...], *, train: bool, groups: int = 1) -> Array:
    x = Unit(HEAD_CHANNELS, dtype=self.dtype, name="unit")(maps[-1], train=train, groups=groups)
    return nn.Dense(self.num_classes, name="classifier")(
      jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
    )
