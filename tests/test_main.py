"""The command line as a user meets it: a whole small run, and the errors."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import pseudoseg_jax
from pseudoseg_jax import (
  config as configs,
  main as command_line,
  options,
  summary,
  workdir as workdirs,
)

# Small enough for a few seconds; every batch divides by the eight simulated devices.
SMALL = {
  "total_steps": 4,
  "log_every_steps": 2,
  "eval_every_steps": 2,
  "checkpoint_every_steps": 2,
  "network.width": 4,
  "views.crop_size": "33,33",
  "evaluation.batch_size": 8,
  "evaluation.pictures": 2,
}
QUICKSTART = SMALL | {
  "data.num_scenes": 24,
  "data.num_labeled": 8,
  "data.num_eval_scenes": 9,
  "data.size": "40,48",
}


def run(config, workdir, overrides, *extra):
  return command_line.main(
    [
      f"--config={config}",
      f"--workdir={workdir}",
      *(f"--config.{key}={value}" for key, value in overrides.items()),
      *extra,
    ]
  )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("quickstart")
  assert run("configs/quickstart.py:method=cps", workdir, QUICKSTART) == 0
  return workdir


def test_a_run_leaves_what_its_summary_names(trained):
  for name in (
    "results.json",
    "scores.csv",
    "config.json",
    "classes.json",
    "log.txt",
    "history.jsonl",
    "pictures/overlays.png",
    "pictures/curves.png",
    "checkpoints/last/4",
    "checkpoints/best",
    "tensorboard",
  ):
    assert (trained / name).exists(), name
  results = json.loads((trained / "results.json").read_text())
  assert results["config"] == {"path": "configs/quickstart.py", "argument": "method=cps"}
  assert (results["seed"], results["method"], results["last"]["step"]) == (0, "cps", 4)
  assert set(results["last"]["predictors"]) == {"a", "b"} and "selected_by" in results["best"]
  text = (trained / "log.txt").read_text()
  assert "Done: cps" in text and "mean IoU" in text and "pseudoseg_jax.predict" in text


def beside(trained, folder, miou, changed=None, **results):
  """A finished supervised run of the quickstart, as far as its files tell."""
  folder.mkdir()
  shutil.copy(trained / "data.json", folder)
  config = (
    json.loads((trained / "config.json").read_text())
    | {"method": {"name": "supervised"}}
    | (changed or {})
  )
  of_run = json.loads((trained / "results.json").read_text()) | {"method": "supervised"} | results
  of_run["last"]["predictors"] = {"student": of_run["last"]["predictors"]["a"] | {"miou": miou}}
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "results.json").write_text(json.dumps(of_run))


def test_the_gain_over_a_supervised_run_beside_it(trained, tmp_path):
  workdir = tmp_path / "cps"
  shutil.copytree(trained, workdir)
  config, results = (
    configs.frozen(workdirs.saved_config(workdir)),
    json.loads((workdir / "results.json").read_text()),
  )
  gain = lambda: workdirs.supervised_beside(workdir, config, results)
  assert gain() is None
  for name, content in {"empty": "", "no_run": "{}", "of_nothing": "[]"}.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(content)
  beside(trained, tmp_path / "other_protocol", 0.5, protocol="sliding windows")
  beside(trained, tmp_path / "unfinished", 0.5, {"total_steps": 5})
  beside(trained, tmp_path / "of_cps", 0.5, method="cps")
  beside(trained, tmp_path / "other_images", 0.5)
  (tmp_path / "other_images" / "data.json").write_text(
    json.dumps({"": {"evaluated": {"images": 1}}})
  )
  assert gain() is None
  beside(trained, tmp_path / "ended_early", 0.5, {"total_steps": 5, "seed": 2}, ended_early=True)
  assert gain()["workdir"] == str(tmp_path / "ended_early")
  beside(
    trained,
    tmp_path / "another_seed",
    0.25,
    {"seed": 1, "batch_size_global": {"labeled": 8, "unlabeled": 16}},
  )
  miou = results["last"]["predictors"]["a"]["miou"]
  assert gain() == {
    "workdir": str(tmp_path / "another_seed"),
    "miou": 0.25,
    "gain": miou - 0.25,
    "differs": ["seed"],
  }
  beside(trained, tmp_path / "supervised", 0.02)
  assert gain() == {
    "workdir": str(tmp_path / "supervised"),
    "miou": 0.02,
    "gain": miou - 0.02,
    "differs": [],
  }
  (line,) = summary.findings(results | {"baseline": gain()}, config)
  assert (
    line == f"  {100 * miou - 2:+.2f} mIoU against supervised, 2.00 in {tmp_path / 'supervised'}"
  )


def test_a_network_that_says_one_class_of_every_pixel_is_told():
  config = configs.make_config("cps", network="tiny", steps=20_000)
  scores = {
    "miou": 0.1,
    "iou": {"ground": 0.3, "leaf": 0.0, "wing": None},
    "predicted_classes": ["ground"],
  }
  results = {"last": {"predictors": {"a": scores}}}
  (line,) = summary.findings(results, config)
  assert "'a' PREDICTS 'ground' FOR EVERY PIXEL" in line
  told = dict(re.findall(r"--config\.([\w.]+)=([\w.]+)", line))
  configs.override(config, told)
  assert config.total_steps == 40_000 and config.criterion.class_weights == "effective"
  (line,) = summary.findings(results | {"ended_early": True}, config)
  # With more of them, it would end where it did.
  assert "steps (--config.early_stopping_patience=0)" in line
  for better in (
    {"predicted_classes": ["ground", "leaf"]},
    {"iou": {"ground": 0.3, "leaf": None, "wing": None}},
  ):
    assert summary.findings({"last": {"predictors": {"a": scores | better}}}, config) == []


def test_the_same_command_again_trains_nothing_more(trained, capsys):
  before = json.loads((trained / "results.json").read_text())
  assert run("configs/quickstart.py:method=cps", trained, QUICKSTART) == 0
  assert "resumed at step 4 of 4" in capsys.readouterr().out
  assert json.loads((trained / "results.json").read_text()) == before


def test_a_workdir_of_another_config_is_refused(trained, capsys):
  assert (
    run("configs/quickstart.py:method=cps", trained, QUICKSTART | {"total_steps": 6, "seed": 1})
    == 2
  )
  error = capsys.readouterr().err
  assert (
    "belongs to another config" in error
    and "seed: 1 now, 0 there" in error
    and "total_steps" not in error
  )


def test_eval_and_load_agree_with_training(trained, capsys):
  assert command_line.main(["--mode=eval", f"--workdir={trained}", "--checkpoint=last"]) == 0
  assert "mean IoU" in capsys.readouterr().out
  scores = pseudoseg_jax.evaluate(trained, checkpoint="last")
  results = json.loads((trained / "results.json").read_text())["last"]["predictors"]
  for name, score in scores.items():
    np.testing.assert_allclose(score.miou, results[name]["miou"], rtol=1e-6)
  predictor = pseudoseg_jax.load(trained, predictor="b", checkpoint="last")
  image = np.random.default_rng(0).integers(0, 256, (37, 51, 3), np.uint8)
  assert predictor.predict(image).shape == (37, 51)
  with pytest.raises(ValueError, match="predictor: got 'c'; allowed: a, b"):
    pseudoseg_jax.load(trained, predictor="c")


def test_python_trains_as_the_command_line_does(tmp_path, trained):
  results = pseudoseg_jax.train("configs/quickstart.py:method=cps", tmp_path, QUICKSTART)
  assert results["finished"]
  assert results["last"] == json.loads((trained / "results.json").read_text())["last"]


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """A folder in CamVid's layout: 16 training and 2 test images, masks with void 11."""
  root = tmp_path_factory.mktemp("camvid")
  rng = np.random.default_rng(0)
  for part, count in {"train": 16, "test": 2}.items():
    for folder in ("images", "labels"):
      (root / folder / part).mkdir(parents=True)
    for index in range(count):
      Image.fromarray(rng.integers(0, 256, (40, 52, 3), np.uint8)).save(
        root / f"images/{part}/{part}{index:02}.jpg"
      )
      Image.fromarray(rng.integers(0, 12, (40, 52), np.uint8)).save(
        root / f"labels/{part}/{part}{index:02}.png"
      )
  return root


