import csv
import dataclasses
import importlib.util
import json
import pathlib
import random
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import build, checks, config as configs
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
    parts = "".join(
      f"<object><name>{one}</name><part><name>head</name></part></object>" for one in objects
    )
    (folder / f"{name}.xml").write_text(
      f"<annotation><filename>{name}.jpg</filename>{parts}</annotation>"
    )
  return folder


@pytest.mark.parametrize(
  "text",
  [
    "a,cat\nb,cat dog\nc,\n",
    "image,tags\r\nc\r\nb,dog,cat\r\na,1\r\n",
    'id,classes\n"a","cat"\nb, 1 2\nc,""\nelsewhere,zebra\n',
    "\ufeffa.jpg,cat\nb.PNG,cat\nb.PNG,dog\n\nc.jpeg\n",
  ],
  ids=[
    "spaces",
    "commas, header, CRLF",
    "quotes, indices, another image",
    "endings, one tag a line, byte order mark",
  ],
)
def test_csv_in_its_forms(tmp_path, text):
  path = tmp_path / "tags.csv"
  path.write_bytes(text.encode())
  got = tags.read_tags(path, IDS, CLASSES)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, WANTED)
  # The order of ids.
  np.testing.assert_array_equal(tags.read_tags(path, ("c", "a"), CLASSES), [WANTED[2], WANTED[0]])


def test_json_of_names_and_indices(tmp_path):
  path = write(
    tmp_path / "tags.json", json.dumps({"a": ["cat"], "b.jpg": [2, "1"], "c": [], "d": ["zebra"]})
  )
  np.testing.assert_array_equal(tags.read_tags(path, IDS, CLASSES), WANTED)


def test_voc_annotations_count_objects_but_not_their_parts(tmp_path):
  write_voc(tmp_path, a=["cat", "cat"], b=["dog", "cat"], c=[])
  np.testing.assert_array_equal(tags.read_tags(tmp_path, ("a", "b.jpg", "c"), CLASSES), WANTED)


def test_class_names_with_spaces_are_whole_fields(tmp_path):
  path = write(tmp_path / "tags.csv", "a,traffic light,cat\n")
  np.testing.assert_array_equal(tags.read_tags(path, ("a",), CLASSES), [[1, 1, 0, 1]])


def test_background_is_everywhere_only_where_there_is_such_a_class(tmp_path):
  path = write(tmp_path / "tags.csv", "a,dog\nb,cat\n")
  pets = Classes(("cat", "dog"), ((0, 0, 0), (1, 1, 1)))
  np.testing.assert_array_equal(tags.read_tags(path, ("a",), pets), [[0, 1]])
  for name in ("_background_", "Background", "bg"):
    path = write(tmp_path / "tags.csv", "a,dog\nb,\n")
    np.testing.assert_array_equal(
      tags.read_tags(path, ("a", "b"), Classes((name, "dog"), ((0, 0, 0),) * 2)), [[1, 1], [1, 0]]
    )


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("tags.csv", "a,cat\nb,cat dog\nc,\n"),
    ("tags.csv", "id,dog,cat\na,0,1\nb,1,1\nc,0,0\n"),
    ("tags.json", '{"a": [1], "b": [1, 2], "c": []}'),
  ],
)
def test_a_class_0_that_no_entry_names_is_asked_for_and_either_answer_helps(tmp_path, name, text):
  path = write(tmp_path / name, text)
  things = dataclasses.replace(CLASSES, names=("ground", *CLASSES.names[1:]))
  told = message(lambda: tags.read_tags(path, IDS, things))
  assert str(path) in told and "class 0: got no entry that names 'ground'" in told
  answers = re.findall("config.data.background=([a-z]+)", told)
  assert answers == ["yes", "no"]
  (tmp_path / "classes.txt").write_text("\n".join(things.names))
  for answer, present in zip(answers, (1, 0), strict=True):
    config = configs.load(
      "configs/folder.py", {"data.root": str(tmp_path), "data.background": answer}
    )
    got = tags.read_tags(path, IDS, build.build_classes(configs.frozen(config).data))
    np.testing.assert_array_equal(got, [[present, *row[1:]] for row in WANTED])


def test_annotations_that_never_name_class_0_ask_for_it_too(tmp_path):
  write_voc(tmp_path, a=["dog"])
  pets = Classes(("cat", "dog"), ((0, 0, 0), (1, 1, 1)))
  assert "config.data.background=yes" in message(lambda: tags.read_tags(tmp_path, ("a",), pets))


