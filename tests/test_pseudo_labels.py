"""Labels that a network made, learned from as if they were true ones."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import build, checks, config as configs, workdir as workdirs
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import pipeline, sources, synthetic

NAMES = synthetic.CLASSES.names


def write_labels(folder, ids, value=3, size=(64, 64), **changes):
  """A folder as `export_labels` leaves it."""
  for name in ids:
    path = folder / f"labels/{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
  (folder / "list.txt").write_text("".join(f"{name}\n" for name in ids))
  (folder / "manifest.json").write_text(
    json.dumps({"finished": True, "classes": dict.fromkeys(NAMES, {}), **changes})
  )
  return folder


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


def load(folder, **overrides):
  """Twenty scenes, six of them labeled."""
  small = {
    "data.num_scenes": 20,
    "data.num_labeled": 6,
    "data.num_eval_scenes": 8,
    "pseudo_labels.folder": str(folder),
  }
  return configs.load("configs/quickstart.py:method=supervised", small | overrides)


def scene_ids(*rows):
  return [f"scene_{row:06d}" for row in rows]


def opened(config):
  """The data, and what training batches are made of."""
  config = configs.frozen(config)
  (domain,) = build.build_domains(config)
  return domain.data, build.build_pipeline(
    config, domain.data, build.build_method(config, len(NAMES))
  )


def test_labels_stand_beside_the_images_of_their_source(tmp_path):
  scenes = synthetic.SyntheticScenes(4, (32, 40))
  folder = write_labels(tmp_path, scene_ids(1, 2, 3), size=(32, 40))
  found = sources.PseudoLabels(scenes, folder, NAMES, scene_ids(2, 1))
  assert (
    found.ids == tuple(scene_ids(2, 1))
    and found.has_labels
    and len(found) == 2
    and found.size(0) == (32, 40)
  )
  np.testing.assert_array_equal(found.image(0), scenes.image(2))
  assert np.all(found.label(0) == 3)


def test_what_is_wrong_with_labels_is_told_together(tmp_path):
  scenes = synthetic.SyntheticScenes(4, (32, 40))
  folder = write_labels(tmp_path, scene_ids(0, 1, 2), size=(32, 40))
  (tmp_path / "labels/scene_000000.png").unlink()
  (tmp_path / "labels/scene_000001.png").unlink()
  told = message(lambda: sources.PseudoLabels(scenes, folder, NAMES, scene_ids(0, 1, 2)))
  assert "2 of 3" in told and str(tmp_path / "labels/scene_000001.png") in told
  write_labels(tmp_path, scene_ids(0, 1, 2), size=(40, 32))
  told = message(lambda: sources.PseudoLabels(scenes, folder, NAMES, scene_ids(0, 1, 2)))
  assert told.count("got height x width 40 x 32; allowed: 32 x 40, as its image") == 3


def test_labels_of_no_class_are_told_when_they_are_read(tmp_path):
  scenes = synthetic.SyntheticScenes(1, (32, 40))
  found = sources.PseudoLabels(
    scenes, write_labels(tmp_path, scenes.ids, value=7, size=(32, 40)), NAMES
  )
  assert "7 on 1280 pixels" in message(lambda: found.label(0))
  write_labels(tmp_path, scenes.ids, value=255, size=(32, 40))
  assert np.all(found.label(0) == 255)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda folder: (folder / "manifest.json").unlink(), "did not finish"),
    (
      lambda folder: (folder / "manifest.json").write_text('{"finished": false, "classes": {}}'),
      "did not finish",
    ),
    (
      lambda folder: (folder / "manifest.json").write_text(
        '{"finished": true, "classes": {"cat": 1}}'
      ),
      "of the classes cat",
    ),
    (lambda folder: (folder / "manifest.json").write_text("{"), "JSONDecodeError"),
    (
      lambda folder: (folder / "list.txt").write_text("elsewhere\n"),
      "1 of 1 images that are not among the training",
    ),
    (
      lambda folder: (folder / "list.txt").write_text("scene_000000\n"),
      "only images that have true labels",
    ),
    (lambda folder: folder.rename(folder.parent / "moved"), "no such folder of labels"),
  ],
)
def test_folders_that_cannot_be_used_are_refused_before_training(tmp_path, change, said):
  folder = write_labels(tmp_path / "exported", scene_ids(8, 9))
  change(folder)
  assert said in message(lambda: build.build_domains(configs.frozen(load(folder))))


def test_true_labels_win_and_labeled_images_can_be_repeated_to_be_half(tmp_path):
  folder = write_labels(tmp_path, scene_ids(*range(20)))  # of labeled images too
  data, spec = opened(load(folder))
  assert data.labeled.ids == tuple(scene_ids(*range(6))) and data.unlabeled.ids == tuple(
    scene_ids(*range(6, 20))
  )
  assert data.pseudo_labeled.ids == data.unlabeled.ids and data.split.endswith(
    "synthetic scenes + 14 pseudo labels"
  )
  assert spec.labeled.ids == (*data.labeled.ids, *data.unlabeled.ids)
  np.testing.assert_array_equal(spec.labeled.label(5), data.labeled.label(5))
  assert np.all(spec.labeled.label(6) == 3) and np.any(data.labeled.label(5) != 3)

  _, spec = opened(load(folder, **{"pseudo_labels.repeat_labeled": "True"}))
  assert len(spec.labeled) == 3 * 6 + 14  # ceil(14 / 6) = 3
  for row, name in enumerate(spec.labeled.ids[:18]):
    assert name == scene_ids(row % 6)[0] and np.any(spec.labeled.label(row) != 3)


def test_a_list_says_which_of_the_labels_count(tmp_path):
  folder = write_labels(tmp_path / "exported", scene_ids(*range(6, 20)))
  (tmp_path / "reliable.txt").write_text("scene_000019\nscene_000007\n")
  data, _ = opened(load(folder, **{"pseudo_labels.list": str(tmp_path / "reliable.txt")}))
  assert data.pseudo_labeled.ids == tuple(scene_ids(19, 7)) and len(data.unlabeled) == 14


def test_only_every_nth_labeled_image_is_used_and_the_others_are_not_unlabeled():
  data, spec = opened(load("", labeled_every=2))
  assert spec.labeled.ids == tuple(scene_ids(0, 2, 4)) and len(data.unlabeled) == 14
  assert data.split.endswith("; labeled_every 2: 3 labeled") and data.pseudo_labeled is None
  assert "config.labeled_every: got 0" in message(lambda: configs.frozen(load("", labeled_every=0)))


def make_folder(root):
  """Two labeled images, and a bare folder of two more, one of them with a labeled one's name."""
  rng = np.random.default_rng(0)
  for path in ("images/a.jpg", "images/b.jpg", "more/a.png", "more/new/c.jpg", "val/v.jpg"):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(root / path)
  for name in ("a", "b", "v"):
    (root / "masks").mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 7, (64, 64)).astype(np.uint8)).save(root / f"masks/{name}.png")
  (root / "classes.txt").write_text("\n".join(NAMES))
  return configs.folder_data(
    root=str(root),
    classes="classes.txt",
    image_pattern="images/{id}.jpg",
    label_pattern="masks/{id}.png",
    eval_image_pattern="val/{id}.jpg",
    unlabeled_folder="more",
  )


