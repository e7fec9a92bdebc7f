"""Labels that a trained network makes: whole, the same on any number of devices, and never mixed
with others.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import pseudoseg_jax
from pseudoseg_jax import build, checks, config as configs, export_labels, trained as opened
from pseudoseg_jax.contract import Predictor
from pseudoseg_jax.data import synthetic
from pseudoseg_jax.engine import loop, mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints

# One device and eight write the same to the byte only when compiled so.
pytestmark = pytest.mark.optimized
QUICKSTART = {
  "total_steps": 4,
  "network.width": 4,
  "evaluation.batch_size": 8,
  "data.num_scenes": 21,
  "data.num_labeled": 8,
  "data.num_eval_scenes": 5,
  "data.size": "40,48",
}


def random_state(config, seed):
  """A state of networks that predict several classes, unlike fresh ones."""
  frozen = configs.frozen(config)
  method = build.build_method(frozen, len(build.build_classes(frozen.data)))
  state = loop.jit_init(method, meshes.make_mesh(), seed)
  rng = np.random.default_rng(seed)

  def moved(path, leaf):
    if not jax.tree_util.keystr(path).endswith("['classifier']['kernel']"):
      return leaf
    kernel = rng.normal(0, 3, leaf.shape)
    # Features are positive: a class with larger weights than the others would win everywhere.
    return jax.device_put(
      (kernel - kernel.mean(-2, keepdims=True)).astype(np.float32), leaf.sharding
    )

  nets = {
    role: net.replace(params=jax.tree_util.tree_map_with_path(moved, net.params))
    for role, net in state.nets.items()
  }
  return state.replace(step=jax.device_put(np.int32(seed), state.step.sharding), nets=nets)


def write_workdir(workdir, config, steps=(2, 4)):
  """A workdir as training leaves it, without the training."""
  classes = build.build_classes(configs.frozen(config).data)
  (workdir / "config.json").write_text(configs.to_json(config))
  (workdir / "classes.json").write_text(json.dumps(dataclasses.asdict(classes)))
  checkpoints = Checkpoints(workdir / "checkpoints")
  for step in steps:
    checkpoints.save(random_state(config, step))
    checkpoints.wait()
  checkpoints.close()
  return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return write_workdir(
    tmp_path_factory.mktemp("trained"), configs.load("configs/quickstart.py:method=cps", QUICKSTART)
  )


def run(workdir, out, *extra):
  return export_labels.main([f"--workdir={workdir}", f"--out={out}", *extra])


def manifest(out):
  return json.loads((out / "manifest.json").read_text())


def labels(out):
  return {
    path.relative_to(out / "labels").as_posix(): np.asarray(Image.open(path))
    for path in (out / "labels").rglob("*.png")
  }


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
  out = tmp_path_factory.mktemp("labels")
  assert run(workdir, out, "--confidence") == 0
  return out


def scenes_of(workdir):
  config = configs.from_json((workdir / "config.json").read_text())
  return build.build_data(configs.frozen(config).data)


def test_labels_and_confidence_are_what_the_network_predicts(workdir, exported):
  best = workdir / "checkpoints" / "best"
  assert not best.exists() or not any(best.iterdir())  # "last" is the default
  predictor = pseudoseg_jax.load(workdir, checkpoint="last")
  source = scenes_of(workdir).unlabeled
  written = labels(exported)
  assert sorted(written) == [f"{name}.png" for name in source.ids] and len(written) == 13
  assert (exported / "list.txt").read_text().split() == list(source.ids)
  for row in (0, 12):
    probabilities = predictor.probabilities(source.image(row))
    confidence = np.asarray(Image.open(exported / "confidence" / f"{source.ids[row]}.png"))
    assert (written[f"{source.ids[row]}.png"] == probabilities.argmax(-1)).mean() > 0.999
    np.testing.assert_allclose(confidence, 255 * probabilities.max(-1), atol=0.6)
  with Image.open(exported / "labels" / f"{source.ids[0]}.png") as image:
    assert image.mode == "P"
    np.testing.assert_array_equal(
      np.asarray(image.getpalette()).reshape(-1, 3)[:7], synthetic.CLASSES.palette
    )


def test_the_manifest_says_what_the_labels_are_from_and_what_is_in_them(workdir, exported):
  about, written = manifest(exported), np.stack(list(labels(exported).values()))
  assert (
    about["finished"]
    and about["images"] == 13
    and about["split"] == "unlabeled"
    and about["image_labels"] is None
  )
  assert (about["checkpoint"], about["step"], about["predictor"], about["protocol"]) == (
    "last",
    4,
    "a",
    "whole images, scale 1",
  )
  counts = np.bincount(written.ravel(), minlength=7)
  assert [of["pixels"] for of in about["classes"].values()] == counts.tolist() and (
    counts > 0
  ).sum() > 2
  assert list(about["classes"]) == list(synthetic.CLASSES.names)
  np.testing.assert_allclose(
    [of["share"] for of in about["classes"].values()], counts / counts.sum()
  )
  confidences = [np.asarray(Image.open(path)) for path in (exported / "confidence").iterdir()]
  np.testing.assert_allclose(about["mean_confidence"], np.mean(confidences) / 255)


def test_one_device_writes_what_eight_write(workdir, exported, tmp_path, monkeypatch):
  one = meshes.make_mesh(jax.devices()[:1])
  monkeypatch.setattr(export_labels.meshes, "make_mesh", lambda devices=None: one)
  assert run(workdir, tmp_path, "--confidence") == 0
  assert manifest(tmp_path) == manifest(exported)
  for folder in ("labels", "confidence"):
    for path in (exported / folder).iterdir():
      assert path.read_bytes() == (tmp_path / folder / path.name).read_bytes()


def test_an_interrupted_export_has_no_manifest_and_goes_on(
  workdir, exported, tmp_path, monkeypatch, capsys
):
  write, written = export_labels._write, []

  def failing(path, picture):
    if len(written) == 5:
      raise OSError("disk full")
    written.append(path)
    write(path, picture)

  monkeypatch.setattr(export_labels, "_write", failing)
  assert run(workdir, tmp_path) == 1
  assert "disk full" in capsys.readouterr().err
  assert not (tmp_path / "manifest.json").exists() and 0 < len(labels(tmp_path)) < 13
  monkeypatch.setattr(export_labels, "_write", write)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").iterdir()}
  assert run(workdir, tmp_path) == 0
  assert "were there already" in capsys.readouterr().out
  assert all(path.stat().st_mtime_ns == time for path, time in before.items())
  assert manifest(tmp_path) == manifest(exported) | {"mean_confidence": None}


def test_a_folder_of_other_labels_is_refused(workdir, exported, capsys):
  before = manifest(exported)
  assert run(workdir, exported, "--step=2") == 2
  error = capsys.readouterr().err
  assert (
    "step: got 2; allowed: 4" in error and "weights_sha256" in error and "another --out" in error
  )
  assert run(workdir, exported, "--predictor=b", "--config.evaluation.flip=True") == 2
  error = capsys.readouterr().err
  assert "predictor: got 'b'" in error and "flipped too" in error
  assert manifest(exported) == before


def test_an_earlier_step_has_labels_of_its_own_and_one_that_is_gone_is_named(
  workdir, exported, tmp_path, capsys
):
  assert run(workdir, tmp_path / "earlier", "--step=2") == 0
  assert manifest(tmp_path / "earlier")["labels_sha256"] != manifest(exported)["labels_sha256"]
  assert run(workdir, tmp_path / "gone", "--step=3") == 2
  assert "got 3; allowed: 2, 4" in capsys.readouterr().err and not (tmp_path / "gone").exists()


def test_image_level_labels_leave_no_pixel_outside_of_their_classes(workdir, exported, tmp_path):
  assert (
    run(workdir, tmp_path, "--image_labels", "--split=train", "--config.evaluation.flip=True") == 0
  )
  data, written = scenes_of(workdir), labels(tmp_path)
  assert len(written) == 21 and manifest(tmp_path)["image_labels"] == "masks"
  plain = labels(exported)
  strays = 0
  for source in (data.labeled, data.unlabeled):
    for row, name in enumerate(source.ids):
      present = np.unique(source.label(row))
      assert np.isin(written[f"{name}.png"], present).all()
      strays += (~np.isin(plain.get(f"{name}.png", present), present)).sum()
  assert strays > 0  # without them there are pixels outside


@pytest.mark.slow
def test_killed_at_once_and_then_written_by_two_processes_it_is_the_same(
  workdir, exported, tmp_path
):
  command = [
    sys.executable,
    "-m",
    "pseudoseg_jax.export_labels",
    f"--workdir={workdir}",
    f"--out={tmp_path}",
    "--confidence",
  ]
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
  }
  root = pathlib.Path(__file__).parents[1]
  options = {
    "cwd": root,
    "env": environment,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "text": True,
  }
  alone = subprocess.Popen([*command, "--config.evaluation.batch_size=2"], **options)
  while alone.poll() is None and len(list(tmp_path.glob("labels/*.png"))) < 3:
    time.sleep(0.001)
  alone.kill()
  alone.communicate()
  assert alone.returncode == -signal.SIGKILL and not (tmp_path / "manifest.json").exists()
  several = [f"--coordinator=localhost:{10000 + os.getpid() % 20000}", "--process_count=2"]
  processes = [
    subprocess.Popen([*command, *several, f"--process_index={index}"], **options)
    for index in (0, 1)
  ]
  for process in processes:
    try:
      printed, _ = process.communicate(timeout=180)
    finally:
      process.kill()
    assert process.returncode == 0, printed
  assert manifest(tmp_path) == manifest(exported)


# Folders


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """Images of three sizes in folders and sub-folders, with tags of the unlabeled ones."""
  root = tmp_path_factory.mktemp("tree")
  rng = np.random.default_rng(0)
  for name, size in {
    "x/a": (33, 40),
    "x/b": (33, 40),
    "y/c": (40, 33),
    "y/d": (35, 35),
    "y/e": (35, 35),
  }.items():
    for folder, pixels in {"images": (*size, 3), "masks": size}.items():
      (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256 if folder == "images" else 3, pixels, np.uint8)).save(
        root / folder / f"{name}.png"
      )
  for name, lines in {
    "train": "x/a x/b y/c y/d",
    "labeled": "x/a",
    "eval": "y/e",
    "classes": "ground disc cross",
  }.items():
    (root / f"{name}.txt").write_text("\n".join(lines.split()))
  (root / "tags.csv").write_text("x/b,disc\ny/c,ground cross\ny/d,\n")
  return root


@pytest.fixture(scope="module")
def folder_workdir(tree, tmp_path_factory):
  config = configs.load(
    "configs/quickstart.py:method=supervised", {"total_steps": 4, "network.width": 4}
  )
  options = {
    "classes": "classes.txt",
    "image_pattern": "images/{id}.png",
    "label_pattern": "masks/{id}.png",
  }
  lists = {"train_list": "train.txt", "split": "labeled.txt", "eval_list": "eval.txt"}
  config.data = configs.folder_data(root=str(tree), **options, **lists) | {
    "mean": (0.5,) * 3,
    "std": (0.2,) * 3,
  }
  return write_workdir(tmp_path_factory.mktemp("on_folders"), config, steps=(4,))


def test_images_of_any_size_keep_their_sub_folders_and_tags_of_files_hold(
  tree, folder_workdir, tmp_path, capsys
):
  assert run(folder_workdir, tmp_path / "without", "--image_labels") == 2
  assert "config.data.image_labels: got nothing" in capsys.readouterr().err
  assert (
    run(folder_workdir, tmp_path / "with", "--image_labels", "--config.data.image_labels=tags.csv")
    == 0
  )
  written = labels(tmp_path / "with")
  assert {name: ids.shape for name, ids in written.items()} == {
    "x/b.png": (33, 40),
    "y/c.png": (40, 33),
    "y/d.png": (35, 35),
  }
  assert (written["x/b.png"] == 1).all() and np.isin(written["y/c.png"], (0, 2)).all()
  assert manifest(tmp_path / "with")["image_labels"] == "tags.csv"


def test_a_bare_folder_of_images_loses_the_endings_and_two_of_one_name_are_refused(
  tree, folder_workdir, tmp_path, capsys
):
  bare = tmp_path / "bare"
  shutil.copytree(tree / "images" / "x", bare)
  command = (folder_workdir, tmp_path / "out", f"--config.data.unlabeled_folder={bare}")
  assert run(*command) == 0
  assert sorted(labels(tmp_path / "out")) == ["a.png", "b.png"]
  Image.open(bare / "a.png").save(bare / "a.jpg")
  assert run(*command) == 2
  assert "labels/a.png: got a.jpg, a.png" in capsys.readouterr().err


# Predictors that want more than images


def test_a_predictor_with_boxes_labels_data_sets_and_segments_no_bare_image(
  workdir, tmp_path, monkeypatch
):
  build_method = build.build_method

  def with_boxes(*args, **options):
    method = build_method(*args, **options)
    seen = lambda state, images: (
      images[..., 3:].at[..., 0].set(0.5) + 0 * method.predictors["b"](state, images[..., :3])
    )
    return method._replace(
      predictors=method.predictors | {"b": Predictor(seen, weak_label="boxes")}
    )

  monkeypatch.setattr(build, "build_method", with_boxes)
  export_labels.export_labels(workdir, tmp_path, predictor="b", split="labeled")
  data, written = scenes_of(workdir), labels(tmp_path)
  truth = np.stack([data.labeled.label(row) for row in range(8)])
  assert (np.stack([written[f"{name}.png"] for name in data.labeled.ids]) == truth).mean() > 0.6
  for refuses in (
    pseudoseg_jax.load,
    lambda *args: opened.export(workdir, tmp_path, predictor="b", checkpoint="last"),
  ):
    with pytest.raises(
      checks.InputError, match="boxes are shown to it beside the image; allowed: a"
    ):
      refuses(workdir, "b", "last")
  with pytest.raises(checks.InputError, match="image-level labels"):
    pseudoseg_jax.load(workdir, "a+image_labels", "last")


def test_a_workdir_is_scored_with_image_level_labels_beside_the_plain_scores(workdir):
  scores = pseudoseg_jax.evaluate(
    workdir, checkpoint="last", overrides={"evaluation.image_labels": True}
  )
  assert list(scores) == ["a", "a+image_labels", "b", "b+image_labels"]
  folder = workdir / "evaluations" / "whole_images_scale_1" / "last"
  assert list(json.loads((folder / "results.json").read_text())["last"]["predictors"]) == list(
    scores
  )
  plain = pseudoseg_jax.evaluate(workdir, checkpoint="last")
  for name, score in plain.items():
    np.testing.assert_array_equal(scores[name].matrix, score.matrix)
    assert scores[f"{name}+image_labels"].pixel_accuracy > score.pixel_accuracy


def test_quality_is_scored_against_the_masks(tree, folder_workdir, tmp_path, monkeypatch, capsys):
  import importlib.util

  path = pathlib.Path(__file__).parents[1] / "launch" / "label_quality.py"
  spec = importlib.util.spec_from_file_location("label_quality", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert run(folder_workdir, tmp_path / "out") == 0
  for name in ("x/b", "y/c", "y/d"):  # as if the network were right, but for one image
    shutil.copy(
      tree / "masks" / f"{name if name != 'y/d' else 'y/e'}.png",
      tmp_path / "out" / "labels" / f"{name}.png",
    )
  config = configs.from_json((folder_workdir / "config.json").read_text())
  monkeypatch.setattr(module.configs, "load", lambda path, overrides: config)
  assert module.main([f"--labels={tmp_path / 'out'}", "--config=any"]) == 0
  row = capsys.readouterr().out.splitlines()[-1].split()
  mask = {name: np.asarray(Image.open(tree / "masks" / f"{name}.png")) for name in ("y/d", "y/e")}
  right = 2 * 33 * 40 + (mask["y/d"] == mask["y/e"]).sum()
  assert row[:2] == ["pixel", "accuracy"] and float(row[2]) == round(
    100 * right / (2 * 33 * 40 + 35 * 35), 2
  )
