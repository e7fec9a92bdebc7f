"""DeepLabv3+ in the form of the TensorFlow DeepLab library.

DeepLabv3+: Chen et al. 2018. PseudoSeg (Zou et al. 2021) trains this form. Atrous and decoder
convolutions are separable, with batch norm and ReLU after the depthwise and after the pointwise
half. Image pooling is one of the concatenated branches. The statistics of the head move at 0.0003 a
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Array
from pseudoseg_jax.models import resnet
from pseudoseg_jax.models.layers import BatchNorm, Conv, ConvBN, DepthwiseConv
from pseudoseg_jax.models.resnet import ResNetBeta
from pseudoseg_jax.models.xception import Xception65
from pseudoseg_jax.ops import resize

BACKBONES = (*resnet.BOTTLENECK, "xception65")


class DepthwiseConvBN(nn.Module):
  """A depthwise 3x3 convolution, batch norm and a ReLU."""

  dilation: int
  momentum: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    x = DepthwiseConv(dilation=self.dilation, dtype=self.dtype, name="conv")(x)
    return BatchNorm(self.momentum, negative_slope=0.0, name="bn")(x, train=train, groups=groups)


class SeparableConvBN(nn.Module):
  """A depthwise 3x3, then a pointwise convolution to `features`.

  Each has batch norm and a ReLU.
  """

  features: int
  dilation: int
  momentum: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    x = DepthwiseConvBN(self.dilation, self.momentum, dtype=self.dtype, name="depthwise")(
      x, train=train, groups=groups
    )
    pointwise = ConvBN(self.features, momentum=self.momentum, dtype=self.dtype, name="pointwise")
    return pointwise(x, train=train, groups=groups)


class ASPP(nn.Module):
  """Atrous spatial pyramid pooling: [B, h, w, C] -> [B, h, w, features].

  Dropout acts only where a "dropout" key is given.
  """

  rates: Sequence[int]
  dropout: float
  momentum: float
  features: int = 256
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    def unit(name, x):
      brick = ConvBN(self.features, momentum=self.momentum, dtype=self.dtype, name=name)
      return brick(x, train=train, groups=groups)

    pooled = unit("pool", jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32))
    branches = [jnp.broadcast_to(pooled, (*x.shape[:3], self.features)), unit("branch0", x)]
    for index, rate in enumerate(self.rates, start=1):
      branch = SeparableConvBN(
        self.features, rate, self.momentum, dtype=self.dtype, name=f"branch{index}"
      )
      branches.append(branch(x, train=train, groups=groups))
    y = unit("project", jnp.concatenate(branches, -1))
    if train and self.has_rng("dropout"):
      y = nn.Dropout(self.dropout, deterministic=False)(y)
    return y


class Head(nn.Module):
  """ASPP on the last map, joined with the first, low-level one.

  Gives per-class scores on the grid of the first, float32.
  """

  num_classes: int
  rates: Sequence[int]
  dropout: float
  momentum: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: Sequence[Array], *, train: bool, groups: int = 1) -> Array:
    aspp = ASPP(self.rates, self.dropout, self.momentum, dtype=self.dtype, name="aspp")
    context = aspp(maps[-1], train=train, groups=groups)
    low = ConvBN(48, momentum=self.momentum, dtype=self.dtype, name="low")(
      maps[0], train=train, groups=groups
    )
    x = jnp.concatenate([resize.bilinear_align_corners(context, low.shape[1:3]), low], -1)
    for name in ("unit1", "unit2"):
      x = SeparableConvBN(256, 1, self.momentum, dtype=self.dtype, name=name)(
        x, train=train, groups=groups
      )
    return Conv(self.num_classes, use_bias=True, name="classifier")(x)


def deeplabv3plus_tf(
  num_classes: int,
  *,
  backbone: str = "resnet50",
  output_stride: int = 16,
  multi_grid: Sequence[int] = (1, 1, 1),
  dropout: float = 0.1,
  head_momentum: float = 0.9997,
  dtype: Any = jnp.float32,
) -> tuple[ResNetBeta | Xception65, Head]:
  """Builds backbone and head of PseudoSeg's DeepLabv3+; images in -1..1.

  Defaults are those of the PseudoSeg code.

  Args:
    backbone: one of BACKBONES; the official commands train "xception65".
    output_stride: one of resnet.OUTPUT_STRIDES.
    multi_grid: factors on the dilations of the last stage's three blocks. PseudoSeg leaves them at
      1; the DeepLab library advises 1, 2, 4 for its ResNets. Xception has none.
    dropout: fraction of ASPP outputs dropped in training.
    head_momentum: what the head's running statistics keep per batch. 0.9997 needs some ten thousand
      batches to settle: use less in short runs.
  """
  checks.check_name("network.backbone", backbone, BACKBONES)
  problems = checks.Problems("the network cannot be built")
  if output_stride not in resnet.OUTPUT_STRIDES:
    problems.add("network.output_stride", got=output_stride, allowed=resnet.OUTPUT_STRIDES)
  if len(multi_grid) != 3 or min(multi_grid) < 1:
    problems.add(
      "network.multi_grid",
      got=multi_grid,
      allowed="three positive integers, one for each block of the last stage",
    )
  if backbone == "xception65" and tuple(multi_grid) != (1, 1, 1):
    problems.add("network.multi_grid", got=multi_grid, allowed="(1, 1, 1) with xception65")
  for name, value in (("dropout", dropout), ("head_momentum", head_momentum)):
    if not 0 <= value < 1:
      problems.add(f"network.{name}", got=value, allowed="0 <= value < 1")
  problems.raise_if_any()
  # Rates 6, 12, 18 are for stride 16; a map twice as fine needs them twice as large to see as far
  # (DeepLabv3, section 3.3).
  rates = tuple(rate * max(16 // output_stride, 1) for rate in (6, 12, 18))
  if backbone == "xception65":
    body = Xception65(output_stride, dtype=dtype)
  else:
    body = ResNetBeta(backbone, output_stride, tuple(multi_grid), dtype=dtype)
  return body, Head(num_classes, rates, dropout, head_momentum, dtype=dtype)
