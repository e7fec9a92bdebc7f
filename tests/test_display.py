"""What shows itself in a notebook and in a terminal."""

import io
import logging
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import notebook
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.evaluation import pictures
from pseudoseg_jax.evaluation.display import ClassMap, Picture, RunResults, ScoreTable
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.evaluation.predictor import Predictor
from pseudoseg_jax.ops.confusion import scores

CLASSES = Classes(("sky", "<b>road</b>", "car"), ((0, 0, 255), (128, 64, 128), (255, 0, 0)))


def shown(value):
  return np.asarray(Image.open(io.BytesIO(value._repr_png_())).convert("RGB"))


def text_of(markup):
  return re.sub(r"<[^>]*>", " ", markup)


def predictor(**options):
  return Predictor(
    lambda x: x,
    CLASSES,
    protocol=Protocol(),
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    name="teacher",
    checkpoint="best",
    step=7,
    **options,
  )


# --- pictures -------------------------------------------------------------------------------------


def test_predictions_are_arrays_that_show_the_colors_of_their_classes():
  image = np.random.default_rng(0).integers(0, 256, (300, 280, 3), np.uint8)
  ids = predictor().predict(image)
  np.testing.assert_array_equal(ids, image.argmax(-1))
  assert isinstance(ids, np.ndarray) and ids.dtype == np.uint8
  np.testing.assert_array_equal(
    shown(ids)[:300, :280], pictures.colorize(image.argmax(-1), CLASSES)
  )
  overlay = predictor().overlay(image)
  np.testing.assert_array_equal(shown(overlay), pictures.overlay(image, image.argmax(-1), CLASSES))


def test_below_a_prediction_stand_the_classes_that_are_in_it():
  ids = ClassMap(np.full((300, 300), 2, np.uint8), CLASSES)
  legend = shown(ids)[300:]
  assert (legend == (255, 0, 0)).all(-1).any() and not (legend == (0, 0, 255)).all(-1).any()


def test_small_pictures_are_enlarged_by_whole_pixels():
  pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 3), np.uint8)
  np.testing.assert_array_equal(shown(Picture(pixels)), pixels.repeat(4, 0).repeat(4, 1))


def test_large_pictures_are_shrunk_in_what_is_shown_alone():
  picture = ClassMap(np.repeat(np.arange(2, dtype=np.uint8), 2000)[:, None].repeat(500, 1), CLASSES)
  colors = shown(picture)[:1600, :200]
  assert picture.shape == (4000, 500) and {*map(tuple, colors.reshape(-1, 3))} == {
    (0, 0, 255),
    (128, 64, 128),
  }
  assert shown(Picture(np.zeros((30, 3200, 3), np.uint8))).shape == (15, 1600, 3)


@pytest.mark.parametrize(
  "make",
  [
    lambda: Picture(np.zeros((8, 9, 3), np.uint8)),
    lambda: ClassMap(np.zeros((8, 9), np.uint8), CLASSES),
  ],
)
def test_what_is_computed_from_a_picture_is_a_plain_array(make):
  picture = make()
  for plain in (
    picture == 1,
    picture + 1,
    np.where(picture, 1, 2),
    np.concatenate([picture, picture]).max(),
    picture.mean(0),
  ):
    assert not hasattr(plain, "_repr_png_") or plain._repr_png_() is None
  assert isinstance(picture.max(), np.uint8) and jnp.asarray(picture).shape == picture.shape
  assert picture[2:5]._repr_png_() is not None  # a part is one too
  assert (
    Picture(np.zeros((0, 3, 3), np.uint8))._repr_png_() is None
    and picture[0].view(type(picture))._repr_png_() is None
  )


def test_ids_that_lost_their_classes_are_numbers():
  assert np.zeros((4, 4), np.uint8).view(ClassMap)._repr_png_() is None


# --- tables ---------------------------------------------------------------------------------------

MATRIX = np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]])


def test_scores_read_as_a_table():
  table = ScoreTable(
    {"a": scores(MATRIX), "b": scores(MATRIX)},
    {"a": CLASSES, "b": CLASSES},
    "best checkpoint, step 7",
  )
  for text in (repr(table), text_of(table._repr_html_())):
    for part in (
      "best checkpoint, step 7",
      "sky",
      "80.00",
      "83.33",
      "-",
      "mean IoU",
      "81.67",
      "pixel accuracy",
      "90.00",
    ):
      assert part in text
  assert (
    "<b>road" not in table._repr_html_().replace("&lt;b&gt;", "")
    and "rgb(128,64,128)" in table._repr_html_()
  )
  assert (
    table["a"].miou == pytest.approx(0.8166667)
    and "mIoU 81.67 %" in repr(table["a"])
    and "80.00 83.33 -" in repr(table["a"])
  )


def test_scores_of_other_classes_stand_in_a_table_of_their_own():
  other = Classes(("x", "y"), ((0, 0, 0), (1, 1, 1)))
  table = ScoreTable({"a": scores(MATRIX), "b": scores(MATRIX[:2, :2])}, {"a": CLASSES, "b": other})
  assert table._repr_html_().count("<table>") == 2 and repr(table).count("mean IoU") == 2


