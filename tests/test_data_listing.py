import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import build, checks
from pseudoseg_jax.data import listing, sources
from pseudoseg_jax.options import FolderData

COMPOSED = "caf\u00e9"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def put(root, *paths, size=(6, 8)):
  """Images of their own grey levels, and masks of class 1 where "mask" is in the path; any other
  suffix is a text.
  """
  for path in paths:
    path = root / path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() not in listing.IMAGE_SUFFIXES:
      path.write_text("no image")
    elif "mask" in str(path.relative_to(root)):
      Image.fromarray(np.ones(size, np.uint8)).save(path)
    else:
      Image.fromarray(np.full((*size, 3), sum(map(ord, path.name)) % 256, np.uint8)).save(path)
  return root


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


def below(root, paths):
  return [path.relative_to(root).as_posix() for path in paths]


def folder(root, **options):
  """The data of a config of configs/folder.py's form."""
  if not (root / "classes.txt").exists():
    (root / "classes.txt").write_text("ground\nthing\n")
  given = {
    "image_pattern": "images/{id}.jpg",
    "label_pattern": "masks/{id}.png",
    "split": "labeled.txt",
    "eval_list": "val.txt",
  }
  return FolderData(root=str(root), classes="classes.txt", **{**given, **options})


def lists(root, labeled, evaluated):
  (root / "labeled.txt").write_text("".join(f"{line}\n" for line in labeled), encoding="utf-8")
  (root / "val.txt").write_text("".join(f"{line}\n" for line in evaluated), encoding="utf-8")


def test_all_endings_and_folders_are_listed_by_name_and_hidden_files_are_not(tmp_path):
  put(
    tmp_path,
    "b.jpg",
    "a.JPG",
    "c.jpeg",
    "z/y/d.PNG",
    "z/e.TIFF",
    "x.jpg/f.webp",
    "Thumbs.db",
    "notes.txt",
  )
  put(
    tmp_path,
    "._b.jpg",
    ".DS_Store",
    ".cache/g.jpg",
    "__MACOSX/._a.jpg",
    "__MACOSX/h.jpg",
    "z/.i.png",
    "@eaDir/a.JPG",
  )
  wanted = ["a.JPG", "b.jpg", "c.jpeg", "x.jpg/f.webp", "z/e.TIFF", "z/y/d.PNG"]
  assert below(tmp_path, listing.image_files(tmp_path)) == wanted
  assert below(tmp_path, listing.image_files(str(tmp_path))) == wanted
  assert listing.image_files(tmp_path / "gone") == [] == listing.image_files(tmp_path / "b.jpg")
  assert sources.image_folder(tmp_path).ids == tuple(wanted)


def test_a_folder_that_is_hidden_itself_may_be_asked_for(tmp_path):
  put(tmp_path, ".cache/a.jpg")
  assert below(tmp_path, listing.image_files(tmp_path / ".cache")) == [".cache/a.jpg"]


