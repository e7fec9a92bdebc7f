"""Every data set's config takes training steps on a tiny tree in that data set's official
layout.
"""

import functools
import io
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from pseudoseg_jax import api, build, checks, config as configs, settings
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import pipeline, sources, splits
from pseudoseg_jax.evaluation import inference
from pseudoseg_jax.options import replaced

SIZE = (40, 52)
SMALL = {
  "network.width": 4,
  "views.crop_size": "33,33",
  "batch_size_global.labeled": 8,
  "batch_size_global.unlabeled": 8,
}


def write(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


def write_pair(rng, image, mask, values):
  write(image, rng.integers(0, 256, (*SIZE, 3), np.uint8))
  write(mask, rng.choice(np.asarray(values, np.uint8), SIZE))


def make_voc(root, rng):
  voc = root / "VOCdevkit/VOC2012"
  lists = voc / "ImageSets/Segmentation"
  lists.mkdir(parents=True)
  names = {
    "train_aug": [f"2007_{index:06}" for index in range(16)],
    "val": ["2008_000001", "2008_000002"],
  }
  for name, ids in names.items():
    (lists / f"{name}.txt").write_text("\n".join(ids))
    for image_id in ids:
      folder = "SegmentationClassAug" if name == "train_aug" else "SegmentationClass"
      write_pair(
        rng, voc / f"JPEGImages/{image_id}.jpg", voc / f"{folder}/{image_id}.png", [*range(21), 255]
      )


def make_cityscapes(root, rng):
  for split, cities in {"train": ("aachen", "ulm"), "val": ("bonn",)}.items():
    for city in cities:
      for index in range(8 if split == "train" else 2):
        frame = f"{split}/{city}/{city}_{index:06}_000019"
        image, mask = (
          root / f"leftImg8bit/{frame}_leftImg8bit.png",
          root / f"gtFine/{frame}_gtFine_labelIds.png",
        )
        write_pair(rng, image, mask, range(34))


def make_coco(root, rng):
  for split, count in {"train2017": 16, "val2017": 2}.items():
    for index in range(count):
      name = f"{index + 100 * (split == 'val2017'):012}"
      write_pair(rng, root / f"{split}/{name}.jpg", root / f"masks/{name}.png", [*range(81), 255])


def make_camvid(root, rng):
  for split, count in {"train": 16, "test": 2}.items():
    for index in range(count):
      write_pair(
        rng,
        root / f"images/{split}/f{index:02}.jpg",
        root / f"labels/{split}/f{index:02}.png",
        range(12),
      )


def make_folder(root, rng):
  for index in range(16):
    write_pair(
      rng, root / f"images/p{index:02}.jpg", root / f"masks/p{index:02}.png", (0, 1, 2, 255)
    )
  (root / "classes.txt").write_text("ground\ncat\nhot dog\n")
  (root / "labeled.txt").write_text("p00\nimages/p01.jpg\nimages/p02.jpg masks/p02.png\n")
  (root / "val.txt").write_text("p14\np15\n")


class TinyPets(tfds.core.GeneratorBasedBuilder):
  """The features of oxford_iiit_pet that are read; masks say 1 pet, 2 background, 3 border."""

  VERSION = tfds.core.Version("4.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "species": tfds.features.ClassLabel(names=["Cat", "Dog"]),
      "file_name": tfds.features.Text(),
      "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples("train", 16),
      "test": self._generate_examples("test", 2),
    }

  def _generate_examples(self, split, count):
    rng = np.random.default_rng(0)
    for index in range(count):
      jpeg = io.BytesIO()
      Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(jpeg, "JPEG")
      mask = rng.integers(1, 4, (*SIZE, 1)).astype(np.uint8)
      name = f"{split}_{index}.jpg"
      yield (
        name,
        {
          "image": io.BytesIO(jpeg.getvalue()),
          "species": index % 2,
          "file_name": name,
          "segmentation_mask": mask,
        },
      )


def make_pets(root, rng):
  tfds.builder("tiny_pets", data_dir=root, file_format="array_record").download_and_prepare()


MAKERS = {
  "camvid": make_camvid,
  "cityscapes": make_cityscapes,
  "coco": make_coco,
  "folder": make_folder,
  "pets": make_pets,
  "voc": make_voc,
}
# name -> argument, options, (labeled, unlabeled, evaluated) images, labels that training meets
CASES = {
  "camvid": ("split=1_4", {}, (4, 12, 2), range(11)),
  "cityscapes": ("split=1_4,lists=random", {}, (4, 12, 2), range(19)),
  "coco": ("split=1_4,method=cps", {}, (4, 16, 2), range(81)),
  "folder": ("", {}, (3, 11, 2), range(3)),
  "pets": ("split=1_4", {"data.dataset": "tiny_pets"}, (4, 12, 2), range(3)),
  "voc": ("split=1_4,lists=random", {}, (4, 12, 2), range(21)),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
  """Makes a data set's tree at its first use."""

  @functools.cache
  def made(name):
    root = tmp_path_factory.mktemp(name)
    MAKERS[name](root, np.random.default_rng(0))
    return root

  return made


def unfrozen(name, root, argument="", **overrides):
  argument = ",".join(filter(None, [argument, "network=tiny"]))
  overrides = {"data.root": str(root)} | SMALL | overrides
  return configs.load(f"configs/{name}.py:{argument}", overrides)


def load(*arguments, **overrides):
  return configs.frozen(unfrozen(*arguments, **overrides))


@functools.cache
def shared_method():
  """One method for all data sets, with as many classes as the largest has: one compilation. It is
  shown unlabeled images too.
  """
  config = configs.load("configs/quickstart.py:method=supervised", SMALL)
  method = build.build_method(configs.frozen(config), 81)
  return method._replace(needs=Needs(unlabeled=True, strong_views=1))


@functools.cache
def shared_step():
  return jax.jit(shared_method().step)


@pytest.mark.parametrize("name", MAKERS)
def test_every_data_set_takes_two_steps(trees, name):
  argument, overrides, counts, labels = CASES[name]
  config = load(name, trees(name), argument, **overrides)
  data = build.build_data(config.data)
  assert (len(data.labeled), len(data.unlabeled), len(data.evaluated)) == counts
  assert not data.unlabeled.has_labels
  assert set(np.unique([data.labeled.label(row) for row in range(counts[0])])) <= {*labels, 255}
  config, _ = settings.settle_from(config, data)
  batches = pipeline.train_batches(build.build_pipeline(config, data, shared_method()))
  state = shared_method().init(jax.random.key(0))
  for _ in range(2):
    batch = next(batches)
    state, metrics = shared_step()(state, batch, jax.random.key(1))
  assert np.isfinite(metrics["loss"]) and int(state.step) == 2
  assert batch["unlabeled"]["strong"].shape == (8, 1, 33, 33, 3)


def test_cityscapes_label_ids_are_trained_on_as_the_nineteen_classes(trees):
  data = build.build_data(load("cityscapes", trees("cityscapes"), "split=full").data)
  row = data.labeled.ids.index("ulm/ulm_000003_000019")
  stored = np.asarray(
    Image.open(trees("cityscapes") / "gtFine/train/ulm/ulm_000003_000019_gtFine_labelIds.png")
  )
  assert set(data.labeled.label(row)[stored == 26]) == {13} and set(
    data.labeled.label(row)[stored == 29]
  ) == {255}


def test_cityscapes_masks_of_train_ids_are_refused(trees, tmp_path):
  make_cityscapes(tmp_path, np.random.default_rng(0))
  for path in tmp_path.glob("gtFine/*/*/*.png"):
    write(path, np.full(SIZE, 255, np.uint8))
  with pytest.raises(checks.InputError, match="got 255"):
    build.build_data(load("cityscapes", tmp_path, "split=full").data)


def test_cityscapes_has_the_published_settings():
  config = configs.load("configs/cityscapes.py:method=cps,split=1_16")
  # 128 epochs of 348 steps; the rate and decay that 8 GPUs amounted to. [CPS, official scripts]
  assert (config.total_steps, config.method.weight, config.views.crop_size) == (
    44544,
    6.0,
    (800, 800),
  )
  assert [
    configs.load(f"configs/cityscapes.py:split={split}").total_steps
    for split in ("1_8", "1_4", "1_2")
  ] == [
    44525,
    44640,
    44640,
  ]
  assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (0.02 / 8, 1e-4 * 8)
  assert (config.criterion.name, config.criterion.min_kept) == ("ohem", 50_000)
  protocol = build.build_protocol(configs.frozen(config))
  assert protocol == inference.PRESETS["cps_cityscapes"]
  assert config.data.split == "cityscapes/cps/1_16"
  protocol = build.build_protocol(configs.frozen(configs.load("configs/voc.py")))
  assert protocol == inference.PRESETS["cps_voc"]


def test_voc_names_the_published_list_that_a_split_has():
  def split(argument):
    return configs.load(f"configs/voc.py:{argument}").data.split

  assert split("split=183") == "voc2012/pseudoseg/183" and split("split=1_16") == "voc2012/cps/1_16"
  assert (
    split("split=1_16,lists=u2pl") == "voc2012/u2pl/1_16"
    and split("split=1_16,lists=random") == "1_16"
  )


def lists(tree, **options):
  """The ids of each role, of configs/folder.py with other options."""
  data = build.build_data(
    load("folder", tree, **{f"data.{name}": value for name, value in options.items()}).data
  )
  return tuple(set(getattr(data, role).ids) for role in ("labeled", "unlabeled", "evaluated"))


def ids(*numbers):
  return {f"p{number:02}" for number in numbers}


def test_images_on_no_list_are_unlabeled_and_evaluated_ones_are_not(trees):
  assert lists(trees("folder")) == (ids(0, 1, 2), ids(*range(3, 14)), ids(14, 15))
  labeled, unlabeled, _ = lists(trees("folder"), split="1_2")
  assert len(labeled) == 7 and labeled | unlabeled == ids(*range(14)) and not labeled & unlabeled
  assert (
    lists(trees("folder"), split="1_4")[0]
    < labeled
    != lists(trees("folder"), split="1_2", split_seed="1")[0]
  )
  everything = ids(*range(14))
  assert lists(trees("folder"), split="full")[:2] == (everything, everything)


def test_lists_of_pairs_alone_are_enough(trees, tmp_path):
  tree = trees("folder")
  for name, numbers in {"train": range(8), "labeled": range(2), "val": (14, 15)}.items():
    (tmp_path / f"{name}.txt").write_text(
      "".join(f"images/p{number:02}.jpg masks/p{number:02}.png\n" for number in numbers)
    )
  paths = {
    "train_list": tmp_path / "train.txt",
    "split": tmp_path / "labeled.txt",
    "eval_list": tmp_path / "val.txt",
  }
  labeled, unlabeled, evaluated = lists(
    tree, image_pattern="", label_pattern="", **{name: str(path) for name, path in paths.items()}
  )
  assert (
    labeled == {"images/p00", "images/p01"}
    and len(unlabeled) == 6
    and evaluated == {"images/p14", "images/p15"}
  )


def test_a_list_s_own_mask_comes_before_the_pattern_s_and_the_training_list_s_image_fills_in(
  trees, tmp_path
):
  make_folder(tmp_path, np.random.default_rng(0))
  write(tmp_path / "refined/p00.png", np.full(SIZE, 2, np.uint8))
  (tmp_path / "labeled.txt").write_text(
    "elsewhere/p00.jpg refined/p00.png\nelsewhere/p01.jpg refined/p01.png\n"
  )
  labeled = build.build_data(load("folder", tmp_path).data).labeled
  assert [labeled.label_path(row).parent.name for row in (0, 1)] == ["refined", "masks"]
  assert labeled.image_path(0) == tmp_path / "images/p00.jpg" and np.all(labeled.label(0) == 2)


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"root": "/nowhere"}, ["config.data.root", "/nowhere"]),
    ({"classes": ""}, ["config.data.classes", "one a line", "voc"]),
    ({"classes": "names.txt"}, ["names.txt"]),
    ({"image_pattern": "images/{id}.png"}, ["images/{id}.png", "images holds p00.jpg"]),
    ({"image_pattern": "images"}, ["{id}"]),
    (
      {"label_pattern": "masks/{id}.tif"},
      ["labeled.txt", "3 of 3 label files absent", "'masks/{id}.png'", "val.txt"],
    ),
    ({"split": "labelled.txt"}, ["config.data.split", "did you mean 'labeled.txt'"]),
    (
      {"split": "voc2012/pseudoseg/92"},
      ["92 of 92 images that are no training images", "2007_000733", "'p00'"],
    ),
    ({"split": "val.txt"}, ["labeled and evaluated", "p14, p15"]),
    ({"eval_list": ""}, ["training images would be evaluated", "eval_list"]),
    ({"eval_list": "no.txt"}, ["no.txt"]),
    ({"label_map": "2:3"}, ["{2: 3}", "0..2"]),
    ({"mask_colors": "True", "classes": "voc"}, ["masks/p00.png", "colors", "pixels"]),
    ({"channels": "1"}, ["images/p00.jpg", "3 channels", "config.data.channels"]),
    ({"image_pattern": "", "label_pattern": ""}, ["train_list"]),
  ],
)
def test_wrong_options_are_told_before_training(trees, options, said):
  with pytest.raises(checks.InputError) as error:
    lists(trees("folder"), **options)
  assert all(part in str(error.value) for part in said), error.value


