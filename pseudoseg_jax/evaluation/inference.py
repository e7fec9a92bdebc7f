"""From whole images of any size to class scores of the same size: in one piece or by sliding windows, scaled and flipped.

Sizes are what compiles: a jitted function knows only *canvases*, arrays large enough for several image sizes, and is told each
image's true size as a number. Which canvas an image takes is `canvas_size`; padding never enters a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Array

STYLES = ("whole", "slide")

# Windows that run through the network together, over the images of a (device's) batch: enough to fill an accelerator.
_WINDOWS_PER_CALL = 8


class Protocol(NamedTuple):
  """How an image is shown to the network; part of what an mIoU means.

  style: "whole" (the image as it is) or "slide" (overlapping windows, their logits summed; CPS, Chen et al. 2021).
  window_pixels: slide: (height, width) of a window.
  stride_fraction: slide: distance between windows as a fraction of the window, rounded up to pixels.
  scales: factors the image is resized by; the logits are resized back and summed.
  flip: add the logits of the mirrored image.
  pad_multiple: canvases are multiples of this, so that few sizes compile. With "whole" the network sees the padding (the mean
    colour, right and below), which changes scores near these borders; 1 shows it images as they are. With "slide" it does not.
  """

  style: str = "whole"
  window_pixels: tuple[int, int] | None = None
  stride_fraction: float = 2 / 3
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False
  pad_multiple: int = 1


def check_protocol(protocol: Protocol) -> None:
  """Raises InputError with everything that is wrong with a protocol."""
  problems = checks.Problems("the evaluation protocol cannot be used")
  if protocol.style not in STYLES:
    remedy = checks.nearest(str(protocol.style), STYLES)
    problems.add("style", got=repr(protocol.style), allowed=checks.choices(STYLES), remedy=remedy)
  if protocol.style == "slide":
    window = protocol.window_pixels
    if not isinstance(window, Sequence) or len(window) != 2 or min(window) < 1:
      problems.add("window_pixels", got=window or "none", allowed="(height, width) of a sliding window, e.g. (512, 512)")
    if not 0 < protocol.stride_fraction <= 1:
      problems.add("stride_fraction", got=protocol.stride_fraction, allowed="above 0, up to 1 (larger ones leave gaps)")
  if not protocol.scales or min(protocol.scales) <= 0:
    problems.add("scales", got=protocol.scales or "none", allowed="one or more factors above 0, e.g. (1.0,)")
  if protocol.pad_multiple < 1:
    problems.add("pad_multiple", got=protocol.pad_multiple, allowed="1 (no padding) or more")
  problems.raise_if_any()


def describe(protocol: Protocol) -> str:
  """A protocol in words, for reports: "sliding windows of 512x512, stride 342x342, scale 1"."""
  if protocol.style == "slide":
    window, stride = ("x".join(map(str, sides)) for sides in (protocol.window_pixels, _strides(protocol)))
    words = [f"sliding windows of {window}, stride {stride}"]
  else:
    words = ["whole images"]
    if protocol.pad_multiple > 1:
      words.append(f"padded to multiples of {protocol.pad_multiple}")
  words.append(f"scale{'s' if len(protocol.scales) > 1 else ''} {' '.join(f'{scale:g}' for scale in protocol.scales)}")
  if protocol.flip:
    words.append("flipped too")
  return ", ".join(words)


def canvas_size(size: tuple[int, int], protocol: Protocol) -> tuple[int, int]:
  """(height, width) of the canvas that an image of `size` (height, width) is laid on."""
  floor = protocol.window_pixels if protocol.style == "slide" else (1, 1)
  multiple = protocol.pad_multiple
  return tuple(least if side <= least else -(-side // multiple) * multiple for side, least in zip(size, floor, strict=True))


def infer(
  predict: Callable[[Array], Array],
  images: Array,
  sizes: Array,
  *,
  protocol: Protocol,
  mean: Sequence[float],
  std: Sequence[float],
) -> tuple[Array, Array]:
  """Class scores of raw images; to be jitted.

  Args:
    predict: images f32[B', h, w, 3], normalised -> logits [B', h, w, K]; rows must not depend on each other.
    images: uint8 [B, H, W, 3], RGB, each image at the top left of a canvas of `canvas_size`; what lies outside does not matter.
    sizes: i32[B, 2], height and width of each image.
    mean, std: of RGB in [0, 1]; the network sees (rgb / 255 - mean) / std.

  Returns:
    scores: f32[B, H, W, K], logits summed over windows, flips and scales; meaningless outside the image.
    passes: f32[B, H, W, 1], how many logits were summed there; scores / passes are mean logits.

  Raises:
    InputError: while tracing, if `predict` does not return one score vector a pixel.
  """
  forward = _forward(predict, protocol.flip)
  normalize = lambda rgb: (rgb / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
  at_one_scale = _slide if protocol.style == "slide" else _whole
  images = images.astype(jnp.float32)
  canvas = images.shape[1:3]
  total = passes = 0.0
  for scale in protocol.scales:
    if scale == 1:
      at_scale = at_one_scale(forward, normalize, images, sizes, protocol)
    else:
      scaled_sizes = jnp.maximum(jnp.rint(sizes * scale).astype(jnp.int32), 1)
      scaled_canvas = canvas_size(tuple(math.ceil(side * scale) for side in canvas), protocol)
      # Rounded: networks are trained on grey levels, and resized photographs have no others.
      scaled = jnp.rint(_resize(images, sizes, scaled_sizes, scaled_canvas))
      at_scale = at_one_scale(forward, normalize, scaled, scaled_sizes, protocol)
      at_scale = [_resize(x, scaled_sizes, sizes, canvas) for x in at_scale]
    total, passes = total + at_scale[0], passes + at_scale[1]
  return total, passes


def _forward(predict, flip):
  def checked(images):
    logits = predict(images)
    if logits.ndim != 4 or logits.shape[:3] != images.shape[:3]:
      problems = checks.Problems("a predictor cannot be evaluated")
      problems.add(
        "logits", got=f"shape {logits.shape} for images {images.shape}", allowed=f"{(*images.shape[:3], 'classes')}",
        remedy="resize them to the images' size",
      )  # fmt: skip
      problems.raise_if_any()
    return logits.astype(jnp.float32)

  if not flip:
    return checked
  return lambda images: checked(images) + checked(images[:, :, ::-1])[:, :, ::-1]


def _inside(sizes, start, shape):
  """Which pixels of a window of `shape` at `start` (i32[..., 2], may be negative) lie on the image: bool[..., h, w, 1]."""
  on_axis = []
  for axis in (0, 1):
    position = start[..., axis, None] + jnp.arange(shape[axis])
    on_axis.append((position >= 0) & (position < sizes[..., axis, None]))
  return (on_axis[0][..., :, None] & on_axis[1][..., None, :])[..., None]


def _whole(forward, normalize, images, sizes, protocol):
  inside = _inside(sizes, jnp.zeros_like(sizes), images.shape[1:3])
  scores = forward(jnp.where(inside, normalize(images), 0.0))
  return scores, jnp.full((*scores.shape[:3], 1), 1.0 + protocol.flip)


def _strides(protocol):
  return tuple(math.ceil(side * protocol.stride_fraction) for side in protocol.window_pixels)


def _window_starts(side, window, stride, count):
  """Along one axis, where `count` windows start and which of them the image needs: two [B, count] arrays.

  An image shorter than the window sits in its middle (the odd pixel of padding after it), so its window starts before it. Else
  windows start at multiples of the stride, the last one shifted back inside; there are ceil((side - window) / stride) + 1.
  """
  last = jnp.maximum(side - window, 0)[:, None]
  margin = (jnp.maximum(window - side, 0) // 2)[:, None]
  step = jnp.arange(count) * stride
  return jnp.minimum(step, last) - margin, step - stride < last


def _slide(forward, normalize, images, sizes, protocol):
  """Sliding windows of CPS (TorchSemiSeg's `Evaluator.sliding_eval`)."""
  batch, canvas, window = images.shape[0], images.shape[1:3], tuple(protocol.window_pixels)
  starts, needed, counts, margins = [], [], [], []
  for axis, stride in enumerate(_strides(protocol)):
    counts.append(-(-(canvas[axis] - window[axis]) // stride) + 1)
    start, need = _window_starts(sizes[:, axis], window[axis], stride, counts[axis])
    starts.append(start)
    needed.append(need)
    # Only images that fit into the window start before 0, and at scale 1 those have a canvas of their own.
    starts_at_zero = canvas[axis] > window[axis] and protocol.scales == (1.0,)
    margins.append(0 if starts_at_zero else window[axis] // 2)
  passes = (1.0 + protocol.flip) * _coverage(starts, needed, window, canvas)

  # All windows of the grid, [B, N, 2] and [B, N], in groups that go through the network together.
  num_windows = math.prod(counts)
  start = jnp.stack(jnp.broadcast_arrays(starts[0][:, :, None], starts[1][:, None, :]), -1).reshape(batch, num_windows, 2)
  needed = (needed[0][:, :, None] & needed[1][:, None, :]).reshape(batch, num_windows)
  group = min(num_windows, max(1, _WINDOWS_PER_CALL // batch))
  spare = -num_windows % group
  start = jnp.pad(start, ((0, 0), (0, spare), (0, 0)))
  needed = jnp.pad(needed, ((0, 0), (0, spare)))
  grouped = [jnp.moveaxis(x.reshape(batch, -1, group, *x.shape[2:]), 1, 0) for x in (start, needed)]

  padded = jnp.pad(images, ((0, 0), (margins[0], 0), (margins[1], 0), (0, 0)))
  offset = jnp.asarray(margins)
  # An image that fits into one window is padded after normalisation (the mean colour), a larger one before it (black).
  fits = jnp.all(sizes <= jnp.asarray(window), axis=-1)
  fill = jnp.where(fits[:, None], 0.0, normalize(jnp.zeros(3)))[:, None, None, None, :]
  cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (*window, 3))

  def add_group(total, grouped):
    start, needed = grouped
    inside = _inside(sizes[:, None], start, window)
    windows = jax.vmap(jax.vmap(cut, (None, 0)))(padded, start + offset)
    windows = jnp.where(inside, normalize(windows), fill)
    logits = forward(windows.reshape(batch * group, *window, 3))
    logits = jnp.where(needed.reshape(-1, 1, 1, 1), logits, 0.0)
    image = jnp.repeat(jnp.arange(batch), group)
    corner = (start + offset).reshape(-1, 2)

    def add_window(number, total):  # one after the other: windows overlap
      at = (image[number], corner[number, 0], corner[number, 1], 0)
      before = jax.lax.dynamic_slice(total, at, (1, *window, total.shape[-1]))
      return jax.lax.dynamic_update_slice(total, before + logits[number][None], at)

    return jax.lax.fori_loop(0, batch * group, add_window, total), None

  num_classes = jax.eval_shape(forward, jax.ShapeDtypeStruct((1, *window, 3), jnp.float32)).shape[-1]
  total = jnp.zeros((*padded.shape[:3], num_classes))
  total = jax.lax.scan(add_group, total, tuple(grouped))[0]
  return total[:, margins[0] :, margins[1] :], passes


def _coverage(starts, needed, window, canvas):
  """How many windows lie over each pixel of the canvas: f32[B, H, W, 1]."""
  by_axis = []
  for axis in (0, 1):
    distance = jnp.arange(canvas[axis]) - starts[axis][..., None]
    by_axis.append(jnp.sum((distance >= 0) & (distance < window[axis]) & needed[axis][..., None], axis=1, dtype=jnp.float32))
  return (by_axis[0][:, :, None] * by_axis[1][:, None, :])[..., None]


def _resize(x, sizes_in, sizes_out, canvas_out):
  """Bilinear resize of each map from its own size to its own size, pixels as areas, without antialiasing (OpenCV's INTER_LINEAR).

  `ops.resize.bilinear_half_pixel` for sizes known only at run time: the same two matrix products.
  """
  for axis in (0, 1):
    side_in, side_out = (sizes[:, axis, None].astype(jnp.float32) for sizes in (sizes_in, sizes_out))
    position = jnp.clip((jnp.arange(canvas_out[axis]) + 0.5) * side_in / side_out - 0.5, 0, side_in - 1)
    matrix = jnp.maximum(0.0, 1 - jnp.abs(position[..., None] - jnp.arange(x.shape[axis + 1])))
    # HIGHEST: the default may round float32 to TF32 or bfloat16 on accelerators, which would shift class boundaries.
    x = jnp.einsum(("bij,bjwc->biwc", "bij,bhjc->bhic")[axis], matrix, x, precision=jax.lax.Precision.HIGHEST)
  return x
