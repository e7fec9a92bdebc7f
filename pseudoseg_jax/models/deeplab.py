"""DeepLabv3+ in the form of the official CPS code.

DeepLabv3+: Chen et al. 2018. CPS: Chen et al. 2021. The form differs from the textbook: one batch
norm over the concatenated ASPP branches, leaky ReLUs in the ASPP, an image-pooling branch that is
added rather than concatenated, no dropout, dilations 2, 4, 8 in the last stage and align-corners
upsampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.backbones import Widths, make_backbone, widths_of
from pseudoseg_jax.models.layers import BatchNorm, Conv, ConvBN
from pseudoseg_jax.ops import resize

LEAK = 0.01  # PyTorch's default slope


class ASPP(nn.Module):
  """Atrous spatial pyramid pooling: [B, h, w, C] -> [B, h, w, features]."""

  rates: Sequence[int]
  features: int = 256
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    branches = [Conv(self.features, 1, dtype=self.dtype, name="branch0")(x)]
    for index, rate in enumerate(self.rates, start=1):
      branches.append(
        Conv(self.features, 3, dilation=rate, dtype=self.dtype, name=f"branch{index}")(x)
      )
    y = BatchNorm(negative_slope=LEAK, name="branches_bn")(
      jnp.concatenate(branches, -1), train=train, groups=groups
    )
    y = Conv(self.features, dtype=self.dtype, name="project")(y)
    pooled = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
    pooled = ConvBN(self.features, negative_slope=LEAK, dtype=self.dtype, name="pool")(
      pooled, train=train, groups=groups
    )
    pooled = Conv(self.features, dtype=self.dtype, name="pool_project")(pooled)
    return BatchNorm(negative_slope=LEAK, name="bn")(y + pooled, train=train, groups=groups)


class Head(nn.Module):
  """ASPP on the last stage, joined with the first stage.

  Gives per-class scores at stride 4, float32.
  """

  num_classes: int
  widths: Widths
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, stages: Sequence[Array], *, train: bool, groups: int = 1) -> Array:
    features, low_features, rates = self.widths
    context = ASPP(rates, features, dtype=self.dtype, name="aspp")(
      stages[-1], train=train, groups=groups
    )
    low = ConvBN(low_features, dtype=self.dtype, name="low")(stages[0], train=train, groups=groups)
    x = jnp.concatenate([resize.bilinear_align_corners(context, low.shape[1:3]), low], -1)
    x = ConvBN(features, 3, dtype=self.dtype, name="unit1")(x, train=train, groups=groups)
    x = ConvBN(features, 3, dtype=self.dtype, name="unit2")(x, train=train, groups=groups)
    return Conv(self.num_classes, use_bias=True, name="classifier")(x)


def deeplabv3plus(
  num_classes: int,
  *,
  backbone: str = "resnet50",
  stem: str = "deep",
  output_stride: int = 16,
  head_channels: int = 0,
  low_channels: int = 0,
  aspp_rates: Sequence[int] = (),
  drop_connect: float = 0.0,
  dtype: Any = jnp.float32,
) -> tuple[nn.Module, Head]:
  """Builds the backbone and the head of CPS's DeepLabv3+.

  On ResNets the head has 256 and 48 channels with rates (6, 12, 18), as in CPS.

  Args:
    backbone: one of backbones.BACKBONES.
    stem, output_stride, drop_connect: as in `backbones.make_backbone`.
    head_channels, low_channels, aspp_rates: as in `backbones.widths_of`.
  """
  body = make_backbone(
    backbone,
    stem=stem,
    output_stride=output_stride,
    multi_grid=(1, 2, 4),
    drop_connect=drop_connect,
    dtype=dtype,
  )
  return body, Head(
    num_classes,
    widths_of(backbone, head_channels, low_channels, aspp_rates, output_stride),
    dtype=dtype,
  )