def test_masks_of_0_and_255_for_two_classes_are_noticed(trees, tmp_path):
  make_folder(tmp_path, np.random.default_rng(0))
  for path in tmp_path.glob("masks/*"):
    write(path, np.where(np.asarray(Image.open(path)) == 1, 255, 0).astype(np.uint8))
  (tmp_path / "classes.txt").write_text("ground\nthing\n")
  with pytest.raises(checks.InputError, match="label_map=255:1"):
    lists(tmp_path)
  for label_map in ("255:1", "255:255"):
    lists(tmp_path, label_map=label_map)


def test_normalization_must_fit_the_channels(trees):
  config = load("folder", trees("folder"), **{"data.channels": "1"})
  with pytest.raises(
    checks.InputError,
    match="config.data.mean: got 3 values; allowed: one for each of the 1 channels",
  ):
    build.check_run(config)
  build.check_run(replaced(config, {"data.mean": (0.5,), "data.std": (0.25,)}))


def test_unchecked_data_open_with_files_missing(trees, tmp_path):
  make_folder(tmp_path, np.random.default_rng(0))
  (tmp_path / "masks/p01.png").unlink()
  (tmp_path / "images/p14.jpg").write_bytes(b"broken")
  data = build.build_data(load("folder", tmp_path).data, check=False)
  with pytest.raises(checks.InputError, match="masks/p01.png"):
    data.labeled.label(1)


