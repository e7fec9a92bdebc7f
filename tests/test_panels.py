import numpy as np
import pytest

from pseudoseg_jax.checks import InputError
from pseudoseg_jax.contract import Panel
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.evaluation import panels, pictures

CLASSES = Classes(("red", "green", "blue"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def one_hot(ids, confidence=1.0):
  return np.eye(3, dtype=np.float32)[np.asarray(ids)] * np.float32(confidence)


def of_kinds(kinds, values, names=None):
  return [Panel(*each) for each in zip(names or kinds, kinds, values, strict=True)]


def cell(sheet, row, column, size, notes=True):
  """The pixels of one cell, found from the layout: margin, title, then cells and gaps."""
  top = pictures.MARGIN + (40 if notes else 24) + row * (size + pictures.GAP)
  left = pictures.MARGIN + column * (size + pictures.GAP)
  return np.asarray(sheet)[top : top + size, left : left + size]


def test_agreement_by_hand_reads_the_nearest_truth_and_leaves_out_what_is_ignored_or_not_kept():
  # [1, 8, 8] for a grid of [1, 2, 2]
  truth = np.repeat(np.repeat(np.array([[[0, 1], [2, 255]]]), 4, 1), 4, 2)
  values = one_hot([[[0, 1], [1, 1]]], 0.4)
  assert panels.agreement(values, truth) == {"accuracy": 2 / 3}
  assert panels.agreement(values, truth, np.array([[[True, False], [True, True]]])) == {
    "accuracy": 1 / 2
  }
  assert panels.agreement(values, truth, np.array([[[0.5, 0.0], [1.5, 9.0]]])) == {"accuracy": 0.25}


@pytest.mark.filterwarnings("error")
def test_agreement_of_no_pixel_is_absent():
  values = one_hot([[[0, 1], [1, 1]]])
  assert panels.agreement(values, np.full((1, 4, 4), 255)) == {}
  assert panels.agreement(values, np.zeros((1, 4, 4), int), np.zeros((1, 4, 4), bool)) == {}


def test_agreement_of_maps_with_their_own_argmax_is_one():
  values = np.random.default_rng(0).random((2, 5, 7, 3)).astype(np.float32)
  assert panels.agreement(values, values.argmax(-1)) == {"accuracy": 1.0}


def test_images_are_shown_as_they_were_before_they_were_normalized():
  pixels = np.random.default_rng(1).integers(0, 256, (1, 300, 300, 3), dtype=np.uint8)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  sheet = panels.panel_sheet(
    [Panel("image", "image", (pixels / 255 - mean) / std)], CLASSES, mean=mean, std=std
  )
  np.testing.assert_array_equal(cell(sheet, 0, 0, 300, notes=False), pixels[0])


def test_sure_pixels_show_the_full_color_and_unsure_ones_fade_in_squares():
  # Scores above 1 are as sure as 1.
  values = one_hot([[[0, 1], [2, 2]]], [[[[1.0], [0.5]], [[0.0], [7.0]]]])
  image = np.zeros((1, 100, 100, 3), np.float32)
  sheet = panels.panel_sheet(
    of_kinds(("image", "classes"), (image, values), ("image", "teacher")), CLASSES, **RAW
  )
  shown = cell(sheet, 0, 1, 300)
  gray = panels._UNSURE
  quarters = {
    (0, 0): (255, 0, 0),
    (0, 1): np.rint((gray + (0, 255, 0)) / 2),
    (1, 0): gray,
    (1, 1): (0, 0, 255),
  }
  for (row, column), color in quarters.items():
    area = shown[150 * row : 150 * row + 150, 150 * column : 150 * column + 150]
    np.testing.assert_array_equal(
      area.reshape(-1, 3), np.broadcast_to(color, (150 * 150, 3)), err_msg=f"{row}, {column}"
    )


def test_pixels_left_out_are_hatched_in_the_last_class_panel_alone():
  kept = np.ones((1, 10, 10), bool)
  kept[:, :5] = False
  everywhere = one_hot(np.ones((1, 10, 10), int))
  values = (
    np.zeros((1, 10, 10, 3), np.float32),
    everywhere,
    everywhere,
    np.zeros((1, 10, 10), np.float32),
  )
  kinds = ("image", "classes", "classes", "heat")
  sheet = panels.panel_sheet(
    of_kinds(kinds, values), CLASSES, **RAW, truth=np.ones((1, 10, 10), int), kept=kept
  )
  shown = cell(sheet, 0, 2, 300)
  assert (shown[150:] == (0, 255, 0)).all()
  assert {tuple(color) for color in shown[:150].reshape(-1, 3).tolist()} == {
    tuple(c) for c in panels._HATCH.tolist()
  }
  for column, color in ((0, (0, 0, 0)), (1, (0, 255, 0)), (4, (0, 255, 0))):
    assert (cell(sheet, 0, column, 300) == color).all()


def test_heat_grows_lighter_from_0_to_1():
  ramp = np.linspace(-0.2, 1.2, 300, dtype=np.float32)  # what leaves 0..1 is clipped
  sheet = panels.panel_sheet([Panel("heat", "heat", np.tile(ramp, (1, 300, 1)))], CLASSES, **RAW)
  luma = cell(sheet, 0, 0, 300, notes=False)[150] @ (0.299, 0.587, 0.114)
  inside = (ramp > 0) & (ramp < 1)
  assert (np.diff(luma[inside][::8]) > 0).all()
  assert np.ptp(luma[ramp < 0]) == np.ptp(luma[ramp > 1]) == 0


def test_notes_say_mean_confidence_and_accuracy_of_the_kept_pixels_alone():
  values = one_hot([[[0, 1], [2, 2]]], [[[[0.9], [0.5]], [[0.1], [0.1]]]])
  kept, truth = np.array([[[True, True], [False, False]]]), np.array([[[0, 2], [2, 2]]])
  assert panels._notes(values, truth, kept) == ["confidence 0.70", "50 % right"]
  assert panels._notes(values, None, kept) == ["confidence 0.70"]
  assert panels._notes(values, truth, np.zeros_like(kept)) == []


@pytest.mark.parametrize("count", [1, 6, 40])
def test_sheets_stay_below_1800_pixels_and_8_rows(count):
  values = np.zeros((9, 96, 24, 3), np.float32)
  names, truth = (
    [f"a rather long title, number {number}" for number in range(count)],
    np.zeros((9, 96, 24), int),
  )
  sheets = [
    panels.panel_sheet(
      of_kinds(["classes"] * count, [values[:rows]] * count, names),
      CLASSES,
      **RAW,
      truth=truth[:rows],
      kept=truth[:rows] == 0,
    )
    for rows in (7, 8, 9)
  ]
  assert sheets[0].width < 1800 and sheets[0].height < sheets[1].height
  np.testing.assert_array_equal(sheets[1], sheets[2])


@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_is_drawn_as_0():
  kinds, rng = ("image", "classes", "heat"), np.random.default_rng(0)
  values = [rng.random(shape, np.float32) for shape in ((2, 8, 8, 3), (2, 4, 4, 3), (2, 4, 4))]
  broken, zero = [[value.copy() for value in values] for _ in range(2)]
  for number, bad in enumerate((np.nan, np.inf, -np.inf)):
    broken[number][0], zero[number][0] = bad, 0
  got, expected = (
    panels.panel_sheet(of_kinds(kinds, value), CLASSES, **RAW) for value in (broken, zero)
  )
  np.testing.assert_array_equal(got, expected)


def test_panels_that_do_not_fit_are_refused_all_at_once():
  values = np.zeros((2, 8, 8, 3)), np.zeros((2, 4, 4, 5)), np.zeros((1, 4, 4)), np.zeros((2, 4, 4))
  with pytest.raises(InputError) as error:
    panels.panel_sheet(
      of_kinds(("image", "classes", "heat", "heta"), values, ("image", "CAM", "doubt", "odd")),
      CLASSES,
      **RAW,
      truth=np.zeros((8, 8)),
    )
  for part in (
    "'CAM'",
    "[2, 4, 4, 5]",
    "[B, h, w, 3]",
    "'doubt'",
    "1 images",
    "did you mean 'heat'?",
    "truth",
    "[8, 8]",
  ):
    assert part in str(error.value)
  with pytest.raises(InputError, match="at least one"):
    panels.panel_sheet([], CLASSES, **RAW)
