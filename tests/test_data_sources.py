import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.data import classes, decode, sources


def make_folder(root, ids=("a", "b", "c"), size=(6, 8)):
  """A tiny data set: palette PNG masks of values 0, 1, 2 and 11, JPEG images."""
  for folder in ("images/train", "labels/train"):
    (root / folder).mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in ids:
    Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(
      root / f"images/train/{name}.jpg"
    )
    mask = np.zeros(size, np.uint8)
    mask[0, :4] = (0, 1, 2, 11)
    save_palette(root / f"labels/train/{name}.png", mask)
  return root


def save_palette(path, mask):
  image = Image.fromarray(mask).convert("P")
  image.putdata(mask.ravel().tolist())
  image.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
  image.save(path)


def open_folder(root, ids=("a", "b", "c"), **changes):
  options = dict(
    image_pattern="images/train/{id}.jpg",
    label_pattern="labels/train/{id}.png",
    num_classes=3,
    label_map={11: 255},
  )
  return sources.FolderSource(root, ids, **{**options, **changes})


def turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation  # 6: "rotate by 90 degrees to view"
  return exif


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


def test_folder_gives_rgb_and_mapped_indices(tmp_path):
  source = open_folder(make_folder(tmp_path))
  assert len(source) == 3 and source.ids == ("a", "b", "c") and source.has_labels
  assert source.size(1) == (6, 8)
  assert source.image(1).shape == (6, 8, 3) and source.image(1).dtype == np.uint8
  assert source.label(1).dtype == np.uint8
  assert source.label(1)[0, :5].tolist() == [0, 1, 2, 255, 0]  # the palette's colors play no part


def test_list_file_and_ids_are_the_same(tmp_path):
  make_folder(tmp_path)
  (tmp_path / "list.txt").write_bytes(b"c\r\na")
  assert open_folder(tmp_path, tmp_path / "list.txt").ids == ("c", "a")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
  Image.new("RGB", (5, 4), (102, 102, 102)).convert(mode).save(tmp_path / "x.png")
  source = sources.image_folder(tmp_path)
  np.testing.assert_array_equal(source.image(0), np.full((4, 5, 3), 102))


@pytest.mark.parametrize(("setting", "shape"), [("apply", (5, 4)), ("ignore", (4, 5))])
def test_exif_orientations_are_treated_as_told(tmp_path, setting, shape):
  Image.new("RGB", (5, 4)).save(tmp_path / "x.jpg", exif=turned(6))
  source = sources.image_folder(tmp_path, exif_orientation=setting)
  assert source.image(0).shape[:2] == source.size(0) == shape
  assert source.orientation_in_words(0).startswith(
    f"orientation 6, {'applied' if setting == 'apply' else 'ignored'}"
  )


@pytest.mark.parametrize(
  ("setting", "size", "other"), [("apply", (6, 8), "ignore"), ("ignore", (8, 6), "apply")]
)
def test_masks_that_the_other_treatment_of_orientations_would_fit_are_told_so(
  tmp_path, setting, size, other
):
  make_folder(tmp_path)
  Image.new("RGB", (8, 6)).save(tmp_path / "images/train/b.jpg", exif=turned(6))
  save_palette(tmp_path / "labels/train/b.png", np.zeros(size, np.uint8))
  text = message(lambda: open_folder(tmp_path, exif_orientation=setting))
  assert "labels/train/b.png" in text and text.endswith(f"config.data.exif_orientation={other}")
  source = open_folder(tmp_path, exif_orientation=other)  # the remedy
  assert source.image(1).shape[:2] == source.label(1).shape == source.size(1) == size


def test_bare_folder_finds_images_below_it(tmp_path):
  make_folder(tmp_path)
  (tmp_path / "notes.txt").write_text("no image")
  source = sources.image_folder(tmp_path)
  assert source.ids[:1] == ("images/train/a.jpg",) and len(source) == 6
  assert not source.has_labels


def test_bare_folder_without_images_is_told(tmp_path):
  assert "no image" in message(lambda: sources.image_folder(tmp_path))
  assert "no such folder" in message(lambda: sources.image_folder(tmp_path / "gone"))


