"""The benchmark tool: real runs of a tiny benchmark in processes of their own, and tables of
results made by hand.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import command_line, config as configs, settings

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


@pytest.fixture(scope="module")
def benchmark():
  spec = importlib.util.spec_from_file_location("benchmark", LAUNCH / "benchmark.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules["benchmark"] = module  # where benchmark files import Run from
  spec.loader.exec_module(module)
  yield module
  del sys.modules["benchmark"]


TINY = '''"""Tiny."""
from benchmark import Run
from pseudoseg_jax import config as configs


def runs(root, workdir, seeds):
  for seed in seeds:
    for method in ("supervised", "single_pseudo"):
      config = configs.make_config(method, network="tiny", crop=16, steps=STEPS, data=configs.folder_data(
        root=str(root), classes="classes.txt", image_pattern="images/train/{id}.png", label_pattern="labels/train/{id}.png",
        split="1_2", eval_image_pattern="images/val/{id}.png", eval_label_pattern="labels/val/{id}.png"))
      config.seed, config.network.width, config.evaluation.pictures, config.eval_every_steps = seed, 4, 0, STEPS
      config.batch_size_global = {"labeled": 2, "unlabeled": 2}
      if method == "single_pseudo" and BROKEN:
        config.method.weight, config.optimizer.learning_rate = 1.0, -1.0
      yield Run("squares", method, "", "1_2", seed, config, {"data.eval_image_pattern": "images/test/{id}.png",
                                                             "data.eval_label_pattern": "labels/test/{id}.png"})
'''


@pytest.fixture
def squares(tmp_path):
  """A folder of images with a bright square each, in the layout of the data sets."""
  rng = np.random.default_rng(0)
  for split, count in {"train": 4, "val": 2, "test": 3}.items():
    for number in range(count):
      mask = np.zeros((20, 24), np.uint8)
      top, left = rng.integers(0, 10, 2)
      mask[top : top + 8, left : left + 8] = 1
      for kind, array in {
        "images": np.repeat(40 + 160 * mask[..., None], 3, -1),
        "labels": mask,
      }.items():
        path = tmp_path / "data" / kind / split / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
  (tmp_path / "data" / "classes.txt").write_text("background\nsquare\n")
  return tmp_path


def write(folder, steps=2, broken=False):
  (folder / "tiny.py").write_text(TINY.replace("STEPS", str(steps)).replace("BROKEN", str(broken)))


def command(folder, action, *options):
  paths = [
    f"--data_root={folder}/data",
    f"--workdir={folder}/work",
    f"--results={folder}/results.jsonl",
  ]
  return [
    sys.executable,
    str(LAUNCH / "benchmark.py"),
    action,
    str(folder / "tiny.py"),
    *paths,
    *options,
  ]


def one_device():
  return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def call(folder, action, *options):
  return subprocess.run(
    command(folder, action, *options), capture_output=True, text=True, env=one_device(), check=False
  )


def results_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(folder):
  return results_of(folder / "results.jsonl")


@pytest.mark.slow
def test_runs_are_done_once_again_where_settings_changed_and_a_failure_stops_no_other(squares):
  write(squares, broken=True)
  first = call(squares, "run", "--seeds=0")
  assert first.returncode == 1 and "FAILED  squares/single_pseudo/1_2/0" in first.stdout, (
    first.stderr
  )
  (result,) = results(squares)
  assert result["key"] == "squares/supervised/1_2/0" and result["steps"] == 2
  assert (
    set(result["test"]) == {"student"}
    and len(result["iou"]) == 2
    and result["best_val"]["step"] == 2
  )
  log = pathlib.Path(first.stdout.partition("see ")[2].strip().splitlines()[0])
  assert "config.optimizer.learning_rate" in log.read_text()

  write(squares)
  second = call(squares, "run", "--seeds=0", "--workers=2")
  assert second.returncode == 0 and "2 runs, 1 done, 1 to do" in second.stdout, (
    second.stdout + second.stderr
  )
  assert [one["method"] for one in results(squares)] == ["supervised", "single_pseudo"]
  assert "2 runs, 2 done, 0 to do" in call(squares, "run", "--seeds=0").stdout

  with (squares / "results.jsonl").open("a") as file:
    file.write('{"key": "cut sho')  # as a kill leaves it
  table = call(squares, "table", "--seeds=0")
  assert "2 of 2 runs are done" in table.stdout and "left out" in table.stderr
  assert (squares / "results.md").read_text() in table.stdout
  with Image.open(squares / "results.png") as drawn:
    assert drawn.width > 500

  write(squares, steps=3)
  assert "0 of 2 runs are done" in call(squares, "table", "--seeds=0").stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_takes_its_children_along(squares, number):
  write(squares, steps=100_000)
  in_background = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells make it
  child = subprocess.Popen(
    command(squares, "run", "--seeds=0"),
    stdout=subprocess.PIPE,
    text=True,
    env=one_device(),
    start_new_session=True,
    preexec_fn=in_background,
  )
  until = time.time() + 120
  while (
    not (begun := list(squares.glob("work/runs/*/history.jsonl")))
    and child.poll() is None
    and time.time() < until
  ):
    time.sleep(0.2)
  assert begun
  child.send_signal(number)
  assert child.wait(60) != 0
  group = subprocess.run(
    ["ps", "-o", "pid=", "-g", str(child.pid)], capture_output=True, text=True, check=False
  ).stdout.split()
  assert not group and not results(squares)


def result_of(run, test, best=None, minutes=2.0):
  return {
    "key": run.key,
    "digest": run.digest(),
    "headline": "student",
    "test": {"student": test, "teacher": 99.0},
    "best_val": {"step": 1, "val": 0.0, "test": best or test},
    "minutes": minutes,
  }


def make_runs(benchmark, methods, seeds, **data):
  config = lambda method: configs.make_config(
    method, network="tiny", data=configs.folder_data(**data)
  )
  return [
    benchmark.Run("leaves", method, "", "1_8", seed, config(method), {})
    for method in methods
    for seed in seeds
  ]


def test_the_table_takes_differences_seed_by_seed(benchmark):
  runs = make_runs(benchmark, ["supervised", "cps", "fixmatch"], [0, 1])
  scores = {
    "leaves/supervised/1_8/0": 40.0,
    "leaves/supervised/1_8/1": 44.0,
    "leaves/cps/1_8/0": 43.0,
    "leaves/cps/1_8/1": 45.0,
  }
  done = {run.key: result_of(run, scores[run.key]) for run in runs if run.key in scores}
  done |= {
    run.key: result_of(run, 39.0, best=50.0) for run in runs if run.key == "leaves/fixmatch/1_8/1"
  }
  lines = benchmark.table("Words.", runs, done).splitlines()
  assert (
    lines[0] == "Words." and "5 of 6 runs are done." in lines and "## leaves, labels: 1/8" in lines
  )
  assert lines[-3:] == [
    "| cps | 2 | 44.0 ± 1.4 | +2.0 ± 1.4 | 44.0 | 2 |",
    "| supervised | 2 | 42.0 ± 2.8 | - | 42.0 | 2 |",
    "| fixmatch | 1 | 39.0 | -5.0 | 50.0 | 2 |",
  ]


def with_nesterov(config):
  """The config as of a release with an option more."""
  with config.unlocked():
    config.optimizer.nesterov = False
  return config


def test_the_digest_is_of_settings_and_not_of_places_or_releases(benchmark, monkeypatch):
  (here,), (there,), (other,) = (
    make_runs(benchmark, ["cps"], [0], root=root, split=split)
    for root, split in (
      ("/a", "/a/lists/x.txt"),
      ("/b", "/b/lists/x.txt"),
      ("/a", "/a/lists/y.txt"),
    )
  )
  assert here.digest() == there.digest() != other.digest()
  for change in ({"method.weight": 0.5}, {"optimizer.power": 0.5}, {"network.width": 4}):
    changed = here.config.copy_and_resolve_references()
    configs.override(changed, change)
    assert dataclasses.replace(here, config=changed).digest() != here.digest()
  before, later = here.digest(), with_nesterov(here.config.copy_and_resolve_references())
  monkeypatch.setattr(
    configs, "base", lambda method, base=configs.base: with_nesterov(base(method))
  )
  assert dataclasses.replace(here, config=later).digest() == before
  assert (
    benchmark.newest([result_of(here, 1.0), result_of(there, 2.0)], [here])[here.key]["test"][
      "student"
    ]
    == 2.0
  )


def test_runs_of_a_config_are_of_the_methods_and_options_that_were_named(benchmark):
  methods = "supervised,pseudoseg+image_labels=1+method.temperature=0.7"
  runs = list(
    benchmark.of_config("configs/quickstart.py:labels=16", methods, {"total_steps": "7"}, [0, 3])
  )
  assert [run.key for run in runs] == [
    f"quickstart/{method}/labels=16/{seed}"
    for seed in (0, 3)
    for method in ("supervised", "pseudoseg+image_labels=1+method.temperature=0.7")
  ]
  assert [(run.config.seed, run.config.method.name, run.config.total_steps) for run in runs] == [
    (seed, method, 7) for seed in (0, 3) for method in ("supervised", "pseudoseg")
  ]
  assert runs[1].config.method.image_labels and runs[1].config.method.temperature == 0.7
  assert all(run.config.data.num_labeled == 16 for run in runs)
  everything = [run.method for run in benchmark.of_config("configs/quickstart.py", "all", {}, [0])]
  assert (
    everything[0] == "supervised" and "fixmatch" in everything and "cct_domains" not in everything
  )


def test_a_config_is_a_benchmark_and_its_table_can_be_checked(tmp_path):
  words = [
    "configs/quickstart.py:labels=8",
    f"--workdir={tmp_path}",
    "--methods=supervised,single_pseudo",
    "--seeds=1",
    "--config.total_steps=2",
    "--config.eval_every_steps=2",
    "--config.network.width=4",
    "--config.views.crop_size=32,32",
    "--config.batch_size_global.labeled=2",
    "--config.batch_size_global.unlabeled=2",
    "--config.evaluation.pictures=0",
    "--config.data.num_eval_scenes=4",
  ]

  def call(action, *more):
    tool = [sys.executable, str(LAUNCH / "benchmark.py"), action, *words, *more]
    return subprocess.run(
      tool, capture_output=True, text=True, env=one_device(), cwd=LAUNCH.parent, check=False
    )

  ran = call("run")
  assert ran.returncode == 0 and "## quickstart, labels: labels=8" not in ran.stdout, (
    ran.stdout + ran.stderr
  )
  assert "2 of 2 runs are done" in ran.stdout and "## quickstart, labels=8" in ran.stdout
  assert call("table", "--check").returncode == 1
  assert call("table").returncode == 0
  checked = call("table", "--check")
  assert checked.returncode == 0 and "is what the results make" in checked.stdout
  with (tmp_path / "quickstart.jsonl").open("a") as file:
    file.write(
      json.dumps(results_of(tmp_path / "quickstart.jsonl")[0] | {"val": {"student": 99.0}}) + "\n"
    )
  assert call("table", "--check").returncode == 1


@pytest.mark.parametrize(
  ("words", "told"),
  [
    (["configs/quickstart.py", "--methods=cps_cutmixx"], "cps_cutmix"),
    (["configs/no_such.py", "--methods=cps"], "no_such.py"),
    (["configs/quickstart.py"], "--methods=NAME"),
    (
      ["launch/benchmarks/photographs.py", "--data_root=DIR", "--config.total_steps=3"],
      "the settings of a benchmark file stand in it",
    ),
  ],
)
def test_what_is_no_benchmark_is_told(benchmark, capsys, monkeypatch, tmp_path, words, told):
  monkeypatch.chdir(LAUNCH.parent)
  code = command_line.run(lambda: leaves(benchmark.main, ["run", *words, f"--workdir={tmp_path}"]))
  assert code == 2 and told in capsys.readouterr().err


def leaves(main, arguments):
  try:
    return main(arguments)
  except SystemExit as error:  # of argparse
    return error.code


def test_the_runs_of_the_photographs_are_distinct_and_their_configs_are_of_methods(
  benchmark, tmp_path
):
  for number in range(12):
    path = tmp_path / "leeds_butterfly" / "images" / "train" / f"{number // 6:03}{number:04}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  runs = list(
    benchmark.load(LAUNCH / "benchmarks" / "photographs.py").runs(
      tmp_path, tmp_path / "work", [0, 1]
    )
  )
  assert len({run.key for run in runs}) == len({run.digest() for run in runs}) == len(runs)
  listed = pathlib.Path(runs[0].config.data.split).read_text().split()
  # Nothing depends on the machine.
  assert not [run.key for run in runs if settings.open_options(configs.frozen(run.config))]
  assert len(listed) == 10 and sum(name.startswith("000") for name in listed) == 5


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_of_photographs_in_the_docs_are_those_of_the_results(page):
  rows = (LAUNCH / "benchmarks/results/photographs.md").read_text().splitlines()
  lines = (LAUNCH.parent / page).read_text().partition("butterflies")[2].splitlines()
  shown = list(
    itertools.takewhile(bool, itertools.dropwhile(lambda line: not line.startswith("|"), lines))
  )
  assert len(shown) > 5 and set(shown) <= set(rows)
