import errno
import io
import json
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from pseudoseg_jax import build, checks, config as configs, prepare
from pseudoseg_jax.data import archives, classes, official_masks
from pseudoseg_jax.evaluation import report

VOC = "VOCdevkit/VOC2012"
ANY_MASK = np.array([[0, 1, 2, 255], [0, 15, 20, 255], [3, 3, 3, 0]], np.uint8)


def encoded(pixels, form="PNG"):
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, form)
  return content.getvalue()


def palette_png(mask):
  return official_masks.png(mask)


def mat(mask):
  """As SBD stores it: struct GTcls with 20 sparse boundary maps, the mask, and the classes in
  it.
  """
  boundaries = np.empty((20, 1), object)
  boundaries[:, 0] = [scipy.sparse.csc_matrix(mask == index) for index in range(1, 21)]
  present = np.unique(mask[mask > 0])[:, None]
  content = io.BytesIO()
  struct = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}
  scipy.io.savemat(content, {"GTcls": struct}, do_compression=True)
  return content.getvalue()


def voc_files():
  files = {
    f"{VOC}/JPEGImages/{name}.jpg": encoded(np.full((3, 4, 3), 10 * index, np.uint8), "JPEG")
    for index, name in enumerate("abcdef")
  }
  files |= {f"{VOC}/SegmentationClass/{name}.png": palette_png(ANY_MASK) for name in "abc"}
  files |= {f"{VOC}/Annotations/{name}.xml": b"<annotation/>" for name in "abcdef"}
  lists = {"train": "a\nb\n", "val": "c\n", "trainval": "a\nb\nc\n"}
  files |= {
    f"{VOC}/ImageSets/Segmentation/{name}.txt": text.encode() for name, text in lists.items()
  }
  return files | {
    f"{VOC}/ImageSets/Main/cat_train.txt": b"a 1\n",
    f"{VOC}/SegmentationObject/a.png": palette_png(ANY_MASK),
  }


def sbd_files():
  masks = {
    name: mat(np.full((3, 4), index, np.uint8)) for index, name in enumerate("acde", start=1)
  }
  files = {f"benchmark_RELEASE/dataset/cls/{name}.mat": content for name, content in masks.items()}
  files |= {f"benchmark_RELEASE/dataset/img/{name}.jpg": b"not VOC's own" for name in "acde"}
  files |= {
    "benchmark_RELEASE/dataset/train.txt": b"a\ne\n",
    "benchmark_RELEASE/dataset/val.txt": b"c\nd\n",
  }
  return files | {"benchmark_RELEASE/README": b"read me"}


def make_tar(path, files, mode="w"):
  with tarfile.open(path, mode) as archive:
    for name, content in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      archive.addfile(entry, io.BytesIO(content))
  return path


def make_zip(path, files):
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def make_folder(path, files):
  for name, content in files.items():
    report.write_atomically(path / name, content)
  return path


@pytest.fixture
def voc_arguments(tmp_path):
  voc = make_tar(tmp_path / "voc.tar", voc_files())
  sbd = make_tar(tmp_path / "benchmark.tgz", sbd_files(), "w:gz")
  return ["voc", f"--voc={voc}", f"--sbd={sbd}", f"--out={tmp_path / 'out'}", "--any_count"]


def snapshot(root):
  return {
    path.relative_to(root).as_posix(): path.read_bytes()
    for path in root.rglob("*")
    if path.is_file()
  }


def without_manifest(root):
  return {name: content for name, content in snapshot(root).items() if not name.endswith(".tsv")}


def test_voc_and_sbd_become_the_tree_of_the_voc_config(tmp_path, voc_arguments, capsys):
  assert prepare.main(voc_arguments) == 0
  root = tmp_path / "out" / VOC
  official = {
    name: content
    for name, content in voc_files().items()
    if "Main" not in name and "Object" not in name
  }
  written = without_manifest(tmp_path / "out")
  assert {name: written[name] for name in official} == official  # bytes as they were
  assert (root / "ImageSets/Segmentation/train_aug.txt").read_text() == "a\nb\nd\ne\n"
  masks = {path.stem: Image.open(path) for path in (root / "SegmentationClassAug").iterdir()}
  assert sorted(masks) == list("abcde")
  for name in "abc":  # VOC's own masks, also where SBD has one
    assert (root / f"SegmentationClassAug/{name}.png").read_bytes() == palette_png(ANY_MASK)
  assert np.all(np.asarray(masks["d"]) == 3) and np.all(np.asarray(masks["e"]) == 4)
  assert (
    masks["d"].mode == "P"
    and masks["d"].getpalette()[:63] == classes.voc_palette(21).ravel().tolist()
  )
  said = capsys.readouterr().out
  assert (
    "train_aug 4" in said
    and f"main --config=configs/voc.py --config.data.root={tmp_path / 'out'}" in said
  )


