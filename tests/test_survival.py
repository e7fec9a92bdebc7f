"""Real processes: killed, stopped, and several at once; all end where one undisturbed run ends."""

import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pseudoseg_jax import build, config as configs, trained
from pseudoseg_jax.engine import mesh as meshes

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 30
OPTIONS = {
  "total_steps": STEPS,
  "log_every_steps": 5,
  "eval_every_steps": 100,
  "checkpoint_every_steps": 4,
  "network.width": 4,
  "views.crop_size": "33,33",
  "data.num_scenes": 24,
  "data.num_labeled": 8,
  "data.num_eval_scenes": 5,
  "data.size": "40,48",
  "evaluation.batch_size": 8,
  "evaluation.pictures": 1,
  "batch_size_global.labeled": 8,
  "batch_size_global.unlabeled": 8,
}

pytestmark = pytest.mark.slow

_SPEC = importlib.util.spec_from_file_location("fault_trials", ROOT / "launch" / "fault_trials.py")
fault_trials = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fault_trials)


def start(workdir, *extra, devices=2):
  command = [
    sys.executable,
    "-m",
    "pseudoseg_jax.main",
    "--config=configs/quickstart.py:method=cps_cutmix",
    f"--workdir={workdir}",
  ]
  command += [f"--config.{key}={value}" for key, value in OPTIONS.items()]
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
  }
  return subprocess.Popen(
    [*command, *extra],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, code=0):
  output, _ = process.communicate(timeout=400)
  assert process.returncode == code, output
  return output


def wait_for_checkpoint(process, workdir, step, seconds=300):
  end = time.time() + seconds
  while not (workdir / "checkpoints" / "last" / str(step)).is_dir():
    assert process.poll() is None and time.time() < end, process.communicate()[0]
    time.sleep(0.02)


def last_state(workdir):
  config = configs.frozen(trained.saved_config(workdir))
  method = build.build_method(config, 7)
  state = trained.restore(workdir, method, meshes.make_mesh(jax.devices()[:1]), "last")
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  finish(start(workdir))
  return workdir


def assert_same_end(workdir, other, check=np.testing.assert_array_equal):
  jax.tree.map(check, last_state(workdir), last_state(other))


def test_killed_without_warning_and_started_again(undisturbed, tmp_path):
  process = start(tmp_path)
  wait_for_checkpoint(process, tmp_path, 8)
  process.kill()
  process.communicate()
  output = finish(start(tmp_path))
  assert "resumed at step" in output
  assert_same_end(tmp_path, undisturbed)


def test_terminated_and_started_again(undisturbed, tmp_path):
  process = start(tmp_path)
  wait_for_checkpoint(process, tmp_path, 4)
  process.send_signal(signal.SIGTERM)
  output = finish(process, code=143)  # as a shell has it: `train && next` ends here
  assert "stopped by SIGTERM" in output and not (tmp_path / "results.json").exists()
  finish(start(tmp_path))
  assert_same_end(tmp_path, undisturbed)


def start_two(workdir, **options):
  """Two processes of one run; options: a pair of values each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  several = [f"--coordinator=localhost:{port}", "--process_count=2"]
  own = [[f"--config.{key}={value[index]}" for key, value in options.items()] for index in range(2)]
  return [
    start(workdir, *several, f"--process_index={index}", *own[index], devices=1)
    for index in range(2)
  ]


def test_two_processes_train_as_one(undisturbed, tmp_path):
  processes = start_two(tmp_path)
  outputs = [finish(process) for process in processes]
  assert "Done: cps_cutmix" in outputs[0] and "Done" not in outputs[1]
  # Two processes add up in another order than two devices of one do: float32 round-off.
  assert_same_end(
    tmp_path, undisturbed, lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-3)
  )
  ours, theirs = (
    json.loads((workdir / "results.json").read_text())["last"]
    for workdir in (tmp_path, undisturbed)
  )
  assert (
    ours["predictors"].keys() == theirs["predictors"].keys()
    and ours["step"] == theirs["step"] == STEPS
  )


def test_processes_that_were_started_differently_are_named(tmp_path):
  processes = start_two(tmp_path, seed=(0, 1))
  for index, process in enumerate(processes):
    output = finish(process, code=2)
    assert "process 1: config" in output and ("seed: 1, in process 0 0" in output) == bool(index)
  assert not (tmp_path / "config.json").exists()


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
  processes = start_two(tmp_path, total_steps=(3000, 3000))
  wait_for_checkpoint(processes[0], tmp_path, 4)
  processes[1].send_signal(signal.SIGTERM)
  output = [finish(process, code=143) for process in processes][0]
  step = re.search(r"stopped by preemption after step (\d+)", output)[1]
  assert (tmp_path / "checkpoints" / "last" / step).is_dir()


def test_the_loss_of_a_process_ends_the_other_and_one_alone_resumes(tmp_path):
  processes = start_two(tmp_path, total_steps=(3000, 3000))
  wait_for_checkpoint(processes[0], tmp_path, 4)
  processes[1].kill()
  processes[1].communicate()
  output = finish(processes[0], code=1)
  assert "error: another process of this run was lost" in output and "Traceback" not in output
  assert "resumed at step" in finish(start(tmp_path))


@pytest.mark.parametrize("fault", sorted(set(fault_trials.FAULTS) - {"disk"}))
def test_a_trial_of_each_fault(fault, tmp_path):
  for line in fault_trials.trials(tmp_path, [fault], ["cps_cutmix"], 1, 0):
    assert line["held"], line["what"]
