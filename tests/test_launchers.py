"""The launchers for several processes and hosts: real processes, under stand-ins for Slurm and
gcloud, and on two hosts.
"""

import contextlib
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import yaml
from test_launch import load

from pseudoseg_jax import config as configs, main

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / "slurm.sbatch", LAUNCH / "tpu_vm.sh"]
TEXTS = [
  *SCRIPTS,
  LAUNCH / "local.py",
  LAUNCH / "gke.yaml",
  LAUNCH / "Dockerfile",
  ROOT / "docs" / "multi_host.md",
]

fault_trials, local = load("fault_trials"), load("local")

STEPS = 24
OPTIONS = fault_trials.OPTIONS | {"total_steps": STEPS, "eval_every_steps": 100}
SECONDS = 400  # within which a run is done, on a busy machine


def arguments(workdir, method="supervised", **options):
  """Of a small run."""
  command = [f"--config={ROOT}/configs/quickstart.py:method={method}", f"--workdir={workdir}"]
  return command + [f"--config.{key}={value}" for key, value in (OPTIONS | options).items()]


def environment(**variables):
  """Of a process that finds CPUs alone, and the stand-ins and this Python first."""
  path = os.pathsep.join(
    [*variables.pop("path", ()), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
  )
  kept = {
    key: value
    for key, value in os.environ.items()
    if key != "XLA_FLAGS" and not key.startswith("SLURM_")
  }
  # A few steps take less time than compiling them well.
  return (
    kept | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PATH": path} | variables
  )


def start(command, **variables):
  return subprocess.Popen(
    list(map(str, command)),
    cwd=ROOT,
    env=environment(**variables),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, code=0, seconds=SECONDS):
  found, output = fault_trials.ended(process, seconds)
  assert found == code, output
  return output


def start_local(processes, *rest, devices=1):
  return start(
    [
      sys.executable,
      LAUNCH / "local.py",
      f"--processes={processes}",
      f"--devices_per_process={devices}",
      *rest,
    ]
  )


def pids(workdir):
  """Of the processes that train in a workdir."""
  found = {}
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      command = path.read_bytes().decode().split("\0")
      if command[1:3] == ["-m", "pseudoseg_jax.main"] and f"--workdir={workdir}" in command:
        index = next(
          (word.partition("=")[2] for word in command if word.startswith("--process_index=")),
          len(found),
        )
        found[int(index)] = int(path.parent.name)
  return found


def wait_until(condition, what, seconds=SECONDS):
  end = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < end, what
    time.sleep(0.05)
  return found


def wait_for_checkpoint(process, workdir):
  fault_trials.wait_for(process, lambda: bool(fault_trials.steps(workdir)))


def stand_in(folder, name, text):
  """An executable to be found before the real one."""
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The workdir of two processes of a device each, which nothing disturbed."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  finish(start_local(2, *arguments(workdir)))
  return workdir


# --- what is written in them ----------------------------------------------------------------------


def commands_in(text):
  """The lines of comments and code blocks that start runs, continued ones whole: (what they start,
  its arguments).
  """
  lines = re.sub(r"\\\n#? *", "", text).replace('"$@"', "").splitlines()
  pattern = r"(launch/local\.py|launch/slurm\.sbatch|launch/tpu_vm\.sh run|pseudoseg_jax\.main|pseudoseg(?= --config)) (--.*)"
  for line in lines:
    if found := re.search(pattern, line):
      rest = re.split(r"[`|;&)]|  +", found[2])[0]
      yield found[1], shlex.split(rest.rstrip('"') if rest.count('"') % 2 else rest)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_name_options_and_configs_that_exist(path):
  found = list(commands_in(path.read_text()))
  assert found
  for what, given in found:
    if what == "launch/local.py":
      given = given + ["--workdir=W"] * (not any(word.startswith("--workdir") for word in given))
      known, given = local._parse(given)
      given.append(f"--workdir={known.workdir}")
    given = [word for word in given if word != "..."]
    if any(word.startswith(("--config=configs/", "--mode=eval")) for word in given):
      known, overrides = main._parse(given)
      if known.config:
        configs.override(configs.load(f"{ROOT}/{known.config}"), overrides)
    else:
      main._parse([*given, "--config=C", "--workdir=W"])


def test_shell_scripts_are_without_findings():
  shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
  files = [path for path in LAUNCH.iterdir() if path.is_file()]
  assert sorted(path for path in files if path.read_text().startswith("#!/bin/bash")) == SCRIPTS
  found = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
  assert found.returncode == 0, found.stdout + found.stderr


def test_slurm_job_has_a_process_for_each_gpu_and_all_gpus_in_sight():
  options = dict(
    re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
  )
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert not options.keys() & {"gpus-per-task", "array"}
  assert (
    options["signal"].startswith("TERM@")
    and "requeue" in options
    and options["open-mode"] == "append"
  )


def objects(kind):
  every = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
  return {found["metadata"]["name"]: found for found in every if found["kind"] == kind}


@pytest.mark.parametrize("name", ["pseudoseg-gpu", "pseudoseg-tpu"])
def test_kubernetes_job_agrees_with_itself(name):
  jobs, services = objects("Job"), objects("Service")
  assert jobs.keys() == services.keys() == {"pseudoseg-gpu", "pseudoseg-tpu"}
  job, service = jobs[name], services[name]
  assert (
    job["metadata"]["labels"]
    == service["metadata"]["labels"]
    == {"hardware": name.removeprefix("pseudoseg-")}
  )
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  hosts = spec["completions"]
  assert spec["completionMode"] == "Indexed" and spec["parallelism"] == hosts > 1
  # A headless service of the job's pods gives them the names that process 0 is sought by.
  assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
  assert service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == name
  (container,) = pod["containers"]
  assert {mount["name"] for mount in container["volumeMounts"]} == {
    volume["name"] for volume in pod["volumes"]
  }
  # Rules by exit code are allowed with this policy alone.
  assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
  rules = spec["podFailurePolicy"]["rules"]
  by_code = {
    tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in rules if "onExitCodes" in rule
  }
  assert by_code == {(2,): "FailJob", (143,): "Ignore"}
  assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {
    container["name"]
  }
  known, overrides = main._parse(
    [word.replace("$(PROCESS_INDEX)", "1") for word in container["args"]]
  )
  assert str(known.workdir).startswith("/shared/") and "data.root" in overrides
  if name == "pseudoseg-gpu":
    assert known.process_count == hosts and known.process_index == 1
    assert known.coordinator.startswith(f"{name}-0.{name}:") and not known.distributed
  else:
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert (
      math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
      == hosts * chips
    )
    assert known.distributed and known.coordinator is None


def docker_copies():
  """(sources, destination) of each COPY."""
  for line in (LAUNCH / "Dockerfile").read_text().splitlines():
    if line.startswith("COPY "):
      *sources, destination = line.split()[1:]
      yield sources, destination


def test_image_runs_the_command_and_gets_what_is_not_ignored():
  text = (LAUNCH / "Dockerfile").read_text()
  assert json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1]) == [
    "python",
    "-m",
    "pseudoseg_jax.main",
  ]
  ignored = (ROOT / ".dockerignore").read_text().splitlines()
  let_through = {line.removeprefix("!") for line in ignored if line.startswith("!")}
  assert (
    "*" in ignored
    and {source for sources, _ in docker_copies() for source in sources} == let_through
  )


