"""Results that display themselves: arrays as pictures, tables as tables.

A notebook displays the arrays as pictures. The tables read as tables there and in a terminal.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pseudoseg_jax.evaluation import pictures, report
from pseudoseg_jax.ops.confusion import Scores

if TYPE_CHECKING:
  from pseudoseg_jax.data.classes import Classes

# pixels; smaller pictures are enlarged by a whole factor, larger ones shrunk.
_LEAST_SIDE, _GREATEST_SIDE = 256, 1600


class _Shown(np.ndarray):
  """An array with a picture.

  What is computed from it is a plain array again. Parts of it are shown as well.
  """

  def __array_wrap__(self, array, context=None, return_scalar=False):
    array = np.asarray(array)
    return array[()] if return_scalar else array

  def _picture(self) -> Image.Image | None:
    raise NotImplementedError

  def _repr_png_(self) -> bytes | None:
    picture = self._picture()
    if picture is None:
      return None
    png = io.BytesIO()
    picture.save(png, format="png")
    return png.getvalue()


class Picture(_Shown):
  """Colors uint8[h, w, 3], which a notebook shows as a picture."""

  def __new__(cls, pixels: np.ndarray) -> Picture:
    return np.asarray(pixels).view(cls)

  def _picture(self) -> Image.Image | None:
    if self.dtype != np.uint8 or self.ndim != 3 or self.shape[-1] != 3 or not self.size:
      return None
    return _fitted(Image.fromarray(np.ascontiguousarray(self)), Image.Resampling.BOX)


class ClassMap(_Shown):
  """Class ids uint8[h, w], which a notebook shows in the classes' colors.

  The picture stands above the names of the classes that occur in it.

  classes: those that the ids are of; None for an array that was made in another way.
  """

  classes: Classes | None

  def __new__(cls, ids: np.ndarray, classes: Classes) -> ClassMap:
    shown = np.asarray(ids).view(cls)
    shown.classes = classes
    return shown

  def __array_finalize__(self, source) -> None:
    self.classes = getattr(source, "classes", None)

  def _picture(self) -> Image.Image | None:
    if self.classes is None or self.dtype != np.uint8 or self.ndim != 2 or not self.size:
      return None
    colors = _fitted(
      Image.fromarray(pictures.colorize(np.asarray(self), self.classes)), Image.Resampling.NEAREST
    )
    present = [index for index in np.unique(self).tolist() if index < len(self.classes)]
    key = pictures.legend(self.classes, max(colors.width, _LEAST_SIDE), only=present)
    sheet = Image.new(
      "RGB", (max(colors.width, key.width), colors.height + key.height), pictures.PAPER
    )
    sheet.paste(colors, (0, 0))
    sheet.paste(key, (0, colors.height))
    return sheet


def _fitted(picture: Image.Image, shrinking: Image.Resampling) -> Image.Image:
  side = max(picture.size)
  factor = max(1, -(-_LEAST_SIDE // side)) if side <= _GREATEST_SIDE else _GREATEST_SIDE / side
  size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
  return picture.resize(size, shrinking if factor < 1 else Image.Resampling.NEAREST)


class ScoreTable(dict):
  """A mapping {predictor: Scores}, which prints as a table of IoU by class.

  classes: those that are scored, by predictor where they differ; heading: what is above the table.
  """

  def __init__(
    self, scores: Mapping[str, Scores], classes: Mapping[str, Classes], heading: str = ""
  ):
    super().__init__(scores)
    self._classes, self.heading = dict(classes), heading

  def _tables(self) -> list[tuple[Classes, dict[str, Scores]]]:
    """Groups the predictors of the same classes, to stand side by side."""
    tables: list[tuple[Classes, dict[str, Scores]]] = []
    for name, score in self.items():
      same = next((shown for classes, shown in tables if classes == self._classes[name]), None)
      if same is None:
        tables.append((self._classes[name], same := {}))
      same[name] = score
    return tables

  def __repr__(self) -> str:
    return "\n\n".join(
      filter(None, [self.heading, *(report.table(*shown) for shown in self._tables())])
    )

  def _repr_html_(self) -> str:
    heading = f"<p>{html.escape(self.heading)}</p>" if self.heading else ""
    return heading + "".join(
      _table_html(classes, _columns(scores)) for classes, scores in self._tables()
    )


class RunResults(dict):
  """The results of a run, which print as what a person wants to know of it.

  They are the content of results.json, `finished` and `stopped_by`.

  classes: of the first domain. workdir: of the run.
  """

  def __init__(self, results: Mapping[str, Any], classes: Classes, workdir: str):
    super().__init__(results)
    self._classes, self._workdir = classes, workdir

  def _facts(self) -> dict[str, str]:
    facts = {"workdir": self._workdir}
    if not self.get("finished", True):
      facts["stopped"] = f"by {self['stopped_by']}; the same call goes on from there"
    if "method" in self:
      facts |= {
        "method": f"{self['method']}, seed {self['seed']}",
        "data": self["split"],
        "protocol": self["protocol"],
      }
      for series in ("last", "best"):
        mious = ", ".join(
          f"{name} {report.percent(found['miou'])}"
          for name, found in self[series]["predictors"].items()
        )
        facts[series] = f"step {self[series]['step']}, mIoU %: {mious}"
    return facts

  def _title(self) -> str:
    return "Results" if "method" in self else "Results: none yet, no evaluation was finished"

  def __repr__(self) -> str:
    return aligned(self._title(), self._facts())

  def _repr_html_(self) -> str:
    shown = facts_html(self._title(), self._facts())
    if "last" not in self:
      return shown
    columns = {
      f"{name}, {series}": [
        *(found["iou"][of] for of in self._classes.names),
        found["miou"],
        found["pixel_accuracy"],
      ]
      for series in ("last", "best")
      for name, found in self[series]["predictors"].items()
    }
    return shown + _table_html(self._classes, columns)


def aligned(title: str, facts: Mapping[str, str]) -> str:
  """Returns a title and aligned lines `name  text`."""
  width = max(map(len, facts))
  return "\n".join([title, *(f"  {name.ljust(width)}  {text}" for name, text in facts.items())])


def facts_html(title: str, facts: Mapping[str, str]) -> str:
  rows = "".join(
    f"<tr><td style='text-align:left;opacity:0.7'>{html.escape(name)}</td><td style='text-align:left'>{html.escape(text)}</td></tr>"
    for name, text in facts.items()
  )
  return f"<p><b>{html.escape(title)}</b></p><table>{rows}</table>"


def legend_html(classes: Classes) -> str:
  """Returns the classes' names, each behind a swatch of its color, as HTML."""
  return "<p>" + " ".join(_named(classes, index) for index in range(len(classes))) + "</p>"