def test_missing_root_and_bad_options_are_told_together(tmp_path):
  text = message(lambda: open_folder(tmp_path / "gone", image_pattern="x.jpg", num_classes=None))
  for part in ("gone", "no such folder", "image_pattern", "{id}", "num_classes"):
    assert part in text


def test_label_map_out_of_range_is_told(tmp_path):
  text = message(lambda: open_folder(make_folder(tmp_path), label_map={11: 3, 70000: 0}))
  assert "{11: 3}" in text and "{70000: 0}" in text


def test_empty_list_is_told(tmp_path):
  make_folder(tmp_path)
  assert "at least one id" in message(lambda: open_folder(tmp_path, ()))
  (tmp_path / "list.txt").write_text("\n")
  assert "list.txt" in message(lambda: open_folder(tmp_path, tmp_path / "list.txt"))


def test_absent_files_are_counted_shown_and_the_list_is_named(tmp_path):
  make_folder(tmp_path)
  (tmp_path / "labels/train/c.png").unlink()
  (tmp_path / "list.txt").write_text("a\nw\nx\ny\nz\nc\n")
  text = message(lambda: open_folder(tmp_path, tmp_path / "list.txt"))
  for part in (
    "list.txt",
    "4 of 6 image files absent",
    "images/train/w.jpg",
    "5 of 6 label files absent",
    "holds e.g. a.jpg",
  ):
    assert part in text


def test_wrong_pattern_names_the_nearest_existing_one(tmp_path):
  text = message(lambda: open_folder(make_folder(tmp_path), image_pattern="images/val/{id}.png"))
  assert "'images/train/{id}.jpg'" in text


def test_size_mismatch_and_unreadable_header_are_told_together(tmp_path):
  make_folder(tmp_path)
  save_palette(tmp_path / "labels/train/a.png", np.zeros((8, 6), np.uint8))
  (tmp_path / "images/train/b.jpg").write_bytes(b"no image at all")
  text = message(lambda: open_folder(tmp_path))
  for part in ("labels/train/a.png", "8 x 6", "6 x 8", "images/train/b.jpg", "no readable image"):
    assert part in text


def test_truncated_image_and_mask_are_named_when_read(tmp_path):
  make_folder(tmp_path, size=(64, 64))
  for path in (tmp_path / "images/train/b.jpg", tmp_path / "labels/train/b.png"):
    path.write_bytes(path.read_bytes()[:-40])
  source = open_folder(tmp_path)  # the headers are whole
  assert "images/train/b.jpg" in message(lambda: source.image(1))
  assert "labels/train/b.png" in message(lambda: source.label(1))


def test_mask_values_that_are_no_class_are_listed(tmp_path):
  make_folder(tmp_path)
  text = message(lambda: open_folder(tmp_path, label_map=None, num_classes=2).label(0))
  for part in (
    "labels/train/a.png",
    "2 on 1 pixels, 11 on 1 pixels",
    "0..1 and 255",
    "label_map",
    "num_classes",
  ):
    assert part in text


def test_sixteen_bit_masks_are_read_or_refused_by_value(tmp_path):
  make_folder(tmp_path)
  path = tmp_path / "labels/train/a.png"
  Image.fromarray(np.full((6, 8), 2, np.uint16)).save(path)
  assert np.all(open_folder(tmp_path).label(0) == 2)
  Image.fromarray(np.full((6, 8), 1000, np.uint16)).save(path)
  assert "1000" in message(lambda: open_folder(tmp_path).label(0))
  assert np.all(open_folder(tmp_path, label_map={1000: 1}).label(0) == 1)


def test_masks_of_fractions_are_refused(tmp_path):
  make_folder(tmp_path)
  np.save(tmp_path / "labels/train/a.npy", np.full((6, 8), 1.5))
  text = message(
    lambda: open_folder(tmp_path, ("a",), label_pattern="labels/train/{id}.npy").label(0)
  )
  assert "labels/train/a.npy" in text and "allowed: integers" in text


def test_color_coded_masks_are_refused(tmp_path):
  make_folder(tmp_path)
  Image.new("RGB", (8, 6)).save(tmp_path / "labels/train/a.png")
  text = message(lambda: open_folder(tmp_path).label(0))
  assert "labels/train/a.png" in text and "3 channels" in text and "mask_colors" in text


