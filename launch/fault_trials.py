"""Trials by fault injection: real runs are killed, signalled, damaged, starved of disk and left by
their peers, at random moments.

  python launch/fault_trials.py --trials=3 --workdir=/tmp/fault_trials
  python launch/fault_trials.py --trials=20 --faults=kill,flip --methods=temporal_ensembling,ael --seed=1 --workdir=W

Each trial is a small run on synthetic scenes that is disturbed, started again with the same command
as often as it takes, and held against an undisturbed run of the same method: it must end with the
same last and best checkpoints, bit for bit, and the same results.json. Faults:

  kill    SIGKILL at a random moment, up to three times
  signal  SIGTERM or SIGINT at a random moment: acknowledged, saved, left within seconds with the
  shell's exit code
  flip    one bit of a random file of the newest checkpoint, or the file cut short, after a kill
  disk    a file system that fills up (tmpfs; needs root): told with path and cause, and resumed when there is space again
  peer    one of two processes is killed: the other one ends with a readable line, and one process alone finishes the run

W/trials.jsonl has a line for each trial as it ends; the same command goes on after those that are
there. Exit code: 1 if a trial failed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
METHODS = ("cps_cutmix", "temporal_ensembling", "ael", "learn_pseudo", "gct")
STEPS = 12
OPTIONS = {
  "total_steps": STEPS,
  "log_every_steps": 3,
  "eval_every_steps": 4,
  "checkpoint_every_steps": 2,
  "network.width": 4,
  "views.crop_size": "33,33",
  "data.num_scenes": 16,
  "data.num_labeled": 4,
  "data.num_eval_scenes": 4,
  "data.size": "40,48",
  "evaluation.batch_size": 4,
  "evaluation.pictures": 1,
  "batch_size_global.labeled": 4,
  "batch_size_global.unlabeled": 4,
}

_SECONDS = 600  # that a process may take; one that takes longer hangs
_SECONDS_TO_LEAVE = 60  # after a signal or the loss of a peer


class Failed(Exception):
  """The run did not do what it must after a fault."""


def start(
  method: str, workdir: pathlib.Path, *extra: str, devices: int = 2, **options: Any
) -> subprocess.Popen:
  command = [
    sys.executable,
    "-m",
    "pseudoseg_jax.main",
    f"--config={ROOT}/configs/quickstart.py:method={method}",
  ]
  command += [
    f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in (OPTIONS | options).items()),
    *extra,
  ]
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
  }
  return subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def ended(process: subprocess.Popen, seconds: float = _SECONDS) -> tuple[int, str]:
  """Exit code and output of a process that must end within some seconds."""
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    output, _ = process.communicate()
    raise Failed(f"still alive after {seconds:.0f} s; its last words: {output[-2000:]}") from None
  return process.returncode, output


def finish(method: str, workdir: pathlib.Path, **options: Any) -> str:
  """Runs the command to its end."""
  code, output = ended(start(method, workdir, **options))
  if code != 0:
    raise Failed(f"exit code {code}: {output[-2000:]}")
  return output


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """What must be equal: every array of the last and the best checkpoint, and results.json."""
  import jax
  import numpy as np

  from pseudoseg_jax import build, config as configs, workdir as workdirs
  from pseudoseg_jax.engine import loop, mesh as meshes
  from pseudoseg_jax.engine.checkpoints import Checkpoints

  config = configs.frozen(workdirs.saved_config(workdir))
  method = build.build_method(config, 7, config.data.num_scenes - config.data.num_labeled)
  like = loop.abstract_state(method._replace(split_memory=()), meshes.make_mesh(jax.devices()[:1]))
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  found = {"results.json": json.loads((workdir / "results.json").read_text())}
  for series in ("last", "best"):
    state = checkpoints.restore(like, series=series)
    found |= {
      f"{series}{jax.tree_util.keystr(at)}": np.asarray(leaf)
      for at, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
  checkpoints.close()
  return found


def compare(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
  import numpy as np

  ours, theirs = outcome(workdir), outcome(undisturbed)
  different = [
    key for key in ours.keys() | theirs.keys() if not np.array_equal(ours.get(key), theirs.get(key))
  ]
  if different:
    raise Failed(
      f"{len(different)} parts differ from the undisturbed run's, such as {sorted(different)[0]}"
    )


# --- faults: (method, workdir, undisturbed run, its seconds, draws) -> what happened, in words ----


def kill(
  method: str, workdir: pathlib.Path, undisturbed: pathlib.Path, seconds: float, rng: random.Random
) -> str:
  moments = []
  for _ in range(rng.randint(1, 3)):
    process = start(method, workdir)
    moments.append(rng.uniform(0.1, 1.0) * seconds)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(moments[-1])
    process.kill()
    process.communicate()
  finish(method, workdir)
  compare(workdir, undisturbed)
  return "killed after " + ", ".join(f"{moment:.1f} s" for moment in moments)


def send_signal(
  method: str, workdir: pathlib.Path, undisturbed: pathlib.Path, seconds: float, rng: random.Random
) -> str:
  number = rng.choice([signal.SIGTERM, signal.SIGINT])
  process = start(method, workdir)
  moment = rng.uniform(0.02, 1.0) * seconds
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(moment)
  process.send_signal(number)
  sent = time.time()
  code, output = ended(process, _SECONDS_TO_LEAVE)
  if code not in (0, 128 + number, -number):  # the last: before Python could take it
    raise Failed(f"exit code {code} after {number.name}: {output[-2000:]}")
  if "Traceback" in output:
    raise Failed(f"a traceback after {number.name} at {moment:.1f} s: {output[-2000:]}")
  left = time.time() - sent
  finish(method, workdir)
  compare(workdir, undisturbed)
  return f"{number.name} after {moment:.1f} s: left with {code} in {left:.1f} s"


def flip(
  method: str, workdir: pathlib.Path, undisturbed: pathlib.Path, seconds: float, rng: random.Random
) -> str:
  process = start(method, workdir)
  wait_for(process, lambda: len(steps(workdir)) == 2 and steps(workdir)[-1] < STEPS)
  process.kill()
  process.communicate()
  newest = steps(workdir)[-1]
  files = sorted(
    path for path in (workdir / "checkpoints" / "last" / str(newest)).rglob("*") if path.is_file()
  )
  # By size, as a disk would choose.
  path = rng.choices(files, [path.stat().st_size for path in files])[0]
  content = bytearray(path.read_bytes())
  if rng.random() < 0.8:
    place = rng.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    done = f"bit {place} of {path.relative_to(workdir)} flipped"
  else:
    content = content[: rng.randrange(len(content))]
    done = f"{path.relative_to(workdir)} cut to {len(content)} bytes"
  path.write_bytes(content)
  finish(method, workdir)
  compare(workdir, undisturbed)
  return done


def disk(
  method: str, workdir: pathlib.Path, undisturbed: pathlib.Path, seconds: float, rng: random.Random
) -> str:
  size = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
  room = int(rng.uniform(0.05, 0.8) * size)
  workdir.mkdir(parents=True)
  subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(workdir)],
    check=True,
    capture_output=True,
  )
  try:
    code, output = ended(start(method, workdir / "run"))
    if "Traceback" in output or (code == 0 and "could not save" in output):
      raise Failed(f"exit code {code} with {room} bytes: {output[-2000:]}")
    if code not in (0, 1):
      raise Failed(f"exit code {code} with {room} bytes: {output[-2000:]}")
    subprocess.run(
      ["mount", "-o", f"remount,size={8 * size}", str(workdir)], check=True, capture_output=True
    )
    finish(method, workdir / "run")
    compare(workdir / "run", undisturbed)
  finally:
    subprocess.run(["umount", "-l", str(workdir)], check=False)
  return f"{room} of {size} bytes: left with {code}"


def peer(
  method: str, workdir: pathlib.Path, undisturbed: pathlib.Path, seconds: float, rng: random.Random
) -> str:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  several = [f"--coordinator=localhost:{port}", "--process_count=2"]
  processes = [
    start(method, workdir, *several, f"--process_index={index}", devices=1) for index in range(2)
  ]
  wait_for(processes[0], lambda: bool(steps(workdir)))
  lost = rng.randrange(2)
  processes[lost].kill()
  processes[lost].communicate()
  code, output = ended(processes[1 - lost], _SECONDS_TO_LEAVE)
  words = [line for line in output.splitlines() if line.startswith("error: ")]
  # Of process 0, which coordinates, C++ tells the loss too, and may end the process before Python
  # could say a word.
  if code == 0 or "Traceback" in output or len(words) != 1 and lost != 0:
    raise Failed(f"exit code {code} after the loss of process {lost}: {output[-3000:]}")
  finish(method, workdir)
  return f"process {lost} killed; the other one left with {code}"


FAULTS: dict[str, Callable[..., str]] = {
  "kill": kill,
  "signal": send_signal,
  "flip": flip,
  "disk": disk,
  "peer": peer,
}


def steps(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints" / "last"
  return (
    sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    if folder.is_dir()
    else []
  )


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
  end = time.time() + _SECONDS
  while not condition():
    if process.poll() is not None or time.time() > end:
      process.kill()
      raise Failed(
        f"the run ended before the fault could be made: {process.communicate()[0][-2000:]}"
      )
    time.sleep(0.02)


# --- all of them ----------------------------------------------------------------------------------


def trials(
  folder: pathlib.Path, faults: list[str], methods: list[str], count: int, seed: int
) -> Iterator[dict[str, Any]]:
  """One line of trials.jsonl after the other; those of an earlier call are taken from there."""
  record = folder / "trials.jsonl"
  lines = map(json.loads, record.read_text().splitlines()) if record.exists() else ()
  done = {(line["fault"], line["method"], line["trial"], line["seed"]): line for line in lines}
  seconds: dict[str, float] = {}
  for number in range(count):
    for method in methods:
      for fault in faults:
        if line := done.get((fault, method, number, seed)):
          yield line
          continue
        undisturbed = folder / f"undisturbed_{method}"
        if not (undisturbed / "results.json").exists():
          finish(method, undisturbed)  # compiles
        if method not in seconds:
          shutil.rmtree(folder / "timed", ignore_errors=True)
          began = time.time()
          finish(method, folder / "timed")
          seconds[method] = time.time() - began
          compare(folder / "timed", undisturbed)
        workdir = folder / f"{fault}_{method}_{number}"
        shutil.rmtree(workdir, ignore_errors=True)
        line = {"fault": fault, "method": method, "trial": number, "seed": seed, "held": True}
        try:
          line["what"] = FAULTS[fault](
            method,
            workdir,
            undisturbed,
            seconds[method],
            random.Random(f"{seed}/{fault}/{method}/{number}"),
          )
          shutil.rmtree(workdir, ignore_errors=True)
        except Failed as failure:
          line |= {"held": False, "what": str(failure)}
        with record.open("a") as file:
          file.write(json.dumps(line) + "\n")
        yield line


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--trials", type=int, default=1, help="of each fault and method (default: 1)")
  parser.add_argument("--faults", default=",".join(FAULTS), help=f"default: {','.join(FAULTS)}")
  parser.add_argument("--methods", default=",".join(METHODS), help=f"default: {','.join(METHODS)}")
  parser.add_argument("--seed", type=int, default=0, help="of the moments and places (default: 0)")
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    required=True,
    help="folder for the runs; those that failed are kept",
  )
  known = parser.parse_args(arguments)
  faults, methods = known.faults.split(","), known.methods.split(",")
  if unknown := set(faults) - set(FAULTS):
    parser.error(f"--faults: unknown {', '.join(sorted(unknown))}; allowed: {', '.join(FAULTS)}")
  known.workdir.mkdir(parents=True, exist_ok=True)
  held, made = collections.Counter(), collections.Counter()
  for line in trials(known.workdir, faults, methods, known.trials, known.seed):
    made[line["fault"]] += 1
    held[line["fault"]] += line["held"]
    print(
      f"{'held  ' if line['held'] else 'FAILED'}  {line['fault']:6}  {line['method']:20}  {line['what']}",
      flush=True,
    )
  print("\n" + "\n".join(f"{fault:6}  {held[fault]} of {made[fault]} held" for fault in faults))
  return int(held != made)


if __name__ == "__main__":
  sys.exit(main())
