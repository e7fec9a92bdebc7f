"""Xception-65 for dense prediction, as in TensorFlow's DeepLab library.

Xception: Chollet 2017; aligned and deepened by Qi et al. 2017. Every convolution is separable: 3x3
within each channel, then 1x1 across channels, each with a batch norm of its own. Strides stand in
place of max pooling, so that a block that may not stride any more can dilate instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.layers import BatchNorm, Conv, DepthwiseConv

# name -> (units, channels of a unit's three separable convolutions, stride)
BLOCKS = {
  "entry1": (1, (128, 128, 128), 2),
  "entry2": (1, (256, 256, 256), 2),
  "entry3": (1, (728, 728, 728), 2),
  "middle1": (16, (728, 728, 728), 1),
  "exit1": (1, (728, 1024, 1024), 2),
  "exit2": (1, (1536, 1536, 2048), 1),
}


def strides_and_dilations(output_stride: int) -> list[tuple[int, int]]:
  """Returns (stride, dilation) of every block.

  Once the output stride is reached, a stride dilates the blocks after its own instead.
  """
  plan, stride_so_far, dilation = [], 2, 1
  for _, _, stride in BLOCKS.values():
    if stride_so_far == output_stride:
      plan.append((1, dilation))
      dilation *= stride
    else:
      plan.append((stride, 1))
      stride_so_far *= stride
  return plan


class ConvNorm(nn.Module):
  """A convolution without bias, batch norm and, if asked for, a ReLU.

  Batch norm is as DeepLab trains Xception. features None: depthwise.
  """

  features: int | None
  kernel_size: int = 1
  stride: int = 1
  dilation: int = 1
  relu: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    """Convolves and normalizes a map.

    [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features or C].
    """
    settings = {
      "stride": self.stride,
      "dilation": self.dilation,
      "dtype": self.dtype,
      "name": "conv",
    }
    if self.features is None:
      x = DepthwiseConv(self.kernel_size, **settings)(x)
    else:
      x = Conv(self.features, self.kernel_size, **settings)(x)
    norm = BatchNorm(momentum=0.9997, eps=1e-3, negative_slope=0.0 if self.relu else 1.0, name="bn")
    return norm(x, train=train, groups=groups)


class Unit(nn.Module):
  """Three separable convolutions and a shortcut.

  The last one has the stride. The shortcut is a 1x1 convolution where channels differ.

  residual: ReLUs stand before the separable convolutions. False (the last unit): no shortcut, and
    ReLUs after each batch norm.
  """

  features: Sequence[int]
  stride: int
  dilation: int
  residual: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, Array]:
    """Computes the unit's output and that of its second separable convolution.

    The input is [B, H, W, C]. The second output is before any ReLU if residual.
    """

    def brick(name, x, features, kernel_size=1, *, stride=1, dilation=1, relu=False):
      return ConvNorm(features, kernel_size, stride, dilation, relu, dtype=self.dtype, name=name)(
        x, train=train, groups=groups
      )

    y, outputs = x, []
    for index, features in enumerate(self.features, start=1):
      stride = self.stride if index == 3 else 1
      y = nn.relu(y) if self.residual else y
      y = brick(
        f"separable{index}_depthwise",
        y,
        None,
        3,
        stride=stride,
        dilation=self.dilation,
        relu=not self.residual,
      )
      y = brick(f"separable{index}_pointwise", y, features, relu=not self.residual)
      outputs.append(y)
    if self.residual:
      if x.shape[-1] != self.features[-1]:
        x = brick("shortcut", x, self.features[-1], stride=self.stride)
      y = x + y
    return y, outputs[1]


class Xception65(nn.Module):
  """The Xception-65 backbone.

  output_stride: 8, 16 or 32.
  """

  output_stride: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, ...]:
    """Computes DeepLab's low-level map and the outputs of the six BLOCKS.

    The input is images [B, H, W, 3] in -1..1. The low-level map comes first (stride 4, 256
    channels). A map at stride s is ceil(H / s) by ceil(W / s); the last is at the output stride,
    with 2048 channels.
    """
    x = ConvNorm(32, 3, stride=2, relu=True, dtype=self.dtype, name="conv1")(
      x, train=train, groups=groups
    )
    x = ConvNorm(64, 3, relu=True, dtype=self.dtype, name="conv2")(x, train=train, groups=groups)
    low, outputs = None, []
    plan = strides_and_dilations(self.output_stride)
    for (name, (units, features, _)), (stride, dilation) in zip(BLOCKS.items(), plan, strict=True):
      for index in range(units):
        unit = Unit(
          features,
          stride,
          dilation,
          residual=name != "exit2",
          dtype=self.dtype,
          name=f"{name}_{index}",
        )
        x, second = unit(x, train=train, groups=groups)
      outputs.append(x)
      low = second if name == "entry2" else low
    return low, *outputs


def tf_scope(module: str) -> str | None:
  """Returns where the TensorFlow code keeps one of our bricks.

  A brick is a pair of convolution and batch norm. None for what Xception-65 does not have.

  "middle1_0/separable1_pointwise" ->
  "xception_65/middle_flow/block1/unit_1/xception_module/separable_conv1_pointwise".
  """
  if stem := re.fullmatch(r"conv([12])", module):
    return f"xception_65/entry_flow/conv1_{stem[1]}"
  if unit := re.fullmatch(
    r"(entry|middle|exit)(\d)_(\d+)/(?:separable(\d_(?:depth|point)wise)|shortcut)", module
  ):
    flow, block, index, half = unit.groups()
    last = f"separable_conv{half}" if half else "shortcut"
    return f"xception_65/{flow}_flow/block{block}/unit_{int(index) + 1}/xception_module/{last}"
  return None
