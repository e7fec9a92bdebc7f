import importlib.util
import json
import pathlib
import random

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.data import boxes, sources, synthetic
from pseudoseg_jax.data.classes import Classes

CLASSES = Classes(("background", "cat", "dog"), ((0, 0, 0),) * 3)
IDS = ("a", "b", "c")
# In images of 20 x 10 pixels (width x height); a: the dog's box is columns 4..9, rows 0..4; b: the
# whole image; c: nothing.
WANTED = ([[2, 0.0, 0.2, 0.5, 0.5], [1, 0.9, 0.95, 1.0, 1.0]], [[1, 0, 0, 1, 1]], np.zeros((0, 5)))


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


def write_xml(
  folder, name, *objects, size="<size><width>20</width><height>10</height><depth>3</depth></size>"
):
  """objects: (class, xmin, ymin, xmax, ymax), in pixels from 1."""
  parts = ""
  for kind, *edges in objects:
    tagged = "".join(
      f"<{edge}>{value}</{edge}>"
      for edge, value in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True)
    )
    # A part of an object has a box as well, which is no box of a class.
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    parts += (
      f"<object><name>{kind}</name>{part}<difficult>1</difficult><bndbox>{tagged}</bndbox></object>"
    )
  (folder / f"{name}.xml").write_text(f"<annotation>{size}{parts}</annotation>")


def write_coco(path, annotations=None, changes=None):
  images = [
    {"id": 10 + row, "file_name": f"{name}.jpg", "width": 20, "height": 10}
    for row, name in enumerate(IDS)
  ]
  categories = [
    {"id": 17, "name": "cat"},
    {"id": 18, "name": "dog"},
    {"id": 90, "name": "toothbrush"},
  ]
  if annotations is None:
    annotations = [
      (10, 18, [4, 0, 6, 5], 0),
      (11, 17, [0, 0, 20, 10], 0),
      (10, 17, [19, 9, 1, 1], 0),
      (11, 18, [0, 0, 5, 5], 1),
      (11, 18, [3, 3, 0, 4], 0),
      (99, 90, [0, 0, 1, 1], 0),
    ]
  annotations = [
    dict(zip(("image_id", "category_id", "bbox", "iscrowd"), one, strict=True))
    for one in annotations
  ]
  path.write_text(
    json.dumps(
      {"images": images, "annotations": annotations, "categories": categories} | (changes or {})
    )
  )
  return path


def assert_boxes(got, wanted=WANTED):
  assert len(got) == len(wanted)
  for one, other in zip(got, wanted, strict=True):
    assert one.dtype == np.float32 and one.shape[1:] == (5,)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_voc_pixels_count_from_one_and_include_the_last(tmp_path):
  write_xml(tmp_path, "a", ("dog", 5, 1, 10, 5), ("cat", "20.0", 10, 20, 10))
  write_xml(tmp_path, "b", ("cat", 1, 1, 20, 10))
  write_xml(tmp_path, "c")
  assert_boxes(boxes.read_boxes(tmp_path, IDS, CLASSES))
  assert_boxes(boxes.read_boxes(tmp_path, ("b.jpg", "a"), CLASSES), [WANTED[1], WANTED[0]])


def test_coco_pixels_count_from_zero_and_crowds_and_empty_boxes_are_dropped(tmp_path):
  path = write_coco(tmp_path / "instances.json")
  assert_boxes(boxes.read_boxes(path, IDS, CLASSES))
  assert_boxes(boxes.read_boxes(path, ("c", "a.jpg"), CLASSES), [WANTED[2], WANTED[0]])
  # Image ids, where no file is called so.
  assert_boxes(boxes.read_boxes(path, ("10", "12"), CLASSES), [WANTED[0], WANTED[2]])


def test_edges_a_pixel_outside_are_clipped(tmp_path):
  write_xml(tmp_path, "a", ("cat", 0, 0, 21, 11))
  assert_boxes(boxes.read_boxes(tmp_path, ("a",), CLASSES), [[[1, 0, 0, 1, 1]]])