def test_unlabeled_folder_never_touches_masks(tmp_path):
  make_folder(tmp_path)
  (tmp_path / "labels/train/a.png").write_bytes(b"broken")
  source = open_folder(tmp_path, label_pattern=None, num_classes=None, label_map=None)
  assert not source.has_labels and source.image(0).shape == (6, 8, 3)


def test_subset_renumbers_rows(tmp_path):
  source = open_folder(make_folder(tmp_path))
  part = sources.Subset(source, ("c", "a"))
  assert len(part) == 2 and part.has_labels
  np.testing.assert_array_equal(part.image(0), source.image(2))
  np.testing.assert_array_equal(part.label(1), source.label(0))
  assert part.size(0) == (6, 8)
  assert "did you mean" in message(
    lambda: sources.Subset(open_folder(tmp_path, ("a", "b")), ("aa",))
  )


def test_masks_in_colors_become_the_classes_of_their_colors(tmp_path):
  make_folder(tmp_path)
  colors = np.zeros((6, 8, 3), np.uint8)
  colors[0, :3] = (128, 0, 0), (0, 1, 255), (255, 255, 255)
  Image.fromarray(colors).save(tmp_path / "labels/train/a.png")
  table = classes.Classes(
    ("ground", "cat", "dog"), ((0, 0, 0), (128, 0, 0), (0, 1, 255)), void=((255, 255, 255),)
  )
  source = open_folder(tmp_path, label_map=None, mask_colors=table.by_color())
  assert source.label(0)[0, :4].tolist() == [1, 2, 255, 0]
  # of color (248, 7, 7).
  save_palette(tmp_path / "labels/train/b.png", np.full((6, 8), 7, np.uint8))
  text = message(lambda: source.label(1))
  assert "(248, 7, 7) on 48 pixels" in text and "labels/train/b.png" in text and "void" in text
  assert "label_map" in message(lambda: open_folder(tmp_path, mask_colors=table.by_color()))


@pytest.mark.parametrize(
  ("options", "wanted"),
  [
    (dict(reduce_zero_label=True, label_map={11: 255}), [255, 0, 1, 255]),  # stored 0, 1, 2, 11
    (dict(reduce_zero_label=True, label_map={11: 0}), [255, 0, 1, 0]),
    (dict(ignore_index=11, label_map=None), [0, 1, 2, 255]),
    (dict(ignore_index=0), [255, 1, 2, 255]),
  ],
)
def test_stored_values_are_mapped_as_told(tmp_path, options, wanted):
  assert open_folder(make_folder(tmp_path), **options).label(0)[0, :4].tolist() == wanted


def test_another_ignore_index_makes_255_a_value_like_others(tmp_path):
  save_palette(make_folder(tmp_path) / "labels/train/a.png", np.full((6, 8), 255, np.uint8))
  assert np.all(open_folder(tmp_path).label(0) == 255)
  assert "got 255" in message(lambda: open_folder(tmp_path, ignore_index=0).label(0))


def test_cityscapes_ids_become_the_nineteen_train_ids():
  table = classes.read_label_map("cityscapes")
  # road, sidewalk, building, car, bicycle.
  assert [table[stored] for stored in (7, 8, 11, 26, 33)] == [0, 1, 2, 13, 18]
  assert sorted(index for index in table.values() if index != 255) == list(
    range(len(classes.CITYSCAPES))
  )
  assert all(table[stored] == 255 for stored in (0, 1, 6, 9, 10, 14, 15, 16, 18, 29, 30)) and set(
    table
  ) == set(range(34))


@pytest.mark.parametrize("suffix", ["png", "tif", "npy"])
def test_sixteen_bit_images_keep_their_steps(tmp_path, suffix):
  values = np.array([[0, 1, 256, 257, 65535]], np.uint16)
  if suffix == "npy":
    np.save(tmp_path / "a.npy", values)
  else:
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
  source = sources.FolderSource(tmp_path, ["a"], image_pattern=f"{{id}}.{suffix}", channels=1)
  assert (source.dtype, source.channels, source.size(0)) == (np.float32, 1, (1, 5))
  np.testing.assert_allclose(source.image(0)[0, :, 0], [0, 1 / 257, 256 / 257, 1, 255], rtol=1e-6)
  np.testing.assert_array_equal(
    decode.read_image(tmp_path / f"a.{suffix}"), np.repeat(source.image(0), 3, -1)
  )