def test_images_of_a_bare_folder_are_found_without_their_endings(tmp_path):
  config = load(write_labels(tmp_path / "exported", ("a", "new/c")))
  config.data.unlock()
  config.data = configs.ConfigDict(
    make_folder(tmp_path) | {"mean": config.data.mean, "std": config.data.std}
  )
  data, spec = opened(config)
  assert data.pseudo_labeled.ids == ("a.png", "new/c.jpg") and spec.labeled.ids == (
    "a",
    "b",
    "a.png",
    "new/c.jpg",
  )
  assert np.all(spec.labeled.label(3) == 3) and np.any(spec.labeled.label(0) != 3)
  workdirs.write_lists(tmp_path, data)  # as a run's lists
  assert (tmp_path / "labeled.txt").read_text() == "a\nb\n"
  # Which may say again what counts.
  config.pseudo_labels.list = str(tmp_path / "pseudo_labeled.txt")
  assert opened(config)[0].pseudo_labeled.ids == ("a.png", "new/c.jpg")


class Untouchable:
  """Scenes whose masks must not be asked for."""

  def __init__(self, scenes):
    self.ids, self.image, self.size, self.has_labels = scenes.ids, scenes.image, scenes.size, True
    self.channels, self.dtype = scenes.channels, scenes.dtype

  def __len__(self):
    return len(self.ids)

  def label(self, row):
    raise AssertionError("the mask of an unlabeled image was opened")