def test_everything_wrong_with_annotations_is_told_together(tmp_path):
  write_xml(tmp_path, "a", ("doog", 1, 1, 2, 2), ("doog", 1, 1, 3, 3))
  write_xml(tmp_path, "b", ("cat", 1, 1, 40, 10))
  write_xml(tmp_path, "c", ("cat", 1, 1, 4, 4), size="")
  write_xml(tmp_path, "d", ("cat", 9, 1, 4, 4))
  told = message(lambda: boxes.read_boxes(tmp_path, (*IDS, "d", "e"), CLASSES))
  for part in (
    "class 'doog': got for a;",
    "did you mean 'dog'?",
    f"file {tmp_path / 'b.xml'}: got a box of 'cat' from x 0 to 40",
    "image of 20 x 10",
    f"file {tmp_path / 'c.xml'}: got no size/width",
    "from x 8 to 4",
    "no entry for 1 of 5: e",
  ):
    assert part in told


def test_everything_wrong_with_coco_is_told_together(tmp_path):
  annotations = [(10, 90, [0, 0, 1, 1], 0), (11, 17, [0, 0, 40, 5], 0), (12, 17, [5, 5, -2, 2], 0)]
  path = write_coco(tmp_path / "instances.json", annotations)
  told = message(lambda: boxes.read_boxes(path, (*IDS, "d"), CLASSES))
  for part in (
    "class 'toothbrush': got for a",
    "image b: got a box of 'cat' from x 0 to 40",
    "image c",
    "1 of 4: d",
  ):
    assert part in told


@pytest.mark.parametrize(
  "changes",
  [
    {"images": [{"id": 3}]},
    {"annotations": {"a": 1}},
    {"categories": None},
    {"annotations": [{"category_id": 4}]},
  ],
)
def test_other_json_is_refused_with_its_path(tmp_path, changes):
  path = write_coco(tmp_path / "instances.json", changes=changes)
  told = message(lambda: boxes.read_boxes(path, IDS, CLASSES))
  assert str(path) in told and "COCO JSON" in told and "no entry" not in told


@pytest.mark.parametrize(
  ("content", "part"),
  [
    (b"[1]", "got a list"),
    (b"null", "got a NoneType"),
    (b"{", "JSONDecodeError"),
    (b"{\xff}", "Unicode"),
    (b"{\x00", "null bytes"),
    (b"[" * 100_000, "RecursionError"),
    (b'{"images": NaN}', "NaN, which is no JSON"),
    (b'{"images": ' + b"9" * 5000 + b"}", "ValueError"),
  ],
)
def test_unreadable_files_are_named(tmp_path, content, part):
  (tmp_path / "boxes.json").write_bytes(content)
  told = message(lambda: boxes.read_boxes(tmp_path / "boxes.json", IDS, CLASSES))
  assert str(tmp_path / "boxes.json") in told and part in told
  assert "No such file" in message(lambda: boxes.read_boxes(tmp_path / "none.json", IDS, CLASSES))