@pytest.mark.parametrize("recipe", ["cps", "pseudoseg"])
def test_both_forms_open_as_the_same_data_by_the_voc_config(tmp_path, voc_arguments, recipe):
  assert prepare.main([*voc_arguments, "--format=tfds"]) == 0
  (tmp_path / "labeled.txt").write_text("a\n")
  argument = f"method=supervised,recipe={recipe},split={tmp_path / 'labeled.txt'}"
  opened = [
    build.build_data(
      configs.frozen(
        configs.load(f"configs/voc.py:{argument},form={form}", {"data.root": str(tmp_path / root)})
      ).data
    )
    for form, root in (("folder", "out"), ("tfds", "out/tfds"))
  ]
  ids = {
    "labeled": ("a",),
    "unlabeled": tuple("abde" if recipe == "pseudoseg" else "bde"),
    "evaluated": ("c",),
  }
  for role, names in ids.items():
    folder, tfds = (getattr(data, role) for data in opened)
    assert folder.ids == tfds.ids == names
    for row in range(len(names)):
      np.testing.assert_array_equal(folder.image(row), tfds.image(row))
      if role != "unlabeled":
        np.testing.assert_array_equal(folder.label(row), tfds.label(row))


def test_official_counts_are_checked_all_at_once(voc_arguments, capsys):
  assert prepare.main(voc_arguments[:-1]) == 2
  said = capsys.readouterr().err
  counts = (
    "VOC train: got 2; allowed: 1464",
    "SBD train: got 2; allowed: 8498",
    "train_aug: got 4; allowed: 10582",
  )
  for part in (*counts, "--any_count"):
    assert part in said


def test_an_image_that_only_sbd_has_is_taken_from_there(tmp_path, voc_arguments):
  files = voc_files()
  del files[f"{VOC}/JPEGImages/d.jpg"]
  make_tar(tmp_path / "voc.tar", files)
  assert prepare.main(voc_arguments) == 0
  assert (tmp_path / "out" / VOC / "JPEGImages/d.jpg").read_bytes() == b"not VOC's own"


def test_a_listed_image_without_mask_is_told(tmp_path, voc_arguments, capsys):
  files = sbd_files()
  del files["benchmark_RELEASE/dataset/cls/d.mat"]
  make_tar(tmp_path / "benchmark.tgz", files, "w:gz")
  assert prepare.main(voc_arguments) == 2
  assert "SegmentationClassAug/d.png" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["voc.tar", "benchmark.tgz"])
def test_an_archive_without_its_lists_is_told(tmp_path, voc_arguments, capsys, name):
  files = voc_files() if name == "voc.tar" else sbd_files()
  make_tar(
    tmp_path / name,
    {path: content for path, content in files.items() if not path.endswith("/val.txt")},
  )
  assert prepare.main(voc_arguments) == 2
  assert "val.txt" in capsys.readouterr().err


def test_extracted_folders_are_as_good_as_archives(tmp_path, voc_arguments):
  assert prepare.main(voc_arguments) == 0
  voc, sbd = make_folder(tmp_path / "voc", voc_files()), make_folder(tmp_path / "sbd", sbd_files())
  inner = voc / VOC  # any level will do
  assert (
    prepare.main(
      ["voc", f"--voc={inner}", f"--sbd={sbd}", f"--out={tmp_path / 'again'}", "--any_count"]
    )
    == 0
  )
  assert without_manifest(tmp_path / "again") == without_manifest(tmp_path / "out")


def failing_write(monkeypatch, after, error):
  """Lets `after` files through; then each write raises."""
  left = iter(range(after))
  original = report.write_atomically

  def write(path, content):
    if not str(path).endswith(".tsv") and next(left, None) is None:
      raise error
    original(path, content)

  monkeypatch.setattr(report, "write_atomically", write)