def test_a_file_that_names_class_0_anywhere_is_believed(tmp_path):
  pets = Classes(("cat", "dog"), ((0, 0, 0), (1, 1, 1)))
  for text in ("a,dog\nelsewhere,cat\n", "a,dog\nelsewhere,0\n", "id,cat,dog\na,0,1\n"):
    np.testing.assert_array_equal(
      tags.read_tags(write(tmp_path / "tags.csv", text), ("a",), pets), [[0, 1]]
    )


TABLES = {
  "commas": "id,background,cat,dog,traffic light\na,1,1,0,0\nb,1,1,1,0\nc,1,0,0,0\n",
  "another order": "id,dog,background,traffic light,cat\nc,0,1,0,0\na,0,1,0,1\nb,1,1,0,1\n",
  "without background": "filename,dog,cat,traffic light\na.jpg,0,1,0\nb.PNG,1,1,0\nc.jpg,0,0,0\n",
  "background never set": "id,background,cat,dog\na,0,1,0\nb,0,1,1\nc,0,0,0\n",
  "some classes": "id,dog,cat\na,0,1\nb,1,1\nc,0,0\n",
  "Excel, of Germany": "\ufeffid;dog;cat;\r\na;0;1;\r\nb;1;1;\r\nc;0;0;\r\n",
  "Excel, which names it": "sep=;\nid;dog;cat\na;0;1\nb;1;1\nc;0;0\n",
  "tabs, quotes": 'id\t"dog"\t"cat"\n"a"\t"0"\t"1"\nb\t1\t1\nc\t0\t0\n',
  "words": "id,dog,cat\na,False,True\nb,TRUE,true\nc,false,FALSE\n",
  "floats, empty cells": ",dog,cat\na,0.0,1.0\nb,1,1.\nc,,\n",
  "other images": "id,dog,cat\na,0,1\nelsewhere,?,?\nb,1,1\nc,0,0\n",
  "indices": "id,0,1,2,3\na,1,1,0,0\nb,1,1,1,0\nc,1,0,0,0\n",
  "an image twice": "id,dog,cat\na,0,1\nb,1,0\nb,0,1\nc,0,0\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_a_table_is_read_by_its_heading(tmp_path, text):
  (tmp_path / "tags.csv").write_bytes(text.encode())
  np.testing.assert_array_equal(tags.read_tags(tmp_path / "tags.csv", IDS, CLASSES), WANTED)


def test_a_column_may_say_that_background_is_not_everywhere(tmp_path):
  path = write(tmp_path / "tags.csv", "id,background,cat\na,1,0\nb,0,1\nc,1,1\n")
  np.testing.assert_array_equal(tags.read_tags(path, IDS, CLASSES)[:, :2], [[1, 0], [0, 1], [1, 1]])


@pytest.mark.parametrize("seed", range(20))
def test_tables_of_any_shape_are_read_as_they_were_written(tmp_path, seed):
  rng = random.Random(seed)
  names = [
    *rng.sample(
      ["cat", "hot dog", "C#", "2 wheeler", "a,b", 'x "y"', "semi;colon", "0", "tags"],
      rng.randint(1, 8),
    )
  ]
  wanted = np.array([[1] + [rng.randint(0, 1) for _ in names] for _ in range(5)], np.float32)
  wanted[0] = 1
  columns = rng.sample(range(len(names) + 1), len(names) + 1)
  words = rng.choice([("0", "1"), ("False", "True"), ("0.0", "1.0"), ("", "1")])
  known = Classes(("Background", *names), ((0, 0, 0),) * (len(names) + 1))
  with open(tmp_path / "tags.csv", "w", newline="") as file:
    writer = csv.writer(file, delimiter=rng.choice(",;\t"))
    writer.writerow(["image", *(known.names[column] for column in columns)])
    writer.writerows(
      [f"i{row}.jpg", *(words[int(wanted[row, column])] for column in columns)] for row in range(5)
    )
  np.testing.assert_array_equal(
    tags.read_tags(tmp_path / "tags.csv", [f"i{row}" for row in range(5)], known), wanted
  )


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("id,dog,cat,bird\na,0,1,1\nb,1,1,1\nc,0,0,1\n", ["column 'bird': got no class"]),
    ("id,dog,cat,split\na,0,1,train\nb,1,1,train\nc,0,0,val\n", ["column 'split': got no class"]),
    (
      "id,Dog,Cat\na,0,1\nb,1,1\nc,0,0\n",
      ["column 'Dog'", "did you mean 'dog'?", "did you mean 'cat'?"],
    ),
    ("id,Katze,Hund\na,0,1\nb,1,1\nc,0,0\n", ["column 'Katze'", "column 'Hund'"]),
    ("id,Cat\na,0\nb,1\nc,0\n", ["column 'Cat'", "did you mean 'cat'?"]),
    (
      "id,dog,cat\na,0,2\nb,1,0.5\nc,0,nan\n",
      ["image 'a', column 'cat': got '2'", "image 'b'", "image 'c'"],
    ),
    (
      "id,dog,cat\na,0\nb,1,1,1\nc,0,0\n",
      ["image 'a': got 1 cells; allowed: 2", "image 'b': got 3 cells"],
    ),
    ("id,dog,cat,cat\na,0,1,1\nb,1,1,0\nc,0,0,0\n", ["column 'cat': got 2 of them"]),
  ],
)
def test_everything_wrong_with_a_table_is_told_together(tmp_path, text, parts):
  path = write(tmp_path / "tags.csv", text)
  told = message(lambda: tags.read_tags(path, IDS, CLASSES))
  assert str(path) in told and all(part in told for part in parts)