CAMVID = SMALL | {"batch_size_global.labeled": 8, "batch_size_global.unlabeled": 8}


def test_trains_on_a_folder(tree, tmp_path):
  assert (
    run("configs/camvid.py:method=supervised,split=1_2", tmp_path, CAMVID | {"data.root": tree})
    == 0
  )
  assert (
    json.loads((tmp_path / "results.json").read_text())["split"]
    == "every_2: 8 labeled, 8 unlabeled"
  )


WITH_TAGS = CAMVID | {"method.image_labels": "True", "data.image_labels": "tags.csv"}


@pytest.mark.slow
def test_trains_with_image_level_labels_and_shows_why(tree, tmp_path):
  lines = [f"train{index:02},car,{'tree' if index % 2 else 'sky'}" for index in range(16)]
  (tree / "tags.csv").write_text("\n".join(lines))
  assert (
    run("configs/camvid.py:method=pseudoseg,split=1_2", tmp_path, WITH_TAGS | {"data.root": tree})
    == 0
  )
  panels = Image.open(tmp_path / "pictures" / "panels.png")
  assert panels.width > 6 * 33 and panels.height > 8 * 33


def test_image_level_labels_that_are_missing_or_unknown_are_named(tree, tmp_path, capsys):
  (tree / "tags.csv").write_text("train01,car\ntrain03,kar\n")
  assert (
    run("configs/camvid.py:method=pseudoseg,split=1_2", tmp_path, WITH_TAGS | {"data.root": tree})
    == 2
  )
  error = capsys.readouterr().err
  assert "tags.csv" in error and "did you mean 'car'?" in error and "train05" in error
  assert (
    run(
      "configs/camvid.py:method=pseudoseg,split=1_2",
      tmp_path,
      WITH_TAGS | {"data.root": tree, "data.image_labels": ""},
    )
    == 2
  )
  assert "config.data.image_labels=FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_pseudo_labels_are_scored_where_truth_is_known(tmp_path):
  overrides = QUICKSTART | {"eval_every_steps": 4}
  assert run("configs/quickstart.py:method=pseudoseg", tmp_path, overrides) == 0
  told = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
  names = {name for entry in told for name in entry}
  assert {"panels/pseudo_label_accuracy", "panels/CAM_accuracy", "train/kept_fraction"} <= names
  assert (tmp_path / "pictures" / "panels.png").exists()


