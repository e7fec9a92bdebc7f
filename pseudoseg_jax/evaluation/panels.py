"""Sheets of what a method makes of a batch of unlabeled images.

Side by side are views, probabilities, pseudo labels and truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL, Panel
from pseudoseg_jax.evaluation import pictures
from pseudoseg_jax.ops import resize

if TYPE_CHECKING:
  from pseudoseg_jax.data.classes import Classes

_KINDS = ("image", "classes", "heat")
_MAX_ROWS = 8
_MIN_WIDTH, _MAX_WIDTH, _MAX_CELL = 480, 1792, 300  # pixels
_FRAME = (214, 216, 220)
_UNSURE = np.array((236, 237, 240), np.float32)  # the color of confidence 0
_NOTE = (110, 114, 120)
_HATCH = np.array(((250, 250, 251), (168, 172, 180)), np.uint8)  # ground and stripes


class _Column(NamedTuple):
  title: str
  notes: list[str]
  cells: list[Image.Image]


def agreement(
  values: np.ndarray, truth: np.ndarray, kept: np.ndarray | None = None
) -> dict[str, float]:
  """Measures how often the likeliest class is the true one.

  Args:
    values: f32[B, h, w, K], class probabilities or scores.
    truth: i32[B, H, W]; read at the nearest pixel of the grid of `values`. Values outside 0..K-1
      (255 = ignore) are not counted.
    kept: bool or float [B, h', w'], the weight of each pixel; None = all count alike.

  Returns:
    {"accuracy": a fraction, weighted by `kept`}, or {} where no pixel counts.
  """
  values, grid = np.asarray(values), np.shape(values)[1:3]
  truth = resize.nearest(np.asarray(truth), grid)
  weight = ((truth >= 0) & (truth < values.shape[-1])).astype(np.float64)
  if kept is not None:
    weight *= resize.nearest(np.asarray(kept), grid)
  total = weight.sum()
  return (
    {"accuracy": float((weight * (values.argmax(-1) == truth)).sum() / total)} if total > 0 else {}
  )


def panel_sheet(
  panels: Sequence[Panel],
  classes: Classes,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  truth: np.ndarray | None = None,
  kept: np.ndarray | None = None,
) -> Image.Image:
  """Draws a row for each image and a column for each panel, above a legend.

  There are 8 rows at most. Class panels show the likeliest class; its color fades to light gray as
  its probability falls. Their notes are that probability and the share of right pixels, over the
  kept pixels of the rows shown.

  Args:
    panels: see `contract.Panel`. Small grids are enlarged without smoothing; what is not finite
      counts as 0.
    mean, std: by channel, those that the images were normalized with.
    truth: i32[B, H, W], shown in a last column.
    kept: bool[B, h, w], on any grid; where it is False (padding, CutOut, ...) the pseudo label, the
      last class panel, is hatched.

  Returns:
    RGB, less than 1800 pixels wide.

  Raises:
    InputError: the panels do not fit each other, or the classes.
  """
  names, kinds = [panel.name for panel in panels], [panel.kind for panel in panels]
  values = [np.asarray(panel.values, np.float32) for panel in panels]
  truth, kept = (None if maps is None else np.asarray(maps) for maps in (truth, kept))
  _check(names, kinds, values, len(mean), len(classes), {"truth": truth, "kept": kept})
  truth, kept = (None if maps is None else maps[:_MAX_ROWS] for maps in (truth, kept))
  values = [np.nan_to_num(value[:_MAX_ROWS], posinf=0.0, neginf=0.0) for value in values]
  largest = max((value.shape[1:3] for value in values), key=np.prod)
  size = _cell_size(largest, len(names) + (truth is not None))

  columns = []
  pseudo_label = max(
    (number for number, kind in enumerate(kinds) if kind == "classes"), default=None
  )
  for number, (name, kind, value) in enumerate(zip(names, kinds, values, strict=True)):
    if kind == "image":
      columns.append(_Column(name, [], _cells(_rgb(value, mean, std), size)))
    elif kind == "heat":
      columns.append(_Column(name, [], _cells(_heat_colors(value), size)))
    else:
      cells = _cells(_class_colors(value, classes), size)
      cells = _hatched(cells, kept) if number == pseudo_label and kept is not None else cells
      columns.append(_Column(name, _notes(value, truth, kept), cells))
  if truth is not None:
    columns.append(_Column("truth", [], _cells(pictures.colorize(truth, classes), size)))
  hatched = kept is not None and pseudo_label is not None and not kept.all()
  ignored = truth is not None and bool((truth == IGNORE_LABEL).any())
  return _laid_out(columns, size, classes, kinds, hatched=hatched, ignored=ignored)


def _check(names, kinds, values, image_channels, num_classes, masks):
  problems = checks.Problems("panels cannot be drawn")
  if not names:
    problems.add("panels", got="none", allowed="at least one")
    problems.raise_if_any()
  rows = values[0].shape[0] if values[0].ndim else 0
  for name, kind, value in zip(names, kinds, values, strict=True):
    if kind not in _KINDS:
      problems.add(
        f"panel '{name}'",
        got=f"kind '{kind}'",
        allowed=checks.choices(_KINDS),
        remedy=checks.nearest(kind, _KINDS),
      )
      continue
    channels = {"image": (image_channels,), "classes": (num_classes,), "heat": ()}[kind]
    if value.ndim != 3 + len(channels) or value.shape[3:] != channels or 0 in value.shape:
      allowed = f"[{', '.join(['B', 'h', 'w', *map(str, channels)])}], none of them 0"
      problems.add(
        f"panel '{name}'", got=f"an array {list(value.shape)} of kind '{kind}'", allowed=allowed
      )
    elif value.shape[0] != rows:
      problems.add(
        f"panel '{name}'", got=f"{value.shape[0]} images", allowed=f"{rows}, as in '{names[0]}'"
      )
  for name, mask in masks.items():
    if mask is not None and (mask.ndim != 3 or len(mask) != rows):
      problems.add(
        name, got=f"an array {list(mask.shape)}", allowed=f"[{rows}, h, w], as in '{names[0]}'"
      )
  problems.raise_if_any()


def _cell_size(size: tuple[int, int], num_columns: int) -> tuple[int, int]:
  """Computes (width, height) of a cell for images of one size.

  The cell is a whole multiple of that size where images are enlarged.

  Args:
    size: (height, width) of the images.
  """
  height, width = size
  room = max(
    1,
    min(_MAX_CELL, (_MAX_WIDTH - 2 * pictures.MARGIN + pictures.GAP) // num_columns - pictures.GAP),
  )
  scale = room / max(height, width)
  scale = int(scale) if scale > 1 else scale
  return max(1, round(width * scale)), max(1, round(height * scale))


def _cells(pixels: np.ndarray, size: tuple[int, int]) -> list[Image.Image]:
  """Converts uint8[B, h, w, 3] to pictures of `size` (width, height)."""
  # Enlarged pixels stay squares: what the network saw, not a smoothed guess.
  method = Image.Resampling.NEAREST if pixels.shape[2] <= size[0] else Image.Resampling.BOX
  return [Image.fromarray(image).resize(size, method) for image in pixels]


def _rgb(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  return pictures.visible(
    255 * (images * np.asarray(std, np.float32) + np.asarray(mean, np.float32))
  )


def _class_colors(values: np.ndarray, classes: Classes) -> np.ndarray:
  return _faded(pictures.colorize(values.argmax(-1), classes), values.max(-1, keepdims=True))


def _faded(colors: np.ndarray, confidence: np.ndarray) -> np.ndarray:
  return np.rint(_UNSURE + confidence.clip(0, 1) * (colors - _UNSURE)).astype(np.uint8)


def _heat_colors(values: np.ndarray) -> np.ndarray:
  from matplotlib import colormaps

  return colormaps["magma"](values.clip(0, 1), bytes=True)[..., :3].copy()


def _hatch(width: int, height: int) -> np.ndarray:
  """Draws slanted stripes: uint8[height, width, 3]."""
  y, x = np.mgrid[:height, :width]
  return _HATCH[((x + y) % 7 < 2).astype(np.intp)]


def _hatched(cells: list[Image.Image], kept: np.ndarray) -> list[Image.Image]:
  """Hatches the cells where `kept` [B, h, w] is False."""
  width, height = cells[0].size
  kept = resize.nearest(kept, (height, width)).astype(bool)[..., None]
  hatch = _hatch(width, height)
  return [
    Image.fromarray(np.where(mask, np.asarray(cell), hatch))
    for cell, mask in zip(cells, kept, strict=True)
  ]


def _notes(values: np.ndarray, truth: np.ndarray | None, kept: np.ndarray | None) -> list[str]:
  confidence = values.max(-1).clip(0, 1)
  kept = (
    np.ones(confidence.shape, bool)
    if kept is None
    else resize.nearest(kept, confidence.shape[1:]).astype(bool)
  )
  notes = [f"confidence {confidence[kept].mean():.2f}"] if kept.any() else []
  scores = {} if truth is None else agreement(values, truth, kept)
  return notes + [f"{100 * share:.0f} % right" for share in scores.values()]


def _laid_out(columns, size, classes, kinds, *, hatched, ignored) -> Image.Image:
  width, height = size
  step = width + pictures.GAP
  sheet_width = max(_MIN_WIDTH, 2 * pictures.MARGIN + len(columns) * step - pictures.GAP)
  legend = pictures.legend(classes, sheet_width, with_ignored=ignored)
  key = _key(sheet_width, kinds, classes, hatched=hatched)
  notes = any(column.notes for column in columns)
  top = pictures.MARGIN + (40 if notes else 24)
  bottom = top + len(columns[0].cells) * (height + pictures.GAP)
  sheet = Image.new("RGB", (sheet_width, bottom + legend.height + key.height), pictures.PAPER)
  draw = ImageDraw.Draw(sheet)
  for number, column in enumerate(columns):
    left = pictures.MARGIN + number * step
    middle = left + width / 2
    _write(draw, (middle, pictures.MARGIN + 6), column.title, 15, pictures.INK, width)
    _write(draw, (middle, pictures.MARGIN + 25), " \u00b7 ".join(column.notes), 12, _NOTE, width)
    for row, cell in enumerate(column.cells):
      place = left, top + row * (height + pictures.GAP)
      sheet.paste(cell, place)
      draw.rectangle(
        (place[0] - 1, place[1] - 1, place[0] + width, place[1] + height), outline=_FRAME
      )
  sheet.paste(legend, (0, bottom))
  sheet.paste(key, (0, bottom + legend.height))
  return sheet


def _write(draw, middle, text, font_size, color, width):
  """Writes centered text that fits into `width`.

  Where it is wider, it gets smaller, then has fewer words, for half a number would mislead.
  """
  while font_size > 10 and pictures.text_font(font_size).getlength(text) > width:
    font_size -= 1
  font = pictures.text_font(font_size)
  if font.getlength(text) > width:
    while text and font.getlength(text + "\u2026") > width:
      text = text.rpartition(" ")[0].rstrip(" \u00b7") if " " in text else text[:-1]
    text += "\u2026"
  draw.text(middle, text, fill=color, font=font, anchor="mm")


def _key(width, kinds, classes, *, hatched) -> Image.Image:
  """Draws a strip that explains fading, heat and hatching.

  It explains them as far as they occur.
  """
  ramp = np.broadcast_to(np.linspace(0, 1, 96, dtype=np.float32), (16, 96))
  entries = []
  if "classes" in kinds:
    liveliest = max(classes.palette, key=lambda color: max(color) - min(color))
    entries.append(("confidence 0 to 1", _faded(np.asarray(liveliest), ramp[..., None])))
  if "heat" in kinds:
    entries.append(("heat 0 to 1", _heat_colors(ramp)))
  if hatched:
    entries.append(("left out", _hatch(24, 16)))
  font = pictures.text_font(13)
  key = Image.new("RGB", (width, 32 if entries else 8), pictures.PAPER)
  draw, left = ImageDraw.Draw(key), pictures.MARGIN
  for text, pixels in entries:
    key.paste(Image.fromarray(pixels), (left, 4))
    draw.rectangle((left - 1, 3, left + pixels.shape[1], 20), outline=pictures.FAINT)
    draw.text((left + pixels.shape[1] + 8, 12), text, fill=pictures.INK, font=font, anchor="lm")
    left += pixels.shape[1] + 8 + int(font.getlength(text)) + 28
  return key
