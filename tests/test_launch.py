"""The launchers, as a user starts them."""

import argparse
import importlib.util
import json
import pathlib
import re

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


def load(name):
  spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_step_times_of_several_methods_come_as_a_table(capsys):
  methods = ["supervised", "pseudoseg+method.image_labels=True", "cps_cutmix"]
  load("step_time").main([
    "--config=configs/quickstart.py", f"--methods={','.join(methods)}", "--images=32", "--steps=1",
    "--config.network.width=4", "--config.views.crop_size=33,33",
  ])  # fmt: skip
  rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", capsys.readouterr().out, re.MULTILINE)
  assert [row[0] for row in rows] == methods
  assert rows[0][2] == "1.00" and all(float(number) > 0 for row in rows for number in row[1:])


def test_input_rate_and_its_stages_come_as_a_table(capsys):
  load("input_rate").main([
    "--config=configs/quickstart.py:method=supervised", "--strong_views=2", "--seconds=0.2", "--config.views.crop_size=33,33",
  ])  # fmt: skip
  printed = capsys.readouterr().out
  rate, cores = re.search(r"^([\d.]+) images/s on (\d+) cores", printed, re.MULTILINE).groups()
  assert "2 strong views" in printed and float(rate) > 0 and int(cores) >= 1
  rows = re.findall(r"^\| (\w+) \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| (\d+)% \|$", printed, re.MULTILINE)
  times = {"decode": 1, "crop": 1, "jitter": 1.6, "blur": 1, "normalize": 3, "batch": 3}  # 2 views x 0.8, 2 x 0.5, 1 + 2
  assert {stage: float(count) for stage, count, _ in rows} == times
  assert 95 <= sum(int(share) for _, _, share in rows) <= 105


def test_options_of_a_method_are_told_from_arguments_of_a_config(monkeypatch, tmp_path):
  compare = load("compare")
  commands = []

  def pretend(command, check):
    commands.append(command)
    workdir = pathlib.Path(next(part for part in command if part.startswith("--workdir=")).removeprefix("--workdir="))
    workdir.mkdir(parents=True)
    (workdir / "results.json").write_text('{"last": {"predictors": {"student": {"miou": 0.5}}}}')

  monkeypatch.setattr(compare.subprocess, "run", pretend)
  (tmp_path / "run").mkdir()
  compare.run("c.py:split=1_8", "mean_teacher+convention=official+method.weight=2.0", 3, tmp_path / "run" / "x", ["--config.seed=3"])
  assert "--config=c.py:split=1_8,method=mean_teacher,convention=official" in commands[0]
  assert "--config.method.weight=2.0" in commands[0]


def test_everything_measured_comes_as_one_table_and_is_measured_once(monkeypatch, tmp_path, capsys):
  monkeypatch.syspath_prepend(str(LAUNCH))
  measure = load("measure")
  asked = []

  def cost(path, method, **options):
    asked.append(method)
    return measure.step_time.Measured({"supervised": 0.2, "cps": 0.5, "ancillary": 0.3}[method], 3.0, 100.0)

  def run(config, method, seed, workdir, rest):
    camvid = "camvid" in config
    asked.append((method, seed, "--config.data.root=DIR" in rest))
    miou = 0.4 if camvid else {"supervised": 0.30, "cps": 0.33}[method] + 0.01 * seed
    return {"last": {"predictors": {"a": {"miou": miou}, "b": {"miou": 0.0}}}}

  monkeypatch.setattr(measure.step_time, "measure", cost)
  monkeypatch.setattr(measure.compare, "run", run)
  monkeypatch.setattr("sys.argv", ["measure.py", f"--workdir={tmp_path}", "--methods=cps,ancillary", "--seeds=0,2", "--camvid=DIR"])
  measure.main()
  measure.main()
  table = capsys.readouterr().out
  assert "| supervised | 1.00 | 3.0 | 100 | 31.0 ± 1.4 | +0.0 | 40.0 |" in table  # 30 and 32
  assert "| cps | 2.50 | 3.0 | 100 | 34.0 ± 1.4 | +3.0 | 40.0 |" in table
  assert "| ancillary | 1.50 | 3.0 | 100 | - | - | - |" in table  # one stage of several: its cost alone
  assert asked.count("cps") == 1 and ("cps", 0, True) in asked and ("cps", 2, False) in asked


def test_every_pipeline_measured_comes_as_one_table_and_is_run_once(monkeypatch, tmp_path, capsys):
  monkeypatch.syspath_prepend(str(LAUNCH))
  measure = load("measure_pipelines")
  commands = []

  def pretend(command, check):
    commands.append(command := [str(part) for part in command])
    if command[1].endswith("pipeline.py"):
      workdir = pathlib.Path(next(part for part in command if part.startswith("--workdir=")).removeprefix("--workdir="))
      seed = int(next(part for part in command if part.startswith("--config.seed=")).removeprefix("--config.seed="))
      is_boxed = "self_correcting" in str(workdir)
      stages = [{"name": "first", "kind": "train", "minutes": 2.0, "miou": {"a": 0.9}}]
      stages += [] if is_boxed else [{"name": "labels", "kind": "export", "minutes": 0.5, "images": 7}]
      stages += [{"name": "second", "kind": "train", "minutes": 1.0, "miou": {"student": 0.4 + 0.02 * seed, "other": 0.1}}]
      workdir.mkdir(parents=True)
      (workdir / "summary.json").write_text(json.dumps(stages))

  def score(labels, config):
    assert config.data.name == ("folder" if "camvid" in str(labels) else "synthetic")
    return None, argparse.Namespace(miou={"labels": 0.5, "ancillary_labels": 0.7}[labels.name])

  monkeypatch.setattr(measure.subprocess, "run", pretend)
  monkeypatch.setattr(measure.label_quality, "score", score)
  monkeypatch.setattr(measure.compare, "run", lambda *_: {"last": {"predictors": {"student": {"miou": 0.3}}}})
  arguments = [f"--workdir={tmp_path}", "--pipelines=learn_pseudo self_correcting", "--seeds=0,2", "--camvid=DIR"]
  monkeypatch.setattr("sys.argv", ["measure_pipelines.py", *arguments])
  measure.main()
  count = len(commands)
  measure.main()
  table = capsys.readouterr().out
  assert "| learn_pseudo | first 2.0, labels 0.5, second 1.0 | labels 50.0 | 42.0 ± 2.8 | +12.0 | labels 50.0 | 40.0 | +10.0 |" in table
  assert "| self_correcting | first 2.0, second 1.0 | ancillary_labels 70.0 | 42.0 ± 2.8 | +12.0 |" in table
  assert len([command for command in commands if command[1].endswith("pipeline.py")]) == 6  # two pipelines, seeds 0, 2 and CamVid
  # Weak labels are made anew only because nothing wrote their files.
  assert {command[1].rpartition("/")[2] for command in commands[count:]} <= {"tags_from_masks.py", "boxes_from_masks.py"}
  on_camvid = next(command for command in commands if command[1].endswith("pipeline.py") and "data=camvid" in command[2])
  assert f"--config.data.image_labels={tmp_path / 'weak_labels' / 'tags.csv'}" in on_camvid