def test_a_column_about_something_else_is_taken_out(tmp_path):
  path = write(tmp_path / "tags.csv", "id,dog,cat,split\na,0,1,train\nb,1,1,train\nc,0,0,val\n")
  assert "take it out" in message(lambda: tags.read_tags(path, IDS, CLASSES))
  write(path, "\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()))
  np.testing.assert_array_equal(tags.read_tags(path, IDS, CLASSES), WANTED)


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("tags.csv", "a,1,1,0,0\nb,1,1,1,0\nc,1,0,0,0\n"),
    ("tags.csv", "a;1;1;0;0\nb;1;1;1;0\nc;1;0;0;0\n"),
    ("tags.csv", "a,1,0,0\nb,1,1,0\nc,0,0,0\n"),
    ("tags.csv", "# mine\na,1 1 0 0\nb,1 1 1 0\nc,1 0 0 0\n"),
    ("tags.json", '{"a": [1, 1, 0, 0], "b": [1, 1, 1, 0], "c": [1, 0, 0, 0]}'),
  ],
)
def test_numbers_that_may_be_indices_or_a_table_are_asked_for(tmp_path, name, text):
  path = write(tmp_path / name, text)
  told = message(lambda: tags.read_tags(path, IDS, CLASSES))
  assert (
    str(path) in told and "all 0 or 1: indices of classes, or whether each class is there?" in told
  )
  (heading,) = re.findall("a CSV with the first line (.*) and a cell for each number", told)
  if path.suffix == ".json":
    text = "".join(
      f"{image},{','.join(map(str, row))}\n" for image, row in json.loads(text).items()
    )
  elif "," in heading:
    text = text.replace(" ", ",")
  path = write(tmp_path / "table.csv", f"{heading}\n{text}")
  np.testing.assert_array_equal(tags.read_tags(path, IDS, CLASSES), WANTED)


@pytest.mark.parametrize(
  "text",
  [
    "a,1\nb,1 2\nc,\n",
    "z,1,2\na,1\nb,2,1\nc\n",
    "id,classes\na,1\nb,1 2\nc,\n",
    "z,cat\na,1\nb,1 2\nc,\n",
  ],
)
def test_indices_are_read_where_they_can_be_nothing_else(tmp_path, text):
  np.testing.assert_array_equal(
    tags.read_tags(write(tmp_path / "tags.csv", text), IDS, CLASSES), WANTED
  )


