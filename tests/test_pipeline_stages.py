"""launch/pipeline.py: stages in order, each made once, from what the others made; and the pipelines
of configs/pipelines.py.
"""

import importlib.util
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from pseudoseg_jax import build, checks, config as configs

ROOT = pathlib.Path(__file__).parents[1]
PIPELINES = str(ROOT / "configs" / "pipelines.py")
ST = f"--config={PIPELINES}:self_training,data=quickstart"  # eight stages, of every kind
STAGES = [
  "teacher",
  "labels_third",
  "labels_two_thirds",
  "labels",
  "reliable",
  "student1",
  "labels1",
  "student2",
]

# What a stage does for the runner: it reads what it is given, works for a while, saves what is
# done, stops at SIGTERM, goes on.
FAKE = """
import hashlib, json, os, pathlib, re, signal, sys, time

def read(flag):
  return [a.partition("=")[2] for a in sys.argv if a.startswith(flag + "=")]

steps = int((read("--config.total_steps") or ["4"])[0])
out = pathlib.Path((read("--out") or read("--workdir"))[0])
select = out.suffix == ".txt"
folder = out.parent if select else out
folder.mkdir(parents=True, exist_ok=True)
if (folder.parent / f"break_{folder.name}").exists():
  print("working ...")
  print("error: no space left", file=sys.stderr)
  sys.exit(3)
with (folder.parent / "starts.txt").open("a") as starts:
  starts.write(folder.name + "\\n")

given = sorted({f for a in sys.argv[1:] for f in re.findall(r"/[^=,]+", a) if pathlib.Path(f).exists()} - {str(out)})
digests = []
for path in map(pathlib.Path, given):
  made = [p for p in (path / "results.json", path / "manifest.json", path) if p.is_file()]
  digests += [hashlib.sha256(p.read_bytes()).hexdigest() for p in made if p.suffix != ".py"]
what = [a for a in sys.argv[1:] if "/" not in a]
content = hashlib.sha256(json.dumps([digests, what]).encode()).hexdigest()

stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
signal.signal(signal.SIGINT, lambda *_: stopping.append(1))
for step in range(1, steps + 1):
  print(f"step {step}", flush=True)
  (folder / f"step_{step}").touch()
  time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
  while (folder.parent / f"hold_{folder.name}").exists() and not stopping:
    time.sleep(0.01)
  if stopping:
    print("stopped by a signal")
    sys.exit(0)

def write(path, text):
  part = path.with_suffix(".part")
  part.write_text(text)
  os.replace(part, path)

if select:
  write(out, "a\\nb\\n")
elif read("--out"):
  write(out / "manifest.json", json.dumps({"finished": True, "labels_sha256": content, "images": 3}))
else:
  scores = {"student": {"miou": int(content[:6], 16) / 16 ** 6}, "student+image_labels": {"miou": 0.5}}
  write(out / "results.json", json.dumps({"config": {}, "last": {"step": steps, "predictors": scores}}))
"""
RUN = f"import sys; sys.path[:0] = ['{ROOT / 'launch'}']; import pipeline\n" + (
  "pipeline.MODULES = dict.fromkeys(pipeline.MODULES, 'fake_stage'); sys.exit(pipeline.main(sys.argv[1:]))"
)
STEPS = "--config.total_steps=4"