def broken(tree, tmp_path, breaking):
  root = tmp_path / "data"
  shutil.copytree(tree, root)
  breaking(root)
  return root


def cut_jpeg(root):
  path = root / "images/train/train00.jpg"
  path.write_bytes(path.read_bytes()[:600])


def other_size(root):
  Image.fromarray(np.zeros((40, 50), np.uint8)).save(root / "labels/train/train02.png")


def other_ids(root):
  Image.fromarray(np.full((40, 52), 77, np.uint8)).save(root / "labels/train/train00.png")


def without_image(root):
  (root / "images/train/train04.jpg").unlink()
  (root / "list.txt").write_text("train00\ntrain04\nnobody\n")


def empty_list(root):
  (root / "list.txt").write_text("\n")


def fewer_classes(root):
  (root / "classes.txt").write_text("0 one 0 0 0\n1 two 9 9 9\n")


@pytest.mark.parametrize(
  ("breaking", "overrides", "said"),
  [
    (cut_jpeg, {}, ["images/train/train00.jpg"]),
    (other_size, {}, ["labels/train/train02.png", "40 x 50", "40 x 52"]),
    (other_ids, {}, ["labels/train/train00.png", "77", "label_map"]),
    (without_image, {"data.split": "list.txt"}, ["list.txt", "train04", "nobody"]),
    (empty_list, {"data.train_list": "list.txt"}, ["list.txt"]),
    (fewer_classes, {"data.classes": "classes.txt"}, ["0..1", "labels/train/train"]),
  ],
)
def test_broken_data_is_named(tree, tmp_path, capsys, breaking, overrides, said):
  root = broken(tree, tmp_path, breaking)
  config = "configs/camvid.py:method=supervised,split=1_2"
  assert run(config, tmp_path / "w", CAMVID | {"data.root": root} | overrides) == 2
  error = capsys.readouterr().err
  assert all(part in error for part in said), error