@pytest.mark.parametrize(
  "text",
  [
    "id,class,present\na,cat,1\na,dog,0\nb,cat,1\nb,dog,1\n",
    "a,cat,0,1,2,3\nb,cat,1,1,3,3\n",
    "a,cat 1\nb,cat dog\n",
  ],
)
def test_numbers_beside_names_are_no_indices(tmp_path, text):
  told = message(lambda: tags.read_tags(write(tmp_path / "tags.csv", text), ("a", "b"), CLASSES))
  assert "numbers: got some beside names, for a" in told
  assert "names alone, or indices of classes alone" in told


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_lists_may_have_other_delimiters(tmp_path, delimiter):
  text = "id,tags\na,cat\nb,cat,dog\nc,\n".replace(",", delimiter)
  np.testing.assert_array_equal(
    tags.read_tags(write(tmp_path / "tags.csv", text), IDS, CLASSES), WANTED
  )


def test_an_ending_is_that_of_an_image_file_and_no_other_dot(tmp_path):
  path = write(tmp_path / "tags.csv", "a.1,cat\na.2.jpg,dog\n")
  np.testing.assert_array_equal(
    tags.read_tags(path, ("a.1", "a.2"), CLASSES)[:, 1:3], [[1, 0], [0, 1]]
  )
  assert "no entry for 1 of 1: a" in message(lambda: tags.read_tags(path, ("a",), CLASSES))
  assert "no entry for 1 of 1: a.2.png" in message(
    lambda: tags.read_tags(path, ("a.2.png",), CLASSES)
  )


@pytest.mark.parametrize("name", ["tags.csv", "tags.json"])
def test_missing_images_and_unknown_classes_are_told_together(tmp_path, name):
  entries = {"image_1": ["cat", "dogg"], "image_2": ["4"], "image_3": ["dogg"]}
  text = (
    json.dumps(entries)
    if name.endswith("json")
    else "".join(f"{key},{' '.join(row)}\n" for key, row in entries.items())
  )
  path = write(tmp_path / name, text)
  told = message(
    lambda: tags.read_tags(path, ("image_1", "image_2", "image_3", "image_4", "image_5"), VOC)
  )
  for part in (
    str(path),
    "no entry for 2 of 5: image_4, image_5",
    "for 'image_4', did you mean 'image_",
    "looks like 'image_3'",
    "class 'dogg': got for image_1, image_3",
    "did you mean 'dog'?",
  ):
    assert part in told
  assert "'4'" not in told  # an index of VOC's 21
  assert "class '4': got for image_2" in message(
    lambda: tags.read_tags(path, ("image_2",), CLASSES)
  )