def test_eight_and_sixteen_bits_together_are_float(tmp_path):
  Image.new("L", (5, 4), 100).save(tmp_path / "a.png")
  Image.fromarray(np.full((4, 5), 25700, np.uint16)).save(tmp_path / "b.png")
  source = sources.FolderSource(tmp_path, ["a", "b"], image_pattern="{id}.png")
  for row in (0, 1):
    assert source.image(row).dtype == np.float32 and np.all(source.image(row) == 100)
  unchecked = sources.FolderSource(tmp_path, ["a", "b"], image_pattern="{id}.png", check=False)
  assert "b.png" in message(lambda: unchecked.image(1)) and unchecked.image(0).dtype == np.uint8


def test_images_of_other_channels_are_read_as_they_are(tmp_path):
  values = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
  np.save(tmp_path / "six.npy", values)
  np.testing.assert_array_equal(decode.read_image(tmp_path / "six.npy", 6), values)
  Image.fromarray(values[..., :4], "RGBA").save(tmp_path / "four.png")
  np.testing.assert_array_equal(decode.read_image(tmp_path / "four.png", 4), values[..., :4])
  Image.new("L", (5, 4), 9).save(tmp_path / "grey.png")
  assert decode.read_image(tmp_path / "grey.png", 1).shape == (4, 5, 1)
  for name, channels in (("six.npy", 3), ("four.png", 1)):
    text = message(
      lambda name=name, channels=channels: decode.read_image(tmp_path / name, channels)
    )
    assert name in text and f"allowed: {channels} channels" in text
  np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
  assert "objects.npy" in message(lambda: decode.read_image(tmp_path / "objects.npy"))
  np.save(tmp_path / "signed.npy", np.full((2, 2, 3), -1, np.int16))
  assert "-1..-1" in message(lambda: decode.read_image(tmp_path / "signed.npy"))


def test_a_list_of_pairs_needs_no_patterns(tmp_path):
  make_folder(tmp_path)
  (tmp_path / "list.txt").write_text(
    "images/train/b.jpg\tlabels/train/b.png\n/images/train/a.jpg /labels/train/a.png\n"
  )
  source = sources.FolderSource(tmp_path, tmp_path / "list.txt", num_classes=3, label_map={11: 255})
  assert source.ids == ("images/train/b", "images/train/a") and source.has_labels
  assert source.label(1)[0, :4].tolist() == [0, 1, 2, 255]
  (tmp_path / "list.txt").write_text("images/train/b.jpg None\nimages/train/a.jpg\n")
  assert not sources.FolderSource(tmp_path, tmp_path / "list.txt").has_labels
  text = message(
    lambda: sources.FolderSource(tmp_path, tmp_path / "list.txt", num_classes=3, check=False)
  )
  assert "no label file for images/train/b, images/train/a" in text and "label_pattern" in text


CITY = dict(
  image_pattern="leftImg8bit/train/{id}_leftImg8bit.png",
  label_pattern="gtFine/train/{id}_gtFine_labelIds.png",
)


def make_city(root, *frames):
  for frame in frames:
    for folder, ending, value in (
      ("leftImg8bit", "leftImg8bit", 0),
      ("gtFine", "gtFine_labelIds", 7),
    ):
      path = root / f"{folder}/train/{frame}_{ending}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("L", (8, 6), value).save(path)
  return root


@pytest.mark.parametrize(
  "line",
  [
    "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png gtFine/train/ulm/ulm_000000_000019_gtFine_labelTrainIds.png",
    "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
    "/images/train/ulm_000000_000019.png\t/segmentation/train/ulm_000000_000019_gtFine.png",
    "train/ulm/ulm_000000_000019",
    "ulm/ulm_000000_000019",
  ],
)
@pytest.mark.parametrize("with_train_ids", [False, True])
def test_lists_of_cityscapes_fit_the_official_tree(tmp_path, line, with_train_ids):
  """In the order above: UniMatch's, U2PL's and CPS's lists, and ids."""
  make_city(tmp_path, "ulm/ulm_000000_000019", "bonn/bonn_000000_000019")
  # a mask of another coding, which label_map would misread: 7 is a traffic sign there.
  if with_train_ids:
    Image.new("L", (8, 6), 7).save(
      tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelTrainIds.png"
    )
  (tmp_path / "list.txt").write_text(line)
  source = sources.FolderSource(
    tmp_path,
    tmp_path / "list.txt",
    num_classes=19,
    label_map=classes.read_label_map("cityscapes"),
    **CITY,
  )
  assert source.ids == ("ulm/ulm_000000_000019",)
  assert source.label_path(0).name == "ulm_000000_000019_gtFine_labelIds.png" and np.all(
    source.label(0) == 0
  )