def test_links_are_followed_and_no_folder_is_entered_twice(tmp_path):
  put(tmp_path, "elsewhere/a.jpg", "elsewhere/deep/b.jpg", "images/real/c.jpg")
  images = tmp_path / "images"
  (images / "a_link").symlink_to(tmp_path / "elsewhere")  # leads out of the folder
  (images / "b_link").symlink_to("real")  # before "real" by name, yet the real folder's paths count
  (images / "c_link").symlink_to(tmp_path / "elsewhere" / "deep")
  (images / "real" / "loop").symlink_to(images)
  (images / "d.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
  wanted = ["images/a_link/a.jpg", "images/a_link/deep/b.jpg", "images/d.jpg", "images/real/c.jpg"]
  assert below(tmp_path, listing.image_files(images)) == wanted
  assert listing.fitting(tmp_path, "images/{id}.jpg").ids == (
    "a_link/a",
    "a_link/deep/b",
    "d",
    "real/c",
  )


def test_what_cannot_be_followed_is_named(tmp_path, monkeypatch):
  put(tmp_path, "a.jpg", "closed/b.jpg", "c.gif", "list.txt")
  (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
  (tmp_path / "self").symlink_to("self")
  os.mkfifo(tmp_path / "pipe.jpg")
  scandir = os.scandir

  def denied(path):
    if str(path).endswith("closed"):
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", denied)
  left_out = []
  assert below(tmp_path, listing.image_files(tmp_path, left_out)) == ["a.jpg"]
  found = {path.name: why for path, why in left_out}
  assert sorted(found) == ["c.gif", "closed", "gone.jpg", "pipe.jpg", "self"]
  assert "nowhere.jpg" in found["gone.jpg"] and "Permission denied" in found["closed"]


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_is_that_of_the_names_whatever_the_system_says(tmp_path, monkeypatch, order):
  put(tmp_path, "b/a.jpg", "b-a.jpg", "a.jpg", "B.jpg", "c/a.jpg")
  (tmp_path / "d").symlink_to("c")
  (tmp_path / "C").symlink_to("b")
  scandir = os.scandir

  class Shuffled(list):
    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

  monkeypatch.setattr(
    os,
    "scandir",
    lambda path: Shuffled(sorted(scandir(path), key=lambda entry: entry.name)[::order]),
  )
  assert below(tmp_path, listing.walk(tmp_path)) == [
    "B.jpg",
    "a.jpg",
    "b-a.jpg",
    "b/a.jpg",
    "c/a.jpg",
  ]


PATTERNS = [
  # files, pattern, ids
  (
    ["images/a.jpg", "images/b.JPG", "images/c.jpeg", "images/d.JPEG"],
    "images/{id}.jpg",
    ("a", "b", "c", "d"),
  ),
  (["images/a.tif", "images/b.TIFF"], "images/{id}.tiff", ("a", "b")),
  (["a_x.PNG", "b_x.png", "c_X.png"], "{id}_x.png", ("a", "b")),
  (
    ["i/a.jpg", "i/below/b.jpg", "i/below/deep/c.jpg"],
    "i/{id}.jpg",
    ("a", "below/b", "below/deep/c"),
  ),
  (
    ["i/train/u/x.png", "i/train/v/x.PNG", "i/train/x.png", "i/test/w/x.png"],
    "i/train/{id}/x.png",
    ("u", "v"),
  ),
  (["i/img_1.jpg", "i/img_2.jpg", "i/other.jpg"], "i/img_{id}.jpg", ("1", "2")),
  # in the order of the paths.
  (["i/a.b.jpg", "i/[x]*.jpg", "i/a.jpg"], "i/{id}.jpg", ("[x]*", "a.b", "a")),
  ([f"i/{DECOMPOSED}.jpg"], "i/{id}.jpg", (COMPOSED,)),
  ([f"{DECOMPOSED}/a.jpg"], f"{COMPOSED}/{{id}}.jpg", ("a",)),
  (["i/a", "i/b.jpg"], "i/{id}", ("a", "b.jpg")),
]


@pytest.mark.parametrize(("files", "pattern", "ids"), PATTERNS)
def test_ids_of_a_pattern_lead_back_to_the_files(tmp_path, monkeypatch, files, pattern, ids):
  put(tmp_path, *files)
  assert listing.fitting(tmp_path, pattern).ids == ids
  for name in ids:
    (path,) = listing.Files().find(tmp_path / pattern.replace("{id}", name))
    assert path.is_file() and path.relative_to(tmp_path).as_posix() in files
  monkeypatch.chdir(tmp_path)
  assert listing.fitting(".", pattern).ids == listing.fitting("", pattern).ids == ids
  assert listing.fitting("elsewhere", str(tmp_path / pattern)).ids == ids


def test_a_file_belongs_to_the_narrower_of_two_patterns():
  root = pathlib.Path("/data")
  rank = lambda pattern: listing.Pattern(root, pattern).rank
  for wide, narrow in [
    ("{id}.png", "masks/{id}.png"),
    ("{id}.png", "{id}_mask.png"),
    ("images/{id}.jpg", "images/unlabeled/{id}"),
    ("img_{id}.png", "{id}_mask.png"),
    ("{id}_leftImg8bit.png", "x/{id}"),
  ]:
    assert rank(wide) < rank(narrow)


def test_masks_beside_and_below_images_are_no_images(tmp_path):
  put(tmp_path, "a.png", "b.PNG", "a_mask.png", "masks/a.png", "masks/b.PNG", "deep/c.png")
  assert listing.fitting(tmp_path, "{id}.png", ["masks/{id}.png", "{id}_mask.png"]) == (
    ("a", "b", "deep/c"),
    (),
  )
  assert listing.fitting(tmp_path, "{id}.png", ["masks/{id}.png"]).ids == (
    "a",
    "a_mask",
    "b",
    "deep/c",
  )


def test_what_a_pattern_leaves_out_is_named(tmp_path):
  put(
    tmp_path,
    "images/a.jpg",
    "images/b.png",
    "images/deep/c.webp",
    "images/d.heic",
    "images/notes.txt",
    "masks/a.png",
  )
  put(tmp_path, "images/a.JPEG", "images/e.JPG", "images/e.jpeg")
  (tmp_path / "images/f.jpg").symlink_to("gone.jpg")
  found = listing.fitting(tmp_path, "images/{id}.jpg", ["masks/{id}.png"])
  assert found.ids == ("a", "e")
  why = {path.name: why for path, why in found.left_out}
  assert sorted(why) == ["a.JPEG", "b.png", "c.webp", "d.heic", "f.jpg"]
  assert (
    why["a.JPEG"] == "a.jpg has the same id"
    and "images/{id}.jpg" in why["b.png"]
    and "gone.jpg" in why["f.jpg"]
  )


def test_an_id_of_several_files_is_that_of_the_exact_name_or_refused(tmp_path):
  put(tmp_path, "images/a.jpg", "images/a.JPG", "images/b.JPG", "images/b.jpeg")
  files = listing.Files()
  assert files.find(tmp_path / "images/a.jpg") == [tmp_path / "images/a.jpg"]
  assert below(tmp_path, files.find(tmp_path / "images/b.jpg")) == ["images/b.JPG", "images/b.jpeg"]
  text = message(
    lambda: sources.FolderSource(tmp_path, ["a", "b"], image_pattern="images/{id}.jpg")
  )
  assert "images/b.jpg: got several files of this id: b.JPG, b.jpeg" in text and "a.jpg" not in text
  (tmp_path / "images/b.JPG").unlink()
  assert len(sources.FolderSource(tmp_path, ["a", "b"], image_pattern="images/{id}.jpg")) == 2


@pytest.mark.parametrize(
  ("names", "line", "image", "mask"),
  [
    (("images/a.JPG", "masks/a.PNG"), "a", "images/a.JPG", "masks/a.PNG"),
    (("images/a.jpeg", "masks/a.png"), "images/a.jpg", "images/a.jpeg", "masks/a.png"),
    (("images/a.JPG", "masks/a.PNG"), "images/a.JPG masks/a.png", "images/a.JPG", "masks/a.PNG"),
    (
      (f"images/{DECOMPOSED}.jpg", f"masks/{DECOMPOSED}.png"),
      COMPOSED,
      f"images/{DECOMPOSED}.jpg",
      f"masks/{DECOMPOSED}.png",
    ),
    (
      (f"images/{COMPOSED}.JPG", f"masks/{DECOMPOSED}.png"),
      DECOMPOSED,
      f"images/{COMPOSED}.JPG",
      f"masks/{DECOMPOSED}.png",
    ),
    (
      (f"images/{DECOMPOSED}/a.jpg", "masks/a.png"),
      f"images/{COMPOSED}/a.jpg masks/a.png",
      f"images/{DECOMPOSED}/a.jpg",
      "masks/a.png",
    ),
  ],
)
def test_names_of_lists_find_the_files_in_any_spelling(tmp_path, names, line, image, mask):
  put(tmp_path, *names, "images/v.jpg", "masks/v.png", "images/u.JPG")
  lists(tmp_path, [line], ["v"])
  data = build.build_data(folder(tmp_path))
  assert (data.labeled.image_path(0), data.labeled.label_path(0)) == (
    tmp_path / image,
    tmp_path / mask,
  )
  assert (
    data.unlabeled.ids == ("u",)
    and data.labeled.image(0).shape == (6, 8, 3)
    and np.all(data.labeled.label(0) == 1)
  )


def test_data_of_mixed_endings_are_whole_and_what_is_left_out_is_told(tmp_path, caplog):
  put(
    tmp_path,
    *(f"images/s{number}.jpg" for number in range(4)),
    "images/s4.JPG",
    "images/s5.jpeg",
    "images/sub/s6.jpg",
  )
  put(
    tmp_path,
    "images/._s3.jpg",
    "images/.DS_Store",
    "images/Thumbs.db",
    "images/p.png",
    *(f"masks/s{n}.png" for n in range(6)),
  )
  lists(tmp_path, ["s0", "s4"], ["s5"])
  data = build.build_data(folder(tmp_path))
  assert data.labeled.ids == ("s0", "s4") and data.evaluated.ids == ("s5",)
  assert data.unlabeled.ids == ("s1", "s2", "s3", "sub/s6")
  assert data.split.endswith("2 labeled, 4 unlabeled; 1 file not used")
  (told,) = [record.getMessage() for record in caplog.records]
  assert f"{tmp_path}/images/p.png (does not fit images/{{id}}.jpg)" in told


def test_files_that_a_list_names_are_not_left_out(tmp_path):
  put(
    tmp_path,
    "images/a.png",
    "images/b.jpg",
    "images/c.jpg",
    "masks/a.png",
    "masks/c.png",
    "images/d.png",
  )
  lists(tmp_path, ["images/a.png"], ["c"])
  config = folder(tmp_path)
  assert below(tmp_path, [path for path, _ in build.left_out(config)]) == ["images/d.png"]
  assert build.build_data(config).labeled.ids == ("a",)


def test_evaluated_and_unlabeled_folders_inside_of_the_images_folder_are_not_trained_on(tmp_path):
  put(
    tmp_path,
    *(f"{n}.jpg" for n in "abcd"),
    *(f"masks/{n}.png" for n in "abcd"),
    "val/v.jpg",
    "valmasks/v.png",
    "more/u.jpg",
  )
  patterns = {
    "image_pattern": "{id}.jpg",
    "eval_image_pattern": "val/{id}.jpg",
    "eval_label_pattern": "valmasks/{id}.png",
  }
  data = build.build_data(
    folder(tmp_path, split="1_2", unlabeled_folder="more", eval_list="", **patterns)
  )
  assert len(data.labeled) == 2 and {*data.labeled.ids} < {*"abcd"}
  assert (
    data.unlabeled.ids == ("u.jpg",)
    and data.evaluated.ids == ("v",)
    and data.split.endswith("1 unlabeled")
  )


def test_a_root_in_the_home_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  put(
    tmp_path / "data", "images/a.jpg", "images/b.jpg", "images/v.jpg", "masks/a.png", "masks/v.png"
  )
  put(tmp_path, "more/u.jpg")
  lists(tmp_path / "data", ["a"], ["v"])
  (tmp_path / "data/classes.txt").write_text("ground\nthing\n")
  (tmp_path / "my_list.txt").write_text("a\n")
  config = folder(tmp_path / "data", split="~/my_list.txt", unlabeled_folder="~/more")
  data = build.build_data(dataclasses.replace(config, root="~/data"))
  assert data.labeled.ids == ("a",) and data.unlabeled.ids == ("u.jpg",)
  elsewhere = dataclasses.replace(config, root="~/dat")
  assert f"{tmp_path}/dat" in message(lambda: build.build_data(elsewhere))


@pytest.mark.parametrize(
  ("line", "make", "parts"),
  [
    (
      "images/sub.jpg",
      lambda root: (root / "images/sub.jpg").mkdir(),
      ["images/sub.jpg", "got a folder"],
    ),
    (
      "a",
      lambda root: (root / "images/a.jpg").symlink_to("gone.jpg"),
      ["images/a.jpg", "a link to gone.jpg, which is not"],
    ),
    ("a", lambda root: None, ["labeled.txt", "1 of 1 image files absent"]),
  ],
)
def test_the_cause_of_an_absent_file_is_told(tmp_path, line, make, parts):
  put(
    tmp_path,
    "images/v.jpg",
    "masks/v.png",
    "masks/a.png",
    "masks/sub.png",
    "images/u.jpg",
    "images/z.jpg",
  )
  make(tmp_path)
  lists(tmp_path, [line], ["v"])
  (tmp_path / "train.txt").write_text(f"{line}\nu\n")
  text = message(lambda: build.build_data(folder(tmp_path, train_list="train.txt")))
  assert all(part in text for part in parts), text


def test_a_pattern_that_no_file_fits_is_told_with_what_lies_there_instead(tmp_path):
  put(tmp_path, "images/readme.txt", "masks/a.png")
  (tmp_path / "images/a.jpg").symlink_to("/gone/a.jpg")
  lists(tmp_path, ["a"], ["a"])
  text = message(lambda: build.build_data(folder(tmp_path)))
  assert f"{tmp_path}/images/a.jpg: a link to /gone/a.jpg, which is not there" in text


def test_the_pattern_that_is_named_in_place_of_one_that_no_file_fits_works(tmp_path):
  put(
    tmp_path,
    "images/a.TIF",
    "images/b.tif",
    "images/v.tif",
    "masks/a.png",
    "masks/v.png",
    "masks/b.png",
  )
  lists(tmp_path, ["a"], ["v"])
  text = message(lambda: build.build_data(folder(tmp_path)))
  assert f"{tmp_path}/images holds a.TIF, b.tif, v.tif" in text
  pattern = text.rpartition(" it is '")[2].rstrip("'")
  assert len(build.build_data(folder(tmp_path, image_pattern=pattern)).unlabeled) == 1
  (tmp_path / "val.txt").write_text("v\nw\n")
  text = message(
    lambda: build.build_data(
      folder(tmp_path, image_pattern=pattern, label_pattern="labels/{id}.png")
    )
  )
  label_pattern = text.partition("for 'a' there is label_pattern '")[2].partition("'")[0]
  (tmp_path / "val.txt").write_text("v\n")
  assert build.build_data(
    folder(tmp_path, image_pattern=pattern, label_pattern=label_pattern)
  ).labeled.ids == ("a",)


def test_names_that_are_not_utf8_are_left_out_and_named(tmp_path):
  put(tmp_path, "images/a.jpg")
  name = os.fsdecode(b"caf\xe9.jpg")
  (tmp_path / "images" / name).write_bytes(b"")
  found = listing.fitting(tmp_path, "images/{id}.jpg")
  assert found.ids == ("a",) and found.left_out == (
    (tmp_path / "images" / name, "its name is not UTF-8"),
  )
  assert found.left_out[0].shown_path() == f"{tmp_path}/images/caf\\udce9.jpg"  # can be printed


@pytest.fixture(params=["tags_from_masks", "boxes_from_masks"])
def launcher(request):
  path = pathlib.Path(__file__).parents[1] / "launch" / f"{request.param}.py"
  spec = importlib.util.spec_from_file_location(request.param, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_weak_labels_are_read_off_masks_of_a_folder_of_their_own(tmp_path, launcher, capsys):
  put(
    tmp_path,
    "images/a.jpg",
    "images/v.jpg",
    "masks/a.png",
    "masks/v.png",
    "more/u1.jpg",
    "more/deep/u2.JPG",
  )
  put(tmp_path, "more_masks/u1.png", "more_masks/deep/u2.PNG")
  lists(tmp_path, ["a"], ["v"])
  (tmp_path / "classes.txt").write_text("ground\nthing\n")
  config = pathlib.Path(__file__).parents[1] / "configs" / "folder.py"
  command = [
    f"--config={config}:method=supervised",
    f"--config.data.root={tmp_path}",
    "--config.data.unlabeled_folder=more",
  ]
  command += [f"--out={tmp_path / 'out'}"]
  assert launcher.main(command) == 2
  told = capsys.readouterr().err
  assert (
    "2 of 2 label files absent" in told
    and "masks of the unlabeled images" in told
    and "image file" not in told
  )
  remedy = told.partition("there is --masks '")[2].partition("'")[0]
  assert remedy.lower() == "more_masks/{id}.png"
  assert launcher.main([*command, f"--masks={remedy}"]) == 0
  written = (tmp_path / "out").read_text()
  assert all(
    name in written
    for name in ("thing", "u1.jpg", "deep/u2.JPG")
    if launcher.__name__ == "tags_from_masks"
  )
  assert all(
    name in written
    for name in ("thing", '"u1', '"deep/u2')
    if launcher.__name__ == "boxes_from_masks"
  )
  (tmp_path / "more_masks/u1.png").write_bytes(b"broken")
  assert launcher.main([*command, f"--masks={remedy}"]) == 2
  told = capsys.readouterr().err
  assert f"mask {tmp_path}/more_masks/u1.png" in told and "Traceback" not in told
  assert launcher.main([*command, "--masks=more_masks"]) == 2 and "{id}" in capsys.readouterr().err


IN_FOLDER = "from pseudoseg_jax.data import listing; print(ascii(listing.fitting({root!r}, 'images/{{id}}.jpg').ids))"
BY_LIST = (
  "from pseudoseg_jax.data import sources;"
  "sources.FolderSource({root!r}, {root!r} + '/list.txt', image_pattern='images/{{id}}.jpg')"
)


@pytest.mark.parametrize(
  ("script", "remedy"),
  [(IN_FOLDER, ""), (BY_LIST, ""), (IN_FOLDER, "PYTHONUTF8=1"), (IN_FOLDER, "LC_ALL=C.UTF-8")],
)
def test_a_locale_that_cannot_spell_a_name_is_told_and_the_remedy_works(tmp_path, script, remedy):
  put(tmp_path, f"images/{COMPOSED}.jpg")
  (tmp_path / "list.txt").write_text(COMPOSED, encoding="utf-8")
  environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  environment |= dict([remedy.split("=")]) if remedy else {}
  command = [sys.executable, "-c", script.format(root=str(tmp_path))]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
  if remedy:
    assert done.returncode == 0 and done.stdout.strip() == ascii((COMPOSED,))
  else:
    assert "InputError" in done.stderr and "set PYTHONUTF8=1 or LC_ALL=C.UTF-8" in done.stderr