@pytest.mark.parametrize("after", [1, 7, 20])
def test_interrupted_and_started_again_ends_as_undisturbed(
  tmp_path, voc_arguments, monkeypatch, capsys, after
):
  with monkeypatch.context() as patch:
    failing_write(patch, after, KeyboardInterrupt())
    assert prepare.main(voc_arguments) == 130
  out = tmp_path / "out"
  manifest = out / "voc.manifest.tsv"
  manifest.write_text(manifest.read_text() + "0123\t1")  # killed within a line
  (out / f".x.png.{'0' * 32}.part").write_bytes(b"half")  # and within a file
  before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
  capsys.readouterr()
  assert prepare.main(voc_arguments) == 0
  assert "were there already" in capsys.readouterr().out
  assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())
  voc_arguments[3] = f"--out={tmp_path / 'undisturbed'}"
  assert prepare.main(voc_arguments) == 0
  assert without_manifest(out) == without_manifest(tmp_path / "undisturbed")
  assert sorted(manifest.read_text().split("\n")) == sorted(
    (tmp_path / "undisturbed/voc.manifest.tsv").read_text().split("\n")
  )


def test_full_disk_names_the_file_and_the_same_command_goes_on(voc_arguments, monkeypatch, capsys):
  with monkeypatch.context() as patch:
    failing_write(patch, 4, OSError(errno.ENOSPC, "No space left on device"))
    assert prepare.main(voc_arguments) == 1
  said = capsys.readouterr().err
  assert "No space left on device" in said and f"{VOC}/JPEGImages/" in said and "goes on" in said
  assert prepare.main(voc_arguments) == 0


def test_verify_finds_and_mends_what_was_changed(tmp_path, voc_arguments, capsys):
  assert prepare.main(voc_arguments) == 0
  verify = ["voc", f"--out={tmp_path / 'out'}", "--verify"]
  assert prepare.main(verify) == 0
  whole = snapshot(tmp_path / "out")
  changed, gone = (
    tmp_path / "out" / VOC / "JPEGImages/a.jpg",
    tmp_path / "out" / VOC / "SegmentationClassAug/d.png",
  )
  changed.write_bytes(changed.read_bytes()[:-1] + b"!")  # the same size
  gone.unlink()
  capsys.readouterr()
  assert prepare.main(verify) == 2
  said = capsys.readouterr()
  assert str(changed) in said.err and str(gone) in said.err and "2 gone or changed" in said.out
  assert prepare.main([*voc_arguments, "--verify"]) == 0
  assert {
    name: content for name, content in snapshot(tmp_path / "out").items() if "tsv" not in name
  } == {name: content for name, content in whole.items() if "tsv" not in name}


def test_verify_of_nothing_is_told(tmp_path, capsys):
  assert prepare.main(["voc", f"--out={tmp_path}", "--verify"]) == 2
  assert "no finished file" in capsys.readouterr().err


@pytest.mark.parametrize(
  "name",
  ["../evil.jpg", "VOCdevkit/../../VOC2012/JPEGImages/x.jpg", "/tmp/VOC2012/JPEGImages/x.jpg"],
)
@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path, make, name):
  path = make(tmp_path / "archive", {"VOCdevkit/VOC2012/JPEGImages/a.jpg": b"a", name: b"evil"})
  with pytest.raises(checks.InputError, match="not safe") as error:
    list(archives.members(path, bool))
  assert name in str(error.value) and str(path) in str(error.value)


def test_links_in_archives_are_refused(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as archive:
    entry = tarfile.TarInfo("JPEGImages/a.jpg")
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(entry)
  with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
    entry = zipfile.ZipInfo("JPEGImages/a.jpg")
    entry.external_attr = 0o120777 << 16
    archive.writestr(entry, "/etc/passwd")
  for path in (tmp_path / "a.tar", tmp_path / "a.zip"):
    with pytest.raises(checks.InputError, match="a link"):
      list(archives.members(path, bool))


def test_whole_archives_after_partial_ones_replace_their_lists(tmp_path, voc_arguments):
  partial = voc_files() | {
    f"{VOC}/ImageSets/Segmentation/train.txt": b"a\n",
    f"{VOC}/SegmentationClass/a.png": b"short",
  }
  make_tar(tmp_path / "voc.tar", partial)
  assert prepare.main(voc_arguments) == 0
  make_tar(tmp_path / "voc.tar", voc_files())
  assert prepare.main(voc_arguments) == 0
  root = tmp_path / "out" / VOC
  assert (root / "ImageSets/Segmentation/train_aug.txt").read_text() == "a\nb\nd\ne\n"
  assert (root / "SegmentationClassAug/a.png").read_bytes() == palette_png(ANY_MASK)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["tar", "tgz", "zip"])
