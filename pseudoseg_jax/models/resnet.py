"""ResNet backbones for dense prediction.

They have any output stride, both dilation conventions, and a plain or a deep stem. He et al. 2016,
"Deep residual learning"; the stride sits in the 3x3 convolution, as in PyTorch's and most later
code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.layers import ConvBN, max_pool, max_pool_same

BLOCKS = {
  "resnet18": (2, 2, 2, 2),
  "resnet34": (3, 4, 6, 3),
  "resnet50": (3, 4, 6, 3),
  "resnet101": (3, 4, 23, 3),
}
BOTTLENECK = ("resnet50", "resnet101")
STEMS = ("plain", "deep")
OUTPUT_STRIDES = (8, 16, 32)


def strides_and_dilations(
  blocks: Sequence[int], output_stride: int, multi_grid: Sequence[int] | None
) -> list[list[tuple[int, int]]]:
  """Returns (stride, dilation) of every block of every stage.

  A stage that may not stride any more dilates instead. Without multi_grid its first block keeps the
  dilation of the stage before (torchvision). With multi_grid block i of the last stage has the
  stage's dilation times multi_grid[i], the first included (DeepLab; CPS has output stride 16 and 2,
  4, 8).
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
  """The first convolutions and the max pooling.

  [B, H, W, 3] -> [B, ~H/4, ~W/4, 64 or 128].

  "plain": 7x7 stride 2 to 64 channels. "deep": 3x3 stride 2 to 64, 3x3 to 64, 3x3 to 128 (the `v1c`
  weights of CPS; other `v1c` weights have 32, 32, 64 and do not fit).
  """

  kind: str
  momentum: float = 0.9
  pool: Callable[[Array], Array] = max_pool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    def unit(name, features, kernel_size, x, stride=1):
      brick = ConvBN(
        features, kernel_size, stride, momentum=self.momentum, dtype=self.dtype, name=name
      )
      return brick(x, train=train, groups=groups)

    if self.kind == "plain":
      x = unit("unit1", 64, 7, x, stride=2)
    else:
      x = unit("unit1", 64, 3, x, stride=2)
      x = unit("unit2", 64, 3, x)
      x = unit("unit3", 128, 3, x)
    return self.pool(x)


class Block(nn.Module):
  """One residual block, bottleneck or basic.

  A bottleneck is 1x1, 3x3, 1x1 to 4 `width`; a basic block is 3x3, 3x3. The shortcut is a 1x1
  convolution where shapes differ.
  """

  width: int
  stride: int
  dilation: int
  bottleneck: bool
  momentum: float = 0.9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    def unit(name, features, kernel_size, x, *, stride=1, dilation=1, negative_slope=0.0):
      brick = ConvBN(
        features,
        kernel_size,
        stride,
        dilation,
        negative_slope,
        self.momentum,
        dtype=self.dtype,
        name=name,
      )
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
  """The ResNet backbone.

  variant, stem, output_stride: one of BLOCKS, STEMS, OUTPUT_STRIDES.
  multi_grid: as in `strides_and_dilations`.
  """

  variant: str
  stem: str = "plain"
  output_stride: int = 16
  multi_grid: Sequence[int] | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, ...]:
    """Computes the outputs of the four stages of images [B, H, W, 3].

    The first is at stride 4, the last at the output stride.
    """
    blocks = BLOCKS[self.variant]
    x = Stem(self.stem, dtype=self.dtype, name="stem")(x, train=train, groups=groups)
    outputs = []
    for stage, plan in enumerate(
      strides_and_dilations(blocks, self.output_stride, self.multi_grid)
    ):
      for index, (stride, dilation) in enumerate(plan):
        block = Block(
          64 * 2**stage,
          stride,
          dilation,
          self.variant in BOTTLENECK,
          dtype=self.dtype,
          name=f"layer{stage + 1}_{index}",
        )
        x = block(x, train=train, groups=groups)
      outputs.append(x)
    return tuple(outputs)


