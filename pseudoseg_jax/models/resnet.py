"""ResNet backbones for dense prediction: any output stride, both dilation conventions, plain or deep stem.

He et al. 2016, "Deep residual learning"; the stride sits in the 3x3 convolution, as in PyTorch's and most later code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.layers import ConvBN, max_pool

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BOTTLENECK = ("resnet50", "resnet101")
STEMS = ("plain", "deep")
OUTPUT_STRIDES = (8, 16, 32)


def strides_and_dilations(
  blocks: Sequence[int], output_stride: int, multi_grid: Sequence[int] | None
) -> list[list[tuple[int, int]]]:
  """(stride, dilation) of every block of every stage.

  A stage that may not stride any more dilates instead. Without multi_grid its first block keeps the dilation of the stage before
  (torchvision). With multi_grid block i of the last stage has the stage's dilation times multi_grid[i], the first included
  (DeepLab; CPS has output stride 16 and 2, 4, 8).
  """
  plan, stride_so_far, dilation = [], 4, 1
  for stage, count in enumerate(blocks):
    stride, first_dilation = (1 if stage == 0 else 2), dilation
    if stride_so_far * stride > output_stride:
      dilation, stride = dilation * stride, 1
    stride_so_far *= stride
    dilations = [first_dilation] + [dilation] * (count - 1)
    if stage == len(blocks) - 1 and multi_grid is not None:
      dilations = [dilation * factor for factor in multi_grid[:count]]
    plan.append([(stride if block == 0 else 1, dilations[block]) for block in range(count)])
  return plan


class Stem(nn.Module):
  """The first convolutions and the max pooling: [B, H, W, 3] -> [B, ~H/4, ~W/4, 64 or 128].

  "plain": 7x7 stride 2 to 64 channels. "deep": 3x3 stride 2 to 64, 3x3 to 64, 3x3 to 128 (the `v1c` weights of CPS; other `v1c`
  weights have 32, 32, 64 and do not fit).
  """

  kind: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    if self.kind == "plain":
      x = ConvBN(64, 7, stride=2, dtype=self.dtype, name="unit1")(x, train=train, groups=groups)
    else:
      x = ConvBN(64, 3, stride=2, dtype=self.dtype, name="unit1")(x, train=train, groups=groups)
      x = ConvBN(64, 3, dtype=self.dtype, name="unit2")(x, train=train, groups=groups)
      x = ConvBN(128, 3, dtype=self.dtype, name="unit3")(x, train=train, groups=groups)
    return max_pool(x)


class Block(nn.Module):
  """One residual block: bottleneck (1x1, 3x3, 1x1 to 4 `width`) or basic (3x3, 3x3), with a 1x1 shortcut where shapes differ."""

  width: int
  stride: int
  dilation: int
  bottleneck: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    def unit(name, features, kernel_size, x, *, stride=1, dilation=1, negative_slope=0.0):
      brick = ConvBN(features, kernel_size, stride, dilation, negative_slope, dtype=self.dtype, name=name)
      return brick(x, train=train, groups=groups)

    if self.bottleneck:
      features = 4 * self.width
      y = unit("unit1", self.width, 1, x)
      y = unit("unit2", self.width, 3, y, stride=self.stride, dilation=self.dilation)
      y = unit("unit3", features, 1, y, negative_slope=1.0)
    else:
      features = self.width
      y = unit("unit1", self.width, 3, x, stride=self.stride, dilation=self.dilation)
      y = unit("unit2", self.width, 3, y, dilation=self.dilation, negative_slope=1.0)
    if self.stride != 1 or x.shape[-1] != features:
      x = unit("shortcut", features, 1, x, stride=self.stride, negative_slope=1.0)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """variant, stem, output_stride: one of BLOCKS, STEMS, OUTPUT_STRIDES; multi_grid as in `strides_and_dilations`."""

  variant: str
  stem: str = "plain"
  output_stride: int = 16
  multi_grid: Sequence[int] | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, ...]:
    """images [B, H, W, 3] -> the outputs of the four stages, the first at stride 4, the last at the output stride."""
    blocks = BLOCKS[self.variant]
    x = Stem(self.stem, dtype=self.dtype, name="stem")(x, train=train, groups=groups)
    outputs = []
    for stage, plan in enumerate(strides_and_dilations(blocks, self.output_stride, self.multi_grid)):
      for index, (stride, dilation) in enumerate(plan):
        block = Block(
          64 * 2**stage, stride, dilation, self.variant in BOTTLENECK, dtype=self.dtype, name=f"layer{stage + 1}_{index}"
        )
        x = block(x, train=train, groups=groups)
      outputs.append(x)
    return tuple(outputs)
