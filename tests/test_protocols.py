import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pseudoseg_jax
from pseudoseg_jax import build, config as configs
from pseudoseg_jax.checks import InputError
from pseudoseg_jax.data.classes import COCO, Classes
from pseudoseg_jax.evaluation import evaluator, inference, pictures, progress
from pseudoseg_jax.evaluation.inference import PRESETS, Protocol
from pseudoseg_jax.evaluation.predictor import Predictor
from pseudoseg_jax.ops import confusion, resize

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def infer_one(image, protocol, predict):
  height, width, channels = image.shape
  canvas = np.zeros((1, *inference.canvas_size((height, width), protocol), channels), image.dtype)
  canvas[0, :height, :width] = image
  infer = functools.partial(
    inference.infer, predict, protocol=protocol, mean=(0.0,) * channels, std=(1.0,) * channels
  )
  return [
    np.asarray(x[0, :height, :width]) for x in jax.jit(infer)(canvas, jnp.array([[height, width]]))
  ]


def random_image(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def size_and_mean(x):
  """Scores that say how large a window was and what it showed."""
  shape = jnp.asarray([x.shape[1], x.shape[2]], jnp.float32)
  return jnp.concatenate(
    [jnp.broadcast_to(shape, (*x.shape[:3], 2)), x * 0 + x.mean((1, 2), keepdims=True)], -1
  )


# Styles


def test_cut_windows_end_at_the_border_and_shifted_ones_do_not():
  # Along 10, windows of 6 with stride 4: cut 0-6, 4-10, 8-10; shifted 0-6, 4-10.
  image = random_image(10, 6)
  heights, passes = infer_one(image, Protocol("slide", (6, 6), 4 / 6, edges="cut"), size_and_mean)
  np.testing.assert_array_equal(
    passes[:, 0, 0], [1, 1, 1, 1, 3, 3, 1, 1, 2, 2] + np.array([0, 0, 0, 0, -1, -1, 0, 0, 0, 0])
  )
  np.testing.assert_array_equal(heights[:, 0, 0], [6, 6, 6, 6, 12, 12, 6, 6, 8, 8])
  # Columns 4 and 5: the windows 0-6 and 4-6.
  np.testing.assert_array_equal(passes[:, 4:], 2 * passes[:, :4][:, :2])
  _, passes = infer_one(image, Protocol("slide", (6, 6), 4 / 6), size_and_mean)
  np.testing.assert_array_equal(passes[:, 0, 0], [1, 1, 1, 1, 2, 2, 1, 1, 1, 1])


def test_a_cut_window_sees_nothing_but_its_part_of_the_image():
  image = random_image(7, 5)
  scores, _ = infer_one(image, Protocol("slide", (6, 6), 1.0, edges="cut"), size_and_mean)
  np.testing.assert_allclose(scores[6, 0], [1, 5, *image[6:].mean((0, 1)) / 255], rtol=1e-5)
  np.testing.assert_allclose(scores[0, 0], [6, 5, *image[:6].mean((0, 1)) / 255], rtol=1e-5)


def everywhere(x, numpy=jnp):
  """Scores that depend on all that a window shows, and where in it."""
  weight = (
    numpy.linspace(0.5, 1.5, x.shape[1])[:, None, None] * numpy.linspace(1, 2, x.shape[2])[:, None]
  )
  return numpy.sin(5 * x) + numpy.mean(x * weight, (1, 2), keepdims=True)


def windows_of_cps(height, width, crop, rate=2 / 3):
  stride = int(np.ceil(crop * rate))
  rows, columns = (int(np.ceil((side - crop) / stride)) + 1 for side in (height, width))
  for row in range(rows):
    for column in range(columns):
      bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
      yield slice(bottom - crop, bottom), slice(right - crop, right)


def windows_of_unimatch(height, width, grid):
  row = 0
  while row < height:
    column = 0
    while column < width:
      yield slice(row, min(height, row + grid)), slice(column, min(width, column + grid))
      column += int(grid * 2 / 3)
    row += int(grid * 2 / 3)


def windows_of_unimatch_v2(height, width, grid):
  row = 0
  while row < height:
    column = 0
    while column < width:
      yield slice(row, row + grid), slice(column, column + grid)
      if column == width - grid:
        break
      column = min(column + int(grid * 2 / 3), width - grid)
    if row == height - grid:
      break
    row = min(row + int(grid * 2 / 3), height - grid)


@pytest.mark.parametrize(
  ("window", "size"), [(11, (33, 29)), (20, (33, 47)), (20, (20, 40)), (21, (34, 33))]
)
@pytest.mark.parametrize(
  ("preset", "windows"),
  [
    ("cps_cityscapes", windows_of_cps),
    ("unimatch_cityscapes", windows_of_unimatch),
    ("unimatch_v2_cityscapes", windows_of_unimatch_v2),
  ],
)
def test_windows_are_those_of_the_official_loops(preset, windows, window, size):
  protocol = PRESETS[preset]._replace(window_pixels=(window, window))
  image = random_image(*size)
  expected, passes = np.zeros((*size, 3)), np.zeros((*size, 1))
  for number, (rows, columns) in enumerate(windows(*size, window), start=1):  # noqa: B007 - counts them
    scores = everywhere(image[None, rows, columns] / 255, np)[0]
    if protocol.summed == "probabilities":
      scores = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected[rows, columns] += scores
    passes[rows, columns] += 1
  assert inference.windows_needed(size, protocol) == number
  got, got_passes = infer_one(image, protocol, everywhere)
  np.testing.assert_array_equal(got_passes, passes)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_strides_of_two_thirds_are_exact_for_every_window():
  for window in range(1, 2001):
    for rounding, exact in {"up": -(-2 * window // 3), "down": 2 * window // 3}.items():
      assert inference._strides(Protocol("slide", (window, window), stride_rounding=rounding)) == (
        exact,
        exact,
      )
    assert (
      int(np.ceil(window * (2 / 3))) == -(-2 * window // 3)
      and int(window * 2 / 3) == 2 * window // 3
    )


def test_a_stride_of_nothing_is_refused_with_a_way_on():
  protocol = Protocol("slide", (1, 64), stride_rounding="down")
  with pytest.raises(InputError, match="stride_fraction.*0 pixels.*stride_rounding 'up'"):
    inference.check_protocol(protocol)
  inference.check_protocol(protocol._replace(stride_rounding="up"))
  inference.check_protocol(protocol._replace(window_pixels=(2, 64)))
  config = configs.base(configs.method("supervised"))
  configs.override(config, {"evaluation.style": "slide", "evaluation.stride_rounding": "upp"})
  with pytest.raises(InputError, match="stride_rounding: got 'upp'.*did you mean 'up'"):
    configs.frozen(config)
  configs.override(
    config, {"evaluation.stride_rounding": "down", "evaluation.window_pixels": "(20, 21)"}
  )
  assert "stride 13x14" in build.describe_protocol(configs.frozen(config))


def test_pad_to_crop_shows_short_sides_padded_and_longer_ones_as_they_are():
  for size, shown in {(5, 9): (8, 9), (3, 4): (8, 8), (20, 10): (20, 10)}.items():
    scores, passes = infer_one(random_image(*size), Protocol("pad_to_crop", (8, 8)), size_and_mean)
    np.testing.assert_array_equal(scores[0, 0, :2], shown)
    assert scores.shape[:2] == size and (passes == 1).all()


def test_center_crop_looks_at_the_middle_only():
  image = random_image(11, 20)
  scores, passes = infer_one(image, Protocol("center_crop", (6, 8), flip=True), lambda x: x)
  expected = np.zeros((11, 20, 1))
  expected[2:8, 6:14] = 2  # (11 - 6) // 2 and (20 - 8) // 2 before it
  np.testing.assert_array_equal(passes, expected)
  np.testing.assert_allclose(scores[2:8, 6:14], 2 * (image[2:8, 6:14] / 255), atol=1e-6)
  # A side shorter than the crop is shown whole.
  scores, passes = infer_one(image, Protocol("center_crop", (30, 8)), size_and_mean)
  assert passes.sum() == 11 * 8 and scores[0, 6, 0] == 30


def test_what_the_protocol_does_not_look_at_is_not_scored():
  image = random_image(9, 9)

  class OneImage:
    ids, has_labels, channels, dtype = ("a",), True, 3, np.uint8
    __len__ = lambda self: 1
    image = lambda self, row: image
    label = lambda self, row: image.argmax(-1).astype(np.uint8)
    size = lambda self, row: (9, 9)

  classes = Classes(("r", "g", "b"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
  score = evaluator.make_evaluator(
    {"x": lambda state, x: x},
    OneImage(),
    classes,
    protocol=Protocol("center_crop", (3, 4)),
    batch_size=1,
    **RAW,
  )
  assert score(None)["x"].matrix.sum() == 12
  (ids,) = score.predictions(None, [0])["x"]
  assert (ids != 255).sum() == 12 and (ids[3:6, 2:6] == image[3:6, 2:6].argmax(-1)).all()


def test_a_predictor_segments_all_of_an_image_whatever_was_scored():
  predictor = Predictor(lambda x: x, COCO, protocol=Protocol("center_crop", (4, 4)), **RAW)
  image = random_image(9, 11)
  np.testing.assert_array_equal(predictor.predict(image), image.argmax(-1))


def test_sides_are_resized_to_the_nearest_multiple_and_back_by_their_corners():
  image = random_image(21, 35)  # 1.5 and 2.5 times 14: halves go up
  shown = []
  spy = lambda x: (shown.append(x.shape[1:3]), jnp.sin(9 * x))[1]
  scores, _ = infer_one(image, Protocol(multiple_pixels=14), spy)
  assert shown[-1] == (28, 42)
  to = functools.partial(resize.bilinear_align_corners, jnp.asarray(image[None] / 255, jnp.float32))
  np.testing.assert_allclose(
    scores, resize.bilinear_align_corners(jnp.sin(9 * to((28, 42))), (21, 35))[0], atol=1e-4
  )


def test_summed_probabilities_are_those_of_each_window():
  image = random_image(8, 12)
  protocol = Protocol("slide", (8, 8), 0.5, flip=True, summed="probabilities")
  scores, passes = infer_one(image, protocol, lambda x: 7 * x)
  np.testing.assert_allclose(scores.sum(-1, keepdims=True), passes, rtol=1e-5)
  got = Predictor(lambda x: 7 * x, COCO, protocol=protocol, **RAW).probabilities(image)
  np.testing.assert_allclose(got, jax.nn.softmax(7 * (image / 255), axis=-1), atol=1e-5)


@pytest.mark.parametrize("style", inference.STYLES)
def test_every_style_takes_scales_and_flips(style):
  # blocks, whose middles no resizing changes.
  image = np.kron(random_image(5, 7), np.ones((4, 4, 1), np.uint8))
  protocol = Protocol(style, (12, 16), scales=(1.0, 2.0), flip=True)
  scores, passes = infer_one(image, protocol, lambda x: x)
  seen = passes[..., 0] > 0
  assert seen.sum() == (12 * 16 if style == "center_crop" else 20 * 28)
  middles = np.zeros_like(seen)
  middles[1::4, 1::4] = True
  np.testing.assert_allclose(
    (scores / passes.clip(1))[seen & middles], image[seen & middles] / 255, atol=1e-5
  )


def test_images_of_one_channel_and_of_more_bits_are_shown_unrounded():
  image = np.random.default_rng(0).uniform(0, 255, (6, 5, 2)).astype(np.float32)
  scores, _ = infer_one(image, Protocol(scales=(2.0,)), lambda x: x)
  twice = resize.bilinear_half_pixel(jnp.asarray(image[None]), (12, 10))
  np.testing.assert_allclose(scores, resize.bilinear_half_pixel(twice, (6, 5))[0] / 255, atol=1e-5)
  grey = Predictor(
    lambda x: jnp.concatenate([x, 0.5 + 0 * x], -1),
    COCO,
    protocol=Protocol(),
    mean=(0.0,),
    std=(1.0,),
  )
  np.testing.assert_array_equal(grey.predict(image[..., :1]), image[..., 0] < 127.5)
  with pytest.raises(InputError, match="height, width, 1"):
    grey.predict(random_image(3, 4))
  assert grey.overlay(image[..., :1]).shape == (6, 5, 3)


def test_a_scaled_image_is_shown_without_padding():
  # 13 * 0.5 = 6.5 becomes 6, and so does the canvas.
  scores, _ = infer_one(random_image(13, 22), Protocol(scales=(0.5,)), size_and_mean)
  np.testing.assert_allclose(scores[0, 0, :2], [6, 11])


# mIoU


def test_absent_classes_are_left_out_or_count_as_zero():
  matrix = [[2, 0, 0], [0, 2, 0], [0, 0, 0]]
  assert confusion.scores(matrix).miou == 1
  zero = confusion.scores(matrix, absent_classes="zero")
  np.testing.assert_allclose(zero.miou, 2 / 3)
  assert np.isnan(zero.iou[2])


# Names and words


def test_every_preset_can_be_used_and_says_what_it_is():
  said = {}
  for name, protocol in PRESETS.items():
    inference.check_protocol(protocol)
    said[name] = inference.describe(protocol)
  assert len(set(said.values())) == len(said)
  assert said["cps_cityscapes"] == "sliding windows of 800x800, stride 534x534, scale 1"
  assert said["pseudoseg_voc"] == "whole images padded to 513x513, scale 1"
  for name, rounding in {"cps": "up", "unimatch": "down"}.items():
    assert {
      p.stride_rounding for key, p in PRESETS.items() if key.startswith(name) and p.style == "slide"
    } == {rounding}
  for words in (
    "801x801, stride 534x534",
    "cut off at the border",
    "probabilities summed",
    "never seen count as 0",
  ):
    assert words in said["unimatch_cityscapes"]


def test_a_preset_replaces_the_options_and_a_wrong_name_gets_the_nearest():
  config = configs.base(configs.method("supervised"))
  configs.override(config, {"evaluation.preset": "cps_voc", "evaluation.flip": "True"})
  frozen = configs.frozen(config)
  assert build.build_protocol(frozen) == PRESETS["cps_voc"]
  assert build.describe_protocol(frozen).startswith("cps_voc: sliding windows of 512x512")
  config.evaluation.preset = "cps_vok"
  with pytest.raises(InputError, match="did you mean 'cps_voc'"):
    build.check_run(configs.frozen(config))


def test_options_that_are_wrong_are_told_together():
  with pytest.raises(InputError) as error:
    inference.check_protocol(
      Protocol("pad_to_crop", edges="cutt", summed="x", absent_classes="nan", multiple_pixels=14)
    )
  told = ("window_pixels", "did you mean 'cut'", "summed", "skip, zero", "style 'whole'")
  assert all(text in str(error.value) for text in told)


# Progress


def test_progress_tells_rate_and_time_left_without_the_first_images(monkeypatch):
  now, said = [0.0], []
  monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
  passed = progress.Progress(100, said.append)
  for second in (30, 32, 36, 38, 41.5):  # the first ones compile
    now[0] = second
    passed.more(4)
  assert said == [
    "12/100 images  1.3 images/s  left 1 min 6 s",
    "20/100 images  1.4 images/s  left 0 min 58 s",
  ]


# Pictures


def colors(path):
  with Image.open(path) as picture:
    return np.asarray(picture.convert("RGB"))


def many_classes(count):
  return Classes(tuple(f"class {index}" for index in range(count)), ((0, 0, 0),) * count)


@pytest.mark.parametrize("count", [2, 41])
def test_confusion_shows_the_diagonal_dark_and_what_never_was_grey(tmp_path, count):
  matrix = np.diag(np.arange(1, count + 1) * 100)
  matrix[-1] = 0
  pictures.confusion_matrix(many_classes(count), "student", matrix, tmp_path / "c.png")
  pixels = colors(tmp_path / "c.png").reshape(-1, 3)
  dark, grey = (pixels == (8, 48, 107)).all(-1).sum(), (pixels == 217).all(-1).sum()
  # A share 1 / count of the cells each, without the text of one.
  assert grey > 0 and dark > 0 and abs(dark / grey / (count - 1) * count - 1) < 0.6


def test_iou_bars_grow_with_classes_and_draw_all_predictors(tmp_path):
  matrix = np.eye(30, dtype=np.int64)
  matrix[3] = 0
  one = {"student": confusion.scores(matrix)}
  two = one | {"teacher": confusion.scores(matrix + 1)}
  for name, scores in {"one": one, "two": two}.items():
    pictures.iou_bars(many_classes(30), scores, tmp_path / f"{name}.png")
  orange = lambda name: (colors(tmp_path / f"{name}.png") == (255, 127, 14)).all(-1).sum()
  assert orange("one") == 0 and orange("two") > 100
  pictures.iou_bars(many_classes(3), {"x": confusion.scores(np.eye(3))}, tmp_path / "few.png")
  assert colors(tmp_path / "few.png").shape[0] < colors(tmp_path / "one.png").shape[0]


def test_grey_and_deep_images_can_be_seen():
  np.testing.assert_array_equal(pictures.visible(np.array([[7]], np.uint8)), [[7, 7, 7]])
  np.testing.assert_array_equal(pictures.visible(np.array([[300.0, 1.6, -4, 9]])), [[255, 2, 0]])


# python -m pseudoseg_jax.main --mode=eval


@pytest.mark.slow
def test_another_protocol_leaves_the_scores_of_training_as_they_are(tmp_path, capsys):
  options = {
    "total_steps": 2,
    "eval_every_steps": 2,
    "data.num_scenes": 24,
    "data.num_labeled": 8,
    "data.num_eval_scenes": 3,
  }
  options |= {
    "evaluation.pictures": 1,
    "batch_size_global.labeled": 8,
    "batch_size_global.unlabeled": 8,
  }
  pseudoseg_jax.train("configs/quickstart.py:method=supervised", tmp_path, options)
  before = (tmp_path / "results.json").read_bytes()
  assert {"iou.png", "confusion.png"} <= {path.name for path in (tmp_path / "pictures").iterdir()}
  assert json.loads(before)["preset"] is None
  capsys.readouterr()
  scores = pseudoseg_jax.evaluate(tmp_path, overrides={"evaluation.preset": "pseudoseg_voc"})
  said = capsys.readouterr().out
  assert said.index("pseudoseg_voc: whole images padded to 513x513") < said.index("mean IoU")
  assert (tmp_path / "results.json").read_bytes() == before
  folder = tmp_path / "evaluations/pseudoseg_voc/best"
  results = json.loads((folder / "results.json").read_text())
  assert (results["preset"], results["seed"], results["best"]["step"]) == ("pseudoseg_voc", 0, 2)
  assert results["best"]["predictors"]["student"]["miou"] == scores["student"].miou
  assert {path.name for path in (folder / "pictures").iterdir()} == {"iou.png", "confusion.png"}
  assert "mean IoU" in (folder / "scores.csv").read_text()
