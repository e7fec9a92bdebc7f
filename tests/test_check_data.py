import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import check_data
from pseudoseg_jax.data import audit, sources, synthetic

NAMES = ("sky", "cat", "dog")
HEIGHT, WIDTH = 12, 16


def add(root, name, *, mask="plain", image=None):
  """An image of its own noise and a mask: half sky, half cat by default."""
  noise = np.random.default_rng(list(map(ord, name))).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
  (root / "images").mkdir(exist_ok=True)
  (root / "labels").mkdir(exist_ok=True)
  Image.fromarray(noise if image is None else image).save(root / f"images/{name}.jpg")
  if isinstance(mask, str):
    mask = np.repeat(np.uint8([[0, 1]]), (WIDTH // 2), axis=1).repeat(HEIGHT, axis=0)
  Image.fromarray(mask).save(root / f"labels/{name}.png")


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def open_source(root, *ids):
  return sources.FolderSource(
    root,
    ids,
    image_pattern="images/{id}.jpg",
    label_pattern="labels/{id}.png",
    num_classes=3,
    label_map={11: 255},
    check=False,
  )


def run(root, *ids, role="labeled", **options):
  return audit.audit(role, open_source(root, *ids), NAMES, **({"with_masks": True} | options))


def items(found, kind):
  return {
    item.path: item.detail for finding in found for item in finding.items if finding.kind == kind
  }


def constant(value):
  return np.full((HEIGHT, WIDTH), value, np.uint8)


def test_classes_are_counted_by_pixel_and_by_image(tmp_path):
  add(tmp_path, "a")
  add(tmp_path, "b", mask=constant(0))
  add(tmp_path, "c", mask=np.where(np.arange(WIDTH) < 4, 11, constant(1)))
  found = run(tmp_path, "a", "b", "c")
  assert found.pixels.tolist() == [96 + 192, 96 + 144, 0] and found.images.tolist() == [2, 2, 0]
  assert found.ignored_pixels == 48  # 11 is mapped
  assert found.sizes == {(HEIGHT, WIDTH): 3} and found.usable == [0, 1, 2]
  assert [finding.kind for finding in found.findings] == ["unseen_class"] and items(
    found.findings, "unseen_class"
  ) == {"dog": ""}


def test_every_kind_of_damage_is_found_with_its_path(tmp_path):
  for name in ("whole", "cut", "empty", "absent", "cut_mask", "absent_mask"):
    add(tmp_path, name)
  add(tmp_path, "values", mask=np.where(np.arange(WIDTH) < 1, 7, constant(11)).astype(np.uint8))
  add(tmp_path, "colors", mask=np.zeros((HEIGHT, WIDTH, 3), np.uint8))
  add(tmp_path, "small", mask=np.ones((3, 4), np.uint8))
  add(tmp_path, "ignored", mask=constant(255))
  add(tmp_path, "binary", mask=np.where(np.arange(WIDTH) < 4, 255, constant(0)).astype(np.uint8))
  image, label = (
    (lambda name: tmp_path / f"images/{name}.jpg"),
    (lambda name: tmp_path / f"labels/{name}.png"),
  )
  truncate(image("cut"))
  truncate(label("cut_mask"))
  image("empty").write_bytes(b"")
  image("absent").unlink()
  label("absent_mask").unlink()
  names = [path.stem for path in sorted(label("").parent.glob("*.png"))] + ["absent_mask"]
  found = run(tmp_path, *names)

  images = items(found.findings, "unreadable_image")
  assert set(images) == {str(image(name)) for name in ("cut", "empty", "absent")}
  assert (
    "truncated" in images[str(image("cut"))].lower()
    and "No such file" in images[str(image("absent"))]
  )
  masks = items(found.findings, "unreadable_mask")
  assert set(masks) == {str(label(name)) for name in ("cut_mask", "absent_mask", "colors")}
  assert "got 3 channels" in masks[str(label("colors"))]
  assert items(found.findings, "unknown_value") == {str(label("values")): "7 on 12 pixels"}
  assert items(found.findings, "size_mismatch") == {
    str(label("small")): "3 x 4, the image 12 x 16 (height x width)"
  }
  assert items(found.findings, "only_ignored") == {str(label("ignored")): ""}
  assert items(found.findings, "only_0_and_255") == {str(label("binary")): "25.0 % of it is 255"}
  assert [names[row] for row in found.usable] == ["binary", "ignored", "whole"]
  assert found.digests[names.index("cut")] is None


def test_masks_of_0_and_255_are_an_error_where_there_are_no_others(tmp_path):
  add(tmp_path, "a", mask=np.where(np.arange(WIDTH) < 4, 255, constant(0)).astype(np.uint8))
  add(tmp_path, "b", mask=constant(0))
  (finding, *_) = run(tmp_path, "a", "b").findings
  assert (finding.kind, finding.severity, len(finding.items)) == ("no_class_but_0", "error", 1)


def test_unknown_values_are_told_of_colored_masks_and_of_arrays(tmp_path):
  add(tmp_path, "a", mask=np.uint8([[[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 255, 0]]]))
  np.save(tmp_path / "labels/a.npy", np.full((1, 4), 9, np.uint8))
  options = dict(image_pattern="images/{id}.jpg", num_classes=3, check=False)
  colors = {"label_pattern": "labels/{id}.png", "mask_colors": {(0, 0, 0): 0, (255, 0, 0): 1}}
  for form, detail in (
    (colors, "(0, 255, 0) on 2 pixels"),
    ({"label_pattern": "labels/{id}.npy"}, "9 on 4 pixels"),
  ):
    found = audit.audit(
      "labeled", sources.FolderSource(tmp_path, ["a"], **options, **form), NAMES, with_masks=True
    )
    assert list(items(found.findings, "unknown_value").values()) == [detail]


def test_nothing_readable_is_no_reason_to_stop(tmp_path):
  add(tmp_path, "a")
  for folder, suffix in (("images", "jpg"), ("labels", "png")):
    truncate(tmp_path / folder / f"a.{suffix}")
  found = run(tmp_path, "a")
  assert [finding.kind for finding in found.findings] == [
    "unreadable_image",
    "unreadable_mask",
    "unseen_class",
  ]
  assert not found.usable and not found.sizes


def test_copies_are_found_whatever_their_file(tmp_path):
  for name in ("a", "b"):
    add(tmp_path, name)
  shutil.copy(tmp_path / "images/a.jpg", tmp_path / "images/c.jpg")
  Image.open(tmp_path / "images/a.jpg").save(tmp_path / "images/d.png")
  source = sources.image_folder(tmp_path / "images", check=False)
  found = audit.audit("unlabeled", source, NAMES, with_masks=False)
  same = f"the same pixels as {tmp_path / 'images/a.jpg'}"
  assert items(found.findings, "duplicate") == {
    str(tmp_path / "images/c.jpg"): same,
    str(tmp_path / "images/d.png"): same,
  }


def test_overlaps_of_roles_are_found_by_file_and_by_content(tmp_path):
  for name in "abcdef":
    add(tmp_path, name)
  shutil.copy(tmp_path / "images/a.jpg", tmp_path / "images/e.jpg")
  truncate(tmp_path / "images/b.jpg")  # in two lists, and unreadable
  audits = {
    role: run(tmp_path, *ids, role=role)
    for role, ids in {"labeled": "abc", "unlabeled": "cd", "evaluated": "bdef"}.items()
  }
  found = {
    finding.kind: (finding.severity, dict(finding.items)) for finding in audit.overlaps(audits)
  }
  a, b, c, d, e = (str(tmp_path / f"images/{name}.jpg") for name in "abcde")
  assert found == {
    "labeled_in_evaluated": ("error", {a: f"the same pixels as {e}", b: "in both lists"}),
    "unlabeled_in_evaluated": ("warning", {d: "in both lists"}),
    "labeled_in_unlabeled": ("warning", {c: "in both lists"}),
  }


def test_sources_without_files_overlap_by_content_alone():
  scenes = [synthetic.SyntheticScenes(3, (32, 32), seed=seed) for seed in (0, 1)]
  audits = {
    role: audit.audit(role, source, synthetic.CLASSES.names, with_masks=True)
    for role, source in zip(("labeled", "evaluated"), scenes, strict=True)
  }
  assert audit.overlaps(audits) == []
  audits["evaluated"] = audit.audit(
    "evaluated", scenes[0], synthetic.CLASSES.names, with_masks=True
  )
  found = items(audit.overlaps(audits), "labeled_in_evaluated")
  assert found["labeled/scene_000002"] == "the same pixels as evaluated/scene_000002"


class Counting:
  """Counts what is asked of a source, and fails at one row as a bug would, not as a file does."""

  ids = tuple(map(str, range(400)))
  has_labels = True

  def __init__(self, failing=None):
    self.asked, self.failing = [], failing

  def __len__(self):
    return len(self.ids)

  def image(self, row):
    self.asked.append(row)
    if row == self.failing:
      raise KeyboardInterrupt
    return np.full((2, 2, 3), row % 256, np.uint8)

  def label(self, row):
    raise AssertionError("masks of unlabeled images are not for opening")


def test_masks_are_left_alone_where_they_are_not_asked_for():
  ticks = []
  found = audit.audit(
    "unlabeled", Counting(), NAMES, with_masks=False, threads=3, each=lambda: ticks.append(1)
  )
  assert len(found.usable) == len(ticks) == 400 and not found.pixels.any()
  assert len(items(found.findings, "duplicate")) == 400 - 256  # grey levels


def test_an_interruption_leaves_at_once():
  source = Counting(failing=40)
  with pytest.raises(KeyboardInterrupt):
    audit.audit("unlabeled", source, NAMES, with_masks=False, threads=2)
  assert len(source.asked) < 60


CONFIG = """
from pseudoseg_jax import config as configs

def get_config(argument=""):
  config = configs.base(configs.method("supervised"))
  config.data.update(configs.folder_data(
    root="ROOT", classes="classes.txt", split="labeled.txt", unlabeled_list="unlabeled.txt", eval_list="evaluated.txt",
    image_pattern="images/{id}.jpg", label_pattern="labels/{id}.png",
  ))
  return config
"""


def make_config(root, **lists):
  for name in sorted(set("".join(lists.values()))):
    add(
      root,
      name,
      mask=np.uint8([[0, 1], [2, 255]]).repeat(HEIGHT // 2, axis=0).repeat(WIDTH // 2, axis=1),
    )
  for role, names in lists.items():
    (root / f"{role}.txt").write_text("\n".join(names))
  (root / "classes.txt").write_text("0 sky 0 0 255\n1 cat 255 0 0\n2 dog 0 255 0\n")
  (root / "config.py").write_text(CONFIG.replace("ROOT", str(root)))
  return f"--config={root / 'config.py'}"


def test_whole_data_pass_with_report_and_pictures(tmp_path, capsys):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  (tmp_path / "labels/c.png").write_bytes(b"never opened")
  assert check_data.main([config, f"--out={tmp_path / 'out'}"]) == 0
  told = capsys.readouterr().out
  for part in (
    "nothing wrong",
    "12 x 16 (2)",
    "33.33",
    str(tmp_path / "out/report.json"),
    str(tmp_path / "out/evaluated.png"),
  ):
    assert part in told
  written = json.loads((tmp_path / "out/report.json").read_text())
  assert (written["errors"], written["warnings"], written["findings"]) == (0, 0, [])
  assert written["roles"]["unlabeled"] == {
    "images": 2,
    "usable": 2,
    "sizes": [[12, 16, 2]],
    "classes": None,
    "ignored_share": None,
  }
  assert written["roles"]["labeled"]["classes"]["dog"] == {
    "pixels": 96,
    "share": 1 / 3,
    "images": 2,
  }
  assert written["roles"]["labeled"]["ignored_share"] == 0.25
  for name in ("labeled.png", "evaluated.png", "classes.png"):
    assert min(Image.open(tmp_path / "out" / name).size) > 50


def test_damaged_data_fail_and_long_lists_are_cut_but_not_in_the_report(tmp_path, capsys):
  config = make_config(tmp_path, labeled="abcdefg", unlabeled="hi", evaluated="j")
  for name in "bcdefg":
    truncate(tmp_path / f"images/{name}.jpg")
  assert check_data.main([config, f"--out={tmp_path / 'out'}", "--most=2"]) == 1
  told = capsys.readouterr().out
  assert "error: labeled: images that cannot be read (6)" in told and "... and 4 more" in told
  assert str(tmp_path / "images/c.jpg") in told and str(tmp_path / "images/d.jpg") not in told
  (finding,) = json.loads((tmp_path / "out/report.json").read_text())["findings"]
  assert (finding["severity"], finding["kind"], finding["role"]) == (
    "error",
    "unreadable_image",
    "labeled",
  )
  assert [item["path"] for item in finding["items"]] == [
    str(tmp_path / f"images/{name}.jpg") for name in "bcdefg"
  ]


def test_what_training_refuses_is_an_error_here_too(tmp_path, capsys):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  for name in "abcde":
    Image.open(tmp_path / f"images/{name}.jpg").convert("RGBA").save(
      tmp_path / f"images/{name}.tif"
    )
    (tmp_path / f"images/{name}.jpg").unlink()
  four = [config, "--config.data.image_pattern=images/{id}.tif", "--config.data.channels=4"]
  assert check_data.main([*four, f"--out={tmp_path / 'out'}"]) == 1
  (finding,) = json.loads((tmp_path / "out/report.json").read_text())["findings"]
  assert (finding["severity"], finding["kind"], finding["role"]) == (
    "error",
    "not_trainable",
    "config",
  )
  assert any(
    "data.mean: got 3 values" in item["detail"] and "4 channels" in item["detail"]
    for item in finding["items"]
  )
  assert any("data.std: got 3 values" in item["detail"] for item in finding["items"])
  assert "error: config: what training refuses" in capsys.readouterr().out
  assert (
    check_data.main(
      [*four, "--config.data.mean=0.5,0.5,0.5,0.5", "--config.data.std=0.2,0.2,0.2,0.2"]
    )
    == 0
  )


@pytest.mark.parametrize(
  ("options", "part"),
  [
    (["--config.batch_size_global.labeled=0"], "config.batch_size_global.labeled: got 0"),
    (["--config.evaluation.style=windows"], "windows"),
    (["--config.views.crop_size=0,5"], "crop_size"),
    (["--config.optimizer.name=lion"], "lion"),
  ],
)
def test_options_that_training_refuses_are_told_with_all_else(tmp_path, capsys, options, part):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  truncate(tmp_path / "images/d.jpg")
  assert check_data.main([config, *options, "--most=20"]) == 1
  told = capsys.readouterr().out
  refused = told.partition("what training refuses")[2]
  assert (
    part in refused and "images/d.jpg" not in refused and "images that cannot be read (1)" in told
  )


@pytest.mark.parametrize(
  ("option", "part"),
  [
    ("labeled_every=0", "config.labeled_every: got 0"),
    ("pseudo_labels.folder=gone", "no such folder of labels"),
  ],
)
def test_what_is_made_of_the_data_is_refused_here_too(tmp_path, capsys, option, part):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  assert check_data.main([config, f"--config.{option}"]) == 1
  assert part in capsys.readouterr().out


@pytest.mark.parametrize("role", ["labeled", "evaluated"])
@pytest.mark.parametrize(
  "options", [[], ["label_map=3:255"], ["ignore_index=3", "label_map=255:255"]]
)
def test_masks_of_which_no_pixel_has_a_label_are_refused(tmp_path, capsys, role, options):
  options = [f"--config.data.{option}" for option in options]
  ids = {"labeled": "abcdefghijkl", "unlabeled": "m", "evaluated": "nopqrstuvwxy"}
  config = make_config(tmp_path, **ids)
  masks = [tmp_path / f"labels/{name}.png" for name in ids[role]]
  for path in masks:
    Image.fromarray(constant(3 if options else 255)).save(path)
  assert check_data.main([config, *options]) == 1
  refused = capsys.readouterr().out.partition("what training refuses")[2]
  assert f"masks of the {role} images: got no label in all 12 of them" in refused
  # One pixel is enough, wherever it is: here not among those that are looked at first.
  mask = constant(3 if options else 255)
  mask[5, 6] = 1
  Image.fromarray(mask).save(masks[1])
  assert check_data.main([config, *options]) == 0


@pytest.mark.parametrize("role", ["labeled", "evaluated"])
def test_masks_of_0_and_255_are_refused_in_both_roles_and_the_remedies_work(tmp_path, capsys, role):
  config = make_config(tmp_path, labeled="ab", unlabeled="c", evaluated="de")
  for name in {"labeled": "ab", "evaluated": "de"}[role]:
    Image.fromarray(np.where(np.arange(WIDTH) < 4, 255, constant(0)).astype(np.uint8)).save(
      tmp_path / f"labels/{name}.png"
    )
  assert check_data.main([config]) == 1
  told = capsys.readouterr().out
  refused = told.partition("what training refuses")[2]
  assert f"masks of the {role} images: got only 0, 255 in 2 of them" in refused
  for remedy in ("config.data.label_map=255:1", "config.data.label_map=255:255"):
    assert remedy in refused
    check_data.main([config, f"--{remedy}"])
    assert "training refuses" not in capsys.readouterr().out


def test_weak_labels_that_the_method_needs_are_opened(tmp_path, capsys):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  (tmp_path / "config.py").write_text(
    (tmp_path / "config.py").read_text().replace('"supervised"', '"learn_pseudo"')
  )
  options = ["--config.data.background=yes"]
  for text, code, part in (
    (None, 1, "tags.csv"),
    ("c,cat\nd,horse\n", 1, "horse"),
    ("c,cat\nd,sky,dog\n", 0, "nothing wrong"),
  ):
    if text:
      (tmp_path / "tags.csv").write_text(text)
    assert check_data.main([config, "--config.data.image_labels=tags.csv", *options]) == code
    told = capsys.readouterr().out
    assert part in told, told


def test_files_that_are_not_used_and_orientations_are_warnings(tmp_path, capsys):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  exif = Image.Exif()
  exif[0x0112] = 3
  Image.open(tmp_path / "images/c.jpg").save(tmp_path / "images/c.jpg", exif=exif)
  (tmp_path / "val").mkdir()
  add(
    tmp_path / "val",
    "f",
    mask=np.uint8([[0, 1], [2, 255]]).repeat(HEIGHT // 2, axis=0).repeat(WIDTH // 2, axis=1),
  )
  Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "val/images/g.png")
  (tmp_path / "val/images/._f.jpg").write_bytes(b"of macOS")
  options = ["--config.data.eval_list=", "--config.data.eval_image_pattern=val/images/{id}.jpg"]
  options += ["--config.data.eval_label_pattern=val/labels/{id}.png", f"--out={tmp_path / 'out'}"]
  for setting in ("apply", "ignore"):
    assert check_data.main([config, *options, f"--config.data.exif_orientation={setting}"]) == 0
    told = capsys.readouterr()
    assert told.err.count("not used") == 0  # it is said once, among the findings
    findings = {
      found["kind"]: found
      for found in json.loads((tmp_path / "out/report.json").read_text())["findings"]
    }
    left_out, turned = findings["left_out"], findings["exif_orientation"]
    assert [item["path"] for item in left_out["items"]] == [str(tmp_path / "val/images/g.png")]
    assert left_out["severity"] == turned["severity"] == "warning" and turned["role"] == "unlabeled"
    ((path, detail),) = [item.values() for item in turned["items"]]
    assert path == str(tmp_path / "images/c.jpg") and "orientation 3" in detail
    assert {"apply": "applied", "ignore": "ignored"}[setting] in detail


def test_masks_that_another_orientation_fits_are_told_so_and_the_remedy_works(tmp_path, capsys):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  exif = Image.Exif()
  exif[0x0112] = 6
  # The mask fits the pixels as stored.
  Image.open(tmp_path / "images/b.jpg").save(tmp_path / "images/b.jpg", exif=exif)
  assert check_data.main([config]) == 1
  (line,) = [line for line in capsys.readouterr().out.splitlines() if "labels/b.png" in line]
  remedy = line.rpartition(" ")[2]
  assert remedy == "config.data.exif_orientation=ignore"
  assert check_data.main([config, f"--{remedy}"]) == 0


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "0 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    (b"<!DOCTYPE html><html></html>", "HTML"),
  ],
)
def test_files_that_stand_in_for_images_and_masks_are_recognized(tmp_path, capsys, content, reason):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  for path in ("images/d.jpg", "labels/b.png"):
    (tmp_path / path).write_bytes(content)
  assert check_data.main([config]) == 1
  told = capsys.readouterr().out.splitlines()
  for path in ("images/d.jpg", "labels/b.png"):
    assert any(f"{tmp_path / path}: " in line and reason in line for line in told)


def test_values_that_are_not_finite_lead_to_the_file(tmp_path, capsys):
  config = make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  for name in "abcde":
    pixels = np.full((HEIGHT, WIDTH, 3), 100 + ord(name), np.float32)
    pixels[1, 2] = np.nan if name == "d" else 7
    np.save(tmp_path / f"images/{name}.npy", pixels)
  assert check_data.main([config, "--config.data.image_pattern=images/{id}.npy"]) == 1
  assert f"{tmp_path / 'images/d.npy'}: values: got NaN" in capsys.readouterr().out


def test_further_domains_are_looked_at_too(tmp_path, capsys):
  make_config(tmp_path, labeled="ab", unlabeled="cd", evaluated="e")
  (tmp_path / "other").mkdir()
  make_config(tmp_path / "other", labeled="fg", unlabeled="hi", evaluated="j")
  truncate(tmp_path / "other/images/h.jpg")
  text = CONFIG.replace("supervised", "cct_domains").replace("ROOT", str(tmp_path))
  other = text[text.index("configs.folder_data") : text.index("  ))\n") + 3].replace(
    str(tmp_path), str(tmp_path / "other")
  )
  (tmp_path / "config.py").write_text(
    text.replace("  return", f"  config.other_data.second = {other}\n  return")
  )
  assert check_data.main([f"--config={tmp_path / 'config.py'}", f"--out={tmp_path / 'out'}"]) == 1
  written = json.loads((tmp_path / "out/report.json").read_text())
  assert written["domains"]["second"]["roles"]["labeled"]["images"] == 2
  (finding,) = [found for found in written["findings"] if found["kind"] == "unreadable_image"]
  assert finding["role"] == "second/unlabeled" and finding["items"][0]["path"] == str(
    tmp_path / "other/images/h.jpg"
  )
  assert (tmp_path / "out/second/labeled.png").is_file()


def test_unusable_input_and_interruptions_have_codes_of_their_own(tmp_path, capsys, monkeypatch):
  config = make_config(tmp_path, labeled="a", unlabeled="b", evaluated="c")
  assert check_data.main([config, f"--config.data.root={tmp_path / 'elsewhere'}"]) == 2
  assert "elsewhere" in capsys.readouterr().err

  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(audit, "audit", interrupted)
  assert check_data.main([config, f"--out={tmp_path / 'out'}"]) == 130
  assert not (tmp_path / "out").exists()