@pytest.mark.parametrize(
  ("part", "key", "value", "told"),
  [
    ("images", "id", None, "images[0].id: got nothing"),
    ("images", "id", [1], "images[0].id: got [1] (list)"),
    ("images", "id", True, "images[0].id: got true (bool)"),
    ("images", "file_name", 3, "images[0].file_name: got 3 (int); allowed: text"),
    ("images", "id", 11, "images: got id 11 2 times"),
    ("images", "id", "11", "images: got id 11 2 times"),
    ("images", "file_name", "b.jpg", "image b: got 2 images of that name"),
    ("images", "width", "20", '["20", 10]'),
    ("images", "height", 10**400, "in the place of 2 numbers"),
    ("images", "width", 0, "0 x 10 pixels"),
    (
      "annotations",
      "category_id",
      3,
      "annotations[0]: got category_id 3; allowed: the id of a category",
    ),
    ("annotations", "category_id", None, "annotations[0].category_id: got nothing"),
    ("annotations", "image_id", {}, "annotations[0].image_id: got {} (dict)"),
    ("annotations", "bbox", None, "got nothing in the place of 4 numbers"),
    ("annotations", "bbox", [1, 2, 3], "got [1, 2, 3] (list) in the place of 4 numbers"),
    ("annotations", "bbox", [1, 2, "3", 4], "in the place of 4 numbers"),
    ("annotations", "bbox", [1, 2, 1e300, 4], "in the place of 4 numbers"),
    ("annotations", "bbox", "abcd", "in the place of 4 numbers"),
    ("annotations", "bbox", [True] * 4, "in the place of 4 numbers"),
    ("categories", "id", 18, "categories: got id 18 2 times"),
    ("categories", "name", "", 'categories[0].name: got "" (str)'),
    ("categories", "name", ["cat"], "categories[0].name"),
  ],
)
def test_wrong_things_in_coco_are_told_with_their_place(tmp_path, part, key, value, told):
  path = write_coco(tmp_path / "boxes.json")
  content = json.loads(path.read_text())
  content[part][0][key] = value
  path.write_text(json.dumps(content))
  assert told in (got := message(lambda: boxes.read_boxes(path, IDS, CLASSES))) and str(path) in got


def test_ids_of_coco_may_be_text_in_one_place_and_numbers_in_another(tmp_path):
  path = write_coco(tmp_path / "instances.json")
  content = json.loads(path.read_text())
  for annotation in content["annotations"]:
    annotation["image_id"] = str(annotation["image_id"])
  path.write_text(json.dumps(content))
  assert_boxes(boxes.read_boxes(path, IDS, CLASSES))


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400", "many", ""])
def test_edges_of_annotations_are_numbers(tmp_path, number):
  write_xml(tmp_path, "a", ("cat", 1, 1, number, 5))
  assert f"file {tmp_path / 'a.xml'}: got" in message(
    lambda: boxes.read_boxes(tmp_path, ("a",), CLASSES)
  )
  write_xml(
    tmp_path,
    "a",
    ("cat", 1, 1, 4, 5),
    size=f"<size><width>{number}</width><height>10</height></size>",
  )
  assert f"file {tmp_path / 'a.xml'}: got" in message(
    lambda: boxes.read_boxes(tmp_path, ("a",), CLASSES)
  )


def _places(value, place=()):
  yield place
  for key, below in (
    value.items()
    if isinstance(value, dict)
    else enumerate(value)
    if isinstance(value, list)
    else ()
  ):
    yield from _places(below, (*place, key))


def test_damaged_coco_is_told_or_read(tmp_path):
  original = write_coco(tmp_path / "boxes.json").read_text()
  values = [
    None,
    True,
    False,
    -1,
    0,
    18,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "\x1b[2J",
    [],
    {},
    [[[]]],
    [None] * 4,
    {"id": 1},
  ]
  told = 0
  for seed in range(400):
    rng = random.Random(seed)
    content = json.loads(original)
    for _ in range(rng.randint(1, 3)):
      *above, key = rng.choice([*_places(content)][1:] or [()]) or [None]
      if key is None:
        break
      place = content
      for step in above:
        place = place[step]
      if rng.random() < 0.2:
        del place[key]
      else:
        place[key] = rng.choice(values)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    try:
      for found in boxes.read_boxes(tmp_path / "boxes.json", IDS, CLASSES):
        assert np.isfinite(found).all() and ((found[:, 1:] >= 0) & (found[:, 1:] <= 1)).all()
    except checks.InputError as error:
      told += 1
      assert str(tmp_path) in str(error)
  assert told > 200