@pytest.mark.parametrize(
  ("name", "content", "part"),
  [
    ("tags.csv", b"a,\xff\xfe\n", "decode"),
    ("tags.json", b'{"a": [', "JSON of the form"),
    ("tags.json", b'["a"]', "got a list"),
    ("tags.json", b'{"a": "cat", "b": [true], "c": [1]}', "\"cat\" for 'a', and 1 more"),
    ("tags.json", b'{"a": ["cat"], "b": [], "c": [], "a": []}', "the key a more than once"),
    ("tags.json", b'{"a": [NaN], "b": [], "c": []}', "NaN, which is no JSON"),
    ("tags.json", b'{"a": [' + b"9" * 5000 + b"]}", "ValueError"),
    ("tags.json", b"[" * 100_000, "RecursionError"),
    ("tags.csv", b"a," + b"x" * 200_000, "field larger than field limit"),
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
  for part in (
    "class 'caat': got for a",
    "did you mean 'cat'?",
    f"file {tmp_path / 'b.xml'}",
    "no entry for 1 of 3: c",
  ):
    assert part in told


@pytest.mark.parametrize(
  ("document", "part"),
  [
    (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "unknown encoding: klingon"),
    (
      b'<?xml version="1.0" encoding="gbk"?><annotation/>',
      "multi-byte encodings are not supported",
    ),
    (b'<?xml version="1.0" encoding="hex"?><annotation/>', "not a text encoding"),
    (b"<annotation>\0</annotation>", "not well-formed"),
    (b"", "no element found"),
    (b"<annotations><image/></annotations>", "<annotations>, not <annotation>"),
    (b"<annotation><object><bndbox/></object></annotation>", "an <object> without a <name>"),
    (b"<annotation><object><name> </name></object></annotation>", "an <object> without a <name>"),
  ],
)
def test_what_is_no_annotation_is_told(tmp_path, document, part):
  (tmp_path / "a.xml").write_bytes(document)
  told = message(lambda: tags.read_tags(tmp_path, ("a",), CLASSES))
  assert f"file {tmp_path / 'a.xml'}" in told and part in told


def test_annotations_are_found_whatever_the_case_of_their_ending_and_hidden_files_are_none(
  tmp_path,
):
  write_voc(tmp_path, a=["cat"], b=["cat", "dog"], c=[])
  (tmp_path / "a.xml").rename(tmp_path / "a.XML")
  (tmp_path / "._a.xml").write_bytes(b"\0\5\x16\7")
  np.testing.assert_array_equal(tags.read_tags(tmp_path, IDS, CLASSES), WANTED)
  (tmp_path / "b.xml").unlink()
  (tmp_path / "._b.xml").write_bytes(b"\0\5\x16\7")
  told = message(lambda: tags.read_tags(tmp_path, IDS, CLASSES))
  assert "no entry for 1 of 3: b" in told and "._" not in told


def test_huge_annotations_are_not_read(tmp_path):
  with open(tmp_path / "a.xml", "wb") as file:
    file.truncate(200 << 20)  # takes no room
  assert "200 MB" in message(lambda: tags.read_tags(tmp_path, ("a",), CLASSES))


def test_ids_are_the_same_however_their_accents_are_composed(tmp_path):
  path = write(tmp_path / "tags.csv", "cafe\u0301.jpg,cat\n")
  np.testing.assert_array_equal(tags.read_tags(path, ("caf\u00e9",), CLASSES), WANTED[:1])


def test_damaged_files_are_told_or_read(tmp_path):
  texts = {
    "tags.csv": b"id,tags\na,cat\nb,cat dog\nc,\n",
    "table.csv": b"id,background,cat,dog\na,1,1,0\nb,1,0,1\nc,1,0,0\n",
    "tags.json": b'{"a": ["cat"], "b": ["dog", 1], "c": []}',
    "a.xml": b'<?xml version="1.0" encoding="utf-8"?><annotation><object><name>cat</name></object></annotation>',
  }
  parts = [
    b",",
    b";",
    b"\t",
    b'"',
    b"\n",
    b"\0",
    b"\xff",
    b"\xff\xfe",
    b"0",
    b"1",
    b"-1",
    b"nan",
    b"null",
    b"[",
    b"}",
    b"<",
  ]
  parts += [b"&x;", b"9" * 5000]
  told = 0
  for seed in range(400):
    rng = random.Random(seed)
    name = rng.choice([*texts])
    content = bytearray(texts[name])
    for _ in range(rng.randint(1, 4)):
      place = rng.randrange(len(content) + 1)
      content[place : place + rng.randrange(4)] = rng.choice(parts)
    (tmp_path / name).write_bytes(content)
    path, ids = (tmp_path, ("a",)) if name == "a.xml" else (tmp_path / name, IDS)
    try:
      got = tags.read_tags(path, ids, CLASSES)
      assert got.shape == (len(ids), 4) and set(np.unique(got)) <= {0, 1}
    except checks.InputError as error:
      told += 1
      assert str(tmp_path) in str(error)
  assert told > 200


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_annotation_with_entities_is_refused_before_they_are_expanded(tmp_path, encoding):
  bomb = '<!ENTITY e0 "cat">' + "".join(
    f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12)
  )
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
  source = sources.FolderSource(
    root, IDS, label_pattern="labels/train/{id}.png", label_map={9: 255}, **options
  )
  np.testing.assert_array_equal(tags.tags_of_masks(source, 3), [[1, 0, 0], [1, 0, 1], [0, 0, 0]])
  assert "label_pattern" in message(
    lambda: tags.tags_of_masks(sources.FolderSource(root, IDS, **options), 3)
  )


@pytest.mark.parametrize(
  "names",
  [
    ("=cmd", "+1", "-x", "@x"),
    ("a,b", 'c "d"', "e;f", "g h"),
    ("0", "1", "2", "3"),
    ("tags", "id", "C#", "1;0"),
  ],
)
def test_names_of_any_kind_are_written_and_read_back(tmp_path, names):
  wanted = np.float32([[1, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
  known = Classes(names, ((0, 0, 0),) * 4)
  tags.write_tags(tmp_path / "tags.csv", "abcd", wanted, known)
  np.testing.assert_array_equal(tags.read_tags(tmp_path / "tags.csv", "abcd", known), wanted)


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
    (
      ["--config.data.unlabeled_folder=images/train"],
      ["a.jpg,background", "b.jpg,background,dog", "c.jpg"],
    ),
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
