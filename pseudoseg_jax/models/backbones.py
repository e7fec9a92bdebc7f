"""Backbones by name: ResNets and EfficientNet-Lites.

They are for the networks that take any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Array
from pseudoseg_jax.models import efficientnet, resnet
from pseudoseg_jax.models.efficientnet import EfficientNetLite
from pseudoseg_jax.models.resnet import ResNet

BACKBONES = (*resnet.BLOCKS, *efficientnet.VERSIONS)


class Widths(NamedTuple):
  """Sizes of a head that suits a backbone.

  context: channels of what pools context (ASPP) and of the decoder.
  low: channels of the finest map.
  rates: dilations of the ASPP at output stride 16.
  """

  context: int
  low: int
  rates: tuple[int, ...]


LARGE = Widths(256, 48, (6, 12, 18))  # DeepLabv3+, on ResNets
# A head of 256 channels costs five times what EfficientNet-Lite0 does. Rates are for the crops that
# such networks are trained with: at 128 pixels the map is 8 x 8, of which rates of 12 and 18 read
# nothing but padding.
SMALL = Widths(96, 24, (3, 6, 9))


def make_backbone(
  name: str,
  *,
  stem: str,
  output_stride: int,
  multi_grid: Sequence[int] | None = None,
  drop_connect: float = 0.0,
  dtype: Any = jnp.float32,
) -> nn.Module:
  """Builds a backbone by name.

  The module maps (images [B, H, W, C], *, train, groups) to maps at strides 4, 8, 16, 32, the last
  at most at the output stride.

  Args:
    name: one of BACKBONES.
    stem: of ResNets, one of resnet.STEMS: "plain", a 7x7 convolution; "deep", three of 3x3.
    output_stride: of the last map, 8, 16 or 32; smaller ones see finer and take longer.
    multi_grid: of ResNets, see `resnet.strides_and_dilations`.
    drop_connect: of EfficientNet-Lites, the probability with which a training image skips the last
      block, less for the blocks before; 0.2 published.

  Raises:
    checks.InputError: unknown names, or values that are not allowed.
  """
  checks.check_name("network.backbone", name, BACKBONES)
  checks.check_name("network.stem", stem, resnet.STEMS)
  problems = checks.Problems("the network cannot be built")
  if output_stride not in resnet.OUTPUT_STRIDES:
    problems.add("network.output_stride", got=output_stride, allowed=resnet.OUTPUT_STRIDES)
  if not 0 <= drop_connect < 1:
    problems.add(
      "network.drop_connect",
      got=drop_connect,
      allowed="0 <= drop_connect < 1; EfficientNet's own is 0.2",
    )
  elif drop_connect and name in resnet.BLOCKS:
    problems.add(
      "network.drop_connect",
      got=drop_connect,
      allowed=f"0 with {name}",
      remedy="it is of EfficientNet-Lite backbones",
    )
  problems.raise_if_any()
  if name in efficientnet.VERSIONS:
    return EfficientNetLite(name, output_stride, drop_connect, dtype=dtype)
  return ResNet(name, stem, output_stride, multi_grid, dtype=dtype)


class Still(nn.Module):
  """A backbone that runs as in inference, whatever mode is asked for.

  Batch norm uses its running statistics, which stay as they are; there is no drop-connect.
  """

  inner: nn.Module

  def setup(self):
    nn.share_scope(self, self.inner)

  @property
  def dtype(self) -> Any:
    return self.inner.dtype

  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, ...]:
    return self.inner(x, train=False)


def widths_of(
  backbone: str,
  head_channels: int,
  low_channels: int,
  aspp_rates: Sequence[int],
  output_stride: int,
) -> Widths:
  """Returns the sizes of a DeepLabv3+ head.

  Where an option is 0 or empty, it is what suits the backbone.

  Args:
    head_channels: of the head; 0 is what suits the backbone.
    low_channels: of the head's low-level map; 0 likewise.
    aspp_rates: dilations at output stride 16; () is what suits the backbone. A map twice as fine
      needs them twice as large to see as far (DeepLabv3, section 3.3).

  Raises:
    checks.InputError: values that are not allowed.
  """
  default = SMALL if backbone in efficientnet.VERSIONS else LARGE
  rates = tuple(aspp_rates) or default.rates
  problems = checks.Problems("the network cannot be built")
  for name, value in (("head_channels", head_channels), ("low_channels", low_channels)):
    if value < 0:
      problems.add(f"network.{name}", got=value, allowed="1 or more; 0 for what suits the backbone")
  if any(not isinstance(rate, int) or rate < 1 for rate in rates):
    problems.add(
      "network.aspp_rates",
      got=aspp_rates,
      allowed="positive integers, such as (3, 6, 9); () for what suits the backbone",
    )
  problems.raise_if_any()
  rates = tuple(rate * max(16 // output_stride, 1) for rate in rates)
  return Widths(head_channels or default.context, low_channels or default.low, rates)
