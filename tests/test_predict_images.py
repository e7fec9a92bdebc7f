"""What files, pictures and arrays the predictor and the predict command take, and what they say of
others.
"""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

import pseudoseg_jax
from pseudoseg_jax import predict as predict_cli
from pseudoseg_jax.checks import InputError
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.decode import read_any_image as read_image
from pseudoseg_jax.evaluation import pictures
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.evaluation.predictor import Predictor

CLASSES = Classes(("red", "green", "blue"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
TURNS = (2, 3, 4, 5, 6, 7, 8)  # EXIF orientations other than upright


def predictor(channels=3, **options):
  """The brightest channel of every pixel is its class."""
  raw = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "protocol": Protocol()}
  return Predictor(lambda x: x, CLASSES, **raw | options)


@pytest.fixture(scope="module")
def shared_predictor():
  return predictor()  # compiled once a size


def picture(seed=0, size=(5, 8)):
  return np.random.default_rng(seed).integers(20, 256, (*size, 3), dtype=np.uint8)


def save(path, pixels, orientation=1):
  exif = Image.Exif()
  exif[0x0112] = orientation
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, exif=exif)
  return path


def upright(path):
  with Image.open(path) as image:
    return np.asarray(ImageOps.exif_transpose(image))


def message(call):
  with pytest.raises(InputError) as error:
    call()
  return str(error.value)


# Predictor


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_network_sees_files_and_pil_images_upright(tmp_path, suffix, orientation):
  path = save(tmp_path / f"x.{suffix}", picture(), orientation)
  for give in (lambda: path, lambda: str(path), lambda: Image.open(path)):
    np.testing.assert_array_equal(predictor().read(give()), upright(path))
    np.testing.assert_array_equal(predictor(exif_orientation="ignore").read(give()), picture())
  with Image.open(path) as image:
    image.load()  # Pillow turns TIFF files by then
    np.testing.assert_array_equal(predictor().read(image), upright(path))


def test_ids_and_overlay_lie_on_the_upright_picture(tmp_path, shared_predictor):
  path = save(tmp_path / "x.jpg", picture(), 6)
  shown = upright(path)
  for given in (path, Image.open(path)):
    np.testing.assert_array_equal(shared_predictor.predict(given), shown.argmax(-1))
    np.testing.assert_array_equal(
      shared_predictor.overlay(given), pictures.overlay(shown, shown.argmax(-1), CLASSES)
    )
  assert shared_predictor.probabilities(path).shape == (8, 5, 3)


def test_options_are_checked_and_kept():
  assert "did you mean 'apply'" in message(lambda: predictor(exif_orientation="appl"))
  assert "max_value" in message(lambda: predictor(max_value=-1.0))
  made = predictor(
    exif_orientation="ignore", max_value=4095.0, checkpoint="last", step=7, name="teacher"
  )
  other = made.with_options(protocol=Protocol(flip=True))
  assert (other.exif_orientation, other.max_value, other.checkpoint, other.step, other.name) == (
    "ignore",
    4095.0,
    "last",
    7,
    "teacher",
  )
  assert other.protocol.flip and not made.protocol.flip


def test_the_scale_of_files_is_the_one_that_was_said(tmp_path):
  floats = (picture() / 255).astype(np.float32)
  np.save(tmp_path / "x.npy", floats)
  text = message(lambda: predictor().predict(tmp_path / "x.npy"))
  remedy = re.search(r"config\.data\.max_value=(\d+)", text)[1]
  assert remedy == "1"
  np.testing.assert_allclose(
    predictor(max_value=float(remedy)).read(tmp_path / "x.npy"), picture(), atol=1e-3
  )
  # All but black indeed: no second opinion on the way to the network.
  dark = predictor(max_value=255.0)
  assert dark.read(tmp_path / "x.npy").max() <= 1
  np.testing.assert_array_equal(dark.predict(tmp_path / "x.npy"), picture().argmax(-1))
  assert dark.overlay(tmp_path / "x.npy").shape == (5, 8, 3)


def test_deep_pil_images_keep_their_levels():
  deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
  np.testing.assert_allclose(read_image(deep)[0, :, 0], [0, 1, 255])
  np.testing.assert_allclose(read_image(deep, 1, max_value=65535.0)[0, :, 0], [0, 1, 255])
  twelve = Image.fromarray(np.array([[0, 4095]], np.uint16))
  np.testing.assert_allclose(read_image(twelve, max_value=4095.0)[0, :, 0], [0, 255])


