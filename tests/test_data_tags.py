import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.data import sources, synthetic, tags
from pseudoseg_jax.data.classes import VOC, Classes

CLASSES = Classes(("background", "cat", "dog", "traffic light"), ((0, 0, 0),) * 4)
IDS = ("a", "b", "c")
WANTED = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]  # a: cat; b: cat and dog; c: nothing


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


def write(path, text):
  path.write_text(text)
  return path


def write_voc(folder, **names):
  for name, objects in names.items():
    parts = "".join(f"<object><name>{one}</name><part><name>head</name></part></object>" for one in objects)
    (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{parts}</annotation>")
  return folder


@pytest.mark.parametrize(
  "text",
  [
    "a,cat\nb,cat dog\nc,\n",
    "image,tags\r\nc\r\nb,dog,cat\r\na,1\r\n",
    'id,classes\n"a","cat"\nb, 1 2\nc,""\nelsewhere,zebra\n',
    "\ufeffa.jpg,cat\nb.PNG,cat\nb.PNG,dog\n\nc.jpeg\n",
  ],
  ids=["spaces", "commas, header, CRLF", "quotes, indices, another image", "endings, one tag a line, byte order mark"],
)
def test_csv_in_its_forms(tmp_path, text):
  path = tmp_path / "tags.csv"
  path.write_bytes(text.encode())
  got = tags.read_tags(path, IDS, CLASSES)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, WANTED)
  np.testing.assert_array_equal(tags.read_tags(path, ("c", "a"), CLASSES), [WANTED[2], WANTED[0]])  # the order of ids


def test_json_of_names_and_indices(tmp_path):
  path = write(tmp_path / "tags.json", json.dumps({"a": ["cat"], "b.jpg": [2, "1"], "c": [], "d": ["zebra"]}))
  np.testing.assert_array_equal(tags.read_tags(path, IDS, CLASSES), WANTED)


def test_voc_annotations_count_objects_but_not_their_parts(tmp_path):
  write_voc(tmp_path, a=["cat", "cat"], b=["dog", "cat"], c=[])
  np.testing.assert_array_equal(tags.read_tags(tmp_path, ("a", "b.jpg", "c"), CLASSES), WANTED)


def test_class_names_with_spaces_are_whole_fields(tmp_path):
  path = write(tmp_path / "tags.csv", "a,traffic light,cat\n")
  np.testing.assert_array_equal(tags.read_tags(path, ("a",), CLASSES), [[1, 1, 0, 1]])


def test_background_is_everywhere_only_where_there_is_such_a_class(tmp_path):
  path = write(tmp_path / "tags.csv", "a,dog\n")
  pets = Classes(("cat", "dog"), ((0, 0, 0), (1, 1, 1)))
  np.testing.assert_array_equal(tags.read_tags(path, ("a",), pets), [[0, 1]])


def test_an_ending_is_that_of_an_image_file_and_no_other_dot(tmp_path):
  path = write(tmp_path / "tags.csv", "a.1,cat\na.2.jpg,dog\n")
  np.testing.assert_array_equal(tags.read_tags(path, ("a.1", "a.2"), CLASSES)[:, 1:3], [[1, 0], [0, 1]])
  assert "no entry for 1 of 1: a" in message(lambda: tags.read_tags(path, ("a",), CLASSES))
  assert "no entry for 1 of 1: a.2.png" in message(lambda: tags.read_tags(path, ("a.2.png",), CLASSES))


@pytest.mark.parametrize("name", ["tags.csv", "tags.json"])
def test_missing_images_and_unknown_classes_are_told_together(tmp_path, name):
  entries = {"image_1": ["cat", "dogg"], "image_2": ["4"], "image_3": ["dogg"]}
  text = json.dumps(entries) if name.endswith("json") else "".join(f"{key},{' '.join(row)}\n" for key, row in entries.items())
  path = write(tmp_path / name, text)
  told = message(lambda: tags.read_tags(path, ("image_1", "image_2", "image_3", "image_4", "image_5"), VOC))
  for part in (
    str(path), "no entry for 2 of 5: image_4, image_5", "for 'image_4', did you mean 'image_", "looks like 'image_3'",
    "class 'dogg': got for image_1, image_3", "did you mean 'dog'?",
  ):  # fmt: skip
    assert part in told
  assert "'4'" not in told  # an index of VOC's 21
  assert "class '4': got for image_2" in message(lambda: tags.read_tags(path, ("image_2",), CLASSES))


@pytest.mark.parametrize(
  ("name", "content", "part"),
  [
    ("tags.csv", b"a,\xff\xfe\n", "decode"),
    ("tags.json", b'{"a": [', "JSON of the form"),
    ("tags.json", b'["a"]', "got a list"),
    ("tags.json", b'{"a": "cat", "b": [true], "c": [1]}', "\"cat\" for 'a', and 1 more"),
  ],
)
def test_unreadable_files_are_named(tmp_path, name, content, part):
  (tmp_path / name).write_bytes(content)
  told = message(lambda: tags.read_tags(tmp_path / name, IDS, CLASSES))
  assert str(tmp_path / name) in told and part in told and "no entry" not in told


