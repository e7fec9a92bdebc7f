import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.data import sources


def make_folder(root, ids=("a", "b", "c"), size=(6, 8)):
  """A tiny data set: palette PNG masks of values 0, 1, 2 and 11, JPEG images."""
  for folder in ("images/train", "labels/train"):
    (root / folder).mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in ids:
    Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(root / f"images/train/{name}.jpg")
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
  options = dict(image_pattern="images/train/{id}.jpg", label_pattern="labels/train/{id}.png", num_classes=3, label_map={11: 255})
  return sources.FolderSource(root, ids, **{**options, **changes})


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
  assert source.label(1)[0, :5].tolist() == [0, 1, 2, 255, 0]  # the palette's colours play no part


def test_list_file_and_ids_are_the_same(tmp_path):
  make_folder(tmp_path)
  (tmp_path / "list.txt").write_bytes(b"c\r\na")
  assert open_folder(tmp_path, tmp_path / "list.txt").ids == ("c", "a")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
  Image.new("RGB", (5, 4), (102, 102, 102)).convert(mode).save(tmp_path / "x.png")
  source = sources.image_folder(tmp_path)
  np.testing.assert_array_equal(source.image(0), np.full((4, 5, 3), 102))


def test_exif_orientation_is_not_applied(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # "rotate by 90 degrees to view"
  Image.new("RGB", (5, 4)).save(tmp_path / "x.jpg", exif=exif)
  source = sources.image_folder(tmp_path)
  assert source.image(0).shape[:2] == source.size(0) == (4, 5)


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
  text = message(lambda: open_folder(make_folder(tmp_path), label_map={11: 3, 300: 0}))
  assert "{11: 3}" in text and "{300: 0}" in text


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
  for part in ("list.txt", "4 of 6 image files absent", "images/train/w.jpg", "5 of 6 label files absent", "holds e.g. a.jpg"):
    assert part in text


def test_wrong_pattern_names_the_nearest_existing_one(tmp_path):
  text = message(lambda: open_folder(make_folder(tmp_path), image_pattern="images/val/{id}.png"))
  assert "'images/train/{id}.jpg'" in text


def test_lines_of_image_mask_pairs_are_explained(tmp_path):
  text = message(lambda: open_folder(make_folder(tmp_path), ("images/train/a.jpg labels/train/a.png",)))
  assert "pairs" in text


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
  for part in ("labels/train/a.png", "2, 11", "0..1 and 255", "label_map", "num_classes"):
    assert part in text


def test_sixteen_bit_masks_are_read_or_refused_by_value(tmp_path):
  make_folder(tmp_path)
  path = tmp_path / "labels/train/a.png"
  Image.fromarray(np.full((6, 8), 2, np.uint16)).save(path)
  assert np.all(open_folder(tmp_path).label(0) == 2)
  Image.fromarray(np.full((6, 8), 1000, np.uint16)).save(path)
  assert "1000" in message(lambda: open_folder(tmp_path).label(0))


def test_color_coded_masks_are_refused(tmp_path):
  make_folder(tmp_path)
  Image.new("RGB", (8, 6)).save(tmp_path / "labels/train/a.png")
  text = message(lambda: open_folder(tmp_path).label(0))
  assert "labels/train/a.png" in text and "3 channels" in text


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
  assert "did you mean" in message(lambda: sources.Subset(open_folder(tmp_path, ("a", "b")), ("aa",)))
