"""Starts the processes of one run on this machine: to use each GPU by a process of its own, or to
try several hosts without them.

  python launch/local.py --processes=4 --config=configs/voc.py:recipe=cps,split=92 --workdir=W --config.data.root=DIR
  JAX_PLATFORMS=cpu python launch/local.py --processes=2 --devices_per_process=2
  --config=configs/quickstart.py --workdir=W

Each process is `python -m pseudoseg_jax.main` with the options given here; all but the launcher's
own go to it as they are. With
--devices_per_process=K, process I takes the K GPUs from number I*K on, among those of CUDA_VISIBLE_DEVICES; of a CPU it makes K
devices. (One process alone uses every GPU of a machine: `python -m pseudoseg_jax.main` needs no
launcher. On a TPU start that.)

Output: process 0's here, and every process's in WORKDIR/processes/INDEX.txt, which goes on when the
  run is resumed.
Stop:   Ctrl-C, or SIGTERM to the launcher: all processes save and leave, with exit code 130 or 143. A second one ends them
        at once; what was saved before stays.
Resume: the same command.

If a process dies, the others are ended, and the launcher ends with the exit code of the one that
died first, and names it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import pathlib
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from pseudoseg_jax import checks, command_line

_AGAIN = "the same command resumes at the newest checkpoint"
# For the others to tell the loss of a process: JAX may notice a GPU's only after some minutes.
_GRACE_SECONDS = 60.0
_POLL_SECONDS = 0.1

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    "python launch/local.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--processes", type=int, required=True, help="how many")
  parser.add_argument(
    "--workdir", type=pathlib.Path, required=True, help="folder of the run, as of the command"
  )
  parser.add_argument(
    "--devices_per_process",
    type=int,
    default=1,
    metavar="K",
    help="of the GPUs, or of the CPU (default: 1)",
  )
  return parser.parse_known_args(arguments)


def _start(index: int, port: int, known: argparse.Namespace, rest: list[str]) -> subprocess.Popen:
  command = [sys.executable, "-m", "pseudoseg_jax.main", *rest, f"--workdir={known.workdir}"]
  command += [
    f"--coordinator=localhost:{port}",
    f"--process_count={known.processes}",
    f"--process_index={index}",
  ]
  count = known.devices_per_process
  environment = os.environ | {
    "PYTHONUNBUFFERED": "1",
    # Read by jax.distributed.initialize: numbers among the GPUs that CUDA shows.
    "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(index * count, (index + 1) * count))),
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}",
  }
  with _log(known.workdir, index).open("a") as log:
    log.write(f"$ {shlex.join(command)}\n")
    log.flush()
    # A session of its own: Ctrl-C in a terminal reaches it once, through the launcher.
    return subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=environment,
      start_new_session=True,
      preexec_fn=_end_with_launcher,
    )


def _end_with_launcher() -> None:
  """Has this process sent SIGTERM should the launcher be killed; on Linux."""
  if _LIBC is not None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _log(workdir: pathlib.Path, index: int) -> pathlib.Path:
  return workdir / "processes" / f"{index}.txt"


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def _gpu_count() -> int | None:
  """How many NVIDIA GPUs there are for these processes; None where there is no saying, or where JAX
  is not to use them.
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
    return None
  if "CUDA_VISIBLE_DEVICES" in os.environ:
    return len(
      [
        name
        for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        if name.strip() not in ("", "-1")
      ]
    )
  try:
    listed = subprocess.run(
      ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return listed.stdout.count("GPU ") if listed.returncode == 0 else None


def _check(known: argparse.Namespace) -> None:
  problems = checks.Problems("cannot start these processes")
  wanted, gpus = known.processes * known.devices_per_process, _gpu_count()
  if gpus and wanted > gpus:  # told here, since the others would wait for one that finds none
    got = f"{known.processes} processes with {known.devices_per_process} GPU{'s' * (known.devices_per_process > 1)} each"
    problems.add(
      "--processes",
      got=got,
      allowed=f"{gpus} GPU{'s' * (gpus > 1)} in all",
      remedy="JAX_PLATFORMS=cpu tries it on the CPU",
    )
  for name in ("processes", "devices_per_process"):
    if getattr(known, name) < 1:
      problems.add(f"--{name}", got=getattr(known, name), allowed="1 or more")
  try:
    (known.workdir / "processes").mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    problems.add(
      f"--workdir={known.workdir}",
      got="a file",
      allowed="a folder, or a path where one can be made",
    )
  problems.raise_if_any()


def _wait_for_all(
  processes: list[subprocess.Popen], first_log: pathlib.Path, shown: int, signals: list[int]
) -> dict[int, int]:
  """Shows what process 0 says, from byte `shown` of its log on, and passes signals on.

  Returns:
    {process: exit code}, in the order in which they ended.
  """
  ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
  for index, process in enumerate(processes):
    threading.Thread(
      target=lambda index=index, process=process: ended.put((index, process.wait())), daemon=True
    ).start()
  codes: dict[int, int] = {}
  passed_on, deadline = 0, float("inf")
  with first_log.open("rb") as output:
    output.seek(shown)
    while len(codes) < len(processes):
      with contextlib.suppress(queue.Empty):
        index, codes[index] = ended.get(timeout=_POLL_SECONDS)
        # A process that ends well has waited for the others: whichever is the first, none has long
        # to go.
        deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
      sys.stdout.buffer.write(output.read())
      sys.stdout.flush()
      late = time.monotonic() > deadline
      if len(signals) > passed_on or late:
        for index, process in enumerate(processes):
          if index not in codes:
            process.send_signal(signal.SIGKILL if late or len(signals) > 1 else signals[0])
        passed_on = len(signals)
  return codes


def _tell_end(codes: dict[int, int], signals: list[int], workdir: pathlib.Path) -> int:
  """Says why the run ended early, if it did; returns the launcher's exit code."""
  index, code = next(((index, code) for index, code in codes.items() if code), (0, 0))
  if not code:
    return 0
  process = f"process {index} of {len(codes)}"
  shell_code = code if code > 0 else 128 - code
  if signals and shell_code > 128:
    print(f"stopped by {signal.Signals(signals[0]).name}; {_AGAIN}", file=sys.stderr)
    return 128 + signals[0]
  if code in (130, 143):
    print(f"stopped by a signal to one of the processes; {_AGAIN}", file=sys.stderr)
    return code
  what = (
    f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
  )
  again = "" if code == 2 else f"; {_AGAIN}"  # what cannot be used now cannot be used then
  print(
    f"error: {process} {what}, and the others with it; its output is in {_log(workdir, index)}{again}",
    file=sys.stderr,
  )
  return shell_code


def main(arguments: list[str] | None = None) -> int:
  known, rest = _parse(sys.argv[1:] if arguments is None else arguments)
  signals: list[int] = []  # those that came, for all processes
  count = command_line.SignalCount()

  def note(number, frame):
    if count.add():
      signals.append(number)

  def command() -> int:
    _check(known)
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, note)
    first_log, port = _log(known.workdir, 0), _free_port()
    shown = first_log.stat().st_size if first_log.exists() else 0
    processes: list[subprocess.Popen] = []
    try:
      for index in range(known.processes):
        processes.append(_start(index, port, known, rest))
      codes = _wait_for_all(processes, first_log, shown, signals)
    finally:
      for process in processes:
        process.kill()  # nothing to those that have ended
    return _tell_end(codes, signals, known.workdir)

  return command_line.run(command)


if __name__ == "__main__":
  sys.exit(main())