def load():
  spec = importlib.util.spec_from_file_location("pipeline", ROOT / "launch" / "pipeline.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def runner(tmp_path, monkeypatch):
  """main of the launcher, with fake stages."""
  (tmp_path / "fake_stage.py").write_text(FAKE)
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
  module = load()
  monkeypatch.setattr(module, "MODULES", dict.fromkeys(module.MODULES, "fake_stage"))
  return module.main


def record(workdir, name):
  return json.loads((workdir / "stages" / f"{name}.json").read_text())


def starts(workdir):
  return (workdir / "starts.txt").read_text().split()


def outcomes(workdir):
  """What all stages made, and the summary but for its times."""
  summary = json.loads((workdir / "summary.json").read_text())
  assert all(stage.pop("minutes") > 0 for stage in summary)
  return {name: record(workdir, name)["made"] for name in STAGES}, summary


# --- with fake stages -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "last, more, finished", [(4, {}, True), (2, {}, False), (2, {"ended_early": True}, True)]
)
def test_a_training_is_finished_at_its_last_step_or_where_it_ended_early(
  tmp_path, last, more, finished
):
  step = types.SimpleNamespace(kind="train", config=types.SimpleNamespace(total_steps=4))
  content = {"config": {}, "last": {"step": last, "predictors": {"student": {"miou": 0.5}}}} | more
  (tmp_path / "results.json").write_text(json.dumps(content))
  made, told = load().outcome(step, tmp_path)
  assert (made is not None, told) == (
    (True, {"miou": {"student": 0.5}}) if finished else (False, {})
  )


def test_stages_run_in_order_once_and_read_what_earlier_ones_made(runner, tmp_path, capfd):
  workdir = tmp_path / "w"
  assert runner([ST, f"--workdir={workdir}", STEPS]) == 0
  assert starts(workdir) == STAGES
  printed = capfd.readouterr().out
  assert re.findall(r"stage \d of 8, '(\w+)'", printed) == STAGES and printed.count("step 4") == 8
  assert "step 4" in (workdir / "stages" / "labels.log").read_text()
  commands = {name: record(workdir, name)["command"] for name in STAGES}
  # of 4, in parts of ceil(4 / 3).
  assert "--step=2" in commands["labels_third"] and "--step=4" in commands["labels_two_thirds"]
  assert f"--config.pseudo_labels.list={workdir}/reliable/list.txt" in commands["student1"]
  assert f"--config.pseudo_labels.folder={workdir}/labels1" in commands["student2"]
  miou = json.loads((workdir / "teacher" / "results.json").read_text())["last"]["predictors"][
    "student"
  ]["miou"]
  table = (workdir / "table.md").read_text()
  assert re.search(
    rf"^\| teacher \| [\d.]+ \| {100 * miou:.2f} \| 50.00 \| - \|$", table, re.MULTILINE
  )
  assert (
    re.search(r"^\| reliable \| [\d.]+ \| - \| - \| 2 \|$", table, re.MULTILINE)
    and table in printed
  )

  assert runner([ST, f"--workdir={workdir}", STEPS]) == 0
  assert starts(workdir) == STAGES and capfd.readouterr().out.count("there already") == 8


def test_a_failed_stage_ends_the_pipeline_with_its_code_and_its_error_and_is_taken_up_again(
  runner, tmp_path, capfd
):
  workdir = tmp_path / "w"
  workdir.mkdir()
  (workdir / "break_labels").touch()
  assert runner([ST, f"--workdir={workdir}", STEPS]) == 3
  told = capfd.readouterr().err.splitlines()
  assert told[-1] == "error: no space left" and "'labels'" in told[-2] and "goes on" in told[-2]
  assert not (workdir / "summary.json").exists()
  (workdir / "break_labels").unlink()
  assert runner([ST, f"--workdir={workdir}", STEPS]) == 0
  assert starts(workdir) == STAGES


def test_other_options_are_refused_and_a_stage_whose_folder_is_removed_is_made_again(
  runner, tmp_path, capfd
):
  workdir = tmp_path / "w"
  run = lambda *more: runner([ST, f"--workdir={workdir}", STEPS, *more])
  assert run() == 0
  assert run("--student1.optimizer.learning_rate=0.5") == 2
  told = capfd.readouterr().err
  assert "optimizer.learning_rate: 0.5 now, 0.1 there" in told
  assert f"rm -r {workdir}/student1 {workdir}/labels1 {workdir}/student2" in told
  assert run("--labels.evaluation.flip=False") == 2
  assert "flip=False" in capfd.readouterr().err and len(starts(workdir)) == 8

  for path in (workdir / "labels").iterdir():
    path.unlink()
  (workdir / "labels").rmdir()
  assert run() == 0  # made again with the same result: what follows stays
  assert starts(workdir)[8:] == ["labels"]

  for path in (workdir / "student1").iterdir():
    path.unlink()
  (workdir / "student1").rmdir()
  # With another one: what follows does not fit.
  assert run("--student1.optimizer.learning_rate=0.5") == 2
  told = capfd.readouterr().err
  assert "'labels1'" in told and "stage 'student1': got made anew" in told
  assert f"rm -r {workdir}/labels1 {workdir}/student2" in told