def test_boxes_of_an_option_reach_the_batches(trees, tmp_path):
  for index in range(14):
    box = "<bndbox><xmin>14</xmin><ymin>1</ymin><xmax>26</xmax><ymax>20</ymax></bndbox>"
    size = f"<size><width>{SIZE[1]}</width><height>{SIZE[0]}</height></size>"
    (tmp_path / f"p{index:02}.xml").write_text(
      f"<annotation>{size}<object><name>cat</name>{box}</object></annotation>"
    )
  method = shared_method()._replace(needs=Needs(weak_label="boxes"))
  config = load("folder", trees("folder"), **{"data.boxes": str(tmp_path)})
  data = build.build_data(config.data)
  config, _ = settings.settle_from(config, data)
  spec = build.build_pipeline(config, data, method)
  np.testing.assert_allclose(spec.unlabeled_boxes[0], [[1, 0, 13 / 52, 20 / 40, 26 / 52]])
  assert spec.labeled_boxes.shape == (3, 1, 5) and spec.unlabeled_boxes.shape == (11, 1, 5)
  with pytest.raises(checks.InputError, match="config.data.boxes"):
    config = replaced(config, {"data.boxes": ""})
    build.build_pipeline(config, build.build_data(config.data), method)


@pytest.mark.slow
def test_a_run_leaves_lists_that_load_as_the_same_images(trees, tmp_path):
  tree, tiny = (
    trees("folder"),
    {"total_steps": 1, "evaluation.batch_size": 8, "evaluation.pictures": 1},
  )
  config = unfrozen("folder", tree, "method=supervised", **tiny)
  config.evaluation.update({"style": "whole", "pad_multiple": 1})
  api.train(config, tmp_path)
  for role, expected in zip(("labeled", "unlabeled", "evaluated"), lists(tree), strict=True):
    path = tmp_path / "lists" / f"{role}.txt"
    assert {
      entry.id for entry in sources.read_entries(tree, path, "images/{id}.jpg", "masks/{id}.png")
    } == expected
    assert len(splits.read_list(path)) == len(expected)
  assert (
    json.loads((tmp_path / "results.json").read_text())["split"]
    == "labeled.txt: 3 labeled, 11 unlabeled"
  )
