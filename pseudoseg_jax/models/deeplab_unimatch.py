"""DeepLabv3+ in the form of the official UniMatch code.

DeepLabv3+: Chen et al. 2018. UniMatch: Yang et al. 2023. The form differs from CPS's (`deeplab`):
every ASPP branch has a batch norm and a ReLU of its own, image pooling is one of the concatenated
branches, the low-level map comes first in the decoder, and the last stage has torchvision's
dilations 1, 2, 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.backbones import Widths, make_backbone, widths_of
from pseudoseg_jax.models.layers import Conv, ConvBN
from pseudoseg_jax.ops import resize


class ASPP(nn.Module):
  """Atrous spatial pyramid pooling: [B, h, w, C] -> [B, h, w, features]."""

  rates: Sequence[int]
  features: int = 256
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    def unit(name, x, kernel_size=1, dilation=1):
      brick = ConvBN(self.features, kernel_size, dilation=dilation, dtype=self.dtype, name=name)
      return brick(x, train=train, groups=groups)

    branches = [unit("branch0", x)]
    branches += [
      unit(f"branch{index}", x, 3, rate) for index, rate in enumerate(self.rates, start=1)
    ]
    pooled = unit("pool", jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32))
    branches.append(jnp.broadcast_to(pooled, branches[0].shape))
    return unit("project", jnp.concatenate(branches, -1))


class Head(nn.Module):
  """ASPP on the last map, joined with the first.

  Gives per-class scores at stride 4, float32. UniMatch's feature perturbation drops channels of
  these two maps and runs the head on clean and perturbed maps as one batch.
  """

  num_classes: int
  widths: Widths
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: Sequence[Array], *, train: bool, groups: int = 1) -> Array:
    features, low_features, rates = self.widths
    context = ASPP(rates, features, dtype=self.dtype, name="aspp")(
      maps[-1], train=train, groups=groups
    )
    low = ConvBN(low_features, dtype=self.dtype, name="low")(maps[0], train=train, groups=groups)
    x = jnp.concatenate([low, resize.bilinear_align_corners(context, low.shape[1:3])], -1)
    x = ConvBN(features, 3, dtype=self.dtype, name="unit1")(x, train=train, groups=groups)
    x = ConvBN(features, 3, dtype=self.dtype, name="unit2")(x, train=train, groups=groups)
    return Conv(self.num_classes, use_bias=True, name="classifier")(x)


def deeplabv3plus_unimatch(
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
  """Builds the backbone and the head of UniMatch's DeepLabv3+.

  On ResNets the head has 256 and 48 channels with rates (6, 12, 18), as in UniMatch.

  Args:
    backbone: one of backbones.BACKBONES.
    stem, output_stride, drop_connect: as in `backbones.make_backbone`.
    head_channels, low_channels, aspp_rates: as in `backbones.widths_of`.
  """
  body = make_backbone(
    backbone, stem=stem, output_stride=output_stride, drop_connect=drop_connect, dtype=dtype
  )
  return body, Head(
    num_classes,
    widths_of(backbone, head_channels, low_channels, aspp_rates, output_stride),
    dtype=dtype,
  )
