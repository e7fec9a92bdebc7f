"""Scores for people and for programs: a table, CSV, and results.json.

results.json:

  {"config": {"path": str, "argument": str},      the config file and what followed its colon
   "seed": int, "method": str,
   "split": str, "protocol": str,                 in words
   "preset": str | null,                          the protocol's name, where it has one
   "last": {"step": int,
            "predictors": {NAME: {"miou": number | null, "pixel_accuracy": number | null,
                                  "iou": {CLASS: number | null},
                                  "predicted_classes": [CLASS, ...]}}},
                                                  predicted_classes: of at least one pixel
   "best": the same of the best step so far, and "selected_by": str, what it is best by,
   "ended_early": true,                           where config.early_stopping_patience ended the
                                                  run before its total_steps
   "baseline": {"workdir": str, "miou": number, "gain": number, "differs": [str]},
                                                  a finished supervised run beside this one, on the
                                                  same images and protocol: the first predictor's
                                                  last mIoU, how much this run's is above it, and
                                                  which options differ but for those of the method;
                                                  where there is one
   "domains": {name: {"split": str, "last": ..., "best": the same of the first data set's best
                      step}},                     where there are further ones

NAME+image_labels is the predictor NAME with its predictions kept to the classes that are in each
image according to the truth: what it is worth where image-level labels are known
(config.evaluation.image_labels). It never selects the best step.

Scores are fractions; null is a class (or a set) of which nothing was seen. `best` was chosen by
looking at the very images it is scored on, so it flatters; `last` does not. An evaluation of one
checkpoint (evaluations/) has but that one of the two.
"""

from __future__ import annotations

import contextlib
import csv as csv_lib
import io
import json
import math
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pseudoseg_jax import checks
from pseudoseg_jax.ops.confusion import Scores

if TYPE_CHECKING:
  from pseudoseg_jax.data.classes import Classes

Results = dict[str, Any]


def table(classes: Classes, scores: Mapping[str, Scores]) -> str:
  """Formats IoU in % by class, predictors side by side, as a table.

  Below the classes are their mean and the pixel accuracy; "-" = never seen.
  """
  rows = _rows(classes, scores)
  cells = [["IoU %", *scores], *([name, *map(percent, values)] for name, values in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = [
    "  ".join(
      [
        row[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
      ]
    )
    for row in cells
  ]
  rule = "-" * len(lines[0])
  return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def csv(classes: Classes, scores: Mapping[str, Scores]) -> str:
  """Formats the rows of `table` as CSV, as fractions.

  An empty cell = never seen. A name that a spreadsheet would run begins with a quote.
  """
  text = io.StringIO()
  writer = csv_lib.writer(text, lineterminator="\n")
  writer.writerow(["class", *scores])
  for name, values in _rows(classes, scores):
    # "=1+1" and the like are formulas even where they are quoted as CSV.
    shown = f"'{name}" if name.startswith(("=", "+", "-", "@")) else name
    writer.writerow([shown, *("" if math.isnan(value) else f"{value:.6f}" for value in values)])
  return text.getvalue()


def _rows(classes, scores):
  rows = [
    (name, [score.iou[index] for score in scores.values()])
    for index, name in enumerate(classes.names)
  ]
  rows.append(("mean IoU", [score.miou for score in scores.values()]))
  rows.append(("pixel accuracy", [score.pixel_accuracy for score in scores.values()]))
  return rows


def percent(value: float | None) -> str:
  """Formats a fraction in %; "-" for none."""
  return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def entry(classes: Classes, step: int, scores: Mapping[str, Scores]) -> Results:
  """Returns what results.json holds of one step."""
  return {
    "step": int(step),
    "predictors": {
      name: {
        "miou": _number(score.miou),
        "pixel_accuracy": _number(score.pixel_accuracy),
        "iou": dict(zip(classes.names, map(_number, score.iou), strict=True)),
        "predicted_classes": [
          name for name, count in zip(classes.names, score.matrix.sum(0), strict=True) if count
        ],
      }
      for name, score in scores.items()
    },
  }


def _number(value: float) -> float | None:
  return None if math.isnan(value) else float(value)


def write_results(path: str | pathlib.Path, results: Results) -> None:
  """Writes results.json, whole or not at all."""
  write_atomically(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def read_results(path: str | pathlib.Path) -> Results:
  """Reads results.json.

  Raises:
    InputError: no such file, or not what `write_results` writes.
  """
  problems = checks.Problems(f"cannot read results from {path}")
  remedy = "take the file away: the next evaluation writes it anew"
  try:
    results = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    problems.add("file", got=error, remedy=remedy)
    problems.raise_if_any()
  kinds = {
    "config": dict,
    "seed": int,
    "method": str,
    "split": str,
    "protocol": str,
    "last": dict,
    "best": dict,
  }
  wrong = [
    key
    for key, kind in kinds.items()
    if not (isinstance(results, dict) and isinstance(results.get(key), kind))
  ]
  wrong += [key for key in ("last", "best") if not (wrong or _is_entry(results[key]))]
  if wrong:
    problems.add("content", got=f"nothing that can be used under {', '.join(wrong)}", remedy=remedy)
  problems.raise_if_any()
  return results


def _is_entry(value: Mapping[str, Any]) -> bool:
  """Tells whether a value is what `entry` made."""
  predictors = value.get("predictors")
  return (
    isinstance(value.get("step"), int)
    and isinstance(predictors, dict)
    and all(
      isinstance(scores, dict) and isinstance(scores.get("miou"), (int, float, type(None)))
      for scores in predictors.values()
    )
  )


def read_object(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads the JSON object of a file.

  The result is {} for a file that is absent, damaged or of something else.
  """
  try:
    content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return content if isinstance(content, dict) else {}


def write_atomically(path: str | pathlib.Path, content: str | bytes) -> None:
  """Writes a file that is there whole or not at all; makes its folder.

  This holds whatever happens meanwhile.

  Raises:
    OSError: with the path.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = content.encode() if isinstance(content, str) else content
  # A name of its own for each writer: two processes may write the same file. Hidden, so that no
  # listing takes it for a result.
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno:
      # of a full disk the system names no file.
      raise type(error)(error.errno, error.strerror, str(path)) from error
    raise