def _named(classes: Classes, index: int) -> str:
  red, green, blue = classes.palette[index]
  swatch = f"<span style='display:inline-block;width:0.9em;height:0.9em;background:rgb({red},{green},{blue});border:1px solid #999'></span>"
  return f"<span style='white-space:nowrap;margin-right:1em'>{swatch} {html.escape(classes.names[index])}</span>"


def _columns(scores: Mapping[str, Scores]) -> dict[str, list[float]]:
  return {
    name: [*score.iou.tolist(), score.miou, score.pixel_accuracy] for name, score in scores.items()
  }


def _table_html(classes: Classes, columns: Mapping[str, list[float | None]]) -> str:
  """Returns a table of IoU in % by class, as HTML.

  Below the classes are their mean and the pixel accuracy.

  Args:
    columns: heading -> the K + 2 fractions.
  """
  names = [
    *(_named(classes, index) for index in range(len(classes))),
    "<b>mean IoU</b>",
    "<b>pixel accuracy</b>",
  ]
  heading = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
  rows = "".join(
    f"<tr><td style='text-align:left'>{name}</td>{''.join(f'<td>{report.percent(value)}</td>' for value in values)}</tr>"
    for name, *values in zip(names, *columns.values(), strict=True)
  )
  return f"<table><tr><th style='text-align:left'>IoU %</th>{heading}</tr>{rows}</table>"
