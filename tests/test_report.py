"""Scores as tables and as CSV: what names of classes may do to a terminal or to a spreadsheet."""

import csv

import numpy as np
import pytest

from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.evaluation import report
from pseudoseg_jax.ops.confusion import Scores


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "=1+1,2"])
def test_no_name_is_run_by_a_spreadsheet(name):
  scores = {
    "student": Scores(
      iou=np.array([0.5, np.nan]), miou=0.5, pixel_accuracy=0.5, matrix=np.eye(2, dtype=np.int64)
    )
  }
  text = report.csv(Classes((name, "cat"), ((0, 0, 0), (1, 1, 1))), scores)
  heading, first, second, *_ = csv.reader(text.splitlines())
  assert (heading, first, second) == (["class", "student"], [f"'{name}", "0.500000"], ["cat", ""])