def test_truncated_archives_are_named(tmp_path, form, share):
  noise = np.random.default_rng(0)
  files = {f"JPEGImages/{index}.jpg": noise.bytes(5000) for index in range(20)}
  path = tmp_path / f"cut.{form}"
  make_zip(path, files) if form == "zip" else make_tar(
    path, files, "w:gz" if form == "tgz" else "w"
  )
  path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
  with pytest.raises(checks.InputError) as error:
    for member in archives.members(path, bool):
      assert member.read() == files[member.name]  # what is handed out is whole
  assert str(path) in str(error.value) and "fetch it anew" in str(error.value)


def test_a_damaged_member_of_a_zip_is_told(tmp_path):
  path = make_zip(tmp_path / "a.zip", {"train2017/a.jpg": b"x" * 1000})
  path.write_bytes(path.read_bytes().replace(b"xxxx", b"xxyx", 1))
  with pytest.raises(checks.InputError, match="CRC"):
    [member.read() for member in archives.members(path, bool)]


def test_wrong_and_missing_archives_are_told(tmp_path, voc_arguments, capsys):
  other = make_zip(tmp_path / "other.zip", {"readme.txt": b""})
  assert prepare.main([voc_arguments[0], f"--voc={other}", *voc_arguments[2:]]) == 2
  assert "JPEGImages/ID.jpg" in capsys.readouterr().err
  (tmp_path / "text.tar").write_text("no archive")
  assert prepare.main([voc_arguments[0], f"--voc={tmp_path / 'text.tar'}", *voc_arguments[2:]]) == 2
  assert "text.tar" in capsys.readouterr().err
  assert (
    prepare.main(["voc", "--voc=gone.tar", "--sbd=gone.tgz", f"--out={tmp_path / 'text.tar'}"]) == 2
  )
  said = capsys.readouterr().err
  assert "gone.tar" in said and "gone.tgz" in said and "--out" in said
  with pytest.raises(SystemExit):
    prepare.main(["voc", f"--out={tmp_path}"])


@pytest.mark.parametrize(
  "content", [b"", b"no mat file", mat(np.full((2, 2), 21, np.uint8)), mat(ANY_MASK % 21)[:-40]]
)
def test_unusable_masks_of_sbd_are_named(content):
  with pytest.raises(checks.InputError, match=r"cls/x\.mat"):
    official_masks.from_sbd(content, "cls/x.mat")


def test_cityscapes_keeps_its_layout_and_its_label_ids(tmp_path):
  frames = [
    ("train", "aachen_000000_000019"),
    ("val", "lindau_000000_000019"),
    ("test", "berlin_000000_000019"),
  ]
  images = {
    f"leftImg8bit/{split}/{frame[:-14]}/{frame}_leftImg8bit.png": frame.encode()
    for split, frame in frames
  }
  labels = {
    f"gtFine/{split}/{frame[:-14]}/{frame}_gtFine_labelIds.png": split.encode()
    for split, frame in frames
  }
  unused = {name.replace("labelIds", "color"): b"" for name in labels} | {"license.txt": b""}
  extra = {"leftImg8bit/train_extra/bad-honnef/bad-honnef_000000_000000_leftImg8bit.png": b"extra"}
  parts = {"images": images | {"README": b""}, "labels": labels | unused, "extra": extra}
  given = [f"--{name}={make_zip(tmp_path / f'{name}.zip', files)}" for name, files in parts.items()]
  assert prepare.main(["cityscapes", *given, f"--out={tmp_path / 'out'}", "--any_count"]) == 0
  assert without_manifest(tmp_path / "out") == images | labels | extra


