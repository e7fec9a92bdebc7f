"""A small encoder-decoder for tests, the quickstart and small machines."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.layers import Conv, ConvBN
from pseudoseg_jax.ops import resize


class TinyBackbone(nn.Module):
  """A small backbone: maps at strides 2, 4, 8.

  [B, H, W, 3] -> maps of `width`, 2 `width`, 4 `width` channels; the last sees far, by dilation 2
  and 4.
  """

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, Array, Array]:
    def unit(name, x, scale, stride=1, dilation=1):
      brick = ConvBN(scale * self.width, 3, stride, dilation, dtype=self.dtype, name=name)
      return brick(x, train=train, groups=groups)

    fine = unit("unit2", unit("unit1", x, 1, stride=2), 1)
    middle = unit("unit4", unit("unit3", fine, 2, stride=2), 2)
    coarse = unit("unit5", middle, 4, stride=2)
    coarse = coarse + unit("unit6", coarse, 4, dilation=2)
    coarse = coarse + unit("unit7", coarse, 4, dilation=4)
    return fine, middle, coarse


class TinyHead(nn.Module):
  """A small head that climbs from the coarse map back to stride 2.

  It adds the image's mean to the coarse map, then climbs by way of the finer maps; float32 scores
  at stride 2.
  """

  num_classes: int
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: tuple[Array, Array, Array], *, train: bool, groups: int = 1) -> Array:
    fine, middle, coarse = maps
    image = jnp.mean(coarse, axis=(1, 2), keepdims=True, dtype=jnp.float32)
    x = coarse + Conv(coarse.shape[-1], dtype=self.dtype, name="context")(image)
    for name, skip in (("unit1", middle), ("unit2", fine)):
      # Channels shrink before the map grows: the 3x3 convolution on the finer grid is then the
      # cheap one.
      x = ConvBN(skip.shape[-1], dtype=self.dtype, name=f"{name}_reduce")(
        x, train=train, groups=groups
      )
      x = jnp.concatenate([resize.bilinear_align_corners(x, skip.shape[1:3]), skip], -1)
      x = ConvBN(skip.shape[-1], 3, dtype=self.dtype, name=name)(x, train=train, groups=groups)
    return Conv(self.num_classes, use_bias=True, name="classifier")(x)


def tiny(
  num_classes: int, *, width: int = 16, dtype: Any = jnp.float32
) -> tuple[TinyBackbone, TinyHead]:
  """Builds backbone and head; about 0.14 million parameters at width 16.

  Args:
    width: channels at stride 2.
  """
  return TinyBackbone(width, dtype), TinyHead(num_classes, width, dtype)
