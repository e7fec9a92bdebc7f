import dataclasses
import functools
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import build, checks, config as configs
from pseudoseg_jax.data import classes
from pseudoseg_jax.data.classes import Classes


def read(tmp_path, text):
  path = tmp_path / "classes.txt"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return classes.read_classes(path)


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


def test_read_classes_skips_comments_and_void(tmp_path):
  path = tmp_path / "classes.txt"
  path.write_bytes(
    b"# index name r g b\r\n0 sky 128 128 128\r\n\r\n1 road 1 2 3  # asphalt\r\n11 void 0 0 0"
  )
  read = classes.read_classes(path)
  assert read.names == ("sky", "road")
  assert read.palette == ((128, 128, 128), (1, 2, 3))
  assert len(read) == 2


def test_read_classes_tells_all_bad_lines_with_the_file(tmp_path):
  path = tmp_path / "classes.txt"
  path.write_text("0 sky 1 2 3\n1 road 1 2\n2 tree\n4 car 1 2 3\n")
  with pytest.raises(checks.InputError) as error:
    classes.read_classes(path)
  for part in (str(path), "line 2", "line 3", "line 4", "index 4 for 'car'"):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ("text", "part"),
  [("0 a 1 2 3\n1 a 1 2 3\n", "'a' 2 times"), ("0 a 1 2 300\n", "0..255"), ("", "none")],
)
def test_read_classes_rejects_what_cannot_be_classes(tmp_path, text, part):
  path = tmp_path / "classes.txt"
  path.write_text(text)
  with pytest.raises(checks.InputError) as error:
    classes.read_classes(path)
  assert part in str(error.value) and str(path) in str(error.value)


def test_missing_class_file_is_named(tmp_path):
  with pytest.raises(checks.InputError, match="nowhere.txt"):
    classes.read_classes(tmp_path / "nowhere.txt")


def test_voc_palette_gives_the_published_colors():
  palette = classes.voc_palette()
  assert palette.shape == (256, 3) and palette.dtype == np.uint8
  assert palette[1].tolist() == [128, 0, 0]
  assert palette[15].tolist() == [192, 128, 128]  # person
  assert palette[20].tolist() == [0, 64, 128]  # tvmonitor
  assert palette[255].tolist() == [224, 224, 192]  # the border
  assert len(classes.VOC) == 21 and classes.VOC.names[15] == "person"
  assert len(classes.CAMVID) == 11


def test_names_alone_get_colors_and_void_has_one_of_its_own(tmp_path):
  path = tmp_path / "classes.txt"
  path.write_text("background\nhot dog  # with mustard\nvoid\n")
  read = classes.read_classes(path)
  assert (read.names, read.palette) == (("background", "hot dog"), ((0, 0, 0), (128, 0, 0)))
  path.write_text("0 sky 1 2 3\n1 void 9 9 9\n")
  read = classes.read_classes(path)
  assert read.void == ((9, 9, 9),) and read.by_color() == {(1, 2, 3): 0, (9, 9, 9): 255}
  path.write_text("sky\nvoid\nroad\n")
  with pytest.raises(checks.InputError, match="line 3: got index 2 for 'road'; allowed: 1"):
    classes.read_classes(path)


def test_a_color_of_two_classes_cannot_be_read_back():
  table = classes.Classes(("a", "b"), ((1, 1, 1), (1, 1, 1)), void=((2, 2, 2),))
  with pytest.raises(checks.InputError, match=r"\(1, 1, 1\): got a, b"):
    table.by_color()


@pytest.mark.parametrize("stored", ["11:255,12: 3", {"11": 255, 12: 3}])
def test_label_maps_are_text_or_mappings(stored):
  assert classes.read_label_map(stored) == {11: 255, 12: 3}
  assert classes.read_label_map("") == {}


@pytest.mark.parametrize("text", ["11", "a:b", "11=255", "cityscape"])
def test_other_label_maps_are_refused_with_an_example(text):
  with pytest.raises(checks.InputError, match="11:255.*cityscapes"):
    classes.read_label_map(text)


def test_a_stored_value_is_mapped_once():
  assert "stored value 11: got 2 classes" in message(lambda: classes.read_label_map("11:255,11:3"))


COLORED = (("background", "cat", "traffic light"), ((0, 0, 0), (128, 0, 0), (1, 2, 3)))