def test_paths_that_exist_are_used_as_they_are(tmp_path):
  make_folder(tmp_path)
  Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "rain a.png")
  (tmp_path / "list.txt").write_text(
    f"rain a.png\tlabels/train/b.png\n{tmp_path}/images/train/c.jpg\n"
  )
  source = open_folder(tmp_path, tmp_path / "list.txt")
  assert source.ids == ("rain a", "c") and np.all(source.image(0) == 9)
  assert (
    source.label_path(0) == tmp_path / "labels/train/b.png"
    and source.label_path(1) == tmp_path / "labels/train/c.png"
  )


def test_ids_are_found_in_the_folder_or_in_those_below_it(tmp_path):
  make_city(tmp_path, "ulm/ulm_1", "bonn/bonn_1")
  assert sources.find_ids(tmp_path, CITY["image_pattern"]) == ("bonn/bonn_1", "ulm/ulm_1")
  make_folder(tmp_path / "flat")
  assert sources.find_ids(tmp_path / "flat", "images/train/{id}.jpg") == ("a", "b", "c")
  assert sources.find_ids(tmp_path / "flat", "images/{id}.jpg") == ("train/a", "train/b", "train/c")
  # One above the others hides none of them.
  Image.new("RGB", (8, 6)).save(tmp_path / "flat/images/d.jpg")
  assert sources.find_ids(tmp_path / "flat", "images/{id}.jpg") == (
    "d",
    "train/a",
    "train/b",
    "train/c",
  )
  assert sources.find_ids(tmp_path, "nothing/{id}.jpg") == ()


@pytest.mark.parametrize(
  ("named", "parts"),
  [
    (
      ["cat", "ground", "dog"],
      [
        "another order",
        "'cat' as class 0",
        "'ground' as class 0, as in the data",
        "export them anew",
      ],
    ),
    (
      ["ground", "cat"],
      ["labels of the classes ground, cat", "those of the data: ground, cat, dog"],
    ),
    (["ground", "cat", 3], ["labels of the classes ground, cat, 3"]),
    (7, ["manifest.json: got TypeError"]),
  ],
)
def test_labels_of_other_classes_or_of_another_order_are_refused(tmp_path, named, parts):
  (tmp_path / "manifest.json").write_text(json.dumps({"finished": True, "classes": named}))
  text = message(lambda: sources.check_labels_folder(tmp_path, ("ground", "cat", "dog")))
  assert all(part in text for part in parts), text
  (tmp_path / "manifest.json").write_text(
    json.dumps({"finished": True, "classes": ["ground", "cat", "dog"]})
  )
  sources.check_labels_folder(tmp_path, ("ground", "cat", "dog"))


def test_masks_alone_are_no_images(tmp_path):
  make_folder(tmp_path)
  options = dict(
    label_pattern="labels/train/{id}.png", num_classes=3, label_map={11: 255}, masks_only=True
  )
  source = sources.FolderSource(tmp_path, ["c", "a"], **options)
  assert source.size(0) == source.label(0).shape == (6, 8) and source.label_path(1).name == "a.png"
  (tmp_path / "labels/train/a.png").write_bytes(b"broken")
  text = message(lambda: sources.FolderSource(tmp_path, ["c", "a"], **options))
  assert (
    text.count("a.png") == 1
    and "mask" in text
    and "image " not in text.replace("readable image", "")
  )
  text = message(lambda: sources.FolderSource(tmp_path, ["c", "x"], **options))
  assert "1 of 2 label files absent" in text and "image file" not in text


