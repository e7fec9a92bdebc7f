"""Runs the stages of a pipeline one after the other: trains, exports labels, trains on them, ...

  python launch/pipeline.py --config=configs/pipelines.py:learn_pseudo,split=92 --workdir=W --config.data.root=DIR
  python launch/pipeline.py --config=configs/pipelines.py:self_training,data=quickstart --workdir=W --teacher.total_steps=1000
  python launch/pipeline.py --config=configs/pipelines.py:self_correcting,data=camvid --workdir=W --list

--config.KEY=VALUE is an option of every training stage, --STAGE.KEY=VALUE of one training or export alone; configs/pipelines.py
says which pipelines there are. Every stage is a process of its own, in the folder WORKDIR/STAGE;
what it prints is also in WORKDIR/stages/STAGE.log. WORKDIR/stages/STAGE.json says what it was made
from, and what it made. The same command again skips what is finished and goes on where it was
stopped; Ctrl-C and SIGTERM go to the stage under way, which saves. At the end there are
WORKDIR/summary.json and WORKDIR/table.md; minutes are those of all processes of a stage but killed
ones.

--list prints each stage's command: for several hosts, start these by hand on each of them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TextIO

from pseudoseg_jax import checks, command_line, config as configs
from pseudoseg_jax.evaluation import report

MODULES = {
  "train": "pseudoseg_jax.main",
  "export": "pseudoseg_jax.export_labels",
  "select": "pseudoseg_jax.reliable",
}

_SPARE_CHECKPOINTS = 5  # that interruptions of a training may add


class Step(NamedTuple):
  """A stage, ready to run but for its folders: {name} in `arguments` stands for a stage's folder,
  {configs} for that of configs.

  reads: the stages whose folders it is given. config: of a training, whole.
  """

  name: str
  kind: str
  arguments: tuple[str, ...]
  reads: tuple[str, ...]
  config: configs.ConfigDict | None


# --- from the command line to the steps -----------------------------------------------------------


def _parse(arguments: list[str]):
  parser = argparse.ArgumentParser(
    "python launch/pipeline.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--config", required=True, help="config file of pipelines, with its argument")
  parser.add_argument(
    "--workdir",
    required=True,
    type=pathlib.Path,
    help="folder of the whole; stages have folders below it",
  )
  parser.add_argument(
    "--list", action="store_true", help="print the stages and their commands, and leave"
  )
  known, rest = parser.parse_known_args(arguments)
  overrides: dict[str, dict[str, str]] = {}
  while rest:
    flag = rest.pop(0)
    key, equals, value = flag.partition("=")
    whose, dot, key = key.removeprefix("--").partition(".")
    if not (flag.startswith("--") and dot):
      parser.error(
        f"unknown argument {flag}; options are given as --config.KEY=VALUE or --STAGE.KEY=VALUE"
      )
    if not equals:
      if not rest:
        parser.error(f"{flag} needs a value: {flag}=VALUE")
      value = rest.pop(0)
    overrides.setdefault(whose, {})[key] = value
  return known, overrides


def load_stages(path: str) -> tuple[pathlib.Path, tuple]:
  """The folder of a config file of pipelines, and its stages for an argument:
  "configs/pipelines.py:learn_pseudo".
  """
  file, _, argument = path.partition(":")
  if not pathlib.Path(file).is_file():
    raise checks.InputError(f"no such config: {file}; pipelines are in configs/pipelines.py")
  spec = importlib.util.spec_from_file_location("pseudoseg_jax_pipelines", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  stages = module.get_config(argument)
  if not isinstance(stages, tuple):
    raise checks.InputError(
      f"{file} has no pipelines but the config of one run; pipelines are in configs/pipelines.py"
    )
  return pathlib.Path(file).resolve().parent, stages


def plan(
  folder: pathlib.Path, stages: tuple, overrides: Mapping[str, Mapping[str, str]]
) -> list[Step]:
  """The stages with all their options.

  Args:
    folder: of the config files that trainings name.
    stages: those of configs/pipelines.py, in order.
    overrides: {"config": {KEY: VALUE} of every training, STAGE: {KEY: VALUE}}.

  Raises:
    InputError: unknown stages, and what the config of any would be refused for; all at once.
  """
  problems = checks.Problems("cannot make the pipeline")
  with_options = ["config", *(stage.name for stage in stages if stage.kind != "select")]
  for name in overrides:
    if name not in with_options:
      remedy = checks.nearest(name, with_options)
      problems.add(
        f"--{name}.KEY", got="no such stage", allowed=", ".join(with_options), remedy=remedy
      )
  steps: dict[str, Step] = {}
  for stage in stages:
    make = _training if stage.kind == "train" else _other
    try:
      arguments, config = make(
        folder, stage, steps, overrides.get("config", {}), overrides.get(stage.name, {})
      )
    except checks.InputError as error:
      problems.extend([f"stage '{stage.name}': {error}"])
      arguments, config = [], None
    reads = tuple(
      name for name in steps if any(f"{{{name}}}" in argument for argument in arguments)
    )
    steps[stage.name] = Step(stage.name, stage.kind, tuple(arguments), reads, config)
  problems.raise_if_any()
  return list(steps.values())


def _training(folder, stage, earlier, everywhere, own) -> tuple[list[str], configs.ConfigDict]:
  """Arguments and config of a training."""
  _refuse_conflicts(
    stage, stage.options, {key: value for key, value in everywhere.items() if key not in own}
  )
  options = {**everywhere, **stage.options, **own}
  config = configs.load(f"{folder}/{stage.config}", options)
  if stage.checkpoints:
    every = -(-config.total_steps // stage.checkpoints)
    # The engine saves where it evaluates and where it is interrupted, too; none of these may
    # displace one that is read later.
    kept = stage.checkpoints + config.total_steps // config.eval_every_steps + _SPARE_CHECKPOINTS
    parts = {"checkpoint_every_steps": str(every), "keep_last_checkpoints": str(kept)}
    _refuse_conflicts(stage, parts, {**everywhere, **own})
    configs.override(config, parts)
    options |= parts
  configs.frozen(config)  # hours before the stage would be refused
  return [
    f"--config={{configs}}/{stage.config}",
    f"--workdir={{{stage.name}}}",
    *_flags(options),
  ], config


def _other(folder, stage, earlier: Mapping[str, Step], everywhere, own) -> tuple[list[str], None]:
  """Arguments of an export or a selection."""
  arguments, options = list(stage.flags), {**stage.options, **own}
  trained = [step for name, step in earlier.items() if f"--workdir={{{name}}}" in stage.flags]
  for config in [step.config for step in trained if step.config is not None]:
    configs.override(configs.from_json(configs.to_json(config)), options)
    if stage.part:
      arguments.append(f"--step={stage.part * config.checkpoint_every_steps}")
  return arguments + _flags(options), None


def _flags(options: Mapping[str, str]) -> list[str]:
  return [f"--config.{key}={value}" for key, value in options.items()]


def _refuse_conflicts(stage, needed: Mapping[str, str], asked: Mapping[str, str]) -> None:
  problems = checks.Problems("the pipeline itself sets")
  for key in needed.keys() & asked.keys():
    if needed[key] != asked[key]:
      problems.add(
        f"config.{key}",
        got=asked[key],
        allowed=needed[key],
        remedy="leave it, or give it to other stages alone",
      )
  problems.raise_if_any()


def located(text: str, workdir: pathlib.Path, folder: pathlib.Path, steps: list[Step]) -> str:
  """`text` with the folders that its {names} stand for."""
  text = text.replace("{configs}", str(folder))
  for step in steps:
    text = text.replace(f"{{{step.name}}}", str(workdir / step.name))
  return text


# --- what is finished, and what it was made from --------------------------------------------------


class Records:
  """WORKDIR/stages/STAGE.json: what each stage was made from (`inputs`), and, once finished, a hash
  of what it made (`made`).
  """

  def __init__(self, workdir: pathlib.Path):
    self.workdir = workdir

  def path(self, name: str, suffix: str = "json") -> pathlib.Path:
    return self.workdir / "stages" / f"{name}.{suffix}"

  def read(self, name: str) -> dict[str, Any] | None:
    """The record of a stage whose folder is there; without its folder a stage was never run."""
    if not (self.path(name).is_file() and (self.workdir / name).is_dir()):
      return None
    try:
      return json.loads(self.path(name).read_text())
    except ValueError as error:
      raise checks.InputError(
        f"cannot read {self.path(name)}: {error}; remove it and {self.workdir / name}"
      ) from error

  def write(self, name: str, record: Mapping[str, Any]) -> None:
    report.write_atomically(self.path(name), json.dumps(record, indent=2) + "\n")

  def inputs(self, step: Step) -> dict[str, Any]:
    """What a stage is made from: its options (a training's whole config) and what the stages it
    reads made. Without folders.
    """
    options = (
      {"config": json.loads(configs.to_json(step.config))}
      if step.config
      else {"arguments": list(step.arguments)}
    )
    return options | {"reads": {name: self.read(name)["made"] for name in step.reads}}

  def check(
    self, step: Step, steps: list[Step], inputs: Mapping[str, Any]
  ) -> dict[str, Any] | None:
    """The record of a stage that was begun or finished before, from the same inputs; None where
    there is none.

    Raises:
      InputError: it was made from something else.
    """
    record = self.read(step.name)
    if record is None or record["inputs"] == inputs:
      return record
    problems = checks.Problems(
      f"stage '{step.name}' in {self.workdir / step.name} was made from something else"
    )
    before = record["inputs"]
    if "config" in inputs and "config" in before:
      problems.extend(
        configs.differences(step.config, configs.from_json(json.dumps(before["config"])))
      )
    elif inputs.get("arguments") != before.get("arguments"):
      problems.add(
        "arguments",
        got=" ".join(inputs.get("arguments", [])),
        allowed=" ".join(before.get("arguments", [])),
      )
    for name, made in inputs["reads"].items():
      if before["reads"].get(name) != made:
        problems.add(f"stage '{name}'", got="made anew, with another result")
    stale = [step.name]
    for other in steps:
      if set(other.reads) & set(stale):
        stale.append(other.name)
    folders = shlex.join(
      str(self.workdir / name) for name in stale if (self.workdir / name).exists()
    )
    problems.extend(
      [
        f"remedy: another --workdir, or the options it was made with; or, to make it anew: rm -r {folders}"
      ]
    )
    problems.raise_if_any()


def outcome(step: Step, folder: pathlib.Path) -> tuple[str | None, dict[str, Any]]:
  """A hash of what a finished stage made, None where it is not finished; and what the summary says
  of it.
  """
  path = (
    folder / {"train": "results.json", "export": "manifest.json", "select": "list.txt"}[step.kind]
  )
  if not path.exists():
    return None, {}
  if step.kind == "select":
    return _hash(path.read_text()), {"images": len(path.read_text().splitlines())}
  content = json.loads(path.read_text())
  if step.kind == "export":
    return content["labels_sha256"] if content["finished"] else None, {"images": content["images"]}
  if content["last"]["step"] != step.config.total_steps and not content.get("ended_early"):
    return None, {}
  mious = {name: scores["miou"] for name, scores in content["last"]["predictors"].items()}
  return _hash({key: value for key, value in content.items() if key != "config"}), {"miou": mious}


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- processes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[TextIO]:
  """Holds a lock file as long as this process lives, or a stage that inherits the open file; the
  system frees it.

  Raises:
    InputError: another pipeline holds it.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      problems = checks.Problems(f"{path.parent.parent} is in use")
      remedy = "wait for it or stop it, or use another --workdir"
      problems.add("by a pipeline, or by a stage that outlived it", got=file.read(), remedy=remedy)
      problems.raise_if_any()
    except OSError as error:
      print(
        f"pipeline: no lock on this file system ({error}): do not run two pipelines on {path.parent.parent}",
        flush=True,
      )
    _sign(file)
    yield file


def _sign(lock: TextIO, stage: str = "") -> None:
  lock.truncate(0)
  lock.write(f"process {os.getpid()}{stage} on {socket.gethostname()}")
  lock.flush()


class Processes:
  """Context manager that starts processes, one at a time, and passes SIGINT and SIGTERM on to the
  one under way.
  """

  def __init__(self, lock: TextIO):
    self._lock = lock
    self._process: subprocess.Popen | None = None
    self.signal: int | None = None  # the newest that came

  def __enter__(self) -> Processes:
    self._previous = {
      number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _pass_on(self, number, frame):
    self.signal = number
    if self._process is not None:
      self._process.send_signal(number)

  def run(self, command: list[str], log: pathlib.Path) -> tuple[int, str]:
    """Exit code and last words of a process, whose output is shown as it comes and appended to a
    log.
    """
    tail = b""
    with log.open("ab") as copy:
      # A session of its own: Ctrl-C in a terminal reaches it once, through us. The lock goes along:
      # it may outlive us.
      self._process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[self._lock.fileno()],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
      )
      _sign(self._lock, f", its stage process {self._process.pid},")
      if self.signal is not None:
        self._process.send_signal(self.signal)  # it came while the process was being started
      while output := os.read(self._process.stdout.fileno(), 1 << 16):
        sys.stdout.buffer.write(output)
        sys.stdout.flush()
        copy.write(output)
        copy.flush()
        tail = (tail + output)[-10_000:]
      code = self._process.wait()
      self._process = None
    return code if code >= 0 else 128 - code, _last_words(tail.decode(errors="replace"))


def _last_words(output: str) -> str:
  """From the last line that begins an error; else the last line."""
  lines = output.strip().splitlines() or [""]
  begins = [index for index, line in enumerate(lines) if line.startswith(("error:", "Traceback"))]
  return "\n".join(lines[begins[-1] if begins else -1 :])


# --- the whole ------------------------------------------------------------------------------------


def command_of(
  step: Step, steps: list[Step], workdir: pathlib.Path, folder: pathlib.Path
) -> list[str]:
  arguments = [located(argument, workdir, folder, steps) for argument in step.arguments]
  return [sys.executable, "-m", MODULES[step.kind], *arguments]


def run(
  steps: list[Step], workdir: pathlib.Path, folder: pathlib.Path, processes: Processes
) -> int:
  """Runs what is not finished; returns 0, or the exit code of the stage that failed or was
  stopped.
  """
  records = Records(workdir)
  for number, step in enumerate(steps, 1):
    heading = f"pipeline: stage {number} of {len(steps)}, '{step.name}'"
    record = records.check(step, steps, inputs := records.inputs(step))
    if record is not None and record["made"] is not None:
      print(f"{heading}: there already", flush=True)
      continue
    if processes.signal is not None:  # it came between two stages
      return _left(
        heading, 128 + processes.signal, processes.signal, "", records.path(step.name, "log")
      )
    command = command_of(step, steps, workdir, folder)
    begun = {
      "kind": step.kind,
      "command": command,
      "inputs": inputs,
      "made": None,
      "seconds": (record or {}).get("seconds", 0.0),
    }
    records.write(step.name, begun)
    print(f"{heading}: {shlex.join(command)}", flush=True)
    started = time.time()
    code, last_words = processes.run(command, records.path(step.name, "log"))
    begun["seconds"] += time.time() - started
    made, told = outcome(step, workdir / step.name) if code == 0 else (None, {})
    records.write(step.name, begun | {"made": made} | told)
    if made is None:
      return _left(heading, code, processes.signal, last_words, records.path(step.name, "log"))
  _summarize(steps, records)
  return 0


def _left(heading: str, code: int, number: int | None, last_words: str, log: pathlib.Path) -> int:
  """Says why the pipeline ends here, and what with; returns its exit code."""
  again = "the same command goes on from here"
  if number is not None:
    print(f"{heading}: stopped by {signal.Signals(number).name}; {again}", file=sys.stderr)
    return code or 128 + number  # a training that saved and left ended well, the pipeline did not
  what = f"failed with exit code {code}" if code else "ended before it was finished"
  print(
    f"{heading}: {what}; {again}. Its output is in {log}, and ends with\n{last_words}",
    file=sys.stderr,
  )
  return code or 1


def _summarize(steps: list[Step], records: Records) -> None:
  """Writes summary.json and table.md, and prints the latter."""
  summary = []
  lines = [
    "| stage | minutes | mIoU % | with image-level labels | images labeled |",
    "|---|---|---|---|---|",
  ]
  for step in steps:
    record = records.read(step.name)
    told = {key: record[key] for key in ("miou", "images") if key in record}
    summary.append({"name": step.name, "kind": step.kind, "minutes": record["seconds"] / 60} | told)
    mious = told.get("miou", {})
    headline = next(iter(mious), None)
    plain, masked = (_percent(mious.get(name)) for name in (headline, f"{headline}+image_labels"))
    lines.append(
      f"| {step.name} | {record['seconds'] / 60:.1f} | {plain} | {masked} | {told.get('images', '-')} |"
    )
  report.write_atomically(records.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
  report.write_atomically(records.workdir / "table.md", "\n".join(lines) + "\n")
  print("\n" + "\n".join(lines), flush=True)


def _percent(miou: float | None) -> str:
  return "-" if miou is None else f"{100 * miou:.2f}"


def main(arguments: list[str] | None = None) -> int:
  known, overrides = _parse(sys.argv[1:] if arguments is None else arguments)

  def command():
    folder, stages = load_stages(known.config)
    steps = plan(folder, stages, overrides)
    workdir = known.workdir.resolve()
    if set(",={}") & set(str(workdir)):
      raise checks.InputError(
        f"--workdir={workdir}: the path must be without , = {{ and }}, which have a meaning in options"
      )
    if known.list:
      for step in steps:
        print(f"{step.name}:\n  {shlex.join(command_of(step, steps, workdir, folder))}")
      return 0
    with locked(workdir / "stages" / "lock") as lock, Processes(lock) as processes:
      return run(steps, workdir, folder, processes)

  return command_line.run(command, again="the same command goes on from here")


if __name__ == "__main__":
  sys.exit(main())