def test_a_stage_that_was_begun_from_something_else_is_refused(runner, tmp_path, capfd):
  workdir = tmp_path / "w"
  workdir.mkdir()
  (workdir / "break_labels").touch()
  (workdir / "labels").mkdir()
  assert runner([ST, f"--workdir={workdir}", STEPS]) == 3
  for name in ("teacher", "labels_third", "labels_two_thirds"):
    for path in (workdir / name).iterdir():
      path.unlink()
    (workdir / name).rmdir()
  assert runner([ST, f"--workdir={workdir}", "--config.total_steps=5"]) == 2
  assert "stage 'labels' in" in capfd.readouterr().err


def test_a_stage_that_ends_well_without_its_result_is_no_success(
  runner, tmp_path, monkeypatch, capfd
):
  (tmp_path / "fake_stage.py").write_text("print('nothing done')")
  assert runner([ST, f"--workdir={tmp_path / 'w'}", STEPS]) == 1
  assert "ended before it was finished" in capfd.readouterr().err


def start(tmp_path, seconds=0.0):
  (tmp_path / "fake_stage.py").write_text(FAKE)
  environment = os.environ | {
    "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    "FAKE_SECONDS": str(seconds),
    "JAX_PLATFORMS": "cpu",
  }
  command = [sys.executable, "-c", RUN, ST, f"--workdir={tmp_path / 'w'}", STEPS]
  return subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def wait_for(path, process, seconds=60):
  end = time.time() + seconds
  while not path.exists():
    assert process.poll() is None and time.time() < end, process.communicate()
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_stage_which_saves_and_the_same_command_goes_on(number, runner, tmp_path):
  workdir = tmp_path / "w"
  workdir.mkdir()
  (workdir / "hold_labels_third").touch()
  process = start(tmp_path)
  wait_for(workdir / "labels_third" / "step_1", process)
  second = start(tmp_path)
  _, told = second.communicate(timeout=60)
  # One pipeline at a time.
  assert second.returncode == 2 and f"process {process.pid}, its stage" in told
  process.send_signal(number)
  output, told = process.communicate(timeout=60)
  assert (
    process.returncode == 128 + number
    and "stopped by a signal" in output
    and f"stopped by {number.name}" in told
  )
  assert starts(workdir) == STAGES[:2] and record(workdir, "labels_third")["made"] is None
  (workdir / "hold_labels_third").unlink()
  assert runner([ST, f"--workdir={workdir}", STEPS]) == 0
  assert starts(workdir) == [*STAGES[:2], *STAGES[1:]]


def test_a_stage_that_outlives_its_pipeline_keeps_the_next_one_out(runner, tmp_path, capfd):
  workdir = tmp_path / "w"
  workdir.mkdir()
  (workdir / "hold_labels").touch()
  process = start(tmp_path)
  wait_for(workdir / "labels" / "step_1", process)
  process.kill()
  process.communicate()
  assert runner([ST, f"--workdir={workdir}", STEPS]) == 2
  told = capfd.readouterr().err
  assert f"process {process.pid}, its stage process" in told
  os.kill(int(re.search(r"stage process (\d+)", told).group(1)), signal.SIGKILL)
  time.sleep(0.5)
  (workdir / "hold_labels").unlink()
  assert runner([ST, f"--workdir={workdir}", STEPS]) == 0