@pytest.mark.parametrize(
  ("config", "overrides", "said"),
  [
    ("configs/camvid.py", {}, ["config.data.root", "--config.data.root=DIR"]),
    ("configs/camvid.py", {"data.root": "/nowhere"}, ["config.data.root", "/nowhere"]),
    ("configs/quickstart.py:method=cbs", {}, ["'cbs'", "did you mean 'cps'?"]),
    ("configs/quickstart.py:methd=cps", {}, ["'methd'", "did you mean 'method'?"]),
    ("configs/quickstart.py:method=cps,convention=official", {}, ["convention"]),
    ("configs/quikstart.py", {}, ["configs/quikstart.py", "did you mean 'configs/quickstart.py'?"]),
    (
      "configs/quickstart.py:method=cps",
      {"method.wieght": 1, "total_stps": 3},
      ["did you mean 'method.weight'?", "did you mean 'total_steps'?"],
    ),
    ("configs/quickstart.py", {"total_steps": "many"}, ["'many'", "int"]),
    (
      "configs/quickstart.py",
      {"batch_size_global.labeled": 6, "eval_every_steps": 0},
      ["8 devices", "eval_every_steps"],
    ),
    ("configs/quickstart.py", {"optimizer.name": "sdg"}, ["'sdg'", "did you mean 'sgd'?"]),
    (
      "configs/quickstart.py",
      {"method.distance": "softmax_mes"},
      ["'softmax_mes'", "did you mean 'softmax_mse'?"],
    ),
    ("configs/quickstart.py", {"network.name": "resnet"}, ["resnet"]),
  ],
)
def test_a_wrong_config_is_explained(tmp_path, capsys, config, overrides, said):
  overrides = overrides if "configs/camvid.py" in config else QUICKSTART | overrides
  if "camvid" in config:
    overrides = CAMVID | overrides
  assert run(config, tmp_path / "w", overrides) == 2
  error = capsys.readouterr().err
  assert all(part in error for part in said), error
  assert not (tmp_path / "w").exists()  # the corrected command may use the same workdir


def test_eval_of_a_folder_that_no_run_made(tmp_path, capsys):
  assert command_line.main(["--mode=eval", f"--workdir={tmp_path}"]) == 2
  assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments", [[], ["--config=configs/quickstart.py"], ["--config=c", "--workdir=w", "--steps=3"]]
)
def test_usage_errors(arguments, capsys):
  with pytest.raises(SystemExit):
    command_line.main(arguments)
  assert "--" in capsys.readouterr().err


def test_help_and_print_config(capsys):
  with pytest.raises(SystemExit):
    command_line.main(["--help"])
  assert "examples:" in capsys.readouterr().out
  assert command_line.main(["--config=configs/voc.py:split=1_16", "--print_config"]) == 0
  assert json.loads(capsys.readouterr().out)["total_steps"] == 39680


def test_the_headline_predictor_comes_first(tmp_path):
  results = pseudoseg_jax.train(
    "configs/quickstart.py:method=mean_teacher,convention=official", tmp_path, QUICKSTART
  )
  assert list(results["last"]["predictors"]) == ["teacher", "student"]
  assert (tmp_path / "scores.csv").read_text().startswith("class,teacher,student\n")
  assert pseudoseg_jax.load(tmp_path).name == "teacher"


@pytest.mark.parametrize(
  "argument, baseline",
  [
    ("method=cps,split=1_4", "method=supervised,split=1_4"),
    ("method=pseudoseg,split=92", "method=supervised,split=92,recipe=pseudoseg"),
    ("method=supervised", None),
  ],
)
def test_the_baseline_that_a_summary_names_differs_in_the_method_alone(argument, baseline):
  path = "configs/voc.py"
  config = configs.load(f"{path}:{argument}", {"data.root": "there"})
  config = configs.frozen(config)
  got = summary.baseline_command(
    {"path": path, "argument": argument}, config, {"data.root": "there"}
  )
  assert got == (baseline and f"{path}:{baseline}")
  flags = {"data.root": "there", "criterion.class_weights": "effective"}
  # What a run makes of it.
  config = options.replaced(config, {"criterion.class_weights": "0.5,2"})
  assert summary.baseline_command({"path": path, "argument": argument}, config, flags) == got


def test_without_a_home_compiled_programs_are_kept_elsewhere(monkeypatch):
  def homeless():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setattr("pathlib.Path.home", homeless)
  assert command_line._compilation_cache().endswith("pseudoseg_jax/compiled")
