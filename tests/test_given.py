"""Data from Python: images as arrays of any type, PIL images and paths, and configs without a
file.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pseudoseg_jax
from pseudoseg_jax import build, checks, config as configs
from pseudoseg_jax.data import decode, synthetic
from pseudoseg_jax.data.given import GivenImages

NAMES = ("background", "leaf", "stem")
SIZE = (24, 30)


def picture(seed=0, channels=3, size=SIZE):
  return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def mask(seed=0, size=SIZE):
  return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), size)


def message(call):
  with pytest.raises(checks.InputError) as caught:
    call()
  return str(caught.value)


def made(images, masks, **options):
  evaluated = options.pop("evaluated", ([picture(90)], [mask(90)]))
  return pseudoseg_jax.make_data(
    images, masks, options.pop("classes", NAMES), evaluated=evaluated, **options
  )


# --- images ---------------------------------------------------------------------------------------

INTEGERS = [np.uint8, np.uint16, np.uint32, np.uint64, np.int16, np.int32, np.int64]
FLOATS = [np.float16, np.float32, np.float64]


@pytest.mark.parametrize(
  "dtype", [*INTEGERS, *FLOATS, jnp.bfloat16], ids=lambda dtype: np.dtype(dtype).name
)
def test_levels_are_the_same_in_arrays_of_any_type(dtype):
  levels = picture() // 2 * 2 if dtype is jnp.bfloat16 else picture()
  levels = levels.clip(0, 128) if dtype is jnp.bfloat16 else levels  # which holds these exactly
  got = decode.read_array(levels.astype(dtype))
  assert got.dtype == (np.uint8 if np.dtype(dtype).kind in "ui" else np.float32)
  np.testing.assert_array_equal(got, levels)


@pytest.mark.parametrize(
  "dtype, full",
  [(np.float64, 1), (np.float32, 1), (np.float16, 1), (np.uint16, 65535), (np.int32, 4095)],
)
def test_another_scale_is_refused_until_it_is_said(dtype, full):
  share = np.linspace(0, 1, np.prod(SIZE) * 3).reshape(*SIZE, 3)
  stored = (share * full).astype(dtype)
  text = message(lambda: decode.read_array(stored))
  assert f"max_value={full}" in text and "levels 0..255" in text
  np.testing.assert_allclose(
    decode.read_array(stored, max_value=full), 255 * share, atol=255 / full if full > 255 else 0.15
  )


def test_an_array_of_jax_black_and_white_and_grey_are_images():
  np.testing.assert_array_equal(decode.read_array(jnp.asarray(picture())), picture())
  white = picture()[..., 0] > 127
  np.testing.assert_array_equal(
    decode.read_array(white), np.repeat(white[..., None] * np.uint8(255), 3, -1)
  )
  grey = picture()[..., :1]
  for image in (grey, grey[..., 0]):
    np.testing.assert_array_equal(decode.read_array(image), np.repeat(grey, 3, -1))
    np.testing.assert_array_equal(decode.read_array(image, 1), grey)
  assert not decode.read_array(np.zeros((*SIZE, 3))).any()  # black is no other scale


@pytest.mark.parametrize(
  "image, remedy",
  [
    (np.moveaxis(picture(), -1, 0), lambda image: np.moveaxis(image, 0, -1)),
    (picture(channels=4), lambda image: image[..., :3]),
  ],
  ids=["channels first", "alpha"],
)
def test_an_array_of_another_shape_is_refused_and_the_remedy_works(image, remedy):
  text = message(lambda: decode.read_array(image))
  assert str(image.shape) in text and (
    "np.moveaxis(image, 0, -1)" in text or "image[..., :3]" in text
  )
  assert decode.read_array(remedy(image)).shape == (*SIZE, 3)


@pytest.mark.parametrize(
  "image",
  [np.array("text"), np.zeros((0, 3, 3)), np.zeros(5), np.array([None]), np.zeros((2, 4, 5, 3))],
)
def test_what_is_no_image_is_refused(image):
  assert "[height, width, 3]" in message(lambda: decode.read_array(image))


# --- data -----------------------------------------------------------------------------------------


def forms(tmp_path):
  """The same image and mask as arrays, PIL images and paths."""
  Image.fromarray(picture()).save(tmp_path / "image.png")
  Image.fromarray(mask()).save(tmp_path / "mask.png")
  palette = Image.fromarray(mask())
  palette.putpalette(list(range(256)) * 3)
  return {
    "arrays": (picture(), mask()),
    "wide": (picture().astype(np.float64), mask().astype(np.int64)),
    "PIL": (Image.fromarray(picture()), palette),
    "paths": (tmp_path / "image.png", str(tmp_path / "mask.png")),
    "mixed": (str(tmp_path / "image.png"), mask()[..., None]),
  }


@pytest.mark.parametrize("form", ["arrays", "wide", "PIL", "paths", "mixed"])
def test_all_forms_of_an_image_and_its_mask_are_the_same(form, tmp_path):
  image, truth = forms(tmp_path)[form]
  data = made([image, picture(1), picture(2)], [truth, None, mask(2)])
  np.testing.assert_array_equal(data.labeled.image(0), picture())
  np.testing.assert_array_equal(data.labeled.label(0), mask())
  assert data.labeled.size(0) == SIZE and data.labeled.label(0).dtype == np.uint8
  assert len(data.labeled) == 2 and len(data.unlabeled) == 1 and data.classes.names == NAMES
  np.testing.assert_array_equal(data.unlabeled.image(0), picture(1))


def test_one_array_holds_several_images_and_further_unlabeled_ones_come_last():
  images, masks = np.stack([picture(0), picture(1)]), np.stack([mask(0), mask(1)])
  data = made(
    images, masks, unlabeled=np.stack([picture(2)]), evaluated=(images[:1] + np.uint8(1), masks[:1])
  )
  assert [len(role) for role in (data.labeled, data.unlabeled, data.evaluated)] == [2, 1, 1]
  alone = made(images, masks)
  # as with folders at split=full.
  assert alone.unlabeled.ids == alone.labeled.ids and not alone.unlabeled.has_labels


def test_label_map_and_background_are_those_of_folders():
  stored = mask().astype(int)
  stored[stored == 2] = 11
  data = made([picture()], [stored], label_map={11: 2}, classes=("a", "b", "c"), background="yes")
  np.testing.assert_array_equal(data.labeled.label(0), mask())
  assert data.classes.background_index == 0


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
  (tmp_path / "broken.png").write_bytes(b"no image")
  wrong = mask().astype(int)
  wrong[0, 0] = -1
  text = message(
    lambda: made(
      [
        picture(0),
        picture(1).astype(float) / 255,
        picture(2),
        tmp_path / "absent.png",
        tmp_path / "broken.png",
        picture(3),
      ],
      [wrong, mask(1), mask(2, (5, 6)), None, None, mask(3) + 0.5],
      evaluated=([picture(4)], [np.zeros((*SIZE, 3))]),
    )
  )
  for part in (
    "labeled_00000",
    "the values -1",
    "label_map={-1: 255}",
    "labeled_00001",
    "max_value=1",
    "labeled_00002",
    "5 x 6",
    "24 x 30",
    "absent.png",
    "broken.png",
    "with fractions",
    "mask of evaluated_00000",
    "np.argmax(mask, axis=-1)",
  ):
    assert part in text, part


def test_the_remedy_for_values_that_are_no_class_works():
  wrong = mask().astype(int)
  wrong[0, 0] = -1
  assert made([picture()], [wrong], label_map={-1: 255}).labeled.label(0)[0, 0] == 255


@pytest.mark.parametrize("form", ["arrays", "PIL", "paths"])
def test_images_that_are_learned_from_are_not_evaluated(form, tmp_path):
  image, truth = forms(tmp_path)[form]
  assert "learned from" in message(
    lambda: made([image, picture(1)], [truth, None], evaluated=([image], [truth]))
  )


def test_what_is_missing_is_told(tmp_path):
  assert "0 for 1 images" in message(lambda: made([picture()], []))
  assert "got none" in message(lambda: made([picture()], [None]))
  assert "at least two" in message(lambda: made([picture()], [mask() * 0], classes=["leaf"]))
  assert "more than once" in message(
    lambda: made([forms(tmp_path)["paths"][0]] * 2, [mask(), mask()])
  )
  assert "None" in message(lambda: GivenImages([picture()], [None], num_classes=3))


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
  drawn = synthetic.SyntheticScenes(16, (32, 32), seed=0)
  return [drawn.image(row) for row in range(16)], [drawn.label(row) for row in range(16)]


def scene_data(scenes, **changes):
  images, masks = scenes
  images = changes.get("images", images)
  return pseudoseg_jax.make_data(
    images[:12],
    [*masks[:4], *[None] * 8],
    synthetic.CLASSES.names,
    evaluated=(images[12:], masks[12:]),
  )


TINY = {
  "network.width": 4,
  "log_every_steps": 1,
  "eval_every_steps": 2,
  "evaluation.style": "whole",
  "evaluation.pictures": 0,
  "batch_size_global.labeled": 8,
  "batch_size_global.unlabeled": 8,
}


def tiny(method="supervised", **overrides):
  return configs.make_config(method, network="tiny", crop=17, steps=2, overrides=TINY | overrides)


@pytest.mark.slow
def test_a_run_on_given_images_resumes_with_the_same_ones_only(scenes, tmp_path, capsys):
  data = scene_data(scenes)
  config = tiny()
  results = pseudoseg_jax.train(config, tmp_path / "w", data=data)
  assert (
    results["finished"]
    and json.loads((tmp_path / "w" / "config.json").read_text())["data"]["name"] == "given"
  )
  assert "4 labeled, 8 unlabeled" in results["split"]
  again = pseudoseg_jax.train(config, tmp_path / "w", {"total_steps": 3}, data=data)
  assert again["last"]["step"] == 3
  changed = [image.copy() for image in scenes[0]]
  changed[0][0, 0] += 1
  assert "labeled images" in message(
    lambda: pseudoseg_jax.train(
      config, tmp_path / "w", {"total_steps": 4}, data=scene_data(scenes, images=changed)
    )
  )
  text = message(lambda: pseudoseg_jax.train(config, tmp_path / "w"))
  assert "given from Python" in text and "`data` of pseudoseg_jax.train" in text
  scores = pseudoseg_jax.evaluate(tmp_path / "w", checkpoint="last", data=data)
  assert {name: score.miou for name, score in scores.items()} == pytest.approx(
    {name: found["miou"] for name, found in again["last"]["predictors"].items()}
  )
  assert not (tmp_path / "w" / "evaluations").exists()
  assert "given from Python" in message(lambda: pseudoseg_jax.evaluate(tmp_path / "w"))
  ids = pseudoseg_jax.load(tmp_path / "w").predict(scenes[0][0])
  # The caller's config stays.
  assert ids.shape == (32, 32) and config.data.name == "given" and config.total_steps == 2


def test_given_images_take_the_place_of_those_of_a_config_file_and_bring_their_scale_and_channels(
  scenes, tmp_path
):
  images, masks = [image[..., :1] / 255 for image in scenes[0]], scenes[1]
  data = pseudoseg_jax.make_data(
    images[:4],
    masks[:4],
    synthetic.CLASSES.names,
    evaluated=(images[4:6], masks[4:6]),
    channels=1,
    max_value=1.0,
  )
  overrides = TINY | {"total_steps": 1, "views.crop_size": (17, 17)}
  results = pseudoseg_jax.train(
    "configs/quickstart.py:method=supervised", tmp_path / "w", overrides, data=data
  )
  assert "4 labeled" in results["split"] and results["config"]["path"] == "configs/quickstart.py"
  predictor = pseudoseg_jax.load(tmp_path / "w")
  assert predictor.max_value == 1.0 and predictor.channels == 1
  levels = predictor.with_options(max_value=0.0)
  np.testing.assert_array_equal(predictor.predict(images[0]), levels.predict(scenes[0][0][..., :1]))
  text = message(lambda: pseudoseg_jax.evaluate(tmp_path / "w", data=scene_data(scenes)))
  assert "channels of the images: got 3; allowed: 1" in text


def test_a_method_that_wants_weak_labels_says_so(scenes, tmp_path):
  config = tiny("pseudoseg")
  text = message(
    lambda: pseudoseg_jax.train(
      config, tmp_path / "w", {"method.image_labels": True}, data=scene_data(scenes)
    )
  )
  assert "config.data.image_labels" in text


# --- configs --------------------------------------------------------------------------------------


def test_a_config_without_a_file_is_that_of_a_folder():
  data = configs.load("configs/folder.py").data.to_dict()
  ours = configs.make_config(
    "cps_cutmix", data={name: value for name, value in data.items() if name not in ("mean", "std")}
  )
  assert configs.differences(ours, configs.load("configs/folder.py")) == []
  assert (
    configs.make_config("cps", backbone="resnet18", overrides={"method.weight": 0.5}).method.weight
    == 0.5
  )
  assert "did you mean 'cps'" in message(lambda: configs.make_config("cpss"))


def test_config_files_are_found_wherever_one_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert configs.load("configs/quickstart.py:method=cps").method.name == "cps"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart.py").write_text(
    "from pseudoseg_jax import config as configs\ndef get_config(argument=''):\n  return configs.make_config('ict')\n"
  )
  assert configs.load("configs/quickstart.py").method.name == "ict"  # the user's own comes first
  assert "no such config" in message(lambda: configs.load("configs/absent.py"))
  assert "no such config" in message(lambda: configs.load("quikstart.py"))


def test_every_package_is_installed():
  import tomllib

  root = pathlib.Path(build.__file__).parents[1]
  settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
  folders = {
    ".".join(path.parent.relative_to(root).parts) for path in (root / "pseudoseg_jax").rglob("*.py")
  }
  assert set(settings["packages"]) == folders | {"pseudoseg_jax.configs"}
  assert settings["package-dir"]["pseudoseg_jax.configs"] == "configs"