def test_killed_at_any_moment_and_started_again_it_ends_as_if_undisturbed(runner, tmp_path):
  (tmp_path / "undisturbed").mkdir()
  assert runner([ST, f"--workdir={tmp_path / 'undisturbed'}", STEPS]) == 0
  moments, killed = random.Random(0), 0
  for _ in range(4):
    process = start(tmp_path, 0.05)
    wait_for(tmp_path / "w" / "stages" / "lock", process)
    time.sleep(moments.uniform(0, 1.5))
    killed += process.poll() is None
    process.kill()  # the stage under way stays behind, and ends when it next prints
    process.communicate()
    time.sleep(1)
  end = time.time() + 30
  while (code := runner([ST, f"--workdir={tmp_path / 'w'}", STEPS])) == 2 and time.time() < end:
    time.sleep(0.1)
  assert killed and code == 0
  assert outcomes(tmp_path / "w") == outcomes(tmp_path / "undisturbed")


# --- what can be known before the first stage -----------------------------------------------------


@pytest.mark.parametrize(
  "flags, told",
  [
    (["--config.totl_steps=3"], "did you mean 'total_steps'"),
    (["--techer.total_steps=3"], "did you mean 'teacher'"),
    (["--reliable.share=1"], "--reliable.KEY: got no such stage"),
    (["--labels.evaluation.flp=True"], "did you mean 'evaluation.flip'"),
    (["--config.pseudo_labels.repeat_labeled=False"], "allowed: True; leave it"),
    (["--teacher.checkpoint_every_steps=7"], "checkpoint_every_steps: got 7; allowed: 1000"),
  ],
)
def test_wrong_options_are_told_before_the_first_stage(runner, tmp_path, capsys, flags, told):
  assert runner([ST, f"--workdir={tmp_path / 'w'}", *flags]) == 2
  assert told in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
  "argument, told",
  [
    ("lern_pseudo", "did you mean 'learn_pseudo'"),
    ("self_training,rounds=0,select=2", r"(?s)rounds: got 0.*select: got 2"),
    ("self_training,roundz=1", "did you mean 'rounds'"),
    ("self_correcting,correction=linar", "did you mean 'linear'"),
    ("learn_pseudo,data=cityscapes", "allowed: camvid, quickstart, voc"),
  ],
)
def test_wrong_arguments_are_told_with_the_nearest_right_one(argument, told):
  with pytest.raises(checks.InputError, match=told):
    load().load_stages(f"{PIPELINES}:{argument}")


# --- the pipelines --------------------------------------------------------------------------------

OPTIONS = [
  "learn_pseudo",
  *(
    f"self_correcting,correction={name}" for name in ("none", "linear", "convolutional", "em_fixed")
  ),
  "self_training",
  "self_training,rounds=1,select=0",
  "self_training,rounds=3,teacher=cps",
  "self_training,teacher=pseudoseg",
]
DATA = [
  "voc",
  "voc,split=1_8",
  "camvid",
  "camvid,split=1_4,network=deeplabv3plus,backbone=resnet101",
  "quickstart,labels=32",
]


def plan(argument, **overrides):
  pipeline = load()
  folder, stages = pipeline.load_stages(f"{PIPELINES}:{argument}")
  return {step.name: step for step in pipeline.plan(folder, stages, overrides)}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_pipeline_loads_for_every_data_set(options, data):
  name, *rest = options.split(",")
  # For the tests' eight devices.
  sizes = {"batch_size_global.labeled": "16", "batch_size_global.unlabeled": "16"}
  steps = plan(",".join([name, f"data={data}", *rest]), config=sizes)
  read = {of for step in steps.values() for of in step.reads}
  # The last is the result, all others serve it.
  assert list(steps)[-1] not in read and read == set(steps) - {list(steps)[-1]}
  for step in steps.values():
    if step.kind == "train":
      build.check_run(configs.frozen(step.config))
      assert set(re.findall(r"{(\w+)}", " ".join(step.arguments))) == {
        "configs",
        step.name,
        *step.reads,
      }


