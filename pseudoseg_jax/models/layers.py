"""Convolution and batch norm with PyTorch's conventions.

Published segmentation networks were trained with them.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax.contract import Array


def _matrix_product(x: Array, matrix: Array) -> Array:
  # Two-dimensional on purpose: XLA on CPU then needs no transposed copy of the map for the
  # gradient.
  return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


def _convolve_by_taps(x: Array, kernel: Array, dilation: int) -> Array:
  """Convolves at stride 1, as a sum over taps.

  Each tap acts on the part of the map where it does not read padding.
  """
  height, width = x.shape[1:3]
  reach = kernel.shape[0] // 2
  y = 0
  for i in range(-reach, reach + 1):
    for j in range(-reach, reach + 1):
      down, right = i * dilation, j * dilation
      if abs(down) >= height or abs(right) >= width:
        continue
      seen = x[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
      part = _matrix_product(seen, kernel[i + reach, j + reach])
      y += jnp.pad(
        part, ((0, 0), (max(-down, 0), max(down, 0)), (max(-right, 0), max(right, 0)), (0, 0))
      )
  return y


def _padding(
  size: int, kernel_size: int, stride: int, dilation: int, same: bool
) -> tuple[int, int]:
  """Returns the pixels of padding before and after an axis.

  They are dilation * (k - 1) / 2 on both sides, or as TensorFlow's "SAME" has them.
  """
  reach = dilation * (kernel_size // 2)
  if not same:
    return reach, reach
  total = max((-(-size // stride) - 1) * stride + 2 * reach + 1 - size, 0)
  return total // 2, total - total // 2


def convolve(
  x: Array, kernel: Array, stride: int = 1, dilation: int = 1, same: bool = False
) -> Array:
  """Convolves a map with a square kernel of odd side.

  [B, H, W, Cin] with [k, k, Cin, Cout], k odd -> [B, ceil(H / stride), ceil(W / stride), Cout].

  Args:
    same: False pads by dilation * (k - 1) / 2 on every side (PyTorch code); True as TensorFlow's
      "SAME", which differs where a stride divides a side: there the window starts a pixel later.
  """
  reach = kernel.shape[0] // 2
  if reach == 0:
    return _matrix_product(x[:, ::stride, ::stride], kernel[0, 0])
  if stride == 1 and 2 * dilation > max(x.shape[1:3]):
    # Most taps read mostly padding (atrous convolutions on small maps): skipping it saves two
    # thirds of the work and more.
    return _convolve_by_taps(x, kernel, dilation)
  return _library_convolution(x, kernel, stride, dilation, same)


def _library_convolution(
  x: Array, kernel: Array, stride: int, dilation: int, same: bool, channel_groups: int = 1
) -> Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=[_padding(size, kernel.shape[0], stride, dilation, same) for size in x.shape[1:3]],
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=channel_groups,
  )


class _Taps:
  """The places that the taps of a depthwise convolution read.

  They are for one size of the map.
  """

  def __init__(self, x_shape, kernel_size: int, stride: int, dilation: int, same: bool):
    self.sides = x_shape[1:3]
    self.stride, self.dilation = stride, dilation
    self.pads = [_padding(size, kernel_size, stride, dilation, same) for size in self.sides]
    self.outputs = [-(-size // stride) for size in self.sides]
    self.kernel_size = kernel_size

  def of_axis(self, axis: int) -> list[int]:
    """Lists the taps that read anything but padding."""
    size, (before, _), last = (
      self.sides[axis],
      self.pads[axis],
      (self.outputs[axis] - 1) * self.stride,
    )
    starts = [tap * self.dilation - before for tap in range(self.kernel_size)]
    return [tap for tap, start in enumerate(starts) if start < size and start + last >= 0]

  def __iter__(self):
    return itertools.product(self.of_axis(0), self.of_axis(1))

  def padded(self, x: Array) -> Array:
    return jnp.pad(x.astype(jnp.float32), ((0, 0), *self.pads, (0, 0)))

  def seen(self, padded: Array, i: int | Array, j: int | Array) -> Array:
    """Returns what tap (i, j) reads: [B, H / stride, W / stride, C]."""
    spans = ((count - 1) * self.stride + 1 for count in self.outputs)
    start = (0, i * self.dilation, j * self.dilation, 0)
    part = jax.lax.dynamic_slice(padded, start, (padded.shape[0], *spans, padded.shape[-1]))
    return part[:, :: self.stride, :: self.stride]


def _depthwise_by_taps(x: Array, kernel: Array, stride: int, dilation: int, same: bool) -> Array:
  taps = _Taps(x.shape, kernel.shape[0], stride, dilation, same)
  padded = taps.padded(x)
  return sum(taps.seen(padded, i, j) * kernel[i, j, 0] for i, j in taps).astype(x.dtype)


def _depthwise_gradients_by_taps(
  x: Array, kernel: Array, gradient: Array, stride: int, dilation: int, same: bool
):
  """Computes the gradients by x and by the kernel, each as sums over taps.

  The one by x gathers: a row of x is read by the taps of one parity alone where the stride is 2.
  (XLA's own derivative of strided slices scatters into a padded map for every tap.)
  """
  taps = _Taps(x.shape, kernel.shape[0], stride, dilation, same)
  padded, gradient = taps.padded(x), gradient.astype(jnp.float32)

  # A loop over the taps, not one sum beside the other: XLA then compiles one of them instead of 9
  # or 25, and runs it faster.
  def of_tap(tap):
    return jnp.sum(taps.seen(padded, *jnp.divmod(tap, taps.kernel_size)) * gradient, axis=(0, 1, 2))

  by_kernel = jax.lax.map(of_tap, jnp.arange(taps.kernel_size**2)).reshape(kernel.shape)

  # Row r of x is read by output o at tap i where r = o * stride + i * dilation - before.
  before = [pads[0] for pads in taps.pads]
  sizes = [-(-size // stride) for size in taps.sides]  # of each phase
  reach = max(taps.kernel_size * dilation, *before) // stride + 1
  far = jnp.pad(gradient, ((0, 0), (reach, reach), (reach, reach), (0, 0)))

  # The first output that reads this phase at the tap; None where none does.
  def outputs(axis, phase, tap):
    first, rest = divmod(phase + before[axis] - tap * dilation, stride)
    return None if rest else first

  def phase(a, b):
    total = jnp.zeros((x.shape[0], *sizes, x.shape[-1]), jnp.float32)
    for i, j in taps:
      row, column = outputs(0, a, i), outputs(1, b, j)
      if row is not None and column is not None:
        top, left = reach + row, reach + column
        total += far[:, top : top + sizes[0], left : left + sizes[1]] * kernel[i, j, 0]
    return total

  phases = jnp.stack([jnp.stack([phase(a, b) for b in range(stride)], 3) for a in range(stride)], 2)
  whole = phases.reshape(x.shape[0], sizes[0] * stride, sizes[1] * stride, x.shape[-1])
  return whole[:, : x.shape[1], : x.shape[2]].astype(x.dtype), by_kernel.astype(kernel.dtype)


def _depthwise_grouped(x: Array, kernel: Array, stride: int, dilation: int, same: bool) -> Array:
  return _library_convolution(x, kernel, stride, dilation, same, channel_groups=x.shape[-1])


def _depthwise_gradients_grouped(
  x: Array, kernel: Array, gradient: Array, stride: int, dilation: int, same: bool
):
  grouped = functools.partial(_depthwise_grouped, stride=stride, dilation=dilation, same=same)
  return jax.vjp(grouped, x, kernel)[1](gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve_depthwise(
  x: Array, kernel: Array, stride: int, dilation: int, same: bool = False
) -> Array:
  """Convolves each channel by itself with its part of the kernel.

  [B, H, W, C] with [k, k, 1, C], k odd; padded as in `convolve`. On CPU it is a sum over taps,
  since XLA's grouped convolution takes ten times as long there, with its gradient up to thirty
  times.
  """
  options = {"stride": stride, "dilation": dilation, "same": same}
  by_taps, grouped = (
    functools.partial(f, **options) for f in (_depthwise_by_taps, _depthwise_grouped)
  )
  return jax.lax.platform_dependent(x, kernel, cpu=by_taps, default=grouped)


def _convolve_depthwise(x, kernel, stride, dilation, same):
  return convolve_depthwise(x, kernel, stride, dilation, same), (x, kernel)


def _convolve_depthwise_gradient(stride, dilation, same, residuals, gradient):
  # By hand, because the derivative of platform_dependent would keep what both ways need.
  options = {"stride": stride, "dilation": dilation, "same": same}
  ways = (
    functools.partial(f, **options)
    for f in (_depthwise_gradients_by_taps, _depthwise_gradients_grouped)
  )
  by_taps, grouped = ways
  return jax.lax.platform_dependent(*residuals, gradient, cpu=by_taps, default=grouped)


convolve_depthwise.defvjp(_convolve_depthwise, _convolve_depthwise_gradient)


@jax.custom_vjp
def max_pool(x: Array) -> Array:
  """Computes the maximum over 3x3 windows, stride 2, one pixel of padding.

  [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]. Among equal values the first takes the gradient,
  as in PyTorch. Written out because XLA's own gradient (select-and-scatter) takes ten times as long
  on CPU.
  """
  return _max_pool(x)[0]


def _max_pool(x):
  height, width = ((size + 1) // 2 for size in x.shape[1:3])
  lowest = jnp.finfo(x.dtype).min
  padded = jnp.pad(
    x,
    ((0, 0), (1, 2 * height - x.shape[1] + 1), (1, 2 * width - x.shape[2] + 1), (0, 0)),
    constant_values=lowest,
  )
  best, winner = None, None
  for tap in range(9):
    i, j = divmod(tap, 3)
    seen = padded[:, i : i + 2 * height : 2, j : j + 2 * width : 2]
    if best is None:
      best, winner = seen, jnp.zeros(seen.shape, jnp.int8)
    else:
      winner = jnp.where(seen > best, jnp.int8(tap), winner)
      best = jnp.maximum(best, seen)
  return best, (winner, x.shape[1:3])


def _max_pool_gradient(residuals, gradient):
  winner, (height, width) = residuals

  def won(i, j):  # what tap (i, j) passes back, [B, H', W', C]
    return jnp.where(winner == 3 * i + j, gradient, 0)

  def next_window(t, axis):  # t[i + 1] at i, zero after the last
    shift = [(0, 0, 0)] * t.ndim
    shift[axis] = (-1, 1, 0)
    return jax.lax.pad(t, jnp.zeros((), t.dtype), shift)

  # Column 2j is the middle of window j; column 2j + 1 its last and the first of window j + 1.
  def columns(i):
    return jnp.stack([won(i, 1), won(i, 2) + next_window(won(i, 0), 2)], 3)  # [B, H', W', 2, C]

  # Rows alike: [B, H', 2, W', 2, C]
  rows = jnp.stack([columns(1), columns(2) + next_window(columns(0), 1)], 2)
  batch, half_height, _, half_width, _, channels = rows.shape
  return (rows.reshape(batch, 2 * half_height, 2 * half_width, channels)[:, :height, :width],)


max_pool.defvjp(_max_pool, _max_pool_gradient)


def max_pool_same(x: Array) -> Array:
  """Computes `max_pool` with TensorFlow's "SAME" padding.

  An axis of even size is padded at its end only.
  """
  even = [1 - size % 2 for size in x.shape[1:3]]
  lowest = jnp.finfo(x.dtype).min
  # One more pixel in front makes the size odd and moves the windows by one; the first window is
  # then one too many.
  x = jnp.pad(x, ((0, 0), (even[0], 0), (even[1], 0), (0, 0)), constant_values=lowest)
  return max_pool(x)[:, even[0] :, even[1] :]


class Conv(nn.Module):
  """A square convolution, NHWC, padded as in PyTorch code.

  The padding is dilation * (kernel_size - 1) / 2 on every side. (Flax's "SAME" pads only bottom and
  right where a stride divides the size.) Parameters are f32: `kernel` [k, k, Cin, Cout] and, where
  asked for, `bias` [Cout]. Modules declare only their shapes; `initial.initial_values` gives them
  values.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  dilation: int = 1
  use_bias: bool = False
  same: bool = False  # pads as TensorFlow's "SAME" does
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Convolves a map.

    [B, H, W, Cin] -> `dtype` [B, ceil(H / stride), ceil(W / stride), features].
    """
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
    y = convolve(
      x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.dilation, self.same
    )
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(
        self.dtype
      )
    return y


class DepthwiseConv(nn.Module):
  """A square depthwise convolution, NHWC, padded as `Conv`.

  Its parameter is `depthwise` f32 [k, k, 1, C]. The name is not `kernel`: TensorFlow's DeepLab
  spares depthwise kernels from weight decay, which acts on kernels.
  """

  kernel_size: int = 3
  stride: int = 1
  dilation: int = 1
  same: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Convolves each channel of a map by itself.

    [B, H, W, C] -> `dtype` [B, ceil(H / stride), ceil(W / stride), C].
    """
    shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
    kernel = self.param("depthwise", nn.initializers.zeros, shape, jnp.float32)
    return convolve_depthwise(
      x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.dilation, self.same
    )


def _activate(z: Array, negative_slope: float, ceiling: float) -> Array:
  y = z if negative_slope == 1 else jnp.where(z > 0, z, negative_slope * z)
  return y if ceiling == jnp.inf else jnp.minimum(y, ceiling)


def _per_channel(values: Array) -> Array:
  """Reshapes [G, C] to [1, G, 1, 1, C].

  The result meets a batch [B / G, G, H, W, C].
  """
  return values[None, :, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize_batch(
  x: Array, scale: Array, bias: Array, eps: float, negative_slope: float, ceiling: float = jnp.inf
) -> tuple[Array, Array, Array]:
  """Normalizes by the batch's own statistics, then applies a leaky ReLU.

  The leaky ReLU goes up to a ceiling. x [B / G, G, H, W, C] -> y, mean and variance f32 [G, C].

  The gradient keeps nothing but x: the normalized map and the sign for the ReLU are cheaper to redo
  than to store. `mean` and `variance` (over n, not n - 1) are for the running statistics and carry
  no gradient.
  """
  return _normalize_batch(x, scale, bias, eps, negative_slope, ceiling)[0]


def _normalize_batch(x, scale, bias, eps, negative_slope, ceiling):
  x32 = x.astype(jnp.float32)
  mean = jnp.mean(x32, axis=(0, 2, 3))
  variance = jnp.mean(jnp.square(x32 - _per_channel(mean)), axis=(0, 2, 3))
  inverse = jax.lax.rsqrt(variance + eps)
  factor = inverse * scale
  y = _activate(
    x32 * _per_channel(factor) + _per_channel(bias - mean * factor), negative_slope, ceiling
  ).astype(x.dtype)
  return (y, mean, variance), (x, scale, bias, mean, inverse)


def _normalize_batch_gradient(eps, negative_slope, ceiling, residuals, gradients):
  x, scale, bias, mean, inverse = residuals
  gradient = gradients[0].astype(jnp.float32)
  normalized = (x.astype(jnp.float32) - _per_channel(mean)) * _per_channel(inverse)
  if negative_slope != 1:
    gradient = jnp.where(normalized * scale + bias > 0, gradient, negative_slope * gradient)
  if ceiling != jnp.inf:
    gradient = jnp.where(normalized * scale + bias < ceiling, gradient, 0)
  count = x.size // mean.size
  bias_gradient = jnp.sum(gradient, axis=(0, 2, 3))
  scale_gradient = jnp.sum(gradient * normalized, axis=(0, 2, 3))
  x_gradient = _per_channel(inverse * scale) * (
    gradient
    - _per_channel(bias_gradient / count)
    - normalized * _per_channel(scale_gradient / count)
  )
  return x_gradient.astype(x.dtype), scale_gradient.sum(0), bias_gradient.sum(0)


normalize_batch.defvjp(_normalize_batch, _normalize_batch_gradient)


class BatchNorm(nn.Module):
  """Batch norm over B, H and W, optionally followed by a (leaky) ReLU.

  Parameters `scale`, `bias` and statistics `mean`, `var` are f32 [C]. The running statistics are
  PyTorch's: the running variance takes the unbiased variance, n / (n - 1) times the one that
  normalizes (Flax's own layer does not). All is computed in float32, whatever the dtype of x.

  momentum: what the running statistics keep per batch; 0.9 is PyTorch's 0.1.
  negative_slope: 0 is a ReLU, 0.01 PyTorch's leaky ReLU, 1 no activation.
  ceiling: the greatest value that is passed on; 6 with negative_slope 0 is a ReLU6.
  use_scale: without it the scale is 1 and no parameter.
  """

  momentum: float = 0.9
  eps: float = 1e-5
  negative_slope: float = 1.0
  ceiling: float = jnp.inf
  use_scale: bool = True

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    """Normalizes [B, H, W, C] to the same shape and dtype.

    With train=True the batch's own statistics normalize and move the running ones. With groups=G
    the rows are G interleaved batches (row i belongs to batch i % G; interleaved, so that a batch
    axis split over devices stays where it is), each with statistics of its own, which move the
    running ones one after the other. B must be a multiple of G.
    """
    channels = x.shape[-1]
    ones = jnp.ones((channels,), jnp.float32)
    scale = (
      self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
      if self.use_scale
      else ones
    )
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
    if not train:
      factor = scale * jax.lax.rsqrt(running_var.value + self.eps)
      y = _activate(
        x.astype(jnp.float32) * factor + (bias - running_mean.value * factor),
        self.negative_slope,
        self.ceiling,
      )
      return y.astype(x.dtype)
    grouped = x.reshape(-1, groups, *x.shape[1:])
    y, mean, variance = normalize_batch(
      grouped, scale, bias, self.eps, self.negative_slope, self.ceiling
    )
    if not self.is_initializing():
      count = x.size // (groups * channels)
      for group in range(groups):
        unbiased = variance[group] * (count / max(count - 1, 1))
        running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean[group]
        running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
    return y.reshape(x.shape)


class ConvBN(nn.Module):
  """A convolution, batch norm and an activation.

  It is the brick of every network here.

  use_bias: of the convolution; the norm takes it away again in training, but some published
    networks have one.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  dilation: int = 1
  negative_slope: float = 0.0  # ReLU; 1 for none
  momentum: float = 0.9
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, groups: int = 1) -> Array:
    x = Conv(
      self.features,
      self.kernel_size,
      self.stride,
      self.dilation,
      self.use_bias,
      dtype=self.dtype,
      name="conv",
    )(x)
    return BatchNorm(self.momentum, negative_slope=self.negative_slope, name="bn")(
      x, train=train, groups=groups
    )