@pytest.mark.parametrize(
  "flaw, made, remedy",
  [
    ("0.0", lambda levels: levels / 255, lambda image: 255 * image),
    (
      "NaN",
      lambda levels: np.where(levels == levels.max(), np.nan, levels),
      lambda image: np.nan_to_num(image, nan=0),
    ),
    (
      "0..",
      lambda levels: np.where(levels == levels.min(), 0, levels) * 16,
      lambda image: 255 * image / image.max(),
    ),
    ("-", lambda levels: levels - 128, lambda image: image + 128),
  ],
  ids=["0..1", "nan", "bright", "normalized"],
)
def test_arrays_on_another_scale_are_refused_and_the_remedy_works(
  flaw, made, remedy, shared_predictor
):
  levels = picture().astype(np.float32)
  image = made(levels).astype(np.float32)
  text = message(lambda: shared_predictor.predict(image))
  assert flaw in text and "levels 0..255" in text
  assert shared_predictor.predict(remedy(image).astype(np.float32)).shape == (5, 8)
  np.testing.assert_array_equal(shared_predictor.predict(levels), picture().argmax(-1))


def test_black_arrays_are_taken(shared_predictor):
  assert not shared_predictor.predict(np.zeros((5, 8, 3), np.float32)).any()
  dark = np.full((5, 8, 3), 0.7, np.float32)
  text = message(lambda: shared_predictor.predict(dark))
  assert "255 * image" in text and "np.rint(image).astype(np.uint8)" in text
  assert not shared_predictor.predict(np.rint(dark).astype(np.uint8)).any()


def test_images_of_one_size_may_be_of_eight_bits_and_of_more(shared_predictor):
  for levels in (picture(), picture().astype(np.float32), picture(1)):
    np.testing.assert_array_equal(shared_predictor.predict(levels), levels.argmax(-1))


def test_an_image_beyond_the_memory_of_the_device_is_told(monkeypatch):
  def exhausted(*_):
    raise jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes."
    )

  network = predictor()
  monkeypatch.setattr(network, "_ids", exhausted)
  text = message(lambda: network.predict(picture()))
  assert "5 x 8" in text and "config.evaluation.style=slide" in text