@pytest.mark.parametrize(
  "text",
  [
    "0 background 0 0 0\n1 cat 128 0 0\n2 traffic light 1 2 3\n",
    # CVAT.
    "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0:head,tail:\ntraffic light:1,2,3::blink\n",
    "name,r,g,b\nbackground,0,0,0\ncat,128,0,0\ntraffic light,1,2,3\n",
    "Index; Name; R; G; B\r\n0; background; 0; 0; 0\r\n1; cat; 128; 0; 0\r\n2; traffic light; 1; 2; 3",
    "0 0 0\tbackground\n128 0 0\t\tcat\n1 2 3\ttraffic light\n\n",  # CamVid's label_colors.txt
    "\ufeffbackground 0 0 0\ncat 128 0 0  # the animal\ntraffic light 1 2 3\nVoid 9 9 9\n",
  ],
  ids=["spaces", "CVAT", "CSV", "headings, semicolons, CRLF", "colors first", "without indices"],
)
def test_names_and_colors_in_the_forms_of_tools(tmp_path, text):
  found = read(tmp_path, text)
  assert (found.names, found.palette) == COLORED and found.void == ((9, 9, 9),) * ("Void" in text)


@pytest.mark.parametrize(
  ("text", "names"),
  [
    ("C\nC++\nC#\n# a comment\nD  # another\n", ("C", "C++", "C#", "D")),
    ("car\n2 wheeler\n18 wheeler\n", ("car", "2 wheeler", "18 wheeler")),
    ("2 wheeler\n3 wheeler\n", ("2 wheeler", "3 wheeler")),
    ("2 wheeler\n", ("2 wheeler",)),
    ("background 0 0 0\n2 wheeler 1 2 3\n", ("background", "2 wheeler")),
    ("0 2 wheeler 0 0 0\n1 car 1 2 3\n", ("2 wheeler", "car")),
    ("0 background\n1 traffic light\n", ("background", "traffic light")),
    # Roboflow's _classes.csv.
    ("Pixel Value, Class\n0, background\n1, cat\n", ("background", "cat")),
    ("0: background\n1: cat\n", ("background", "cat")),
    # LabelMe's labels.txt, whose first line has the index -1.
    ("__ignore__\n_background_\ncat\n", ("_background_", "cat")),
    ("sky\nroad\n_void_\n", ("sky", "road")),
    ("floor, flooring\nrock/stone (big)\n", ("floor, flooring", "rock/stone (big)")),
    ("class 0\nclass 1\n", ("class 0", "class 1")),
    ("red\ngreen\nblue\n", ("red", "green", "blue")),
    ("0\n1\n2\n", ("0", "1", "2")),
    ("=1+1\n@x\n-y\n+z\n", ("=1+1", "@x", "-y", "+z")),
    ("cafe\u0301\nthe\u0301\n", ("caf\u00e9", "th\u00e9")),
  ],
)
def test_names_as_they_are_meant(tmp_path, text, names):
  found = read(tmp_path, text)
  assert found.names == names
  assert (
    found.palette == tuple(map(tuple, classes.voc_palette(len(names)).tolist())) or " 0 0 0" in text
  )


def test_another_long_file_is_told_at_once(tmp_path):
  assert "got 100000 lines; allowed: at most 255 classes" in message(
    lambda: read(tmp_path, "image 7\n" * 100_000)
  )
  assert "line 2: got 50001 characters" in message(
    lambda: read(tmp_path, "sky\n" + "a " * 25_000 + "b")
  )


def test_what_labelme_ignores_has_the_color_that_it_draws(tmp_path):
  assert read(tmp_path, "__ignore__\n_background_\ncat\n").by_color() == {
    (0, 0, 0): 0,
    (128, 0, 0): 1,
    (224, 224, 192): 255,
  }