def test_padding_rows_have_no_class():
  padded = boxes.pad_boxes([np.float32(WANTED[0]), np.float32(WANTED[1]), np.float32(WANTED[2])])
  assert padded.shape == (3, 2, 5) and padded.dtype == np.float32
  np.testing.assert_array_equal(padded[..., 0], [[2, 1], [1, -1], [-1, -1]])
  np.testing.assert_allclose(padded[0], WANTED[0])
  assert boxes.pad_boxes([np.zeros((0, 5), np.float32)]).shape == (1, 1, 5)


def masks_source(root, *masks):
  for row, mask in enumerate(masks):
    Image.new("RGB", mask.shape[::-1]).save(root / f"{row}.jpg")
    Image.fromarray(mask).save(root / f"{row}.png")
  ids = [str(row) for row in range(len(masks))]
  return sources.FolderSource(
    root, ids, image_pattern="{id}.jpg", label_pattern="{id}.png", num_classes=3
  )


def test_boxes_of_masks_are_tight_and_skip_background_ignored_and_small_regions(tmp_path):
  mask = np.zeros((10, 20), np.uint8)
  mask[0:5, 4:10] = 2
  mask[9, 19] = 1
  mask[6:9, 4:10] = 255
  source = masks_source(tmp_path, mask, np.ones((10, 20), np.uint8), np.zeros((10, 20), np.uint8))
  assert_boxes(
    boxes.boxes_of_masks(source, CLASSES), ([WANTED[0][1], WANTED[0][0]], WANTED[1], WANTED[2])
  )
  # 1 of 200 pixels is less.
  assert len(boxes.boxes_of_masks(source, CLASSES, min_area_fraction=0.01)[0]) == 1
  for things, found in (
    (Classes(("sky", "cat", "dog"), ((0, 0, 0),) * 3), {0, 1, 2}),
    (Classes(("_Background_", "cat", "dog"), ((0, 0, 0),) * 3), {1, 2}),
    (Classes(("sky", "cat", "dog"), ((0, 0, 0),) * 3, background=True), {1, 2}),
    (Classes(("background", "cat", "dog"), ((0, 0, 0),) * 3, background=False), {0, 1, 2}),
  ):
    assert set(boxes.boxes_of_masks(source, things)[0][:, 0]) == found
    assert set(boxes.boxes_of_instances(np.uint8(mask + 1), mask, things)[:, 0]) == found


def test_boxes_of_synthetic_scenes_cover_their_classes():
  scenes = synthetic.SyntheticScenes(4, (32, 40))
  for row, found in enumerate(boxes.boxes_of_masks(scenes, synthetic.CLASSES, min_area_fraction=0)):
    inside = np.zeros((32, 40), bool)
    for _, top, left, bottom, right in np.rint(found * [1, 32, 40, 32, 40]).astype(int):
      inside[top:bottom, left:right] = True
    assert not (scenes.label(row)[~inside] > 0).any()