@pytest.mark.slow
def test_what_the_image_gets_is_enough_to_install_it(tmp_path):
  context = tmp_path / "context"
  context.mkdir()
  for sources, destination in docker_copies():
    for source in sources:
      if (ROOT / source).is_dir():
        shutil.copytree(
          ROOT / source, context / destination, ignore=shutil.ignore_patterns("__pycache__")
        )
      else:
        shutil.copy(ROOT / source, context / destination)
  pip = [
    sys.executable,
    "-m",
    "pip",
    "wheel",
    "--quiet",
    "--no-deps",
    "--no-build-isolation",
    f"--wheel-dir={tmp_path}",
    ".",
  ]
  subprocess.run(pip, cwd=context, check=True)
  (wheel,) = tmp_path.glob("*.whl")
  shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
  command = [
    sys.executable,
    "-m",
    "pseudoseg_jax.main",
    "--config=configs/quickstart.py",
    "--print_config",
  ]
  shown = subprocess.run(
    command,
    cwd=tmp_path / "installed",
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert '"synthetic"' in shown.stdout, shown.stderr


# --- local.py -------------------------------------------------------------------------------------


def test_help_answers_at_once():
  began = time.monotonic()
  shown = subprocess.run(
    [sys.executable, LAUNCH / "local.py", "--help"], capture_output=True, text=True, check=True
  ).stdout
  assert "--devices_per_process" in shown and "Resume:" in shown
  assert time.monotonic() - began < 5


def test_all_that_cannot_be_used_is_told_at_once(tmp_path, capsys):
  (tmp_path / "file").touch()
  code = local.main(
    ["--processes=0", "--devices_per_process=0", f"--workdir={tmp_path / 'file'}", "--config=C"]
  )
  told = capsys.readouterr().err
  assert code == 2 and all(
    word in told for word in ("--processes: got 0", "--devices_per_process: got 0", "got a file")
  )


def test_more_processes_than_gpus_are_told_before_they_start(tmp_path, monkeypatch, capsys):
  (tmp_path / "nvidia-smi").write_text(
    "#!/bin/sh\necho 'GPU 0: NVIDIA A (UUID: GPU-0)'\necho 'GPU 1: NVIDIA A (UUID: GPU-1)'\n"
  )
  (tmp_path / "nvidia-smi").chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
    monkeypatch.delenv(name, raising=False)
  assert local._gpu_count() == 2
  assert (
    local.main(["--processes=2", "--devices_per_process=2", f"--workdir={tmp_path / 'w'}"]) == 2
  )
  told = capsys.readouterr().err
  assert (
    "got 2 processes with 2 GPUs each; allowed: 2 GPUs in all" in told
    and "JAX_PLATFORMS=cpu" in told
  )
  for shown, count in (("0", 1), ("3,5,7", 3), ("", 0), ("-1", 0)):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert local._gpu_count() == count
  for platforms, count in (("cpu", None), ("tpu", None), ("cuda,cpu", 0)):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert local._gpu_count() == count


def start_pretended(tmp_path, script, processes=3):
  """local.py with processes that run a script in place of the command; `index` is its own."""
  package = tmp_path / "pseudoseg_jax"
  package.mkdir(exist_ok=True)
  (package / "__init__.py").touch()
  head = "import os, signal, sys, time\nindex = int(sys.argv[-1].partition('=')[2])\nprint('process', index, flush=True)\n"
  (package / "main.py").write_text(head + script)
  command = [
    sys.executable,
    str(LAUNCH / "local.py"),
    f"--processes={processes}",
    f"--workdir={tmp_path / 'w'}",
    "--config.x=1",
  ]
  return subprocess.Popen(
    command,
    cwd=tmp_path,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def said(workdir, index):
  path = workdir / "processes" / f"{index}.txt"
  return path.read_text() if path.exists() else ""


def all_said(tmp_path, word, processes=3):
  return lambda: all(word in said(tmp_path / "w", index) for index in range(processes))


def test_logs_of_all_are_kept_and_the_first_is_shown(tmp_path):
  for _ in range(2):
    output = finish(start_pretended(tmp_path, "print('arguments', sys.argv[1:])"), seconds=60)
    assert output.count("process 0") == 1 and "process 1" not in output and "--config.x=1" in output
  for index in range(3):
    log = said(tmp_path / "w", index)
    assert (
      log.count(f"process {index}\n") == 2 and log.count("$ ") == 2 and "--process_count=3" in log
    )


@pytest.mark.parametrize(
  ("end", "code", "says"),
  [
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
    ("sys.exit(1)", 1, "ended with exit code 1"),
    ("sys.exit(2)", 2, "ended with exit code 2"),
  ],
)
def test_who_died_first_is_named_and_the_others_are_ended(
  tmp_path, monkeypatch, capsys, end, code, says
):
  monkeypatch.setattr(local, "_GRACE_SECONDS", 0.5)
  monkeypatch.chdir(tmp_path)
  start_pretended(tmp_path, "").communicate()  # writes the package
  script = f"if index == 2:\n  {end}\ntime.sleep(600)"
  (tmp_path / "pseudoseg_jax" / "main.py").write_text(
    f"import os, signal, sys, time\nindex = int(sys.argv[-1][-1])\n{script}"
  )
  monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay
  began = time.monotonic()
  assert local.main(["--processes=3", f"--workdir={tmp_path / 'w'}"]) == code
  told = capsys.readouterr().err
  assert f"process 2 of 3 {says}" in told and str(tmp_path / "w" / "processes" / "2.txt") in told
  assert ("the same command resumes" in told) == (code != 2)
  assert time.monotonic() - began < 30 and not pids(tmp_path / "w")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_goes_to_all_once_and_a_second_one_ends_them(tmp_path, number, code):
  script = f"""
signal.signal({int(number)}, lambda *_: print("got it", flush=True))
print("ready", flush=True)
for _ in range(6000):
  time.sleep(0.1)
"""
  launcher = start_pretended(tmp_path, script)
  wait_until(all_said(tmp_path, "ready"), "they did not start", 60)
  os.killpg(launcher.pid, number)  # as a terminal does for Ctrl-C
  launcher.send_signal(number)  # told to it and to its group: that is one
  wait_until(all_said(tmp_path, "got it"), "they were not told", 60)
  time.sleep(1.5)
  assert launcher.poll() is None
  launcher.send_signal(number)
  output = finish(launcher, code, seconds=60)
  assert (
    f"stopped by {number.name}" in output
    and said(tmp_path / "w", 1).count("got it") == 1
    and not pids(tmp_path / "w")
  )


def test_nobody_stays_when_the_launcher_is_killed(tmp_path):
  launcher = start_pretended(tmp_path, "print('ready', flush=True)\ntime.sleep(600)")
  wait_until(all_said(tmp_path, "ready"), "they did not start", 60)
  assert len(pids(tmp_path / "w")) == 3
  launcher.kill()
  launcher.communicate(timeout=60)
  wait_until(lambda: not pids(tmp_path / "w"), "some were left", 60)


def test_two_processes_train_and_the_first_line_says_so(tmp_path):
  output = finish(start_local(2, *arguments(tmp_path, total_steps=3)))
  first = next(line for line in output.splitlines() if line.startswith("supervised on synthetic"))
  assert ", 2 devices (cpu) of 2 processes, workdir" in first
  assert "step 3/3" in output and (tmp_path / "results.json").exists() and not pids(tmp_path)
  assert "Done" in said(tmp_path, 0) and "Done" not in said(tmp_path, 1)
  assert "--process_index=1" in said(tmp_path, 1)


# --- local.py, real runs --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (4, 1), (2, 2)])
def test_processes_train_as_one_with_as_many_devices(tmp_path, processes, devices):
  # Partners from the whole batch; hard labels, which make much of little.
  run = {"method": "cps_cutmix", "total_steps": 4}
  finish(start_local(processes, *arguments(tmp_path / "several", **run), devices=devices))
  flags = f"--xla_force_host_platform_device_count={processes * devices}"
  finish(
    start(
      [sys.executable, "-m", "pseudoseg_jax.main", *arguments(tmp_path / "one", **run)],
      XLA_FLAGS=flags,
    )
  )
  ours, theirs = fault_trials.outcome(tmp_path / "several"), fault_trials.outcome(tmp_path / "one")
  tables = [outcome.pop("results.json")["last"]["predictors"] for outcome in (ours, theirs)]
  assert ours.keys() == theirs.keys() and tables[0].keys() == tables[1].keys()
  # Sums over processes are taken in another order than sums over devices of one: float32 round-off,
  # which every step makes more.
  for name, array in ours.items():
    np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-4, err_msg=name)
  for name, table in tables[0].items():
    assert abs(table["miou"] - tables[1][name]["miou"]) < 0.005, name


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_run_which_resumes_to_the_same_end(undisturbed, tmp_path, lost):
  launcher = start_local(2, *arguments(tmp_path))
  wait_for_checkpoint(launcher, tmp_path)
  os.kill(pids(tmp_path)[lost], signal.SIGKILL)
  output = finish(launcher, code=137, seconds=120)
  assert (
    f"process {lost} of 2 was killed by SIGKILL" in output
    and str(tmp_path / "processes" / f"{lost}.txt") in output
  )
  assert not pids(tmp_path)
  assert "resumed at step" in finish(start_local(2, *arguments(tmp_path)))
  fault_trials.compare(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_resumes(undisturbed, tmp_path, number):
  launcher = start_local(2, *arguments(tmp_path))
  wait_for_checkpoint(launcher, tmp_path)
  launcher.send_signal(number)
  output = finish(launcher, code=128 + number)
  step = int(re.search(r"stopped by \w+ after step (\d+)", output)[1])
  assert step in fault_trials.steps(tmp_path) and step < STEPS and not pids(tmp_path)
  assert f"resumed at step {step} of {STEPS}" in finish(start_local(2, *arguments(tmp_path)))
  fault_trials.compare(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_signal_before_the_first_step_of_a_resumed_run_stops_it(undisturbed, tmp_path):
  finish(start_local(2, *arguments(tmp_path, total_steps=6)))
  launcher = start_local(2, *arguments(tmp_path, total_steps=3000))
  wait_until(lambda: said(tmp_path, 0).count("of 2 processes") == 2, "it did not start")
  launcher.send_signal(signal.SIGTERM)
  assert "stopped by preemption after step 7 of 3000" in finish(launcher, code=143, seconds=120)


# --- slurm.sbatch under stand-ins -----------------------------------------------------------------

# Starts tasks as srun does, passes SIGTERM on to them and ends with the greatest of their codes.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = list(sys.argv[1:])
options = []
while command[0].startswith("-"):
  options.append(command.pop(0))
here = os.environ["STAND_IN"]
with open(here + "/srun.txt", "a") as file:
  print(options, os.environ["SRUN_CPUS_PER_TASK"], file=file)
step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}}
numbers = [{{"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}} for index in range(2)]
tasks = [subprocess.Popen(command, env=os.environ | step | of_task) for of_task in numbers]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""
SCONTROL = """#!/bin/sh
echo "$*" >> "$STAND_IN/scontrol.txt"
[ "$1" = requeue ] || echo "   JobState=$(cat "$STAND_IN/state") Reason=None"
"""


def free_job():
  """A job's number of which JAX makes a port that is free: 61440 and up."""
  while True:
    job = random.randrange(2**20)
    with socket.socket() as free, contextlib.suppress(OSError):
      free.bind(("localhost", job % 2**12 + 65536 - 2**12))
      return job


class Slurm:
  """A cluster of stand-ins: a node with two tasks."""

  def __init__(self, folder, srun=SRUN):
    self.folder = folder / "slurm"
    stand_in(self.folder, "srun", srun)
    stand_in(self.folder, "scontrol", SCONTROL)
    (self.folder / "state").write_text("RUNNING")
    self.job = free_job()

  def start(self, *rest):
    variables = {
      "STAND_IN": str(self.folder),
      "SLURM_JOB_ID": str(self.job),
      "SLURM_CPUS_PER_TASK": "8",
    }
    return start(["bash", LAUNCH / "slurm.sbatch", *rest], path=[str(self.folder)], **variables)

  def requeued(self):
    """The jobs that were."""
    path = self.folder / "scontrol.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("requeue ")]


@pytest.mark.parametrize(
  ("code", "state", "requeued"),
  [
    (0, "RUNNING", False),
    (1, "RUNNING", False),
    (2, "RUNNING", False),
    (130, "RUNNING", False),
    (143, "RUNNING", True),
    (143, "CANCELLED", False),
    (143, "COMPLETING", False),
    (143, "PREEMPTED", False),
  ],
)
def test_slurm_job_that_was_stopped_is_requeued_unless_it_was_canceled(
  tmp_path, code, state, requeued
):
  slurm = Slurm(tmp_path, srun=f'#!/bin/sh\nprintf "<%s>" "$@"\nexit {code}\n')
  (slurm.folder / "state").write_text(state)
  output = finish(slurm.start("--config=C", "--workdir=a b", "--config.x=1,2"), code, seconds=30)
  assert (
    "<python><-m><pseudoseg_jax.main><--distributed><--config=C><--workdir=a b><--config.x=1,2>"
    in output
  )
  assert slurm.requeued() == [slurm.job] * requeued


@pytest.mark.slow
def test_slurm_job_stops_saved_and_goes_on_when_it_is_requeued(undisturbed, tmp_path):
  slurm, workdir = Slurm(tmp_path), tmp_path / "w"
  job = slurm.start(*arguments(workdir))
  wait_for_checkpoint(job, workdir)
  assert len(pids(workdir)) == 2
  for pid in [job.pid, *pids(workdir).values()]:  # all of the job, as Slurm may
    os.kill(pid, signal.SIGTERM)
  output = finish(job, code=143)
  assert (
    ", 2 devices (cpu) of 2 processes, workdir" in output
    and "stopped by preemption after step" in output
  )
  assert slurm.requeued() == [slurm.job] and not (workdir / "results.json").exists()
  assert "resumed at step" in finish(slurm.start(*arguments(workdir)))
  assert slurm.requeued() == [slurm.job]
  fault_trials.compare(workdir, undisturbed)


# --- tpu_vm.sh under a stand-in -------------------------------------------------------------------

# Two workers, each with a home of its own. A command's process group is hung up on when it ends, as
# by a connection that closes.
GCLOUD = f"""#!{sys.executable}
import contextlib, json, os, shutil, signal, subprocess, sys
here, given = os.environ["STAND_IN"], sys.argv[1:]
with open(here + "/gcloud.txt", "a") as file:
  print(json.dumps(given), file=file)
options = dict(word[2:].partition("=")[::2] for word in given if word.startswith("--"))
workers = {{"all": range(2), None: ()}}.get(options.get("worker"), range(1))
code = 0
for index in workers:
  home = f"{{here}}/worker{{index}}"
  if given[3] == "scp":
    shutil.copy(given[4], f"{{home}}/{{given[5].partition(':')[2]}}")
  if given[3] == "ssh":
    step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}}
    path = f"{{home}}/bin:{{os.environ['PATH']}}"
    process = subprocess.Popen(
      ["bash", "-c", options["command"]], cwd=home, env=os.environ | step | {{"HOME": home, "PATH": path}}, start_new_session=True
    )
    code = max(code, process.wait())
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGHUP)
sys.exit(code)
"""


class Tpu:
  """A TPU of two workers, which JAX takes for a Slurm cluster."""

  def __init__(self, folder):
    self.folder = folder / "tpu"
    stand_in(self.folder, "gcloud", GCLOUD)
    for home in self.homes():
      stand_in(home, ".keep", "")
      stand_in(home / "bin", "python3", '#!/bin/sh\necho "$*" >> "$HOME/python3.txt"\n')
      (home / "pseudoseg_env").mkdir()
      stand_in(home / "pseudoseg_env" / "bin", "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    self.job = free_job()

  def homes(self):
    return [self.folder / f"worker{index}" for index in range(2)]

  def do(self, *words, code=0, **variables):
    variables = {
      "STAND_IN": str(self.folder),
      "SLURM_JOB_ID": str(self.job),
      "TPU_NAME": "mine",
      "ZONE": "there",
    } | variables
    variables.setdefault("JAX_COMPILATION_CACHE_DIR", main._compilation_cache())  # homes are others
    return finish(
      start([LAUNCH / "tpu_vm.sh", *words], path=[str(self.folder)], **variables), code, seconds=60
    )

  def asked(self):
    return [json.loads(line) for line in (self.folder / "gcloud.txt").read_text().splitlines()]

  def log(self, index):
    path = self.homes()[index] / "pseudoseg.log"
    return path.read_text() if path.exists() else ""


def test_tpu_commands_ask_gcloud_for_the_right_tpu(tmp_path):
  tpu = Tpu(tmp_path)
  tpu.do("create", "--accelerator-type=v4-32", "--version=V", "--spot")
  tpu.do("install")
  tpu.do("delete")
  create, scp, install, delete = tpu.asked()
  assert create == shlex.split(
    "compute tpus tpu-vm create mine --accelerator-type=v4-32 --version=V --spot --zone=there"
  )
  assert delete == shlex.split("compute tpus tpu-vm delete mine --zone=there")
  assert (
    scp[5:] == ["mine:pseudoseg.tar.gz", "--worker=all", "--zone=there"]
    and not pathlib.Path(scp[4]).exists()
  )
  assert (
    install[:6] == shlex.split("compute tpus tpu-vm ssh mine --worker=all")
    and install[-1] == "--zone=there"
  )
  # Unpacked there, and given to pip with the extra that pyproject.toml has.
  for home in tpu.homes():
    assert (home / "pseudoseg_jax" / "pseudoseg_jax" / "main.py").is_file()
    assert (home / "pseudoseg_jax" / "configs" / "quickstart.py").is_file()
    assert "--editable ./pseudoseg_jax[tpu]" in (home / "python3.txt").read_text()
    with tarfile.open(home / "pseudoseg.tar.gz") as archive:
      assert not [
        name for name in archive.getnames() if "__pycache__" in name or name.startswith(".git")
      ]
  assert re.search(r"^tpu = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", [["strat"], ["install", "now"], ["run"]])
def test_tpu_commands_that_cannot_be_meant_reach_nobody(tmp_path, words):
  tpu = Tpu(tmp_path)
  tpu.do(*words, code=2)
  assert "which TPU" in tpu.do("logs", code=2, TPU_NAME="")
  assert not (tpu.folder / "gcloud.txt").exists()


@pytest.mark.slow
def test_tpu_run_survives_the_connection_stops_saved_and_resumes(undisturbed, tmp_path):
  tpu, workdir = Tpu(tmp_path), tmp_path / "w"
  tpu.do("install")
  assert tpu.do("run", *arguments(workdir)).count("started") == 2
  wait_until(lambda: fault_trials.steps(workdir), "no checkpoint")
  assert "a run is going on here" in tpu.do("run", *arguments(workdir), code=1)
  shown = tpu.do("logs")
  assert ", 2 devices (cpu) of 2 processes, workdir" in shown and shown.count("\nrunning") == 2
  assert tpu.do("stop").count("told to save") == 2
  wait_until(
    lambda: all("ended with exit code 143" in tpu.log(index) for index in range(2)), "not stopped"
  )
  # The newest lines of worker 0, and both in a word.
  assert tpu.do("logs").count("ended with exit code 143") == 3
  tpu.do("run", *arguments(workdir))
  wait_until(
    lambda: all(tpu.log(index).endswith("ended with exit code 0\n") for index in range(2)),
    "not finished",
  )
  assert "resumed at step" in tpu.log(0)
  fault_trials.compare(workdir, undisturbed)


# --- two hosts, and Kubernetes' names -------------------------------------------------------------


def ip(*words):
  subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts():
  """Two network namespaces with a cable between them, as commands that run something there: each
  with a name, known to both.

  The names are those of the pods of gke.yaml's job for GPUs.
  """
  if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
    pytest.skip("needs root, ip and unshare, to make network namespaces")
  spaces = [f"pseudoseg{os.getpid()}{letter}" for letter in "ab"]
  names = [f"pseudoseg-gpu-{index}" for index in range(2)]
  hosts = "127.0.0.1 localhost\n" + "".join(
    f"10.99.7.{i + 1} {name} {name}.pseudoseg-gpu\n" for i, name in enumerate(names)
  )
  with contextlib.ExitStack() as made:
    for space in spaces:
      try:
        ip("netns", "add", space)
      except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
      made.callback(ip, "netns", "delete", space)
      folder = pathlib.Path("/etc/netns") / space  # what `ip netns exec` shows in place of /etc
      folder.mkdir(parents=True)
      made.callback(shutil.rmtree, folder)
      (folder / "hosts").write_text(hosts)
    ip(
      "link",
      "add",
      "cable0",
      "netns",
      spaces[0],
      "type",
      "veth",
      "peer",
      "name",
      "cable1",
      "netns",
      spaces[1],
    )
    for index, space in enumerate(spaces):
      ip("-netns", space, "address", "add", f"10.99.7.{index + 1}/24", "dev", f"cable{index}")
      for device in ("lo", f"cable{index}"):
        ip("-netns", space, "link", "set", device, "up")
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
    yield [
      ["ip", "netns", "exec", space, *named, name]
      for space, name in zip(spaces, names, strict=True)
    ]


@pytest.mark.slow
def test_two_hosts_train_by_the_words_of_the_kubernetes_job(undisturbed, tmp_path, two_hosts):
  spec = objects("Job")["pseudoseg-gpu"]["spec"]["template"]["spec"]
  words = [
    word for word in spec["containers"][0]["args"] if not word.startswith(("--config", "--workdir"))
  ]
  entrypoint = json.loads(
    re.search(r"^ENTRYPOINT (.*)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)[1]
  )
  in_cluster = {
    "KUBERNETES_SERVICE_HOST": "10.99.7.9",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
  }

  def start_pods():
    given = [[word.replace("$(PROCESS_INDEX)", str(index)) for word in words] for index in range(2)]
    commands = [
      [*host, *entrypoint, *own, *arguments(tmp_path)]
      for host, own in zip(two_hosts, given, strict=True)
    ]
    return [start(command, **in_cluster) for command in commands]

  pods = start_pods()
  wait_for_checkpoint(pods[0], tmp_path)
  for pod in pods:
    pod.send_signal(signal.SIGTERM)
  outputs = [finish(pod, code=143) for pod in pods]
  assert ", 2 devices (cpu) of 2 processes, workdir" in outputs[0]
  outputs = [finish(pod) for pod in start_pods()]
  assert "resumed at step" in outputs[0] and f"step {STEPS}/{STEPS}" in outputs[0]
  fault_trials.compare(tmp_path, undisturbed)
