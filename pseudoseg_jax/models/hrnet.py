"""HRNet for segmentation: branches side by side, fused often.

HRNetV2: Sun et al. 2019, Wang et al. 2020. The branches are at strides 4 to 32. The module follows
the official code. The ImageNet models of the same trunk upsample by nearest neighbor where this one
does bilinearly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.layers import Conv, ConvBN
from pseudoseg_jax.models.resnet import Block
from pseudoseg_jax.ops import resize

Resize = Callable[[Array, tuple[int, int]], Array]


class Plan(NamedTuple):
  """The sizes of an HRNet.

  width: channels of the finest branch, doubled at each coarser one.
  first: blocks of the first stage and their width.
  modules: of stages 2, 3, 4.
  blocks: of every branch of every module.
  """

  width: int
  first: tuple[int, int] = (4, 64)
  modules: tuple[int, int, int] = (1, 4, 3)
  blocks: int = 4


PLANS = {
  "hrnet_w18_small_v1": Plan(16, first=(1, 32), modules=(1, 1, 1), blocks=2),
  "hrnet_w18_small_v2": Plan(18, first=(2, 64), modules=(1, 3, 2), blocks=2),
  "hrnet_w18": Plan(18),
  "hrnet_w32": Plan(32),
  "hrnet_w48": Plan(48),
}


class Module(nn.Module):
  """Residual blocks on every branch, then a sum of all for every branch.

  Maps in, maps of the same shapes out.
  """

  blocks: int
  momentum: float
  resize: Resize
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, branches: Sequence[Array], *, train: bool, groups: int = 1) -> list[Array]:
    mode = {"train": train, "groups": groups}
    widths = [x.shape[-1] for x in branches]
    branches = list(branches)
    for b, width in enumerate(widths):
      for index in range(self.blocks):
        block = Block(
          width, 1, 1, False, self.momentum, dtype=self.dtype, name=f"branch{b}_{index}"
        )
        branches[b] = block(branches[b], **mode)

    def unit(name, features, kernel_size, stride=1, negative_slope=0.0):
      return ConvBN(
        features,
        kernel_size,
        stride,
        negative_slope=negative_slope,
        momentum=self.momentum,
        dtype=self.dtype,
        name=name,
      )

    def finer(x, i, j):
      x = unit(f"fuse{i}_{j}", widths[i], 1, negative_slope=1.0)(x, **mode)
      return self.resize(x, branches[i].shape[1:3])

    def coarser(x, i, j):
      for step in range(i - j - 1):
        x = unit(f"fuse{i}_{j}_{step}", widths[j], 3, stride=2)(x, **mode)
      return unit(f"fuse{i}_{j}_{i - j - 1}", widths[i], 3, stride=2, negative_slope=1.0)(x, **mode)

    fused = []
    for i in range(len(branches)):
      parts = [
        x if j == i else (finer if j > i else coarser)(x, i, j) for j, x in enumerate(branches)
      ]
      fused.append(nn.relu(sum(parts[1:], parts[0])))
    return fused


class HRNet(nn.Module):
  """The HRNet backbone.

  plan: one of PLANS' values.
  momentum: of batch norm.
  resize: how coarse branches meet finer ones.
  """

  plan: Plan
  momentum: float = 0.9
  resize: Resize = resize.bilinear_half_pixel
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, ...]:
    """Computes maps at strides 4, 8, 16, 32 of images [B, H, W, C].

    They have W, 2 W, 4 W, 8 W channels, W being the plan's width; sides are rounded up.
    """
    plan, mode = self.plan, {"train": train, "groups": groups}

    def unit(name, features, x, stride=1):
      return ConvBN(features, 3, stride, momentum=self.momentum, dtype=self.dtype, name=name)(
        x, **mode
      )

    x = unit("stem2", 64, unit("stem1", 64, x, stride=2), stride=2)
    count, width = plan.first
    for index in range(count):
      x = Block(width, 1, 1, True, self.momentum, dtype=self.dtype, name=f"layer1_{index}")(
        x, **mode
      )
    branches = [
      unit("transition1_0", plan.width, x),
      unit("transition1_1", 2 * plan.width, x, stride=2),
    ]
    for stage, modules in enumerate(plan.modules, start=2):
      if stage > 2:
        branches.append(
          unit(
            f"transition{stage - 1}_{stage - 1}",
            plan.width * 2 ** (stage - 1),
            branches[-1],
            stride=2,
          )
        )
      for index in range(modules):
        module = Module(
          plan.blocks, self.momentum, self.resize, dtype=self.dtype, name=f"stage{stage}_{index}"
        )
        branches = module(branches, **mode)
    return tuple(branches)


class Head(nn.Module):
  """All branches on the grid of the finest, mixed by 1x1 convolutions.

  Gives per-class scores at stride 4, float32.
  """

  num_classes: int
  momentum: float = 0.9
  resize: Resize = resize.bilinear_half_pixel
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: Sequence[Array], *, train: bool, groups: int = 1) -> Array:
    x = jnp.concatenate([self.resize(x, maps[0].shape[1:3]) for x in maps], -1)
    brick = ConvBN(
      x.shape[-1], momentum=self.momentum, use_bias=True, dtype=self.dtype, name="unit"
    )
    return Conv(self.num_classes, use_bias=True, name="classifier")(
      brick(x, train=train, groups=groups)
    )


def hrnet(
  num_classes: int,
  *,
  backbone: str = "hrnet_w48",
  bn_momentum: float = 0.9,
  align_corners: bool = False,
  dtype: Any = jnp.float32,
) -> tuple[HRNet, Head, Resize]:
  """Builds backbone, head and the upsampling of the scores.

  Args:
    backbone: one of PLANS.
    bn_momentum: what running statistics keep per batch. The official branches differ: 0.99
      (pytorch-v1.1) and 0.9 (HRNet-OCR).
    align_corners: convention of every bilinear resize. Official: False on Cityscapes, LIP and
      Pascal-Context; True with OCR and on ADE20K and COCO-Stuff.
  """
  checks.check_name("network.backbone", backbone, PLANS)
  if not 0 <= bn_momentum < 1:
    problems = checks.Problems("the network cannot be built")
    problems.add("network.bn_momentum", got=bn_momentum, allowed="0 <= value < 1")
    problems.raise_if_any()
  bilinear = resize.bilinear_align_corners if align_corners else resize.bilinear_half_pixel
  body = HRNet(PLANS[backbone], bn_momentum, bilinear, dtype=dtype)
  return body, Head(num_classes, bn_momentum, bilinear, dtype=dtype), bilinear