def test_unchecked_sources_open_whatever_is_wrong_and_say_it_when_read(tmp_path):
  make_folder(tmp_path)
  (tmp_path / "images/train/b.jpg").write_bytes(b"broken")
  (tmp_path / "labels/train/a.png").unlink()
  source = open_folder(tmp_path, check=False)
  assert source.size(0) == (6, 8) and source.image(2).shape == (6, 8, 3)
  for read, name in ((source.image, "images/train/b.jpg"), (source.size, "images/train/b.jpg")):
    assert name in message(lambda read=read: read(1))
  assert "labels/train/a.png" in message(lambda: source.label(0))


def encoded_files():
  """Whole files by ending, among them arrays that are no images."""
  rng = np.random.default_rng(0)
  arrays = [
    (rng.random(shape) * 2).astype(dtype)
    for dtype in "u1 u2 f4 i8 ?".split()
    for shape in ((6, 8), (6, 8, 3))
  ]
  arrays += [np.zeros(shape, np.uint8) for shape in ((), (5,), (0, 8, 3), (2, 2, 2, 2))]
  arrays += [np.array([{}], object), np.array(["x"])]
  arrays += [
    np.zeros((6, 8), complex),
    np.zeros((6, 8), [("a", "u1")]),
    np.full((6, 8), np.nan),
    np.zeros((6, 8), "M8[s]"),
  ]
  files = {"npy": [npy_bytes(array) for array in arrays]}
  color = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
  for suffix, form, modes in (
    ("png", "PNG", "L P RGB RGBA LA 1"),
    ("jpg", "JPEG", "L RGB CMYK"),
    ("tif", "TIFF", "L RGB F 1"),
  ):
    for mode in modes.split():
      for orientation in (1, 6):
        file = io.BytesIO()
        color.convert(mode).save(file, form, exif=turned(orientation))
        files.setdefault(suffix, []).append(file.getvalue())
  return files


def npy_bytes(array):
  file = io.BytesIO()
  np.save(file, array, allow_pickle=True)
  return file.getvalue()


def mutated(rng, content):
  """Cut, with bits flipped, with another header, longer or shorter."""
  content = bytearray(content)
  place = rng.randrange(len(content))
  match rng.randrange(5):
    case 0:
      del content[place:]
    case 1:
      for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    case 2:
      for _ in range(3):
        content[rng.randrange(min(128, len(content)))] = ord(rng.choice("0123456789-,()'<>|fiuOV"))
    case 3:
      content[place:place] = rng.randbytes(rng.randint(1, 9))
    case 4:
      del content[place : place + rng.randint(1, 20)]
  return bytes(content)


@pytest.mark.filterwarnings("ignore")  # of PIL, about what it skips in damaged headers
@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_file_holds_it_is_read_or_refused_by_its_path(tmp_path, seed):
  rng = random.Random(seed)
  files = encoded_files()
  outcomes = []
  for number in range(40):
    suffix = rng.choice(sorted(files))
    content = rng.choice(files[suffix])
    path = tmp_path / f"{number}.{rng.choice(sorted(files)) if rng.random() < 0.1 else suffix}"
    path.write_bytes(mutated(rng, content) if rng.random() < 0.8 else content)
    options = dict(
      image_pattern=f"{{id}}{path.suffix}", label_pattern=f"{{id}}{path.suffix}", num_classes=3
    )
    options |= dict(
      channels=rng.choice((1, 3, 4)),
      exif_orientation=rng.choice(("apply", "ignore")),
      check=rng.random() < 0.5,
    )
    options |= dict(mask_colors={(0, 0, 0): 0} if rng.random() < 0.3 else None)
    try:
      source = sources.FolderSource(tmp_path, [str(number)], **options)
    except checks.InputError as error:
      assert str(path) in str(error)
      outcomes.append("refused")
      continue
    source.orientation_in_words(0), source.orientation_remedy(0)
    for read in (source.size, source.image, source.label):
      try:
        found = read(0)
      except checks.InputError as error:
        assert str(path) in str(error)
        outcomes.append("refused")
      else:
        assert (
          read != source.image
          or found.shape == (*source.size(0), options["channels"])
          and np.isfinite(found).all()
        )
        assert read != source.label or found.ndim == 2 and found.dtype == np.uint8
        outcomes.append("read")
  assert {*outcomes} == {"refused", "read"}