def results(**changes):
  entry = {
    "step": 3,
    "predictors": {
      "a": {
        "miou": 0.5,
        "pixel_accuracy": None,
        "iou": {"sky": 0.25, "<b>road</b>": None, "car": 1.0},
      }
    },
  }
  found = {
    "method": "cps",
    "seed": 1,
    "split": "4 labeled",
    "protocol": "whole images",
    "last": entry,
    "best": entry,
  }
  return RunResults(found | {"finished": True, "stopped_by": None} | changes, CLASSES, "/w")


def test_results_say_what_a_person_wants_to_know():
  assert results()["last"]["step"] == 3 and dict(results()) == {**results()}
  for text in (repr(results()), text_of(results()._repr_html_())):
    for part in ("cps, seed 1", "4 labeled", "whole images", "step 3", "a 50.00", "/w"):
      assert part in text
    assert "stopped" not in text
  assert "25.00" in results()._repr_html_() and "a, best" in results()._repr_html_()


def test_results_of_a_run_that_was_stopped_say_how_to_go_on():
  stopped = RunResults({"finished": False, "stopped_by": "SIGINT"}, CLASSES, "/w")
  for text in (repr(stopped), text_of(stopped._repr_html_())):
    assert "by SIGINT" in text and "the same call goes on" in text and "none yet" in text
  assert "by SIGTERM" in repr(results(finished=False, stopped_by="SIGTERM"))


def test_a_predictor_says_what_it_is():
  for text in (repr(predictor()), text_of(predictor()._repr_html_())):
    for part in ("teacher", "sky", "best, step 7", "3 channels", "whole images", "overlay(image)"):
      assert part in text
  assert "<b>road" not in predictor()._repr_html_()


# --- the cell as a console ------------------------------------------------------------------------


class Cell:
  """What a cell shows: displays, each with its newest content, and how often that changed."""

  def __init__(self, monkeypatch):
    self.displays, self.updates = [], 0
    display = pytest.importorskip("IPython.display")
    monkeypatch.setattr(display, "display", self.display)

  def display(self, content, *, raw, display_id):
    assert raw and display_id
    self.displays.append(content)
    place, cell = len(self.displays) - 1, self

    class Handle:
      def update(self, content, *, raw):
        cell.displays[place] = content
        cell.updates += 1

    return Handle()


@pytest.fixture
def cell(monkeypatch):
  return Cell(monkeypatch)


@pytest.fixture
def log():
  made = logging.getLogger("a log of a test")
  made.setLevel(logging.INFO)
  made.propagate = False
  yield made
  for handler in made.handlers[:]:
    made.removeHandler(handler)


def test_progress_stands_in_one_place_and_lines_go_on(cell, log, capsys):
  log.addHandler(notebook.CellConsole())
  log.info("begun")
  for step in range(100):
    log.info("step %d of 100 <", step, extra={"slot": "progress", "fraction": step / 100})
  log.info("evaluating", extra={"slot": "evaluation"})
  log.info("a table", extra={"slot": "scores "})
  log.warning("something")
  assert capsys.readouterr().out == "begun\nsomething\n"
  assert len(cell.displays) == 1 and cell.updates == 101
  (content,) = cell.displays
  assert content["text/plain"] == "step 99 of 100 <\na table"  # the evaluation is done
  assert "step 99 of 100 &lt;" in content["text/html"] and "value='0.9900'" in content["text/html"]


def test_pictures_are_drawn_as_often_as_that_costs_little(cell, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(notebook.time, "perf_counter", lambda: now[0])
  console, drawn = notebook.CellConsole(), []

  def draw():
    drawn.append(now[0])
    now[0] += 1.0
    return b"a PNG"

  for second in range(100):
    now[0] = max(now[0], second)
    console.picture(draw)
  assert len(drawn) == 5  # a second each, of which a twentieth of the time
  console.picture(draw, now=True)
  assert len(drawn) == 6 and "data:image/png;base64,YSBQTkc=" in cell.displays[0]["text/html"]


def test_a_passing_console_leaves_nothing(cell, log):
  console = notebook.CellConsole(transient=True)
  log.addHandler(console)
  log.info("10/20 images", extra={"slot": "evaluation"})
  console.close()
  assert cell.displays == [{"text/plain": "", "text/html": "<div></div>"}]


def test_a_terminal_has_every_line(log, capsys):
  console = notebook.console()
  log.addHandler(console)
  log.info("step 1", extra={"slot": "progress", "fraction": 0.5})
  log.info("step 2", extra={"slot": "progress", "fraction": 1.0})
  assert capsys.readouterr().out == "step 1\nstep 2\n"


def test_the_root_logger_keeps_its_handlers():
  own, foreign = logging.NullHandler(), logging.NullHandler()
  logging.root.addHandler(own)
  try:
    with notebook.root_handlers_kept():
      logging.root.addHandler(foreign)
    assert own in logging.root.handlers and foreign not in logging.root.handlers
  finally:
    logging.root.removeHandler(own)