@pytest.mark.parametrize(
  "line",
  [
    "cat:128,0,0",
    "cat,1",
    "1,cat",
    "cat, 1",
    "cat:1",
    "cat;",
    "cat,",
    "[cat",
    "'cat',",
    '"cat"',
    "- cat",
    "* cat",
    "cat\t1",
    "cat,#ff0000",
    "0 cat 1 2",
    "cat = [",
    "item {",
    "}",
    "0 cat 1 2 3",
    "cat 1 2 3",
    "1 2 3 cat",
    "0,cat,1,2,3",
    "{'cat'}",
    "1: cat",
    "cat;dog;2",
  ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_no_name_never_becomes_one(tmp_path, line, place):
  lines = ["sky", "tall tree"]
  lines.insert(place, line)
  told = message(lambda: read(tmp_path, "\n".join(lines)))
  assert str(tmp_path / "classes.txt") in told
  assert any(
    part in told
    for part in (
      "write every line as `index name r g b`",
      "all lines of one form",
      "no lines of names",
    )
  )


@pytest.mark.parametrize(
  "text",
  [
    json.dumps(["background", "cat"]),
    json.dumps({"categories": [{"id": 1, "name": "cat"}]}, indent=2),
    "<annotation><name>cat</name></annotation>",
    "background,cat,dog\n",
    "names:\n  0: a\n  1: b\n",
    "names: ['a', 'b']\n",
  ],
)
def test_other_files_are_no_lists_of_names(tmp_path, text):
  told = message(lambda: read(tmp_path, text))
  assert (
    "one a line" in told
    or "one class a line" in told
    or "a name alone" in told
    or "all lines of one form" in told
  )


@pytest.mark.parametrize(
  "text",
  ["12:30 lane\n4,5-methyl\n", "2 wheeler\n3 axles\n", "classes\nteachers\n", "cat 1 2 3\nsky\n"],
)
def test_any_name_can_be_said_with_its_index(tmp_path, text):
  told = message(lambda: read(tmp_path, text))
  assert "write every line as `index name r g b`" in told or "all lines of one form" in told
  names = text.splitlines()
  found = read(
    tmp_path, "".join(f"{index} {name} {index} 0 0\n" for index, name in enumerate(names))
  )
  assert found.names == tuple(names)


def test_a_heading_alone_is_told_and_taken_out(tmp_path):
  told = message(lambda: read(tmp_path, "class_name\nsky\nroad\n"))
  assert "line 1: got 'class_name', which looks like a heading" in told and "take it out" in told
  assert read(tmp_path, "sky\nroad\n").names == ("sky", "road")


@pytest.mark.parametrize("colors", [" 1 2 3", ""])
def test_indices_from_one_lack_a_class_or_are_counted_from_zero(tmp_path, colors):
  told = message(lambda: read(tmp_path, f"1 cat{colors}\n2 dog{colors}\n"))
  assert (
    "got index 1 for 'cat'; allowed: 0" in told
    and "background, before it" in told
    and "reduce_zero_label=True" in told
  )
  assert read(tmp_path, f"0 background{colors}\n1 cat{colors}\n2 dog{colors}\n").names == (
    "background",
    "cat",
    "dog",
  )
  assert read(tmp_path, f"0 cat{colors}\n1 dog{colors}\n").names == ("cat", "dog")


def test_void_in_the_middle_is_put_last(tmp_path):
  lines = ["sky,1,1,1", "Void,2,2,2", "road,3,3,3"]
  assert (
    "got index 2 for 'road'; allowed: 1, as indices count up from 0; put the line of void last"
    in message(lambda: read(tmp_path, "\n".join(lines)))
  )
  assert read(tmp_path, "\n".join([lines[0], lines[2], lines[1]])).by_color() == {
    (1, 1, 1): 0,
    (3, 3, 3): 1,
    (2, 2, 2): 255,
  }


def test_more_classes_than_labels_are_told_with_the_limit(tmp_path):
  assert len(read(tmp_path, "\n".join(f"n{index}" for index in range(255)))) == 255
  for count in (256, 300):
    told = message(
      functools.partial(read, tmp_path, "\n".join(f"n{index}" for index in range(count)))
    )
    assert (
      f"got {count} classes; allowed: at most 255, since the value 255 of a mask is no label"
      in told
    )


@pytest.mark.parametrize(
  ("name", "written"),
  [
    ("\x1b[31mcat\x1b[0m", "cat"),
    ("\x1b]0;title\x07cat", "cat"),
    ("c\u200bat", "cat"),
    ("\u202ecat", "cat"),
    ("ca\x00t", "cat"),
    ("ca\rt", "cat"),
    ("ca\nt", "cat"),
    ("ca\tt", "cat"),
    (" cat", "cat"),
    ("c\ufeffat", "cat"),
    ("\ud800cat", "cat"),
    ("cat\x7f", "cat"),
  ],
)
def test_names_are_of_what_can_be_seen(name, written):
  colors = ((0, 0, 0), (1, 1, 1))
  told = message(lambda: Classes(("sky", name), colors))
  assert f"names[1]: got {name!r}" in told and told.replace("\n", "").isprintable()
  (remedy,) = re.findall("write '(.*)'", told)
  assert Classes(("sky", remedy), colors).names[1] == written


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, None, 3, ["a"], "\x1b[2J"])
def test_no_names_are_told(name):
  assert "names[1]" in message(lambda: Classes(("sky", name), ((0, 0, 0), (1, 1, 1))))


def test_names_that_look_the_same_are_told(tmp_path):
  assert "'a' 2 times" in message(lambda: read(tmp_path, "a\n a \n"))
  assert "'caf\u00e9' 2 times" in message(
    lambda: Classes(("caf\u00e9", "cafe\u0301"), ((0, 0, 0), (1, 1, 1)))
  )