def test_coco_things_are_numbered_without_the_gaps():
  # Category ids 1, 11, 13, 90, a gap's end, stuff, unlabeled.
  stored = np.array([[0, 10, 12, 89, 90, 181, 255]], np.uint8)
  got = np.asarray(Image.open(io.BytesIO(official_masks.from_coco_stuff(encoded(stored), "x.png"))))
  assert got.tolist() == [[1, 11, 12, 80, 0, 0, 255]]
  assert classes.COCO.names[12] == "stop sign"  # category 13 fills the place of 12, which is none


def instances(*annotations):
  ids = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
  categories = [
    {"id": number, "name": name} for number, name in zip(ids, classes.COCO.names[1:], strict=True)
  ]
  images = [{"id": 7, "file_name": "000000000007.jpg", "height": 4, "width": 6}]
  return {"categories": categories[::-1], "images": images, "annotations": list(annotations)}


def box(category, left, right, **changes):
  polygon = [[left, 0, right, 0, right, 4, left, 4]]
  return {"image_id": 7, "category_id": category, "segmentation": polygon, "iscrowd": 0} | changes


def test_first_instance_wins_and_crowds_have_no_opinion():
  pytest.importorskip("pycocotools")
  crowd = {"size": [4, 6], "counts": [0, 24]}  # the whole image
  data = instances(box(1, 0, 6, segmentation=crowd, iscrowd=1), box(90, 0, 2), box(13, 1, 4))
  ((name, draw),) = official_masks.from_coco_instances(json.dumps(data).encode(), "instances.json")
  mask = np.asarray(Image.open(io.BytesIO(draw())))
  assert name == "000000000007" and mask.tolist() == [[80, 80, 12, 12, 255, 255]] * 4


def test_other_annotations_than_cocos_are_told():
  data = instances() | {"categories": [{"id": 1, "name": "thing"}]}
  with pytest.raises(checks.InputError, match="1 categories"):
    list(official_masks.from_coco_instances(json.dumps(data).encode(), "mine.json"))
  for content in (b"{", b"[]", b"{}"):
    with pytest.raises(checks.InputError, match=r"mine\.json"):
      list(official_masks.from_coco_instances(content, "mine.json"))
  with pytest.raises(checks.InputError, match=r"mine\.png"):
    official_masks.from_coco_stuff(encoded(ANY_MASK)[:-30], "mine.png")


def test_without_pycocotools_the_way_out_is_told_before_anything_is_unpacked(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, "pycocotools", None)
  images = make_zip(tmp_path / "train2017.zip", {"train2017/a.jpg": b"a"})
  assert (
    prepare.main(
      ["coco", "--images", str(images), f"--annotations={images}", f"--out={tmp_path / 'out'}"]
    )
    == 2
  )
  said = capsys.readouterr().err
  assert "pip install pycocotools" in said and "--stuff" in said
  assert not without_manifest(tmp_path / "out")


@pytest.mark.parametrize("kind", ["stuff", "annotations"])
def test_coco_becomes_the_tree_of_the_coco_config(tmp_path, kind):
  parts = {f"{part}2017": f"00000000000{number}" for number, part in enumerate(("train", "val"))}
  images = [
    make_zip(tmp_path / f"{part}.zip", {f"{part}/{name}.jpg": name.encode()})
    for part, name in parts.items()
  ]
  files = {
    f"{part}/{name}.png": encoded(np.zeros((4, 6), np.uint8)) for part, name in parts.items()
  }
  if kind == "annotations":
    pytest.importorskip("pycocotools")
    files = {}
    for part, name in parts.items():
      data = instances(box(1, 0, 6))
      data["images"][0]["file_name"] = f"{name}.jpg"
      files[f"annotations/instances_{part}.json"] = json.dumps(data).encode()
  given = make_zip(tmp_path / "masks.zip", files)
  arguments = [
    "coco",
    "--images",
    *map(str, images),
    f"--{kind}={given}",
    f"--out={tmp_path / 'out'}",
    "--any_count",
  ]
  assert prepare.main(arguments) == 0
  written = without_manifest(tmp_path / "out")
  assert sorted(written) == [
    "masks/000000000000.png",
    "masks/000000000001.png",
    *(f"{p}/{n}.jpg" for p, n in parts.items()),
  ]
  assert np.all(np.asarray(Image.open(tmp_path / "out/masks/000000000001.png")) == 1)