def test_absent_file_is_named(tmp_path):
  assert "No such file" in message(lambda: tags.read_tags(tmp_path / "tags.csv", IDS, CLASSES))


def test_broken_and_missing_annotations_are_told_together(tmp_path):
  write_voc(tmp_path, a=["caat"])
  write(tmp_path / "b.xml", "<annotation><object>")
  told = message(lambda: tags.read_tags(tmp_path, IDS, CLASSES))
  for part in ("class 'caat': got for a", "did you mean 'cat'?", f"file {tmp_path / 'b.xml'}", "no entry for 1 of 3: c"):
    assert part in told


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_annotation_with_entities_is_refused_before_they_are_expanded(tmp_path, encoding):
  bomb = '<!ENTITY e0 "cat">' + "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
  text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [{bomb}]><a><object><name>&e11;</name></object></a>'
  (tmp_path / "a.xml").write_bytes(text.encode(encoding))
  assert "entity declaration" in message(lambda: tags.read_tags(tmp_path, ("a",), CLASSES))


def test_tags_of_masks_are_the_classes_that_occur():
  scenes = synthetic.SyntheticScenes(3, (32, 40))
  got = tags.tags_of_masks(scenes, len(synthetic.CLASSES))
  assert got.dtype == np.float32 and got.shape == (3, 7)
  for row in range(3):
    assert set(np.flatnonzero(got[row])) == set(np.unique(scenes.label(row)))


def make_folder(root):
  """Images a, b, c; masks of 0, of 0 and 2, and of ignored pixels alone (stored as 9)."""
  for part in ("images/train", "labels/train"):
    (root / part).mkdir(parents=True)
  masks = {"a": np.zeros((4, 6)), "b": np.eye(4, 6) * 2, "c": np.full((4, 6), 9)}
  for name, mask in masks.items():
    Image.new("RGB", (6, 4)).save(root / f"images/train/{name}.jpg")
    Image.fromarray(mask.astype(np.uint8)).save(root / f"labels/train/{name}.png")
  return root


def test_ignored_pixels_are_no_class_and_sources_without_masks_are_refused(tmp_path):
  options = dict(image_pattern="images/train/{id}.jpg", num_classes=3)
  root = make_folder(tmp_path)
  source = sources.FolderSource(root, IDS, label_pattern="labels/train/{id}.png", label_map={9: 255}, **options)
  np.testing.assert_array_equal(tags.tags_of_masks(source, 3), [[1, 0, 0], [1, 0, 1], [0, 0, 0]])
  assert "label_pattern" in message(lambda: tags.tags_of_masks(sources.FolderSource(root, IDS, **options), 3))


def test_written_tags_are_read_back(tmp_path):
  wanted = np.float32([[1, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
  ids = ("x/a.jpg", 'b, "quoted"', "c")
  tags.write_tags(tmp_path / "tags.csv", ids, wanted, CLASSES)
  np.testing.assert_array_equal(tags.read_tags(tmp_path / "tags.csv", ids, CLASSES), wanted)


@pytest.fixture(scope="module")
def launcher():
  path = pathlib.Path(__file__).parents[1] / "launch" / "tags_from_masks.py"
  spec = importlib.util.spec_from_file_location("tags_from_masks", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


CONFIG = """
from pseudoseg_jax import config as configs

def get_config(argument=""):
  config = configs.base(configs.method("supervised"))
  config.data.update(configs.folder_data(
    root="ROOT", classes="classes.txt", label_map={"9": 255}, split="every_3", eval_list="eval.txt",
    image_pattern="images/train/{id}.jpg", label_pattern="labels/train/{id}.png", eval_image_pattern="images/{id}.jpg",
  ))
  return config
"""


def make_config(root):
  make_folder(root)
  write(root / "classes.txt", "0 background 0 0 0\n1 cat 1 1 1\n2 dog 2 2 2\n")
  write(root / "eval.txt", "a\n")
  shutil.copy(root / "images/train/a.jpg", root / "images/a.jpg")
  return write(root / "config.py", CONFIG.replace("ROOT", str(root)))


@pytest.mark.parametrize(
  ("options", "lines"),
  [
    ([], ["b,background,dog", "c"]),
    # A bare folder of images, whose ids have endings.
    (["--config.data.unlabeled_folder=images/train"], ["a.jpg,background", "b.jpg,background,dog", "c.jpg"]),
  ],
)
def test_launcher_writes_the_tags_of_unlabeled_images(tmp_path, launcher, options, lines):
  out = tmp_path / "tags.csv"
  assert launcher.main([f"--config={make_config(tmp_path)}", f"--out={out}", *options]) == 0
  assert out.read_text().splitlines() == ["id,tags", *lines]


def test_launcher_says_what_is_wrong(tmp_path, launcher, capsys):
  config = make_config(tmp_path)
  (tmp_path / "labels/train/c.png").unlink()
  assert launcher.main([f"--config={config}", f"--out={tmp_path / 'tags.csv'}"]) == 2
  assert "1 of 2" in capsys.readouterr().err and not (tmp_path / "tags.csv").exists()