def labeled_too(**changes):
  """A batch of twelve whole scenes, of which three are labeled and also among the unlabeled
  ones.
  """
  scenes = synthetic.SyntheticScenes(12, (40, 40))
  options = dict(
    labeled=sources.Subset(scenes, scenes.ids[:3]),
    unlabeled=Untouchable(scenes),
    batch_size_labeled_global=2,
    batch_size_unlabeled_global=12,
    geometry=pipeline.Geometry((40, 40), scales=(1.0,), flip=False, convention="pillow"),
    needs=Needs(labeled_too=True, weak_label="image"),
    mean=(0,) * 3,
    std=(1,) * 3,
    unlabeled_image_labels=np.full((12, 7), 0.5, np.float32)
    + np.arange(12, dtype=np.float32)[:, None],
  )
  spec = pipeline.PipelineSpec(**options | changes)
  return scenes, next(itertools.islice(pipeline.train_batches(spec), 1))["unlabeled"]


def row_of(scenes, image):
  return next(
    row for row in range(len(scenes)) if np.array_equal(np.rint(image * 255), scenes.image(row))
  )


def test_labeled_images_are_drawn_once_among_the_unlabeled_ones_with_their_masks():
  scenes, batch = labeled_too()
  rows = [row_of(scenes, image) for image in batch["weak"]]
  assert sorted(rows) == list(range(12))
  for row, label, image_label in zip(rows, batch["label"], batch["image_label"], strict=True):
    if row < 3:
      np.testing.assert_array_equal(label, scenes.label(row))
      np.testing.assert_array_equal(image_label, np.isin(np.arange(7), scenes.label(row)))
    else:
      assert np.all(label == 255) and np.all(image_label == 0.5 + row)


def test_truth_for_pictures_stands_beside_the_labels():
  _, batch = labeled_too(unlabeled=synthetic.SyntheticScenes(12, (40, 40)), with_truth=True)
  known = np.any(batch["label"] != 255, axis=(1, 2))
  assert known.sum() == 3 and not np.any(batch["truth"] == 255)
  np.testing.assert_array_equal(batch["truth"][known], batch["label"][known])


def test_boxes_follow_their_images_among_labeled_and_unlabeled_ones():
  labeled = np.zeros((3, 1, 5), np.float32) + [0, 0, 0, 1, 1]
  unlabeled = np.full((12, 2, 5), -1, np.float32)
  unlabeled[:, 0] = [[row, 0, 0, 1, 1] for row in range(12)]
  options = dict(
    needs=Needs(labeled_too=True, weak_label="boxes"),
    labeled_boxes=labeled,
    unlabeled_boxes=unlabeled,
  )
  scenes, batch = labeled_too(**options)
  expected = [0 if row < 3 else row for row in (row_of(scenes, image) for image in batch["weak"])]
  assert batch["boxes"].shape == (12, 2, 5) and batch["boxes"][:, 0, 0].tolist() == expected


def test_ids_and_labeled_images_do_not_go_together():
  assert "ids are rows of the unlabeled images alone" in message(
    lambda: labeled_too(needs=Needs(labeled_too=True, ids=True))
  )