# python -m pseudoseg_jax.predict


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A workdir, two images, and a `load` that gives the brightest-channel predictor."""
  (tmp_path / "workdir").mkdir()
  for number, name in enumerate("ab"):
    save(tmp_path / "images" / f"{name}.png", picture(number))

  def load(workdir, predictor=None, checkpoint="best", overrides=None):
    given = {key.removeprefix("evaluation."): value == "True" for key, value in overrides.items()}
    name = predictor or "student"
    raw = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return Predictor(
      lambda x: x, CLASSES, protocol=Protocol(**given), name=name, checkpoint="last", step=7, **raw
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


def written(folder, kind, name, out="out"):
  with Image.open(folder / out / kind / f"{name}.png") as image:
    return np.asarray(image)


@pytest.mark.parametrize("orientation", [3, 6])
def test_all_that_is_written_lies_on_the_upright_picture(folder, orientation):
  path = save(folder / "images" / "turned.png", picture(2), orientation)
  shown = upright(path)
  assert run(folder) == 0
  np.testing.assert_array_equal(written(folder, "ids", "turned"), shown.argmax(-1))
  np.testing.assert_array_equal(
    written(folder, "color", "turned"), pictures.colorize(shown.argmax(-1), CLASSES)
  )
  np.testing.assert_array_equal(
    written(folder, "overlay", "turned"), pictures.overlay(shown, shown.argmax(-1), CLASSES)
  )
  assert run(folder, "--config.data.exif_orientation=ignore", out="stored") == 0
  np.testing.assert_array_equal(written(folder, "ids", "turned", "stored"), picture(2).argmax(-1))


def test_a_folder_says_how_it_was_made_and_mixes_nothing(folder, capsys):
  assert run(folder, "--config.evaluation.flip=True") == 0
  origin = json.loads((folder / "out" / "predictions.json").read_text())
  assert "flipped too" in origin["protocol"]
  wanted = {
    "checkpoint": "last",
    "step": 7,
    "predictor": "student",
    "exif_orientation": "apply",
    "max_value": 0.0,
  }
  # The checkpoint that was used, not the one that was asked for.
  assert {key: origin[key] for key in wanted} == wanted
  assert run(folder, "--config.evaluation.flip=True") == 0
  for other in ((), ("--config.evaluation.flip=True", "--config.data.exif_orientation=ignore")):
    assert run(folder, *other) == 2
  assert "exif_orientation: got ignore; allowed: apply" in capsys.readouterr().err


def test_only_options_of_prediction_can_be_changed(folder, capsys):
  assert (
    run(folder, "--config.method.weight=1", "--config.data.root=/", "--config.evaluation.flip=True")
    == 2
  )
  error = capsys.readouterr().err
  for part in (
    "config.method.weight: got an option of training",
    "config.data.root",
    "config.evaluation.KEY",
    "config.data.max_value",
  ):
    assert part in error
  assert run(folder, "--config.data.exif_orientation=upright") == 2
  assert "config.data.exif_orientation" in capsys.readouterr().err
  assert run(folder, "--config.data.max_value=white") == 2
  assert "config.data.max_value: got 'white'; allowed: a number" in capsys.readouterr().err
  assert not (folder / "out").exists()


def test_the_remedy_for_another_scale_works_as_it_is_printed(folder, capsys):
  floats = Image.fromarray((picture(3)[..., 0] / 255).astype(np.float32))
  floats.save(folder / "images" / "c.tif")
  assert run(folder) == 2
  captured = capsys.readouterr()
  assert str(folder / "images" / "c.tif") in captured.err and "2 images segmented" in captured.out
  remedy = re.search(r"config\.data\.max_value=1\b", captured.err)[0]
  assert run(folder, f"--{remedy}", images="images/c.tif", out="floats") == 0
  np.testing.assert_allclose(
    written(folder, "overlay", "c", "floats")[..., 1], 0.6 * picture(3)[..., 0], atol=1
  )


def test_unreadable_images_are_told_at_the_end_and_stop_no_other(folder, capsys):
  bad = {
    "empty.png": b"",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\n",
    "page.jpeg": b"<!DOCTYPE html>",
    "cut.png": (folder / "images" / "a.png").read_bytes()[:60],
    "text.tif": b"words",
  }
  for name, content in bad.items():
    (folder / "images" / name).write_bytes(content)
  (folder / "images" / "gone.png").symlink_to(folder / "nowhere.png")
  assert run(folder) == 2
  captured = capsys.readouterr()
  assert "2 images segmented" in captured.out and "the others are done" in captured.err
  for name in (*bad, "gone.png"):
    assert captured.err.count(str(folder / "images" / name)) == 1
  assert all(
    part in captured.err
    for part in ("empty file, 0 bytes", "git lfs pull", "HTML page", "nowhere.png")
  )
  assert sorted(path.name for path in (folder / "out" / "ids").iterdir()) == ["a.png", "b.png"]
  for name in (*bad, "gone.png"):  # the remedy: they are taken away
    (folder / "images" / name).unlink()
  assert run(folder) == 0
  assert "2 were there already" in capsys.readouterr().out


def test_where_no_image_can_be_read_nothing_is_loaded(folder, capsys, monkeypatch):
  for path in (folder / "images").iterdir():
    path.write_bytes(b"")
  monkeypatch.setattr(pseudoseg_jax, "load", lambda *_, **__: pytest.fail("a network was loaded"))
  assert run(folder) == 2
  assert capsys.readouterr().err.count("empty file, 0 bytes") == 2
  assert run(folder, images="images/a.png") == 2
  assert not (folder / "out").exists()


def test_folders_are_listed_as_everywhere(folder, capsys):
  """Links followed and entered once, suffixes in any case, nothing hidden; what else is left out is
  counted.
  """
  save(folder / "elsewhere" / "deep" / "c.png", picture(4)).rename(
    folder / "elsewhere" / "deep" / "c.PNG"
  )
  (folder / "images" / "linked").symlink_to(folder / "elsewhere")
  (folder / "images" / "loop").symlink_to(folder / "images")
  (folder / "images" / "._a.png").write_bytes(b"\0\5\x16\7")
  (folder / "images" / "d.heic").write_bytes(b"words")
  (folder / "images" / "notes.txt").write_bytes(b"words")
  assert run(folder) == 0
  names = sorted(
    path.relative_to(folder / "out" / "ids").as_posix()
    for path in (folder / "out" / "ids").rglob("*.png")
  )
  assert names == ["a.png", "b.png", "linked/deep/c.png"]
  said = capsys.readouterr().out
  assert "1 .heic" in said and "1 .txt" in said


def test_an_output_folder_among_the_images_is_no_input_however_it_is_spelled(folder, monkeypatch):
  monkeypatch.chdir(folder / "images")
  for out in ("out", "../images/out", str(folder / "images" / "out")):
    assert (
      predict_cli.main(
        [f"--workdir={folder / 'workdir'}", f"--images={folder / 'images'}", f"--out={out}"]
      )
      == 0
    )
  assert len(list((folder / "images" / "out" / "ids").rglob("*.png"))) == 2


def test_the_home_folder_may_be_a_tilde(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder))
  assert predict_cli.main(["--workdir=~/workdir", "--images=~/images", "--out=~/out"]) == 0
  assert (folder / "out" / "ids" / "a.png").exists()


def test_images_larger_than_pillow_likes_are_segmented_without_a_warning(
  folder, monkeypatch, recwarn
):
  save(folder / "images" / "large.png", picture(5, (100, 100)))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
  assert run(folder) == 0
  assert not [warning for warning in recwarn if "bomb" in str(warning.message).lower()]


def test_large_images_wait_in_smaller_numbers(folder, monkeypatch):
  monkeypatch.setattr(predict_cli, "_PIXELS_AHEAD", 50)  # one image has 40
  assert run(folder) == 0
  assert len(list((folder / "out" / "ids").iterdir())) == 2


def test_help_says_where_ids_lie(capsys):
  with pytest.raises(SystemExit):
    predict_cli.main(["--help"])
  said = capsys.readouterr().out
  assert (
    "EXIF orientation is applied" in said
    and "--config.evaluation" in said
    and "--config.data.max_value" in said
  )
