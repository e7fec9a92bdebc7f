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
  load("step_time").main(
    [
      "--config=configs/quickstart.py",
      f"--methods={','.join(methods)}",
      "--images=32",
      "--steps=1",
      "--config.network.width=4",
      "--config.views.crop_size=33,33",
    ]
  )
  rows = re.findall(
    r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$",
    capsys.readouterr().out,
    re.MULTILINE,
  )
  assert [row[0] for row in rows] == methods
  assert rows[0][2] == "1.00" and all(float(number) > 0 for row in rows for number in row[1:])


def test_input_rate_and_its_stages_come_as_a_table(capsys):
  load("input_rate").main(
    [
      "--config=configs/quickstart.py:method=supervised",
      "--strong_views=2",
      "--seconds=0.2",
      "--config.views.crop_size=33,33",
    ]
  )
  printed = capsys.readouterr().out
  rate, cores = re.search(r"^([\d.]+) images/s on (\d+) cores", printed, re.MULTILINE).groups()
  assert "2 strong views" in printed and float(rate) > 0 and int(cores) >= 1
  rows = re.findall(
    r"^\| (\w+) \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| (\d+)% \|$", printed, re.MULTILINE
  )
  # 2 views x 0.8, 2 x 0.5, 1 + 2.
  times = {"decode": 1, "crop": 1, "jitter": 1.6, "blur": 1, "normalize": 3, "batch": 3}
  assert {stage: float(count) for stage, count, _ in rows} == times
  assert 95 <= sum(int(share) for _, _, share in rows) <= 105


def test_every_pipeline_measured_comes_as_one_table_and_is_run_once(monkeypatch, tmp_path, capsys):
  monkeypatch.syspath_prepend(str(LAUNCH))
  measure = load("measure_pipelines")
  commands = []

  def pretend(command, check):
    commands.append(command := [str(part) for part in command])
    if "pseudoseg_jax.main" in command:
      workdir = pathlib.Path(
        next(part for part in command if part.startswith("--workdir=")).removeprefix("--workdir=")
      )
      workdir.mkdir(parents=True)
      (workdir / "results.json").write_text('{"last": {"predictors": {"student": {"miou": 0.3}}}}')
    if command[1].endswith("pipeline.py"):
      workdir = pathlib.Path(
        next(part for part in command if part.startswith("--workdir=")).removeprefix("--workdir=")
      )
      seed = int(
        next(part for part in command if part.startswith("--config.seed=")).removeprefix(
          "--config.seed="
        )
      )
      is_boxed = "self_correcting" in str(workdir)
      stages = [{"name": "first", "kind": "train", "minutes": 2.0, "miou": {"a": 0.9}}]
      stages += (
        [] if is_boxed else [{"name": "labels", "kind": "export", "minutes": 0.5, "images": 7}]
      )
      stages += [
        {
          "name": "second",
          "kind": "train",
          "minutes": 1.0,
          "miou": {"student": 0.4 + 0.02 * seed, "other": 0.1},
        }
      ]
      workdir.mkdir(parents=True)
      (workdir / "summary.json").write_text(json.dumps(stages))

  def score(labels, config):
    assert config.data.name == ("folder" if "camvid" in str(labels) else "synthetic")
    return None, argparse.Namespace(miou={"labels": 0.5, "ancillary_labels": 0.7}[labels.name])

  monkeypatch.setattr(measure.subprocess, "run", pretend)
  monkeypatch.setattr(measure.label_quality, "score", score)
  arguments = [
    f"--workdir={tmp_path}",
    "--pipelines=learn_pseudo self_correcting",
    "--seeds=0,2",
    "--camvid=DIR",
  ]
  monkeypatch.setattr("sys.argv", ["measure_pipelines.py", *arguments])
  measure.main()
  count = len(commands)
  measure.main()
  table = capsys.readouterr().out
  assert (
    "| learn_pseudo | first 2.0, labels 0.5, second 1.0 | labels 50.0 | 42.0 ± 2.8 | +12.0 | labels 50.0 | 40.0 | +10.0 |"
    in table
  )
  assert (
    "| self_correcting | first 2.0, second 1.0 | ancillary_labels 70.0 | 42.0 ± 2.8 | +12.0 |"
    in table
  )
  # Two pipelines, seeds 0, 2 and CamVid.
  assert len([command for command in commands if command[1].endswith("pipeline.py")]) == 6
  # Weak labels are made anew only because nothing wrote their files.
  assert {command[1].rpartition("/")[2] for command in commands[count:]} <= {
    "tags_from_masks.py",
    "boxes_from_masks.py",
  }
  on_camvid = next(
    command
    for command in commands
    if command[1].endswith("pipeline.py") and "data=camvid" in command[2]
  )
  assert f"--config.data.image_labels={tmp_path / 'weak_labels' / 'tags.csv'}" in on_camvid
