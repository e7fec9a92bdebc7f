import dataclasses
import functools
import io
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image

import pseudoseg_jax
from pseudoseg_jax import predict as predict_cli
from pseudoseg_jax.checks import InputError
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.decode import read_any_image as read_image
from pseudoseg_jax.evaluation import evaluator, inference, pictures, report
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.evaluation.predictor import Predictor
from pseudoseg_jax.ops import confusion, resize

CLASSES = Classes(("red", "green", "blue"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class FakeSource:
  """Random images; about a tenth of the labels are ignored, the others mostly the brightest
  channel.
  """

  channels, dtype = 3, np.uint8

  def __init__(self, sizes, has_labels=True):
    rng = np.random.default_rng(0)
    self.has_labels = has_labels
    self.images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    self.labels = []
    for image in self.images:
      label = image.argmax(-1).astype(np.uint8)
      label = np.where(rng.random(label.shape) < 0.3, rng.integers(0, 3, label.shape), label)
      self.labels.append(np.where(rng.random(label.shape) < 0.1, 255, label).astype(np.uint8))
    self.ids = tuple(f"image{row}" for row in range(len(sizes)))

  def __len__(self):
    return len(self.images)

  def image(self, row):
    return self.images[row]

  def label(self, row):
    return self.labels[row]

  def size(self, row):
    return self.images[row].shape[:2]


def brightest(state, images):
  """Class = brightest channel, the first one made brighter by `state`."""
  return images.at[..., 0].add(state)


def darkest(state, images):
  return -images


def expected_matrix(source, state=0.0, sign=1):
  matrix = np.zeros((3, 3), np.int64)
  for image, label in zip(source.images, source.labels, strict=True):
    ids = (sign * (image / np.float32(255)) + np.array([state, 0, 0])).argmax(-1)
    np.add.at(matrix, (label[label < 3], ids[label < 3]), 1)
  return matrix


def mesh_of(count):
  return Mesh(np.asarray(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))


# Confusion matrix and scores


def test_confusion_matrix_by_hand_ignores_what_is_no_class():
  label = jnp.array([[0, 0, 1, 2, 255, 3]])
  got = confusion.confusion_matrix(label, jnp.array([[0, 1, 1, 0, 0, 2]]), 3)
  np.testing.assert_array_equal(got, [[1, 1, 0], [0, 1, 0], [1, 0, 0]])


def test_counts_are_exact_beyond_what_float32_can_count():
  pixels = 2**24 + 3
  count = jax.jit(functools.partial(confusion.confusion_matrix, num_classes=2))
  got = count(np.ones(pixels, np.uint8), np.ones(pixels, np.uint8))
  assert got[1, 1] == pixels and got.sum() == pixels


def test_scores_by_hand_leave_out_classes_never_seen():
  got = confusion.scores([[2, 1, 0, 0], [1, 4, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
  # Class 2 was seen and missed, class 3 never seen.
  np.testing.assert_allclose(got.iou, [2 / 4, 4 / 8, 0, np.nan])
  np.testing.assert_allclose([got.miou, got.pixel_accuracy], [1 / 3, 6 / 10])


@pytest.mark.filterwarnings("error")
def test_scores_of_nothing_are_nan():
  got = confusion.scores(np.zeros((2, 2)))
  assert np.isnan([*got.iou, got.miou, got.pixel_accuracy]).all()


# Inference


def infer_one(image, protocol, predict=lambda x: x, mean=RAW["mean"], std=RAW["std"]):
  height, width = image.shape[:2]
  canvas = np.zeros((1, *inference.canvas_size((height, width), protocol), 3), np.uint8)
  canvas[0, :height, :width] = image
  infer = jax.jit(
    functools.partial(inference.infer, predict, protocol=protocol, mean=mean, std=std)
  )
  return [np.asarray(x[0, :height, :width]) for x in infer(canvas, jnp.array([[height, width]]))]


@pytest.fixture
def image():
  return np.random.default_rng(1).integers(0, 256, (13, 22, 3), dtype=np.uint8)


def with_context(x):
  """Every score depends on all pixels of what the network is shown, on their places too."""
  weight = (
    jnp.linspace(0.5, 1.5, x.shape[1])[:, None, None] * jnp.linspace(1, 2, x.shape[2])[:, None]
  )
  return jnp.sin(3 * x) + jnp.mean(x * weight, (1, 2), keepdims=True)


def test_whole_images_are_normalized_and_padded_with_the_mean_color(image):
  shown = []
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
  watch = lambda x: (jax.debug.callback(lambda value: shown.append(np.asarray(value)), x), x)[1]
  infer_one(image, Protocol(pad_multiple=16), watch, mean, std)
  jax.effects_barrier()
  assert shown[0].shape == (1, 16, 32, 3)
  np.testing.assert_allclose(shown[0][0, :13, :22], (image / 255 - mean) / std, atol=1e-5)
  assert not shown[0][0, 13:].any() and not shown[0][0, :, 22:].any()


def test_flip_adds_the_mirrored_logits(image):
  scores, passes = infer_one(image, Protocol(flip=True), with_context)
  straight, mirrored = (infer_one(x, Protocol(), with_context)[0] for x in (image, image[:, ::-1]))
  np.testing.assert_allclose(scores, straight + mirrored[:, ::-1], atol=1e-5)
  assert (passes == 2).all()


@pytest.mark.parametrize("scale", [0.5, 1.75])
@pytest.mark.parametrize("pad_multiple", [1, 24])
def test_scaled_scores_are_those_of_the_resized_image_resized_back(image, scale, pad_multiple):
  protocol = Protocol(scales=(1.0, scale), pad_multiple=pad_multiple)
  pointwise = lambda x: jnp.sin(5 * x)  # does not see the padding
  scores, passes = infer_one(image, protocol, pointwise)
  size = tuple(int(np.rint(side * scale)) for side in image.shape[:2])
  resized = jnp.rint(resize.bilinear_half_pixel(jnp.asarray(image[None], jnp.float32), size)) / 255
  expected = (
    pointwise(image / 255) + resize.bilinear_half_pixel(pointwise(resized), image.shape[:2])[0]
  )
  # Where a level rounds the other way: 5 / 255.
  np.testing.assert_allclose(scores, expected, atol=2e-2)
  assert np.abs(scores - expected).mean() < 1e-4
  np.testing.assert_allclose(passes, 2, atol=1e-5)


# At factors of two, resized grey levels are exact: none can round the other way on another canvas.
@pytest.mark.parametrize(
  "size, scales", [((13, 22), (1.0,)), ((9, 9), (1.0,)), ((3, 40), (1.0,)), ((12, 14), (0.5, 2.0))]
)
def test_sliding_scores_do_not_depend_on_the_canvas(size, scales):
  image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
  slide = functools.partial(
    Protocol, style="slide", window_pixels=(10, 12), stride_fraction=0.5, scales=scales
  )
  exact, exact_passes = infer_one(image, slide(), with_context, (0.5,) * 3, (0.2,) * 3)
  roomy, roomy_passes = infer_one(
    image, slide(pad_multiple=34), with_context, (0.5,) * 3, (0.2,) * 3
  )
  np.testing.assert_allclose(roomy, exact, atol=2e-4)
  np.testing.assert_allclose(roomy_passes, exact_passes, atol=1e-4)


def test_sliding_passes_count_the_windows_over_each_pixel():
  # Along a side of 10, windows of 4 with stride 3 start at 0, 3, 6.
  protocol = Protocol("slide", (4, 4), 0.75, flip=True)
  scores, passes = infer_one(np.full((10, 4, 3), 255, np.uint8), protocol)
  np.testing.assert_array_equal(passes[:, 0, 0], 2 * np.array([1, 1, 1, 2, 1, 1, 2, 1, 1, 1]))
  np.testing.assert_allclose(scores, np.broadcast_to(passes, scores.shape), atol=1e-6)


def test_images_of_several_sizes_on_one_canvas_keep_apart():
  protocol = Protocol("slide", (8, 8), pad_multiple=30)
  sizes = [(20, 30), (9, 11), (29, 5)]
  images = [
    np.random.default_rng(row).integers(0, 256, (*size, 3), dtype=np.uint8)
    for row, size in enumerate(sizes)
  ]
  assert len({inference.canvas_size(size, protocol) for size in sizes[:2]}) == 1
  canvas = np.zeros((2, 30, 30, 3), np.uint8)
  for row in (0, 1):
    canvas[row, : sizes[row][0], : sizes[row][1]] = images[row]
  together, _ = jax.jit(functools.partial(inference.infer, with_context, protocol=protocol, **RAW))(
    canvas, jnp.array(sizes[:2])
  )
  for row in (0, 1):
    alone, _ = infer_one(images[row], protocol, with_context)
    np.testing.assert_allclose(together[row, : sizes[row][0], : sizes[row][1]], alone, atol=1e-5)


def test_all_problems_of_a_protocol_are_told_at_once():
  with pytest.raises(InputError) as error:
    inference.check_protocol(Protocol("slid", scales=(0.0,), pad_multiple=0))
  assert all(
    text in str(error.value) for text in ("did you mean 'slide'", "scales", "pad_multiple")
  )
  with pytest.raises(InputError, match="window_pixels"):
    inference.check_protocol(Protocol("slide"))


def test_a_protocol_can_be_said_in_words():
  assert (
    inference.describe(Protocol("slide", (512, 512)))
    == "sliding windows of 512x512, stride 342x342, scale 1"
  )
  assert "multiples of 14" in inference.describe(
    Protocol(pad_multiple=14, scales=(0.5, 1), flip=True)
  )


def test_logits_of_another_size_are_refused(image):
  with pytest.raises(InputError, match="resize them"):
    infer_one(image, Protocol(), lambda x: x[:, ::2, ::2])


# Evaluator

SIZES = [(7, 9), (12, 6), (7, 9), (5, 5), (7, 9), (12, 6), (7, 9)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize(
  "protocol",
  [Protocol(), Protocol(pad_multiple=16), Protocol("slide", (8, 8))],
  ids=["whole", "padded", "slide"],
)
def test_every_image_counts_once_whatever_the_batch_size(protocol, batch_size):
  source = FakeSource(SIZES)
  score = evaluator.make_evaluator(
    {"brightest": brightest, "darkest": darkest},
    source,
    CLASSES,
    protocol=protocol,
    batch_size=batch_size,
    **RAW,
  )
  got = score(0.0)
  assert list(got) == ["brightest", "darkest"]
  np.testing.assert_array_equal(got["brightest"].matrix, expected_matrix(source))
  np.testing.assert_array_equal(got["darkest"].matrix, expected_matrix(source, sign=-1))


@pytest.mark.parametrize("batch_size", [1, 11])
@pytest.mark.parametrize(
  "protocol", [Protocol(), Protocol("slide", (5, 5))], ids=["whole", "slide"]
)
def test_eight_devices_say_what_one_says(protocol, batch_size):
  protocol = protocol._replace(pad_multiple=16)
  source = FakeSource(SIZES)
  for devices in (1, 8):
    mesh = mesh_of(devices)
    options = dict(protocol=protocol, batch_size=batch_size, mesh=mesh, **RAW)
    score = evaluator.make_evaluator({"x": brightest}, source, CLASSES, **options)
    assert all(size % devices == 0 for size in score.batch_sizes.values())
    state = jax.device_put(jnp.float32(0.25), NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(score(state)["x"].matrix, expected_matrix(source, 0.25))


def test_it_compiles_once_and_scores_the_state_it_is_given():
  source = FakeSource([(6, 6)] * 5)
  traces = []
  count_traces = lambda state, images: (traces.append(1), brightest(state, images))[1]
  score = evaluator.make_evaluator(
    {"x": count_traces}, source, CLASSES, protocol=Protocol(), batch_size=2, **RAW
  )
  for state in (0.0, 0.5, 2.0):
    np.testing.assert_array_equal(
      score(jnp.float32(state))["x"].matrix, expected_matrix(source, state)
    )
  score.predictions(jnp.float32(0.0), [0, 3, 4])
  assert len(traces) == 1


@pytest.mark.parametrize("devices", [None, 8])
def test_predictions_of_chosen_rows_come_back_in_order_and_at_size(devices):
  source = FakeSource(SIZES)
  source.label = lambda row: pytest.fail("labels are not needed")
  mesh = devices and mesh_of(devices)
  options = dict(protocol=Protocol(pad_multiple=16), batch_size=2, mesh=mesh, **RAW)
  score = evaluator.make_evaluator({"x": brightest}, source, CLASSES, **options)
  rows = [5, 0, 3, 5]
  for row, ids in zip(rows, score.predictions(0.0, rows)["x"], strict=True):
    np.testing.assert_array_equal(ids, source.images[row].argmax(-1))


def test_loading_overlaps_computing():
  source = FakeSource([(4, 4)] * 12)
  load = source.image
  source.image = lambda row: (time.sleep(0.05), load(row))[1]
  slow = lambda state, x: (
    jax.debug.callback(lambda: time.sleep(0.05), ordered=True),
    brightest(state, x),
  )[1]
  score = evaluator.make_evaluator(
    {"x": slow}, source, CLASSES, protocol=Protocol(), batch_size=1, **RAW
  )
  score.predictions(0.0, [0])  # compiles
  start = time.perf_counter()
  score(0.0)
  assert time.perf_counter() - start < 0.9 * 12 * (0.05 + 0.05)


def test_unusable_sources_are_refused_with_all_problems():
  with pytest.raises(InputError) as error:
    evaluator.make_evaluator(
      {}, FakeSource([], has_labels=False), CLASSES, protocol=Protocol(), batch_size=0, **RAW
    )
  assert all(text in str(error.value) for text in ("no labels", "at least one", "batch_size"))


def test_a_bad_file_is_named():
  source = FakeSource([(4, 4)] * 3)

  def broken(row):
    raise InputError("cannot read mask /data/labels/image1.png")

  source.label = broken
  score = evaluator.make_evaluator(
    {"x": brightest}, source, CLASSES, protocol=Protocol(), batch_size=2, **RAW
  )
  with pytest.raises(InputError, match="/data/labels/image1.png"):
    score(0.0)


def test_a_label_of_another_size_is_named():
  source = FakeSource([(4, 4)] * 2)
  source.labels[1] = source.labels[1][:3]
  score = evaluator.make_evaluator(
    {"x": brightest}, source, CLASSES, protocol=Protocol(), batch_size=2, **RAW
  )
  with pytest.raises(InputError, match="image1.*\n.*label"):
    score(0.0)


def test_a_predictor_with_other_classes_is_refused():
  score = evaluator.make_evaluator(
    {"x": lambda state, x: x[..., :2]},
    FakeSource([(4, 4)]),
    CLASSES,
    protocol=Protocol(),
    batch_size=1,
    **RAW,
  )
  with pytest.raises(InputError, match="2 classes"):
    score(0.0)


PROCESS = """
import sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tests import test_evaluate as t
source = t.FakeSource(t.SIZES)
mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
read, image = [], source.image
source.image = lambda row: (read.append(row), image(row))[1]
options = dict(protocol=t.Protocol(pad_multiple=16), batch_size=3, mesh=mesh, **t.RAW)
score = t.evaluator.make_evaluator({"x": t.brightest}, source, t.CLASSES, **options)
state = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), np.float32(0))
np.testing.assert_array_equal(score(state)["x"].matrix, t.expected_matrix(source))
assert 0 < len(read) < len(source), read
for row, ids in zip([5, 0], score.predictions(state, [5, 0])["x"]):
  np.testing.assert_array_equal(ids, source.images[row].argmax(-1))
"""


@pytest.mark.slow
def test_two_processes_read_their_share_and_both_know_the_whole():
  port = str(10000 + os.getpid() % 20000)
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
  }
  root = pathlib.Path(__file__).parent.parent
  options = {"cwd": root, "env": environment, "stderr": subprocess.PIPE, "text": True}
  processes = [
    subprocess.Popen([sys.executable, "-c", PROCESS, str(number), port], **options)
    for number in (0, 1)
  ]
  for process in processes:
    try:
      _, error = process.communicate(timeout=180)
    finally:
      process.kill()
    assert process.returncode == 0, error


# Reports


def two_scores():
  good = confusion.scores([[8, 0, 0], [2, 10, 0], [0, 0, 0]])
  return {"student": good, "teacher": confusion.scores([[8, 0, 0], [1, 11, 0], [0, 0, 0]])}


def test_table_is_aligned_in_percent_with_a_dash_for_what_was_never_seen():
  assert report.table(CLASSES, two_scores()).splitlines() == [
    "IoU %           student  teacher",
    "--------------------------------",
    "red               80.00    88.89",
    "green             83.33    91.67",
    "blue                  -        -",
    "--------------------------------",
    "mean IoU          81.67    90.28",
    "pixel accuracy    90.00    95.00",
  ]


def test_csv_holds_fractions():
  lines = report.csv(CLASSES, two_scores()).splitlines()
  assert lines[0] == "class,student,teacher"
  assert lines[1] == "red,0.800000,0.888889"
  assert lines[3] == "blue,,"
  assert lines[4].startswith("mean IoU,0.816667")


ABOUT = {
  "config": {"path": "c.py", "argument": ""},
  "seed": 0,
  "method": "m",
  "split": "1_8",
  "protocol": "whole images",
}


def test_results_are_read_as_they_were_written(tmp_path):
  last, best = (report.entry(CLASSES, step, two_scores()) for step in (30, 20))
  results = {
    **ABOUT,
    "last": last,
    "best": best | {"selected_by": "mIoU of 'student' on the evaluated images"},
  }
  path = tmp_path / "results.json"
  report.write_results(path, results)
  assert report.read_results(path) == results
  assert results["best"]["predictors"]["teacher"]["iou"] == {
    "red": 8 / 9,
    "green": 11 / 12,
    "blue": None,
  }
  assert list(tmp_path.iterdir()) == [path]


def test_a_score_of_nothing_is_null():
  nothing = report.entry(CLASSES, 1, {"x": confusion.scores(np.zeros((3, 3)))})
  assert nothing["predictors"]["x"]["miou"] is None


def test_damaged_results_are_named(tmp_path):
  path = tmp_path / "results.json"
  for content, message in (("{", "cannot read"), ("{}", "nothing that can be used under config")):
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
      report.read_results(path)
    assert str(path) in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file"
  report.write_atomically(path, "old")
  monkeypatch.setattr(
    pathlib.Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
  )
  with pytest.raises(OSError, match="disk full"):
    report.write_atomically(path, "new")
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# Pictures


def test_colors_and_overlay_by_hand():
  ids = np.array([[0, 2, 255]], np.uint8)
  np.testing.assert_array_equal(
    pictures.colorize(ids, CLASSES), [[[255, 0, 0], [0, 0, 255], [224, 224, 224]]]
  )


def test_overlays_tint_areas_outline_them_and_leave_the_background():
  ids = np.zeros((7, 8), np.uint8)
  ids[1:6, 1:6] = 2
  ids[:, 7] = 255
  gray = np.full((7, 8, 3), 100, np.uint8)
  things = dataclasses.replace(CLASSES, background=True)
  for classes, ground in (
    (things, [100, 100, 100]),
    (dataclasses.replace(CLASSES, background=False), [178, 50, 50]),
  ):
    shown = pictures.overlay(gray, ids, classes, 0.5)
    np.testing.assert_array_equal(shown[3, 3], [50, 50, 178])  # 177.5, half to even
    for row, column in ((1, 1), (1, 3), (3, 1), (5, 5), (3, 5)):
      np.testing.assert_array_equal(shown[row, column], [0, 0, 255])
    np.testing.assert_array_equal(shown[0, 0], ground)
    np.testing.assert_array_equal(shown[3, 7], [162, 162, 162])  # ignored: grey, without an outline
  outlined = np.all(pictures.overlay(gray, ids, things, 0.5) == [0, 0, 255], axis=-1)
  assert (
    outlined.sum() == 16
    and pictures.overlay(gray, np.full((7, 8), 2, np.uint8), things, 0.0).tolist() == gray.tolist()
  )


def test_indexed_pictures_hold_ids_and_show_colors(tmp_path):
  ids = np.array([[0, 2], [1, 1]], np.uint8)
  pictures.indexed(ids, CLASSES).save(tmp_path / "ids.png")
  with Image.open(tmp_path / "ids.png") as read:
    assert read.mode == "P"
    np.testing.assert_array_equal(np.asarray(read), ids)
    np.testing.assert_array_equal(np.asarray(read.convert("RGB")), pictures.colorize(ids, CLASSES))


def test_contact_sheet_shows_every_map_and_the_legend():
  source = FakeSource([(40, 60), (64, 30)])
  predictions = {name: source.labels for name in ("student", "teacher")}
  sheet = pictures.contact_sheet(source.images, source.labels, predictions, CLASSES)
  key = pictures.legend(CLASSES, sheet.width, with_ignored=True)
  assert sheet.width > 4 * 300 and sheet.height > 2 * 300 + key.height
  bottom = np.asarray(sheet)[-key.height - pictures.GAP :][: key.height]
  np.testing.assert_array_equal(bottom, np.asarray(key))
  assert all((np.asarray(key) == color).all(-1).any() for color in CLASSES.palette)


def test_legend_wraps_many_classes():
  many = Classes(
    tuple(f"class{index}" for index in range(40)), tuple((index, 0, 0) for index in range(40))
  )
  narrow, wide = pictures.legend(many, 300), pictures.legend(many, 1200)
  assert narrow.width == 300 and narrow.height > wide.height


def test_curves_draw_what_there_is():
  history = {
    "train/loss": [(1, 2.0), (2, 1.0)],
    "evaluation/a/miou": [(2, 0.5)],
    "train/learning_rate": [(1, 0.1)],
  }
  history["rate/images_per_second"] = [(1, 9.0)]  # in the log, but no curve
  widths = {}
  for name, kept in (("all", list(history)), ("loss", ["train/loss"]), ("none", [])):
    with Image.open(io.BytesIO(pictures.curves({key: history[key] for key in kept}))) as picture:
      widths[name] = picture.width
  assert widths["all"] == 3 * widths["loss"] and widths["none"] == widths["loss"]
  nothing_seen = {
    "evaluation/a/miou": [(2, float("nan"))],
    "evaluation/b/miou": [(2, 0.5), (4, float("nan"))],
  }
  assert pictures.curves(nothing_seen)  # where no evaluated image has a class


# Predictor


def test_predictor_takes_arrays_pictures_and_paths_of_any_size(tmp_path):
  predictor = Predictor(lambda x: x, CLASSES, protocol=Protocol(pad_multiple=8), **RAW)
  for image in FakeSource([(5, 9), (17, 3)]).images:
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    for given in (image, path, str(path), Image.fromarray(image)):
      ids = predictor.predict(given)
      assert ids.dtype == np.uint8
      np.testing.assert_array_equal(ids, image.argmax(-1))
    np.testing.assert_array_equal(
      predictor.overlay(path), pictures.overlay(image, image.argmax(-1), CLASSES)
    )


@pytest.mark.parametrize(
  "protocol", [Protocol(flip=True), Protocol("slide", (4, 4), 0.5)], ids=["flip", "slide"]
)
def test_probabilities_are_those_of_mean_logits(protocol):
  image = FakeSource([(9, 7)]).images[0]
  got = Predictor(lambda x: 5 * x, CLASSES, protocol=protocol, **RAW).probabilities(image)
  np.testing.assert_allclose(got, jax.nn.softmax(5 * (image / 255), axis=-1), atol=1e-5)


def test_weights_are_arguments_of_the_compiled_function_not_part_of_it(monkeypatch):
  weights = jnp.arange(30000.0).reshape(3, 10000)
  lowered, jit = [], jax.jit

  def spying_jit(fn):
    return lambda *args: (lowered.append(jit(fn).lower(*args).as_text()), jit(fn)(*args))[1]

  monkeypatch.setattr(jax, "jit", spying_jit)
  predictor = Predictor(lambda x: x @ weights[:, :3], CLASSES, protocol=Protocol(), **RAW)
  predictor.predict(np.zeros((4, 4, 3), np.uint8))
  assert len(lowered) == 1 and len(lowered[0]) < 30000


def test_a_predictor_compiles_once_for_a_canvas():
  traces = []
  predictor = Predictor(
    lambda x: (traces.append(1), x)[1], CLASSES, protocol=Protocol(pad_multiple=8), **RAW
  )
  for size in ((5, 5), (8, 3), (7, 8)):
    predictor.predict(np.zeros((*size, 3), np.uint8))
  assert len(traces) == 1


@pytest.mark.parametrize(
  "wrong",
  [np.zeros((4, 4, 3), complex), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_wrong_arrays_are_refused(wrong):
  with pytest.raises(InputError, match=r"allowed: \[height, width, 3\] of numbers"):
    read_image(wrong)


def test_gray_and_transparent_images_become_rgb_and_deep_ones_keep_their_levels(tmp_path):
  for mode in ("L", "RGBA", "P"):
    Image.new(mode, (4, 3)).save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png").shape == (3, 4, 3)
  Image.fromarray(np.full((3, 4), 60000, np.uint16)).save(tmp_path / "deep.png")
  deep = read_image(tmp_path / "deep.png")
  assert deep.dtype == np.float32 and deep.shape == (3, 4, 3)
  np.testing.assert_allclose(deep, 60000 / 257)
  with pytest.raises(InputError, match="absent.png"):
    read_image(tmp_path / "absent.png")


# python -m pseudoseg_jax.predict


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A workdir, images of two sizes with a sub-folder, and a `load` that gives the brightest-channel
  predictor.
  """
  (tmp_path / "workdir").mkdir()
  images = FakeSource([(6, 8), (5, 4), (6, 8)]).images
  for name, image in zip(("a.png", "b.png", "deep/c.png"), images, strict=True):
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)

  def load(workdir, predictor=None, checkpoint="best", overrides=None):
    assert workdir == tmp_path / "workdir"
    return Predictor(
      lambda x: x,
      CLASSES,
      protocol=Protocol(),
      name=predictor or "student",
      checkpoint=checkpoint,
      **RAW,
    )

  monkeypatch.setattr(pseudoseg_jax, "load", load, raising=False)
  return tmp_path


def run(folder, *more, images="images", out="out"):
  return predict_cli.main(
    [
      f"--workdir={folder / 'workdir'}",
      f"--images={folder / images}",
      f"--out={folder / out}",
      *more,
    ]
  )


def test_predict_writes_ids_colors_and_overlays_with_sub_folders(folder, capsys):
  assert run(folder) == 0
  for name in ("a", "b", "deep/c"):
    image = read_image(folder / "images" / f"{name}.png")
    expected = image.argmax(-1)
    with Image.open(folder / "out" / "ids" / f"{name}.png") as ids:
      assert ids.mode == "P"
      np.testing.assert_array_equal(np.asarray(ids), expected)
    np.testing.assert_array_equal(
      read_image(folder / "out" / "color" / f"{name}.png"), pictures.colorize(expected, CLASSES)
    )
    np.testing.assert_array_equal(
      read_image(folder / "out" / "overlay" / f"{name}.png"),
      pictures.overlay(image, expected, CLASSES),
    )
  assert (folder / "out" / "legend.png").exists()
  assert "3 images segmented" in capsys.readouterr().out


def test_predict_goes_on_where_it_was_stopped(folder, capsys):
  assert run(folder) == 0
  (folder / "out" / "color" / "b.png").unlink()
  kept = (folder / "out" / "ids" / "a.png").stat().st_mtime_ns
  assert run(folder) == 0
  said = capsys.readouterr().out
  assert (
    "3 images segmented" in said and "1 images segmented" in said and "2 were there already" in said
  )
  assert (folder / "out" / "color" / "b.png").exists()
  assert (folder / "out" / "ids" / "a.png").stat().st_mtime_ns == kept


def test_predict_never_mixes_two_networks_in_a_folder(folder, capsys):
  assert run(folder) == 0
  assert run(folder, "--predictor=teacher", "--checkpoint=last") == 2
  error = capsys.readouterr().err
  assert "predictor: got teacher; allowed: student" in error and "another --out" in error


def test_predict_takes_one_file_and_an_output_folder_among_the_images(folder):
  assert run(folder, images="images/deep/c.png", out="one") == 0
  assert (folder / "one" / "ids" / "c.png").exists()
  for _ in range(2):  # the second time, what the first one wrote is not segmented
    assert run(folder, out="images") == 0
  assert len(list((folder / "images" / "ids").rglob("*.png"))) == 3


def test_predict_tells_all_problems_at_once(folder, capsys):
  (folder / "images" / "a.jpg").write_text("no image")
  (folder / "workdir").rmdir()
  assert run(folder) == 2
  error = capsys.readouterr().err
  assert all(
    text in error
    for text in (
      f"{folder / 'workdir'}, which",
      f"image {folder / 'images' / 'a.jpg'}",
      "outputs 'a.png'",
    )
  )
  assert not (folder / "out").exists()


def test_predict_says_where_there_are_no_images(folder, capsys):
  assert run(folder, images="workdir") == 2
  assert f"{folder / 'workdir'}, which holds no image" in capsys.readouterr().err
  assert run(folder, images="nowhere") == 2
  assert f"{folder / 'nowhere'}, which does not exist" in capsys.readouterr().err


def test_a_truncated_image_is_named_and_the_others_are_done(folder, capsys):
  path = folder / "images" / "b.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
  path.write_bytes(path.read_bytes()[:3000])
  assert run(folder) == 2
  assert str(path) in capsys.readouterr().err
  assert sorted(p.name for p in (folder / "out" / "ids").rglob("*.png")) == ["a.png", "c.png"]


@pytest.mark.parametrize("style", ["whole", "slide"])
def test_many_sizes_are_padded_to_few_canvases(style, capsys):
  protocol = Protocol(style, (4, 4) if style == "slide" else None, pad_multiple=14)
  predictor = Predictor(lambda x: x, CLASSES, protocol=protocol, **RAW)
  sizes = [(20 + 3 * number, 50 + 5 * number) for number in range(40)]
  got = predict_cli.bounded(predictor, sizes)
  assert len({inference.canvas_size(size, got.protocol) for size in sizes}) <= 8
  assert all(side % 14 == 0 for size in sizes for side in inference.canvas_size(size, got.protocol))
  said = capsys.readouterr().out
  assert "40 image sizes" in said and ("stay the same" in said) == (style == "slide")
  assert predict_cli.bounded(predictor, sizes[:3]) is predictor
