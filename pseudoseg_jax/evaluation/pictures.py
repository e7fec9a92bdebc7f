"""Pictures for people, from class colors to curves and scores.

They are class colors, overlays, legends, contact sheets, curves and scores.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.evaluation import report
from pseudoseg_jax.ops.confusion import Scores

if TYPE_CHECKING:
  from pseudoseg_jax.data.classes import Classes

_IGNORE_COLOR = (224, 224, 224)
INK, FAINT, PAPER = (32, 33, 36), (150, 154, 160), (255, 255, 255)
MARGIN, GAP = 16, 8  # pixels


def color_table(classes: Classes) -> np.ndarray:
  """Returns the classes' colors by id: uint8[256, 3].

  The ignore label is light gray; ids that are no class are black.
  """
  table = np.zeros((256, 3), np.uint8)
  table[: len(classes.palette)] = classes.palette
  table[IGNORE_LABEL] = _IGNORE_COLOR
  return table


def colorize(ids: np.ndarray, classes: Classes) -> np.ndarray:
  """Colors class ids: uint8[h, w] -> uint8[h, w, 3]."""
  return color_table(classes)[ids]


def visible(images: np.ndarray) -> np.ndarray:
  """Converts levels 0..255 to visible colors: [..., C] -> uint8[..., 3].

  The first three channels are red, green and blue. With fewer channels, the first is shown as gray.
  """
  rgb = images[..., :3] if images.shape[-1] >= 3 else np.repeat(images[..., :1], 3, axis=-1)
  return rgb if rgb.dtype == np.uint8 else np.rint(rgb.clip(0, 255)).astype(np.uint8)


def overlay(
  image: np.ndarray, ids: np.ndarray, classes: Classes, opacity: float = 0.4
) -> np.ndarray:
  """Tints the image by class, with an outline around each area.

  The image is [h, w, C] of levels 0..255, the result uint8[h, w, 3]. Outlines have the full color
  of the class.

  The photograph stays as it is where the background is, if the classes have one.
  """
  image = visible(image)
  tinted = np.rint(image * (1 - opacity) + colorize(ids, classes) * opacity).astype(np.uint8)
  outline = _edges(ids, max(1, round(min(ids.shape) / 250))) & (ids != IGNORE_LABEL)
  tinted[outline] = colorize(ids, classes)[outline]
  if classes.background_index is not None:
    background = ids == classes.background_index
    tinted[background] = image[background]
  return tinted


def _edges(ids: np.ndarray, width: int) -> np.ndarray:
  """Finds the pixels that are close to another class: bool[h, w].

  Those are pixels with one of another class at most `width` pixels away in their row or column.
  """
  edges = np.zeros(ids.shape, bool)
  for distance in range(1, width + 1):
    for axis in (0, 1):
      before, after = np.moveaxis(ids, axis, 0)[:-distance], np.moveaxis(ids, axis, 0)[distance:]
      along = np.moveaxis(edges, axis, 0)
      along[:-distance] |= before != after
      along[distance:] |= before != after
  return edges


def indexed(ids: np.ndarray, classes: Classes) -> Image.Image:
  """Converts class ids uint8[h, w] to an 8-bit palette image.

  Its pixels are the ids, shown in the classes' colors.
  """
  picture = Image.fromarray(np.ascontiguousarray(ids, np.uint8))
  picture.putpalette(color_table(classes).ravel().tolist())
  return picture


def legend(
  classes: Classes,
  width: int = 900,
  *,
  with_ignored: bool = False,
  only: Sequence[int] | None = None,
) -> Image.Image:
  """Draws a strip of color swatches with the names of the classes.

  Args:
    width: the strip wraps at so many pixels.
    only: the indices of the classes that are shown; None: all of them.
  """
  font = text_font(14)
  shown = range(len(classes)) if only is None else only
  entries = [(classes.names[index], classes.palette[index]) for index in shown]
  entries += [("ignored", _IGNORE_COLOR)] if with_ignored else []
  swatch, line_height = 16, 26
  # Equal columns: a ragged strip is harder to search.
  column = max((int(font.getlength(name)) for name, _ in entries), default=0) + swatch + 8 + 20
  columns = max(1, (width - 2 * MARGIN) // column)
  rows = -(-len(entries) // columns)
  picture = Image.new("RGB", (width, rows * line_height + 2 * GAP), PAPER)
  draw = ImageDraw.Draw(picture)
  for number, (name, color) in enumerate(entries):
    left, top = MARGIN + number % columns * column, GAP + number // columns * line_height
    draw.rectangle(
      (left, top + 4, left + swatch, top + 4 + swatch), fill=tuple(color), outline=FAINT
    )
    draw.text((left + swatch + 8, top + 4 + swatch / 2), name, fill=INK, font=font, anchor="lm")
  return picture


def contact_sheet(
  images: Sequence[np.ndarray],
  labels: Sequence[np.ndarray],
  predictions: Mapping[str, Sequence[np.ndarray]],
  classes: Classes,
) -> Image.Image:
  """Draws a row for each image, with its truth and predictions.

  The columns are image | truth | one for each predictor. The rows are above a legend.

  Args:
    images: [h, w, C] of levels 0..255, of any sizes.
    labels: uint8[h, w], likewise.
    predictions: predictor -> uint8[h, w] of each image.
  """
  columns = {"image": [visible(image) for image in images]}
  for title, maps in {"truth": labels, **predictions}.items():
    columns[title] = [overlay(image, ids, classes) for image, ids in zip(images, maps, strict=True)]
  cell = 300 if len(columns) <= 4 else 220  # pixels
  tallest = max((image.shape[0] / image.shape[1] for image in images), default=1.0)
  cell_height = min(cell, round(cell * tallest))

  sheet_width = 2 * MARGIN + len(columns) * (cell + GAP) - GAP
  key = legend(
    classes, sheet_width, with_ignored=any((label == IGNORE_LABEL).any() for label in labels)
  )
  top = MARGIN + 24
  bottom = top + len(images) * (cell_height + GAP)
  sheet = Image.new("RGB", (sheet_width, bottom + key.height + GAP), PAPER)
  draw = ImageDraw.Draw(sheet)
  for column, (title, cells) in enumerate(columns.items()):
    left = MARGIN + column * (cell + GAP)
    draw.text((left + cell / 2, MARGIN + 8), title, fill=INK, font=text_font(15), anchor="mm")
    for row, pixels in enumerate(cells):
      small = _fitted(pixels, cell, cell_height)
      sheet.paste(
        small,
        (
          left + (cell - small.width) // 2,
          top + row * (cell_height + GAP) + (cell_height - small.height) // 2,
        ),
      )
  sheet.paste(key, (0, bottom))
  return sheet


def _fitted(pixels: np.ndarray, width: int, height: int) -> Image.Image:
  scale = min(width / pixels.shape[1], height / pixels.shape[0])
  size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
  # Enlarged pixels stay squares: what the network saw, not a smoothed guess.
  return Image.fromarray(pixels).resize(
    size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
  )


def text_font(size: int) -> ImageFont.ImageFont:
  return ImageFont.load_default(size)


def curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
  """Draws losses, accuracies and the learning rate against steps, as a PNG.

  The curves are losses, mIoU, the accuracy of pseudo labels and the learning rate, each where the
  history has it.

  Args:
    history: name -> [(step, value)]. By its last parts a name is a loss ("train/loss_sup"), a
      predictor's mIoU ("evaluation/teacher/miou", a fraction), an accuracy of panels
      ("panels/CAM_accuracy", likewise) or a learning rate ("train/learning_rate"); others are not
      drawn.
  """
  titles = ("loss", "mIoU %", "right on unlabeled images %", "learning rate")
  panels: dict[str, dict[str, list[tuple[int, float]]]] = {title: {} for title in titles}
  for name, points in history.items():
    parts = name.split("/")
    if parts[-1] == "miou":
      panels["mIoU %"][parts[-2] if len(parts) > 1 else "mIoU"] = [
        (step, 100 * value) for step, value in points
      ]
    elif parts[0] == "panels" and parts[-1].endswith("_accuracy"):
      label = parts[-1].removesuffix("_accuracy").replace("_", " ")
      panels["right on unlabeled images %"][label] = [(step, 100 * value) for step, value in points]
    elif parts[-1].startswith("loss"):
      panels["loss"][parts[-1]] = list(points)
    elif parts[-1].startswith("learning_rate"):
      panels["learning rate"][parts[-1]] = list(points)
  panels = {title: lines for title, lines in panels.items() if lines} or {
    "nothing recorded yet": {}
  }

  last_step = max(
    (step for lines in panels.values() for points in lines.values() for step, _ in points),
    default=1,
  )
  figure = _figure(5.2 * len(panels), 3.8)
  for axes, (title, lines) in zip(
    figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
  ):
    for label, points in lines.items():
      steps, values = zip(*points, strict=True) if points else ((), ())
      marker = "o" if len(points) <= 30 else None
      axes.plot(steps, values, label=label, linewidth=1.6, marker=marker, markersize=3.5)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("step")
    # The same for all; around a single point matplotlib would choose one of its own.
    axes.set_xlim(0, 1.03 * last_step)
    if "%" in title:
      known = [
        [(step, value) for step, value in points if np.isfinite(value)] for points in lines.values()
      ]
      for step, value in (points[-1] for points in known if points):
        axes.annotate(
          f"{value:.1f}", (step, value), (-4, 5), textcoords="offset points", ha="right", fontsize=8
        )
      axes.set_ylim(
        0, min(103, 5 + 1.15 * max((value for points in known for _, value in points), default=80))
      )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1 or title == "mIoU %":
      axes.legend(fontsize=9, frameon=False)
  return _png(figure)


def scores(
  classes: Classes, by_predictor: Mapping[str, Scores], folder: str | pathlib.Path
) -> None:
  """Draws the IoU of all predictors and the confusion matrix of the first.

  The files are `folder`/iou.png and `folder`/confusion.png.
  """
  folder = pathlib.Path(folder)
  iou_bars(classes, by_predictor, folder / "iou.png")
  name = next(iter(by_predictor))
  confusion_matrix(classes, name, by_predictor[name].matrix, folder / "confusion.png")


def iou_bars(
  classes: Classes, by_predictor: Mapping[str, Scores], path: str | pathlib.Path
) -> None:
  """Draws IoU in % by class, predictors side by side.

  The best class of the first predictor is on top. A dashed line is the mIoU.
  """
  first = next(iter(by_predictor.values()))
  order = np.argsort(np.nan_to_num(-first.iou, nan=1.0), kind="stable")  # never seen: last
  place = np.arange(len(order))
  thickness = 0.8 / len(by_predictor)
  row_inches = max(0.21, 0.13 * len(by_predictor))
  figure = _figure(7.5, 1.3 + row_inches * len(order))
  axes = figure.subplots()
  for number, (name, score) in enumerate(by_predictor.items()):
    percent = 100 * score.iou[order]
    center = place + (number - (len(by_predictor) - 1) / 2) * thickness
    bars = axes.barh(
      center, np.nan_to_num(percent), thickness, label=f"{name}, mean {100 * score.miou:.1f}"
    )
    notes = ["never seen" if np.isnan(value) else f"{value:.1f}" for value in percent]
    axes.bar_label(bars, notes, padding=2, fontsize=7)
    axes.axvline(
      100 * score.miou,
      color=bars.patches[0].get_facecolor(),
      linestyle="--",
      linewidth=1.1,
      zorder=0.5,
    )
  axes.set_yticks(place, [classes.names[index] for index in order], fontsize=8)
  axes.set_ylim(len(order) - 0.5, -0.5)
  axes.set_xlim(0, 104)
  axes.tick_params(axis="y", length=0)
  axes.set_title("IoU %", fontsize=11, loc="left")
  axes.grid(axis="x", alpha=0.25)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower left", fontsize=9, frameon=False, ncols=3)
  _save_figure(figure, path)


_MOST_NUMBERED = 40  # classes, above which numbers do not fit into a matrix


def confusion_matrix(
  classes: Classes, name: str, matrix: np.ndarray, path: str | pathlib.Path
) -> None:
  """Draws what predictor `name` takes the pixels of each class for.

  The numbers are in % of the class.

  Args:
    matrix: i64[K, K], row = truth.
  """
  from matplotlib.colors import PowerNorm

  count = len(matrix)
  totals = matrix.sum(1, keepdims=True)
  percent = np.where(totals > 0, 100 * matrix / np.maximum(totals, 1), np.nan)
  numbered = count <= _MOST_NUMBERED
  side = max(3.0, (0.3 if numbered else 0.16) * count)  # inches
  figure = _figure(side + 2.2, side + 1.6)
  axes = figure.subplots()
  # The square root: confusions of a few percent are what one looks for.
  shown = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
  axes.set_facecolor("0.85")
  if numbered:
    for row, column in zip(*np.nonzero(np.nan_to_num(percent) >= 0.5), strict=True):
      value = percent[row, column]
      color = "white" if value > 30 else "black"
      axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
  labels = [
    label if total else f"{label} (never)"
    for label, total in zip(classes.names, totals[:, 0], strict=True)
  ]
  size = 8 if numbered else 6.5
  axes.set_xticks(range(count), classes.names, rotation=90, fontsize=size)
  axes.set_yticks(range(count), labels, fontsize=size)
  axes.tick_params(length=0)
  axes.set_xlabel("predicted")
  axes.set_ylabel("truth")
  axes.set_title(f"{name}: % of each true class's pixels", fontsize=11, loc="left")
  figure.colorbar(shown, shrink=0.6, ticks=(0, 1, 5, 10, 25, 50, 75, 100))
  _save_figure(figure, path)


def _figure(width_inches: float, height_inches: float):
  # Not pyplot: it keeps every figure alive and may look for a display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width_inches, height_inches), dpi=110, layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def _png(figure) -> bytes:
  png = io.BytesIO()
  figure.savefig(png, format="png")
  return png.getvalue()


def _save_figure(figure, path: str | pathlib.Path) -> None:
  report.write_atomically(path, _png(figure))


def save(picture: Image.Image, path: str | pathlib.Path) -> None:
  """Writes a PNG whole or not at all."""
  png = io.BytesIO()
  picture.save(png, format="png")
  report.write_atomically(path, png.getvalue())
