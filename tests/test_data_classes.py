import numpy as np
import pytest

from pseudoseg_jax import checks
from pseudoseg_jax.data import classes


def test_read_classes_skips_comments_and_void(tmp_path):
  path = tmp_path / "classes.txt"
  path.write_bytes(b"# index name r g b\r\n0 sky 128 128 128\r\n\r\n1 road 1 2 3  # asphalt\r\n11 void 0 0 0")
  read = classes.read_classes(path)
  assert read.names == ("sky", "road")
  assert read.palette == ((128, 128, 128), (1, 2, 3))
  assert len(read) == 2


def test_read_classes_tells_all_bad_lines_with_the_file(tmp_path):
  path = tmp_path / "classes.txt"
  path.write_text("0 sky 1 2 3\n1 road 1 2\n2 tall tree 1 2 3\n4 car 1 2 3\n")
  with pytest.raises(checks.InputError) as error:
    classes.read_classes(path)
  for part in (str(path), "line 2", "line 3", "line 4", "index 4 for 'car'"):
    assert part in str(error.value)


@pytest.mark.parametrize(("text", "part"), [("0 a 1 2 3\n1 a 1 2 3\n", "'a' 2 times"), ("0 a 1 2 300\n", "0..255"), ("", "none")])
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


def test_names_alone_get_colours_and_void_has_one_of_its_own(tmp_path):
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


def test_a_colour_of_two_classes_cannot_be_read_back():
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