def test_sources_without_masks_are_refused(tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
  assert "label_pattern" in message(
    lambda: boxes.boxes_of_masks(sources.image_folder(tmp_path), CLASSES)
  )


def test_boxes_of_instances_have_the_class_of_most_of_their_pixels():
  instances = np.zeros((10, 20), np.uint8)
  label = np.zeros((10, 20), np.uint8)
  instances[0:5, 4:10] = 7
  label[0:5, 4:10] = 2
  label[0, 4:8] = 1  # four of thirty pixels
  instances[5, 4:10] = 255  # the border between objects
  label[5, 4:10] = 2
  instances[9, 19], label[9, 19] = 1, 1
  instances[8, 0:2], label[8, 0:2] = 3, 255  # an object of no known class
  assert_boxes(
    [boxes.boxes_of_instances(instances, label, CLASSES)], [[WANTED[0][1], WANTED[0][0]]]
  )
  # 16-bit numbers of Cityscapes: 255 is one like any other, and two objects that touch have a box
  # each.
  pair = np.uint16([[26000, 26001], [0, 255]])
  assert boxes.boxes_of_instances(pair, np.uint8([[1, 1], [0, 2]]), CLASSES)[:, 0].tolist() == [
    2,
    1,
    1,
  ]


def test_written_boxes_are_read_again(tmp_path):
  written = [np.float32(wanted).reshape(-1, 5) for wanted in WANTED]
  boxes.write_boxes(
    tmp_path / "boxes.json", ("x/a.jpg", "b", "c"), [(10, 20)] * 3, written, CLASSES
  )
  assert_boxes(boxes.read_boxes(tmp_path / "boxes.json", ("x/a.jpg", "b", "c"), CLASSES))


CONFIG = """
from pseudoseg_jax import config as configs

def get_config(argument=""):
  config = configs.base(configs.method("supervised"))
  config.data.update(configs.folder_data(
    root="ROOT", classes="classes.txt", split="labeled.txt", train_list="train.txt", eval_list="eval.txt",
    image_pattern="{id}.jpg", label_pattern="{id}.png",
  ))
  return config
"""


def make_tree(root):
  """Images 0 (labeled), 1 and 2 (not), and 3 (evaluated); each has one cat, of two pixels more than
  its number in width.
  """
  masks = [np.zeros((10, 20), np.uint8) for _ in range(4)]
  for row, mask in enumerate(masks):
    mask[2:4, 5 : 7 + row] = 1
  masks_source(root, *masks)
  for name, text in {
    "classes.txt": "background\ncat\ndog\n",
    "labeled.txt": "0\n",
    "train.txt": "0\n1\n2\n",
    "eval.txt": "3\n",
    "config.py": CONFIG.replace("ROOT", str(root)),
  }.items():
    (root / name).write_text(text)
  return root


@pytest.fixture
def launcher():
  path = pathlib.Path(__file__).parents[1] / "launch" / "boxes_from_masks.py"
  spec = importlib.util.spec_from_file_location("boxes_from_masks", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_launcher_writes_the_boxes_of_labeled_and_unlabeled_images(tmp_path, launcher):
  command = [f"--config={make_tree(tmp_path)}/config.py", f"--out={tmp_path / 'boxes.json'}"]
  assert launcher.main(command) == 0
  wanted = [[[1, 0.2, 0.25, 0.4, (7 + row) / 20]] for row in range(3)]
  assert_boxes(boxes.read_boxes(tmp_path / "boxes.json", ("0", "1", "2"), CLASSES), wanted)

  for row in range(3):  # two objects where the classes show one region
    numbers = np.zeros((10, 20), np.uint8)
    numbers[2, 5:7], numbers[3, 5:7] = 1, 2
    Image.fromarray(numbers).save(tmp_path / f"objects_{row}.png")
  assert launcher.main([*command, "--instances=objects_{id}.png"]) == 0
  wanted = [[[1, 0.2, 0.25, 0.3, 0.35], [1, 0.3, 0.25, 0.4, 0.35]]] * 3
  assert_boxes(boxes.read_boxes(tmp_path / "boxes.json", ("0", "1", "2"), CLASSES), wanted)


def test_launcher_says_what_is_wrong(tmp_path, launcher, capsys):
  command = [
    f"--config={make_tree(tmp_path)}/config.py",
    f"--out={tmp_path / 'boxes.json'}",
    "--instances=objects_{id}.png",
  ]
  Image.new("L", (20, 10)).save(tmp_path / "objects_0.png")
  assert launcher.main(command) == 2 and "2 of 3 files absent" in capsys.readouterr().err
  for row in (1, 2):
    Image.new("L", (10, 20)).save(tmp_path / f"objects_{row}.png")
  assert (
    launcher.main(command) == 2
    and "got 20 x 10; allowed: 10 x 20, as its class mask" in capsys.readouterr().err
  )
  assert not (tmp_path / "boxes.json").exists()