def test_the_stages_of_learning_pseudo_labels():
  steps = plan("learn_pseudo,split=92")
  assert list(steps) == ["hybrid", "labels", "retrained"]
  hybrid, retrained = steps["hybrid"].config, steps["retrained"].config
  assert (hybrid.method.name, hybrid.evaluation.image_labels) == ("learn_pseudo", True)
  assert (retrained.method.name, retrained.pseudo_labels.folder) == ("supervised", "{labels}")
  # [learning pseudo labels, sections 8 and 10]
  assert (hybrid.total_steps, retrained.total_steps) == (20_000, 30_000)
  assert retrained.views.labeled_operations == 2
  export = steps["labels"].arguments
  assert {
    "--image_labels",
    "--predictor=hybrid",
    "--config.evaluation.scales=0.5,0.75,1.0,1.25,1.5",
  } <= {*export}


def test_a_learnt_correction_has_its_ancillary_network_from_half_of_the_masks():
  steps = plan("self_correcting,correction=convolutional,data=quickstart")
  assert list(steps) == ["ancillary", "correction", "primary"]
  assert [step.config.labeled_every for step in steps.values()] == [2, 1, 1]
  assert (
    not steps["correction"].config.method.learn_weak and steps["primary"].config.method.learn_weak
  )
  assert (
    steps["primary"].config.nets_from
    == "ancillary={ancillary},primary={correction},correction={correction}"
  )
  assert [
    step.config.labeled_every for step in plan("self_correcting,data=quickstart").values()
  ] == [1, 1]
  assert list(plan("self_correcting,correction=em_fixed,data=quickstart")) == ["primary"]


def test_the_teachers_checkpoints_after_each_third_outlive_evaluations_and_interruptions():
  steps = plan(
    "self_training,data=quickstart", config={"total_steps": "100", "eval_every_steps": "10"}
  )
  teacher = steps["teacher"].config
  assert teacher.checkpoint_every_steps == 34 and teacher.keep_last_checkpoints >= 10 + 2 + 1
  assert (
    "--step=34" in steps["labels_third"].arguments
    and "--step=68" in steps["labels_two_thirds"].arguments
  )
  # 184 // 16 steps an epoch [ST++, main.py]
  assert plan("self_training,split=92")["teacher"].config.total_steps == 80 * 11


# --- the whole way --------------------------------------------------------------------------------

SMALL = {
  "total_steps": 6,
  "log_every_steps": 3,
  "network.width": 4,
  "views.crop_size": "33,33",
  "data.num_scenes": 24,
  "data.size": "40,48",
  "data.num_eval_scenes": 5,
  "evaluation.batch_size": 8,
  "evaluation.pictures": 0,
  "batch_size_global.labeled": 8,
  "batch_size_global.unlabeled": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize(
  "argument", ["learn_pseudo", "self_correcting,correction=convolutional", "self_training"]
)
def test_a_pipeline_runs_on_synthetic_scenes_from_start_to_end(argument, tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
  monkeypatch.chdir(ROOT)
  workdir = tmp_path / "w"
  flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
  assert (
    load().main(
      [f"--config={PIPELINES}:{argument},data=quickstart,labels=8", f"--workdir={workdir}", *flags]
    )
    == 0
  )
  summary = {stage["name"]: stage for stage in json.loads((workdir / "summary.json").read_text())}
  assert all(
    0 <= miou <= 1 for stage in summary.values() for miou in stage.get("miou", {}).values()
  )
  if argument == "learn_pseudo":
    assert {"hybrid", "hybrid+image_labels"} <= summary["hybrid"]["miou"].keys() and summary[
      "labels"
    ]["images"] == 16
  if argument == "self_training":
    assert (summary["labels"]["images"], summary["reliable"]["images"]) == (16, 8)