def beta_strides_and_dilations(
  blocks: Sequence[int], output_stride: int, multi_grid: Sequence[int]
) -> list[list[tuple[int, int]]]:
  """Returns (stride, dilation) of every block of `ResNetBeta`, by stage.

  The last block of a stage strides, so a stage that may not any more keeps its own dilation and
  doubles that of the stages after it. The last stage has no stride; its block i has the dilation
  times multi_grid[i].
  """
  plan, stride_so_far, dilation = [], 4, 1
  for count in blocks[:-1]:
    stride = 2 if 2 * stride_so_far <= output_stride else 1
    plan.append([(1, dilation)] * (count - 1) + [(stride, dilation)])
    stride_so_far, dilation = stride_so_far * stride, dilation * 2 // stride
  return [*plan, [(1, dilation * factor) for factor in multi_grid[: blocks[-1]]]]


class BlockBeta(nn.Module):
  """One bottleneck block of `ResNetBeta`.

  1x1, 3x3, 1x1 to 4 `width`. Its shortcut is a 1x1 convolution only where the channels differ.
  """

  width: int
  stride: int
  dilation: int
  momentum: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, Array]:
    """Computes the output and the residual.

    The residual is what the block adds to the shortcut, before the sum's ReLU.
    """

    def unit(name, features, kernel_size, x, *, stride=1, dilation=1, negative_slope=0.0):
      brick = ConvBN(
        features,
        kernel_size,
        stride,
        dilation,
        negative_slope,
        self.momentum,
        dtype=self.dtype,
        name=name,
      )
      return brick(x, train=train, groups=groups)

    y = unit("unit1", self.width, 1, x)
    y = unit("unit2", self.width, 3, y, stride=self.stride, dilation=self.dilation)
    y = unit("unit3", 4 * self.width, 1, y, negative_slope=1.0)
    if x.shape[-1] == y.shape[-1]:
      x = x[:, :: self.stride, :: self.stride]
    else:
      x = unit("shortcut", 4 * self.width, 1, x, stride=self.stride, negative_slope=1.0)
    return nn.relu(x + y), y


class ResNetBeta(nn.Module):
  """The ResNet of TensorFlow's DeepLab library; input in -1..1.

  There it is `resnet_v1_50_beta` and `resnet_v1_101_beta`.

  It differs from `ResNet`: the stride sits in the last block of a stage and not the first, a
  strided shortcut without change of channels is no convolution, the pooling pads as TensorFlow's
  "SAME", running statistics move at 0.05 a batch (PseudoSeg's).

  variant, output_stride: one of BOTTLENECK, OUTPUT_STRIDES; multi_grid as in
    `beta_strides_and_dilations`.
  """

  variant: str
  output_stride: int = 16
  multi_grid: Sequence[int] = (1, 1, 1)
  momentum: float = 0.95
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, ...]:
    """Computes the low-level map and the outputs of the four stages.

    The input is images [B, H, W, 3]. The low-level map [B, ~H/4, ~W/4, 256] is for decoders and
    comes first; it is the residual of the second block. With output stride 16 the stages end at
    strides 8, 16, 16, 16.
    """
    x = Stem("deep", self.momentum, max_pool_same, dtype=self.dtype, name="stem")(
      x, train=train, groups=groups
    )
    outputs, residuals = [], []
    for stage, plan in enumerate(
      beta_strides_and_dilations(BLOCKS[self.variant], self.output_stride, self.multi_grid)
    ):
      for index, (stride, dilation) in enumerate(plan):
        name = f"layer{stage + 1}_{index}"
        block = BlockBeta(
          64 * 2**stage, stride, dilation, self.momentum, dtype=self.dtype, name=name
        )
        x, residual = block(x, train=train, groups=groups)
        residuals.append(residual)
      outputs.append(x)
    return residuals[1], *outputs
