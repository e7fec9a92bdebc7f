"""PSPNet in the forms of the official CCT and PixelSSL codes.

PSPNet: Zhao et al. 2017. CCT: Ouali et al. 2020. PixelSSL: Ke et al. 2020. The pyramid pooling ends
the backbone and the decoder is light: 1x1 convolutions, and channels that become pixels (Shi et al.
2016). CCT's auxiliary decoders all start from the pyramid's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pseudoseg_jax.contract import Array
from pseudoseg_jax.models.backbones import make_backbone
from pseudoseg_jax.models.layers import Conv, ConvBN
from pseudoseg_jax.ops import resize

BINS = (1, 2, 3, 6)


def _averaging_matrix(size: int, bins: int) -> np.ndarray:
  """Returns the matrix that averages an axis over bins: f32[bins, size].

  Row i averages from floor(i size / bins) up to ceil((i + 1) size / bins), as PyTorch does.
  """
  matrix = np.zeros((bins, size), np.float32)
  for i in range(bins):
    start, end = i * size // bins, -(-(i + 1) * size // bins)
    matrix[i, start:end] = 1 / (end - start)
  return matrix


def adaptive_average_pool(x: Array, bins: int) -> Array:
  """Computes means over bins x bins rectangles.

  [B, H, W, C] -> f32[B, bins, bins, C]. The rectangles overlap where a side is no multiple.
  """
  rows, columns = (_averaging_matrix(size, bins) for size in x.shape[1:3])
  y = jnp.einsum("ih,bhwc->biwc", rows, x, precision=jax.lax.Precision.HIGHEST)
  return jnp.einsum("jw,biwc->bijc", columns, y, precision=jax.lax.Precision.HIGHEST)


def pixel_shuffle(x: Array) -> Array:
  """Turns four channels into four pixels.

  [B, H, W, 4 C] -> [B, 2 H, 2 W, C]; channel 4 c + 2 i + j goes to sub-row i, sub-column j of
  channel c.
  """
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(batch, 2 * height, 2 * width, channels // 4)


class PyramidPooling(nn.Module):
  """A map beside its means over grids, then a 3x3 convolution.

  [B, h, w, C] -> [B, h, w, C / 4]; the grids have BINS cells a side.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    features = x.shape[-1] // len(BINS)
    parts = [x]
    for bins in BINS:
      pooled = ConvBN(features, dtype=self.dtype, name=f"bin{bins}")(
        adaptive_average_pool(x, bins), train=train, groups=groups
      )
      parts.append(resize.bilinear_half_pixel(pooled, x.shape[1:3]))
    return ConvBN(features, 3, dtype=self.dtype, name="unit")(
      jnp.concatenate(parts, -1), train=train, groups=groups
    )


class Backbone(nn.Module):
  """A backbone and pyramid pooling on its last map.

  The backbone's parameters stand beside "psp", where those of others stand.
  """

  body: nn.Module

  def setup(self):
    nn.share_scope(self, self.body)

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> tuple[Array, ...]:
    """Computes the outputs of the four stages and of the pyramid pooling.

    The input is images [B, H, W, C]. The pyramid's output comes last, on the grid of the fourth
    stage.
    """
    stages = self.body(x, train=train, groups=groups)
    return *stages, PyramidPooling(self.body.dtype, name="psp")(
      stages[-1], train=train, groups=groups
    )


class Decoder(nn.Module):
  """The decoder from the last map to per-class scores f32[B, 8 h, 8 w, K].

  None is below 0, since a ReLU comes last.
  """

  num_classes: int

  @nn.compact
  def __call__(self, maps: Sequence[Array], *, train: bool, groups: int = 1) -> Array:
    x = Conv(self.num_classes, name="classifier")(maps[-1])
    for step in (1, 2, 3):
      x = pixel_shuffle(
        nn.relu(Conv(4 * self.num_classes, use_bias=True, name=f"subpixel{step}")(x))
      )
    return x


def pspnet(
  num_classes: int,
  *,
  backbone: str = "resnet50",
  stem: str = "deep",
  output_stride: int = 8,
  drop_connect: float = 0.0,
  dtype: Any = jnp.float32,
) -> tuple[Backbone, Decoder]:
  """Builds CCT's network: backbone and decoder.

  Args:
    backbone: one of backbones.BACKBONES.
    stem, output_stride, drop_connect: as in `backbones.make_backbone`.
  """
  body = make_backbone(
    backbone, stem=stem, output_stride=output_stride, drop_connect=drop_connect, dtype=dtype
  )
  return Backbone(body), Decoder(num_classes)


def pspnet_pixelssl(
  num_classes: int,
  *,
  backbone: str = "resnet50",
  stem: str = "plain",
  output_stride: int = 16,
  drop_connect: float = 0.0,
  dtype: Any = jnp.float32,
) -> tuple[Backbone, Decoder]:
  """Builds PixelSSL's network: backbone and decoder.

  As `pspnet`, but dilations 2, 4, 8 in the last stage, and a decoder that overshoots stride 1.

  Args:
    backbone: one of backbones.BACKBONES.
    stem, output_stride, drop_connect: as in `backbones.make_backbone`.
  """
  body = make_backbone(
    backbone,
    stem=stem,
    output_stride=output_stride,
    multi_grid=(1, 2, 4),
    drop_connect=drop_connect,
    dtype=dtype,
  )
  return Backbone(body), Decoder(num_classes)