@pytest.mark.parametrize(
  ("name", "is_background"),
  [
    (name, True)
    for name in (
      "background",
      "_background_",
      "Background",
      "BACKGROUND",
      "back ground",
      "bg",
      "__BG__",
      "背景",
    )
  ]
  + [(name, False) for name in ("cat", "sky", "ground", "background_car", "back", "b g 2", "void")],
)
def test_background_is_known_by_its_name(name, is_background):
  colors = ((0, 0, 0), (1, 1, 1))
  assert Classes((name, "x"), colors).background_index == (0 if is_background else None)
  assert Classes(("x", name), colors).background_index == (1 if is_background else None)
  for told, index in ((True, 0), (False, None)):
    assert Classes((name, "x"), colors, background=told).background_index == index


def test_classes_survive_their_saved_form():
  for background in (None, True, False):
    given = Classes(("a", "b"), ((0, 0, 0), (1, 1, 1)), background=background)
    assert Classes(**dataclasses.asdict(given)) == given
    saved = json.loads(json.dumps(dataclasses.asdict(given)))
    assert saved["background"] is background


def folder_config(root, **options):
  overrides = {"data.root": str(root)} | options
  return configs.frozen(configs.load("configs/folder.py:method=supervised", overrides))


@pytest.mark.parametrize(("word", "index"), [("auto", None), ("yes", 0), ("no", None)])
def test_a_config_says_whether_class_0_is_background(tmp_path, word, index):
  (tmp_path / "classes.txt").write_text("ground\ncat\n")
  assert (
    build.build_classes(folder_config(tmp_path, **{"data.background": word}).data).background_index
    == index
  )
  config = folder_config(tmp_path, **{"data.background": word, "data.classes": "voc"})
  assert build.build_classes(config.data).background_index == (None if word == "no" else 0)


def test_other_words_for_background_are_told(tmp_path):
  told = message(
    lambda: build.build_classes(folder_config(tmp_path, **{"data.background": "True"}).data)
  )
  assert "config.data.background: got 'True'; allowed: auto, no, yes" in told


@pytest.mark.parametrize(
  "text", ["road\n", "0 road 9 8 7\n", "road:9,8,7::\n", "road\nvoid\n", "background\n"]
)
def test_one_class_is_refused_and_the_remedy_reads_the_masks_as_they_are(tmp_path, text):
  for folder in ("images", "masks"):
    (tmp_path / folder).mkdir()
  for name in "abc":
    Image.new("RGB", (6, 4)).save(tmp_path / f"images/{name}.jpg")
    Image.fromarray(np.eye(4, 6, dtype=np.uint8)).save(tmp_path / f"masks/{name}.png")
  (tmp_path / "labeled.txt").write_text("a\n")
  (tmp_path / "val.txt").write_text("b\n")
  (tmp_path / "classes.txt").write_text(text)
  told = message(lambda: build.build_data(folder_config(tmp_path).data))
  assert "one class" in told and "label_map" not in told
  (tmp_path / "classes.txt").write_text("\n".join(re.findall("`([^`]*)`", told)))
  data = build.build_data(folder_config(tmp_path).data)
  assert len(data.classes) == 2 and data.classes.background_index == 0
  np.testing.assert_array_equal(data.labeled.label(0), np.eye(4, 6))
  assert data.classes.names[1] == ("object" if text == "background\n" else "road")


def test_damaged_class_files_are_told_or_read(tmp_path):
  texts = [
    b"0 sky 1 2 3\n1 road 3 4 5\n",
    b"sky\nroad # x\nvoid\n",
    b"sky:1,2,3::\nroad:4,5,6::\n",
    b"name,r,g,b\nsky,1,2,3\n",
  ]
  parts = [
    b",",
    b";",
    b":",
    b"\t",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xff\xfe",
    b"#",
    b"\x1b[2J",
    b"{",
    b"-1",
  ]
  parts += [b"9" * 5000, b" " * 20000]
  told = 0
  for seed in range(300):
    rng = random.Random(seed)
    content = bytearray(rng.choice(texts))
    for _ in range(rng.randint(1, 4)):
      place = rng.randrange(len(content) + 1)
      content[place : place + rng.randrange(4)] = rng.choice(parts)
    try:
      assert all(map(str.isprintable, read(tmp_path, bytes(content)).names))
    except checks.InputError as error:
      told += 1
      assert str(tmp_path / "classes.txt") in str(error)
  assert told > 100
