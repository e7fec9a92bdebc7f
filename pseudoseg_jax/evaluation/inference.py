"""Class scores of whole images of any size, at the size of each image.

An image is shown in one piece or by sliding windows, scaled and flipped.

Sizes are what compiles: a jitted function knows only *canvases*, arrays large enough for several
image sizes, and gets each image's true size as a number. `canvas_size` gives the canvas that an
image takes. `bounded` sees to it that there are few. A larger canvas costs memory, but no work of
the network: windows that no image needs are not run.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Array
from pseudoseg_jax.ops.confusion import ABSENT_CLASSES

STYLES = ("whole", "pad_to_crop", "center_crop", "slide")
EDGES = ("shift", "cut")
ROUNDINGS = ("up", "down")
SUMMED = ("logits", "probabilities")

# Windows that run through the network together, over the images of a (device's) batch: enough to
# fill an accelerator, and of large windows few enough for a CPU's memory. Of few images fewer:
# where the last call is not full, it runs for nothing.
_WINDOWS_PER_CALL = 8
_WINDOWS_OF_FEW_IMAGES = 4
_PIXELS_PER_CALL = 1 << 20

# Canvases that a network is compiled for, which takes from seconds to a minute each: where they are
# free to choose, and where fewer have a price, which are other scores.
_CANVASES = 4
_SEEN_CANVASES = 8
# Pixels of chosen canvases over those of the images' own: only more than this is worth compiling
# for one more.
_SPARE = 2.0
_COMPARED = 64  # sizes that canvases are chosen for; of more, similar ones are taken together first


class Protocol(NamedTuple):
  """The way an image is shown to the network and its scores are summed up.

  It is part of what an mIoU means.

  style:
    "whole": the image as it is. "pad_to_crop": padded to window_pixels with the mean color, right
    and below (PseudoSeg); longer sides stay as they are. "center_crop": only the middle
    window_pixels of the image are shown and scored (UniMatch); shorter sides are padded likewise.
    "slide": overlapping windows, whose scores are summed.
  window_pixels: (height, width) of the window, or of the crop.
  stride_fraction: slide: distance between windows as a fraction of the window.
  scales: factors the image is resized by; the scores are resized back and summed.
  flip: add the scores of the mirrored image.
  pad_multiple: canvases are multiples of this, so that few sizes compile. With "whole" and "cut"
    the network sees the padding (the mean color, right and below), which changes scores near these
    borders; 1 shows it images as they are. Else it does not.
  edges: slide: the last window is shifted back inside ("shift": CPS, UniMatch V2), where images
    shorter than the window are padded around, or ends at the border ("cut": UniMatch).
  summed: the "logits" of windows, scales and flips (CPS), or their "probabilities" (UniMatch's
    windows).
  multiple_pixels: whole: sides are resized to the nearest multiple of this, for networks of
    patches; 1 leaves them. As in UniMatch V2 (14), that and the way back keep the corners, and gray
    levels are not rounded.
  absent_classes: classes in neither truth nor prediction; "skip" leaves them out of the mIoU,
    "zero" counts them as 0 (UniMatch).
  stride_rounding: slide: of the stride to pixels, "up" (CPS) or "down" (both versions of UniMatch).
  canvases: (height, width) of those that images are laid on, the smallest that holds an image; what
    none holds, and all where there are none, has one of its own. No part of what an mIoU means, and
    only for protocols without `sees_padding`.
  """

  style: str = "whole"
  window_pixels: tuple[int, int] | None = None
  stride_fraction: float = 2 / 3
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False
  pad_multiple: int = 1
  edges: str = "shift"
  summed: str = "logits"
  multiple_pixels: int = 1
  absent_classes: str = "skip"
  stride_rounding: str = "up"
  canvases: tuple[tuple[int, int], ...] = ()


# What a user says; canvases are chosen.
OPTIONS = tuple(name for name in Protocol._fields if name != "canvases")

# What the published tables were measured with, from the official code of each.
PRESETS = {
  "cps_voc": Protocol("slide", (512, 512)),
  "cps_cityscapes": Protocol("slide", (800, 800)),
  "pseudoseg_voc": Protocol("pad_to_crop", (513, 513)),
  "pseudoseg_coco": Protocol("pad_to_crop", (641, 641)),
  "unimatch_voc": Protocol(absent_classes="zero"),
  "unimatch_cityscapes": Protocol(
    "slide",
    (801, 801),
    edges="cut",
    summed="probabilities",
    absent_classes="zero",
    stride_rounding="down",
  ),
  "unimatch_v2_voc": Protocol(multiple_pixels=14, absent_classes="zero"),
  "unimatch_v2_cityscapes": Protocol(
    "slide", (798, 798), summed="probabilities", absent_classes="zero", stride_rounding="down"
  ),
}


def check_protocol(protocol: Protocol) -> None:
  """Raises InputError with everything that is wrong with a protocol."""
  problems = checks.Problems("the evaluation protocol cannot be used")
  words = {
    "style": STYLES,
    "edges": EDGES,
    "summed": SUMMED,
    "absent_classes": ABSENT_CLASSES,
    "stride_rounding": ROUNDINGS,
  }
  for field, allowed in words.items():
    name = getattr(protocol, field)
    if name not in allowed:
      problems.add(
        field,
        got=repr(name),
        allowed=checks.choices(allowed),
        remedy=checks.nearest(str(name), allowed),
      )
  window = protocol.window_pixels
  has_window = checks.is_size(window)
  if not has_window and (protocol.style in STYLES[1:] or window):
    problems.add(
      "window_pixels",
      got=window or "none",
      allowed="(height, width) of the window or crop, e.g. (512, 512)",
    )
  if protocol.style == "slide":
    if not 0 < protocol.stride_fraction <= 1:
      problems.add(
        "stride_fraction",
        got=protocol.stride_fraction,
        allowed="above 0, up to 1 (larger ones leave gaps)",
      )
    elif has_window and min(_strides(protocol)) < 1:
      problems.add(
        "stride_fraction",
        got=f"{protocol.stride_fraction:g} of a window of {min(window)}, rounded down to a stride of 0 pixels",
        allowed="a stride of 1 pixel or more",
        remedy="stride_rounding 'up', or a larger window",
      )
  if not protocol.scales or min(protocol.scales) <= 0:
    problems.add(
      "scales", got=protocol.scales or "none", allowed="one or more factors above 0, e.g. (1.0,)"
    )
  if protocol.pad_multiple < 1:
    problems.add("pad_multiple", got=protocol.pad_multiple, allowed="1 (no padding) or more")
  if protocol.multiple_pixels < 1 or (protocol.multiple_pixels > 1 and protocol.style != "whole"):
    problems.add(
      "multiple_pixels",
      got=protocol.multiple_pixels,
      allowed="1 (no resizing), or more with style 'whole'",
    )
  problems.raise_if_any()


def describe(protocol: Protocol) -> str:
  """Describes a protocol in words, for reports.

  For example: "sliding windows of 512x512, stride 342x342, scale 1".
  """
  if protocol.style == "slide":
    words = [
      f"sliding windows of {_sides(protocol.window_pixels)}",
      f"stride {_sides(_strides(protocol))}",
    ]
    words += ["cut off at the border"] * (protocol.edges == "cut")
  elif protocol.style == "pad_to_crop":
    words = [f"whole images padded to {_sides(protocol.window_pixels)}"]
  elif protocol.style == "center_crop":
    words = [f"the middle {_sides(protocol.window_pixels)} of images"]
  else:
    words = ["whole images"]
  if protocol.multiple_pixels > 1:
    words.append(f"resized to multiples of {protocol.multiple_pixels}")
  if protocol.pad_multiple > 1 and sees_padding(protocol):
    words.append(f"padded to multiples of {protocol.pad_multiple}")
  words.append(
    f"scale{'s' if len(protocol.scales) > 1 else ''} {' '.join(f'{scale:g}' for scale in protocol.scales)}"
  )
  if protocol.flip:
    words.append("flipped too")
  if protocol.summed == "probabilities":
    words.append("probabilities summed")
  if protocol.absent_classes == "zero":
    words.append("classes never seen count as 0")
  return ", ".join(words)


def sees_padding(protocol: Protocol) -> bool:
  """Tells whether the network sees what lies on a canvas beside an image.

  If so, scores near that border depend on the canvas.
  """
  return protocol.style in ("whole", "pad_to_crop") or _cuts(protocol)


def canvas_size(size: tuple[int, int], protocol: Protocol) -> tuple[int, int]:
  """Returns (height, width) of the canvas that an image is laid on.

  Args:
    size: (height, width) of the image.
  """
  takes_any = protocol.style == "whole" or _cuts(protocol)
  own = _round_up(size, protocol.pad_multiple, (1, 1) if takes_any else protocol.window_pixels)
  return min(
    (canvas for canvas in protocol.canvases if _holds(canvas, own)), key=math.prod, default=own
  )


def bounded(protocol: Protocol, sizes: Sequence[tuple[int, int]]) -> tuple[Protocol, str]:
  """Makes the protocol compile for few sizes where images come in many.

  Where the network does not see the padding, images share a few larger canvases. Else they are
  padded to multiples of 32 pixels or more.

  Returns:
    The protocol, and in words what was changed ("" for nothing).
  """
  canvases = lambda protocol: len({canvas_size(size, protocol) for size in sizes})
  changed, before = protocol, canvases(protocol)
  if not sees_padding(protocol):
    if before > _CANVASES:
      changed = protocol._replace(
        canvases=_few_canvases([canvas_size(size, protocol) for size in sizes])
      )
    how = f"laid on canvases of {', '.join(_sides(canvas) for canvas in changed.canvases)} pixels"
    effect = "scores stay the same"
  else:
    padding = 32
    while canvases(changed) > _SEEN_CANVASES and padding <= 128:
      # A multiple of what the network may need.
      multiple = math.lcm(protocol.pad_multiple, protocol.multiple_pixels, padding)
      changed, padding = protocol._replace(pad_multiple=multiple), 2 * padding
    how, effect = (
      f"padded to multiples of {changed.pad_multiple} pixels",
      "scores near the padded borders may change a little",
    )
  after = canvases(changed)
  if after >= before:
    return protocol, ""
  return changed, (
    f"{len(set(sizes))} image sizes: {how}, to compile for {after} size{'s' * (after > 1)} instead of {before}; {effect}"
  )


def _few_canvases(own: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
  """Chooses a few canvases, so that each of `own` fits one of them.

  Little is padded: the most similar ones are joined.
  """
  joined = lambda one, other: tuple(map(max, one, other))
  counts = collections.Counter(own)
  multiple = 1
  while len({_round_up(canvas, multiple, (1, 1)) for canvas in counts}) > _COMPARED:
    multiple *= 2
  alike = {}
  for canvas in counts:
    key = _round_up(canvas, multiple, (1, 1))
    alike[key] = joined(alike.get(key, canvas), canvas)
  groups = collections.Counter()
  for canvas, count in counts.items():
    groups[alike[_round_up(canvas, multiple, (1, 1))]] += count

  def cost(pair):
    together = math.prod(joined(*pair))
    return sum(groups[canvas] * (together - math.prod(canvas)) for canvas in pair)

  padded, most = (
    sum(math.prod(canvas) * count for canvas, count in groups.items()),
    _SPARE * sum(map(math.prod, own)),
  )
  while len(groups) > 1:
    pair = min(itertools.combinations(sorted(groups), 2), key=cost)
    padded += cost(pair)
    if len(groups) <= _CANVASES and padded > most:
      break
    count = sum(groups.pop(canvas) for canvas in pair)
    groups[joined(*pair)] += count
  return tuple(sorted(groups))


def _holds(canvas, size) -> bool:
  return canvas[0] >= size[0] and canvas[1] >= size[1]


def _round_up(size, multiple, least):
  return tuple(
    floor if side <= floor else -(-side // multiple) * multiple
    for side, floor in zip(size, least, strict=True)
  )


def _sides(pixels) -> str:
  return "x".join(map(str, pixels))


def _cuts(protocol):
  return protocol.style == "slide" and protocol.edges == "cut"


def infer(
  predict: Callable[[Array], Array],
  images: Array,
  sizes: Array,
  *,
  protocol: Protocol,
  mean: Sequence[float],
  std: Sequence[float],
) -> tuple[Array, Array]:
  """Computes class scores of raw images; to be jitted.

  Args:
    predict: images f32[B', h, w, C], normalized -> logits [B', h, w, K]; rows must not depend on
      each other.
    images: uint8 or float32 [B, H, W, C], levels 0..255, each image at the top left of a canvas of
      `canvas_size`; what lies outside does not matter.
    sizes: i32[B, 2], height and width of each image.
    mean, std: of C channels in [0, 1]; the network sees (levels / 255 - mean) / std.

  Returns:
    scores: f32[B, H, W, K], logits or probabilities summed over windows, flips and scales;
      meaningless outside the image.
    passes: f32[B, H, W, 1], how many were summed there, 0 where the protocol does not look; scores
      / passes are means.

  Raises:
    InputError: while tracing, if `predict` does not return one score vector a pixel.
  """
  forward = _forward(predict, protocol)
  normalize = lambda levels: (
    (levels / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
  )
  if protocol.style != "center_crop":
    return _all_scales(forward, normalize, images, sizes, protocol)

  window = tuple(protocol.window_pixels)
  start = jnp.maximum(sizes - jnp.asarray(window), 0) // 2
  cut = lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (*window, image.shape[-1]))
  crops, crop_sizes = jax.vmap(cut)(images, start), jnp.minimum(sizes, jnp.asarray(window))
  scores, passes = _all_scales(forward, normalize, crops, crop_sizes, protocol)
  passes = jnp.where(_inside(crop_sizes, jnp.zeros_like(sizes), window), passes, 0.0)
  paste = lambda crop, at: jax.lax.dynamic_update_slice(
    jnp.zeros((*images.shape[1:3], crop.shape[-1])), crop, (*at, 0)
  )
  return jax.vmap(paste)(scores, start), jax.vmap(paste)(passes, start)


def _forward(predict, protocol):
  """Returns the function from normalized images to what is summed.

  Its results are logits or probabilities, of the mirrored images too where the protocol asks for
  it.
  """

  def scores(images):
    logits = predict(images)
    if logits.ndim != 4 or logits.shape[:3] != images.shape[:3]:
      problems = checks.Problems("a predictor cannot be evaluated")
      problems.add(
        "logits",
        got=f"shape {logits.shape} for images {images.shape}",
        allowed=f"{(*images.shape[:3], 'classes')}",
        remedy="resize them to the images' size",
      )
      problems.raise_if_any()
    logits = logits.astype(jnp.float32)
    return jax.nn.softmax(logits, axis=-1) if protocol.summed == "probabilities" else logits

  if not protocol.flip:
    return scores
  return lambda images: scores(images) + scores(images[:, :, ::-1])[:, :, ::-1]


def _all_scales(forward, normalize, images, sizes, protocol):
  canvas, multiple = images.shape[1:3], protocol.multiple_pixels
  at_one_scale = _slide if protocol.style == "slide" else _whole
  least = protocol.window_pixels if protocol.style == "slide" and not _cuts(protocol) else (1, 1)
  levels = images.astype(jnp.float32)
  total = passes = 0.0
  for scale in protocol.scales:
    shown, shown_sizes = levels, sizes
    resized = scale != 1 or multiple > 1
    if resized:
      shown_sizes = _scaled(sizes, scale, multiple)
      shown_canvas = _round_up(
        _scaled(np.asarray(canvas), scale, multiple).tolist(), protocol.pad_multiple, least
      )
      shown = _resize(levels, sizes, shown_sizes, shown_canvas, align_corners=multiple > 1)
      if images.dtype == jnp.uint8 and multiple == 1:
        # Networks are trained on grey levels, and resized photographs have no others.
        shown = jnp.rint(shown)
    *at_scale, offset = at_one_scale(forward, normalize, shown, shown_sizes, protocol)
    if resized or offset is not None:
      at_scale = [
        _resize(x, shown_sizes, sizes, canvas, offset=offset, align_corners=multiple > 1)
        for x in at_scale
      ]
    total, passes = total + at_scale[0], passes + at_scale[1]
  return total, passes


def _scaled(sizes, scale, multiple):
  """Scales sides by `scale`, to the nearest pixel, then the nearest multiple.

  The sides are NumPy arrays (canvases) or JAX's (image sizes).
  """
  # In float32 for both, and monotone: a scaled image fits its scaled canvas.
  pixels = (sizes.astype(np.float32) * np.float32(scale)).round().astype(np.int32).clip(1)
  return ((2 * pixels + multiple) // (2 * multiple) * multiple).clip(multiple)


def _inside(sizes, start, shape):
  """Computes which pixels of a window lie on the image: bool[..., h, w, 1].

  Args:
    start: i32[..., 2], where the window starts; may be negative.
    shape: of the window.
  """
  on_axis = []
  for axis in (0, 1):
    position = start[..., axis, None] + jnp.arange(shape[axis])
    on_axis.append((position >= 0) & (position < sizes[..., axis, None]))
  return (on_axis[0][..., :, None] & on_axis[1][..., None, :])[..., None]


def _whole(forward, normalize, images, sizes, protocol):
  """Returns scores, passes, and None: the scores lie where the images lie."""
  inside = _inside(sizes, jnp.zeros_like(sizes), images.shape[1:3])
  scores = forward(jnp.where(inside, normalize(images), 0.0))
  return scores, jnp.full((*scores.shape[:3], 1), 1.0 + protocol.flip), None


def _strides(protocol):
  """Computes the pixels between windows.

  CPS has int(np.ceil(crop * rate)), UniMatch int(crop * 2 / 3).
  """
  rounded = math.ceil if protocol.stride_rounding == "up" else math.floor
  return tuple(rounded(side * protocol.stride_fraction) for side in protocol.window_pixels)


def windows_needed(size: tuple[int, int], protocol: Protocol) -> int:
  """Counts the network's runs for an image, at scale 1 and unflipped."""
  if protocol.style != "slide":
    return 1
  per_axis = zip(size, protocol.window_pixels, _strides(protocol), strict=True)
  if _cuts(protocol):
    return math.prod(-(-side // stride) for side, _, stride in per_axis)
  return math.prod(-(-max(side - window, 0) // stride) + 1 for side, window, stride in per_axis)


def _windows_on_axis(sides, canvas, window, stride, edges):
  """Computes where windows start along one axis.

  An image without pixels needs none.

  Args:
    edges: "shift": at multiples of the stride, the last one shifted back inside; ceil((side -
      window) / stride) + 1 of them. "cut": at all multiples of the stride, ending at the border;
      those of one length together, as they have one shape.

  Returns:
    [(their length, starts i32[B, N], whether the image needs them: bool[B, N])].
  """
  if edges == "shift":
    step = jnp.arange(-(-(canvas - window) // stride) + 1) * stride
    last = jnp.maximum(sides - window, 0)[:, None]
    return [(window, jnp.minimum(step, last), (step - stride < last) & (sides > 0)[:, None])]
  by_length = {}
  for start in range(0, canvas, stride):
    by_length.setdefault(min(window, canvas - start), []).append(start)
  starts = {
    length: jnp.broadcast_to(jnp.asarray(s), (len(sides), len(s)))
    for length, s in by_length.items()
  }
  return [(length, start, start < sides[:, None]) for length, start in starts.items()]


def _slide(forward, normalize, images, sizes, protocol):
  """Sums the scores of sliding windows, those of CPS or of UniMatch.

  CPS: TorchSemiSeg's `Evaluator.sliding_eval`. UniMatch: `evaluate`.

  Returns:
    scores, passes: as `infer`, but of each image at `offset`.
    offset: i32[B, 2] or None (nowhere but at 0): a shorter image lies in the middle of the window,
      the odd pixel after it.
  """
  canvas, channels, window = (
    images.shape[1:3],
    images.shape[-1],
    jnp.asarray(protocol.window_pixels),
  )
  rows, columns = (
    _windows_on_axis(
      sizes[:, axis],
      canvas[axis],
      protocol.window_pixels[axis],
      _strides(protocol)[axis],
      protocol.edges,
    )
    for axis in (0, 1)
  )
  passes = (1.0 + protocol.flip) * (
    _coverage(rows, canvas[0])[:, :, None] * _coverage(columns, canvas[1])[:, None, :]
  )[..., None]
  num_classes = jax.eval_shape(
    forward, jax.ShapeDtypeStruct((1, rows[0][0], columns[0][0], channels), jnp.float32)
  ).shape[-1]
  total = jnp.zeros((*images.shape[:3], num_classes))
  if _cuts(protocol):
    shown = jnp.where(_inside(sizes, jnp.zeros_like(sizes), canvas), normalize(images), 0.0)
    offset = None
  else:
    # An image that fits into one window is padded after normalization (the mean color), a larger
    # one before it (black).
    fits = jnp.all(sizes <= window, axis=-1)
    fill = jnp.where(fits[:, None], 0.0, normalize(jnp.zeros(channels)))[:, None, None]
    offset = jnp.maximum(window - sizes, 0) // 2
    inside = _inside(sizes, -offset, canvas)
    moved = jax.vmap(lambda image, by: jnp.roll(image, by, (0, 1)))(images, offset)
    shown = jnp.where(inside, normalize(moved), fill)
  for height, *from_top in rows:
    for width, *from_left in columns:
      total = _add_windows(total, forward, shown, (height, width), from_top, from_left)
  return total, passes, offset


def _add_windows(total, forward, images, shape, from_top, from_left):
  """Adds the scores of windows of one shape to `total` [B, H, W, K].

  The windows are at those combinations of the starts on both axes that an image needs.
  """
  batch, of_image = len(images), from_top[0].shape[1] * from_left[0].shape[1]
  start = jnp.stack(
    jnp.broadcast_arrays(from_top[0][:, :, None], from_left[0][:, None, :]), -1
  ).reshape(batch * of_image, 2)
  needed = (from_top[1][:, :, None] & from_left[1][:, None, :]).reshape(batch * of_image)
  most = max(1, min(_WINDOWS_PER_CALL, _PIXELS_PER_CALL // math.prod(shape)))
  together = max(batch, min(of_image, _WINDOWS_OF_FEW_IMAGES))
  group = -(-together // -(-together // most))
  count = jnp.sum(needed)
  # The needed ones first, in their order: no other is run.
  window = jnp.argsort(~needed, stable=True)
  window = jnp.pad(window, (0, -len(window) % group))
  image, corner = window // of_image, start[window]
  cut = lambda image, at: jax.lax.dynamic_slice(
    images, (image, *at, 0), (1, *shape, images.shape[-1])
  )[0]

  def add_group(done_and_total):
    done, total = done_and_total
    of, at = (jax.lax.dynamic_slice_in_dim(x, done, group) for x in (image, corner))
    scores = forward(jax.vmap(cut)(of, at))
    scores = jnp.where((done + jnp.arange(group) < count)[:, None, None, None], scores, 0.0)

    def add_window(number, total):  # one after the other: windows overlap
      place = (of[number], at[number, 0], at[number, 1], 0)
      before = jax.lax.dynamic_slice(total, place, (1, *shape, total.shape[-1]))
      return jax.lax.dynamic_update_slice(total, before + scores[number][None], place)

    return done + group, jax.lax.fori_loop(0, group, add_window, total)

  return jax.lax.while_loop(
    lambda state: state[0] < count, add_group, (jnp.zeros((), count.dtype), total)
  )[1]


def _coverage(windows, canvas):
  """Counts the windows over each pixel of one axis of the canvas.

  The result is f32[B, canvas].
  """
  count = 0.0
  for length, starts, needed in windows:
    distance = jnp.arange(canvas) - starts[..., None]
    count += jnp.sum(
      (distance >= 0) & (distance < length) & needed[..., None], axis=1, dtype=jnp.float32
    )
  return count


def _resize(x, sizes_in, sizes_out, canvas_out, *, offset=None, align_corners=False):
  """Resizes each map [H, W, C] bilinearly, from and to sizes of its own.

  The conventions are those of `ops.resize`. The sizes are known only at run time. It works by
  indices: on large canvases matrices would cost as much as a network.

  Args:
    offset: i32[B, 2] or None, where each map lies on its canvas.
  """
  for axis in (0, 1):
    side_in, side_out = (
      sizes[:, axis, None].astype(jnp.float32) for sizes in (sizes_in, sizes_out)
    )
    row = jnp.arange(canvas_out[axis], dtype=jnp.float32)
    if align_corners:
      position = row * ((side_in - 1) / jnp.maximum(side_out - 1, 1))
    else:
      position = (row + 0.5) * (side_in / side_out) - 0.5
    position = jnp.clip(position, 0, side_in - 1)
    below = position.astype(jnp.int32)
    above = jnp.minimum(below + 1, side_in.astype(jnp.int32) - 1)
    fraction = jnp.expand_dims(position - below, (2, 3) if axis == 0 else (1, 3))
    first = 0 if offset is None else offset[:, axis, None]
    at = jax.vmap(lambda image, index, axis=axis: jnp.take(image, index, axis=axis, mode="clip"))
    x = at(x, below + first) * (1 - fraction) + at(x, above + first) * fraction
  return x
