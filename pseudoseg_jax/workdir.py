"""The folder of a run.

This is about who writes in it, what it was made with, and which of that may change when the run is
resumed.

  config.json   every option of the run      classes.json   names and colors, per data set
  data.json     which images, per data set   lists/         the same by name
  lock          the process that is writing, as long as it does

What is written here is read again when the run is resumed, scored or used; a damaged file is an
InputError that names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import pathlib
import shlex
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pseudoseg_jax import checks, config as configs
from pseudoseg_jax.data import splits
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.splits import Entry
from pseudoseg_jax.evaluation import report
from pseudoseg_jax.options import Config

log = logging.getLogger("pseudoseg_jax")

ROLES = ("labeled", "unlabeled", "evaluated", "pseudo_labeled")

# What may differ when a run is resumed, by the patterns of fnmatch. Of options that are on no list,
# another value makes another run: what was learned so far would be the result of neither.
_FREE = (
  "log_every_steps",
  "eval_every_steps",
  "checkpoint_every_steps",
  "keep_last_checkpoints",
  "evaluation.batch_size",
  "evaluation.pictures",
  "data.skip_unreadable",
)
# Changed at the step where the run is resumed, and told.
_FROM_NOW_ON = {
  "total_steps": "the learning rate, and whatever else depends on how long the run is, follows the new length from here on",
  "optimizer.*": "it holds from here on",
  "method.*": "it holds from here on",  # of options that are numbers: weights, thresholds, momenta
  "early_stopping_patience": "it holds from here on",
  "evaluation.*": "scores from here on are of this protocol, and the best state is chosen anew among them",
}
_NEVER = ("optimizer.name", "method.name")
# Where things lie. That the same things lie there is seen from data.json.
_PLACES = (
  "data.root",
  "data.classes",
  "data.train_list",
  "data.split",
  "data.split_seed",
  "data.unlabeled_list",
  "data.unlabeled_folder",
  "data.eval_list",
  "data.image_labels",
  "data.boxes",
  "data.eval_boxes",
  "pseudo_labels.folder",
  "pseudo_labels.list",
)


# --- who writes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[str]:
  """Makes the workdir and holds its lock.

  The system frees the lock with the process, however that ends.

  Yields:
    The lock's token, by which other processes of this run know that they see the same workdir.

  Raises:
    InputError: another process holds it; `workdir` is a file.
  """
  problems = checks.Problems(f"cannot use workdir {workdir}")
  existed = workdir.is_dir()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    problems.add("workdir", got="a file", allowed="a folder, or a path where one can be made")
    problems.raise_if_any()
  path = workdir / "lock"
  try:
    descriptor = _open_locked(path)
  except BlockingIOError:
    holder = _holder(path)
    problems.add(
      "lock",
      got=f"held by {holder}",
      allowed="one run at a time",
      remedy="wait for it, stop it (it saves when it gets SIGTERM), or use another --workdir",
    )
    problems.raise_if_any()
  try:
    before = _holder(path)
    if before:
      log.info("%s was not left by its last run, %s: killed, it seems; taken over", workdir, before)
    token = uuid.uuid4().hex
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_about_process(started) | {"token": token}).encode(), 0)
    yield token
  finally:
    path.unlink(missing_ok=True)
    os.close(descriptor)
    if not existed:
      with contextlib.suppress(OSError):  # there is something in it
        workdir.rmdir()


def token(workdir: pathlib.Path) -> str:
  """Reads the token of the lock that another process of this run holds.

  It is "" where the lock is not seen.
  """
  return str(report.read_object(workdir / "lock").get("token", ""))


def _about_process(started: str) -> dict[str, Any]:
  return {"host": socket.gethostname(), "process": os.getpid(), "started": started}


def _open_locked(path: pathlib.Path) -> int:
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(descriptor)
      raise
    except OSError as error:
      log.warning(
        "no lock on this file system (%s): let no two runs use %s at once", error, path.parent
      )
      return descriptor
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(descriptor), os.stat(path)):
        return descriptor
    os.close(descriptor)  # its holder removed it between our two calls


def _holder(path: pathlib.Path) -> str:
  """Describes the process that a lock names; "" for none."""
  about = report.read_object(path)
  return (
    f"process {about.get('process')} on {about.get('host')}, started {about.get('started')}"
    if about
    else ""
  )


# --- what is written there ------------------------------------------------------------------------


def read_json(
  path: pathlib.Path, *, remedy: str, parse: Callable[[Any], Any] = lambda content: content
) -> Any:
  """Reads a JSON file of a workdir or of an exported network.

  Returns what `parse` makes of it.

  Raises:
    InputError: a file that cannot be read, is no JSON, or not what `parse` expects (it fails in any
      way).
  """
  try:
    return parse(json.loads(path.read_text(encoding="utf-8")))
  except checks.InputError:
    raise
  except (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
  ) as error:
    got = (
      "an empty file"
      if path.is_file() and path.stat().st_size == 0
      else f"{type(error).__name__}: {error}"
    )
    problems = checks.Problems(f"cannot read {path}")
    problems.add("content", got=got, remedy=remedy)
    problems.raise_if_any()


def saved_config(workdir: pathlib.Path) -> configs.ConfigDict:
  """Reads the config that a workdir was made with.

  It is to be changed before it is `frozen`.
  """
  path = workdir / "config.json"
  if not path.is_file():
    problems = checks.Problems("cannot use workdir")
    problems.add(
      "workdir",
      got=str(workdir),
      allowed="a folder that a training run made (it holds config.json)",
    )
    problems.raise_if_any()
  remedy = "remove the file and run the training command again, which writes it anew"
  return read_json(path, remedy=remedy, parse=configs.from_saved)


def save_classes(
  workdir: pathlib.Path, classes: Classes, other_classes: Mapping[str, Classes]
) -> None:
  """Writes the classes of the first and of further domains.

  A workdir is thus usable where its data are not.
  """
  others = {name: dataclasses.asdict(other) for name, other in other_classes.items()}
  report.write_atomically(
    workdir / "classes.json", json.dumps(dataclasses.asdict(classes) | {"domains": others})
  )


def saved_classes(workdir: pathlib.Path) -> tuple[Classes, dict[str, Classes]]:
  """Reads the classes as they were at training time.

  Returns those of the first domain, and those of further ones by name.
  """

  def parse(saved):
    return classes_of(saved), {
      name: classes_of(other) for name, other in saved.get("domains", {}).items()
    }

  remedy = "remove the file and run the training command again, which writes it anew"
  return read_json(workdir / "classes.json", remedy=remedy, parse=parse)


def classes_of(saved: Mapping[str, Any]) -> Classes:
  """Parses classes as JSON keeps them."""
  palette, void = (
    tuple(tuple(map(int, color)) for color in saved.get(key, ())) for key in ("palette", "void")
  )
  return Classes(tuple(map(_text, saved["names"])), palette, void, saved.get("background"))


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError(f"a name that is no text: {value!r}")
  return value


def same_classes(ours: Classes, theirs: Classes, *, where: str, allowed: str) -> list[str]:
  """Compares classes with those that a network learned.

  Returns what is wrong with `ours`, which must be those that a network learned (`theirs`): none or
  one text. They are compared by name and order: a network knows them by their number alone.
  """
  problems = checks.Problems("")
  if len(ours) != len(theirs):
    problems.add(where, got=f"{len(ours)} classes", allowed=f"the {len(theirs)} {allowed}")
  elif ours.names != theirs.names:
    index = next(
      index for index, (a, b) in enumerate(zip(ours.names, theirs.names, strict=True)) if a != b
    )
    same = sorted(ours.names) == sorted(theirs.names)
    got = f"{'the same names in another order' if same else 'other names'}: class {index} is '{ours.names[index]}'"
    remedy = f"a file of classes with the names {', '.join(theirs.names)}, in this order"
    problems.add(where, got=got, allowed=f"'{theirs.names[index]}', as {allowed}", remedy=remedy)
  return problems.items


def write_lists(folder: pathlib.Path, data: Any) -> None:
  """Writes the images of each role, as lists that config.data reads."""
  for role in ROLES:
    source = getattr(data, role)
    if source is not None:
      entries = getattr(source, "entries", None) or map(Entry, source.ids)
      report.write_atomically(folder / f"{role}.txt", splits.list_text(entries))


def fingerprint(
  data: Any, arrays: Sequence[np.ndarray | None] = (), labels_folder: str = ""
) -> dict[str, dict[str, Any]]:
  """Identifies the images of each role, and the weak and pseudo labels.

  Returns {role: {"images": N, "sha256": of the ids}, ...} of a data set: which images it has in
  each role, and its weak and pseudo labels.
  """
  found = {}
  for role in ROLES:
    source = getattr(data, role)
    if source is not None:
      listed = "\n".join([*source.ids, *getattr(source, "digests", ())])
      digest = hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()
      found[role] = {"images": len(source.ids), "sha256": digest}
  given = [np.ascontiguousarray(array) for array in arrays if array is not None]
  if given:
    digest = hashlib.sha256()
    for array in given:
      digest.update(str(array.shape).encode() + array.tobytes())
    found["weak labels"] = {"images": sum(map(len, given)), "sha256": digest.hexdigest()}
  if labels_folder:
    manifest = report.read_object(pathlib.Path(labels_folder) / "manifest.json")
    found["pseudo labels"] = {
      "images": manifest.get("images"),
      "sha256": manifest.get("labels_sha256"),
    }
  return found


# --- resuming -------------------------------------------------------------------------------------


Data = Mapping[str, Mapping[str, Any]]  # domain -> `fingerprint`


def check_claim(
  workdir: pathlib.Path,
  config: Config,
  classes: Mapping[str, Classes],
  data: Data,
  *,
  step: int | None,
) -> list[str]:
  """Checks whether the workdir can be that of this run.

  Only a checkpoint binds it: without one nothing was learned.

  Args:
    classes, data: those of each domain by name, "" the first: the classes, and `fingerprint`.
    step: that of the newest checkpoint, None for none.

  Returns:
    What is to be reported: the options that differ from those of the run so far, and what that
    means.

  Raises:
    InputError: the run that it belongs to cannot be resumed with this config, these classes or
      these images; all at once.
  """
  return [] if step is None else _check_resumable(workdir, config, classes, data, step)


def claim(
  workdir: pathlib.Path,
  config: Config,
  classes: Mapping[str, Classes],
  data: Data,
  *,
  step: int | None,
) -> None:
  """Makes the workdir that of this run, after `check_claim`."""
  if jax.process_index() != 0:
    return
  if step is None:
    _set_aside(workdir)
  save_classes(workdir, classes[""], {name: of for name, of in classes.items() if name})
  report.write_atomically(workdir / "data.json", json.dumps(data, indent=2) + "\n")
  report.write_atomically(workdir / "config.json", configs.to_json(config))


def _set_aside(workdir: pathlib.Path) -> None:
  """Renames the reports of a run that left no network.

  Its curves and scores are not those of the run that begins.
  """
  for name in ("history.jsonl", "results.json", "scores.csv"):
    if (workdir / name).is_file():
      (workdir / name).replace(workdir / f"{name}.before")


def _check_resumable(workdir, config, classes, data, step) -> list[str]:
  problems = checks.Problems(
    f"workdir {workdir} belongs to another config, whose run is at step {step}"
  )
  changed = []
  if (workdir / "config.json").is_file():  # else the user removed a damaged one
    for key, (ours, theirs) in configs.changes(config, saved_config(workdir)).items():
      line = f"{key}: {json.dumps(ours)} now, {json.dumps(theirs)} there"
      effect = _effect(key, ours, theirs)
      if effect is None:
        problems.add(line)
      elif effect:
        changed.append(f"{line}; {effect}")
  changed_options = bool(problems.items)
  if config.total_steps < step:
    remedy = f"give --config.total_steps={step} or more"
    problems.add(
      "total_steps",
      got=config.total_steps,
      allowed=f"at least the {step} steps that are done",
      remedy=remedy,
    )
  if (workdir / "classes.json").is_file():
    first, others = saved_classes(workdir)
    for name, theirs in {"": first, **others}.items():
      if name in classes:
        where = f"config.other_data.{name}.classes" if name else "config.data.classes"
        problems.extend(same_classes(classes[name], theirs, where=where, allowed="of the run"))
  if (workdir / "data.json").is_file():
    remedy = "remove the file: the data are then taken to be those of the run"
    saved = read_json(
      workdir / "data.json",
      remedy=remedy,
      parse=lambda content: {name: dict(of) for name, of in content.items()},
    )
    for name, now in data.items():
      for role in sorted(now.keys() | saved.get(name, now).keys()):
        ours, theirs = now.get(role), saved.get(name, now).get(role)
        if ours != theirs:
          count = [
            f"{of['images']} images" if isinstance(of, Mapping) and "images" in of else "none"
            for of in (ours, theirs)
          ]
          got = (
            f"{count[0]}, other ones than the {count[1]} so far"
            if count[0] == count[1]
            else f"{count[0]}, not {count[1]}"
          )
          listed = (
            f"{workdir / 'lists' / name / role}.txt has those so far" if role in ROLES else None
          )
          problems.add(f"{role} images" if role in ROLES else role, got=got, remedy=listed)
  if problems.items:
    problems.add(
      f"remedy: another --workdir{_start_from(workdir, config)}"
      + (", or the options that this one was made with" if changed_options else "")
    )
  problems.raise_if_any()
  return changed


# What is another method's business, or nobody's.
_OF_THE_METHOD = (
  "method.*",
  "unlabeled_loss.*",
  "batch_size_global.unlabeled",
  "nets_from",
  *_FREE,
)


def supervised_beside(
  workdir: pathlib.Path, config: Config, results: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Finds the finished supervised run that differs least.

  Returns what results.json holds under "baseline", see `report`; None for none. Folders beside
  `workdir` that are no run, or cannot be read, are passed over.
  """
  found = []
  of_ours = results["last"]["predictors"]
  miou = next(iter(of_ours.values()))["miou"]
  images = report.read_object(workdir / "data.json")[""]["evaluated"]
  workdir = workdir.absolute()
  for folder in sorted(
    path.parent for path in workdir.parent.glob("*/results.json") if path.parent != workdir
  ):
    try:
      theirs = report.read_results(folder / "results.json")
      if theirs["method"] != "supervised" or theirs["protocol"] != results["protocol"]:
        continue
      saved = configs.from_saved(report.read_object(folder / "config.json"))
      last = next(iter(theirs["last"]["predictors"].values()))["miou"]
      finished = (
        theirs["last"]["step"] >= saved.total_steps or theirs.get("ended_early")
      ) and last is not None
      if not finished or report.read_object(folder / "data.json")[""]["evaluated"] != images:
        continue
    except Exception:  # whatever lies there is not ours to judge
      continue
    different = configs.changes(config, saved)
    differs = [
      key
      for key in different
      if not any(fnmatch.fnmatch(key, pattern) for pattern in _OF_THE_METHOD)
    ]
    found.append({"workdir": str(folder), "miou": last, "gain": miou - last, "differs": differs})
  return min(found, key=lambda entry: len(entry["differs"]), default=None)


def _effect(key: str, ours: Any, theirs: Any) -> str | None:
  """Describes what a changed option does to a resumed run.

  It is "" for nothing, None for making it another run.
  """
  if fnmatch.fnmatch(key, "other_data.*"):
    key = f"data.{key.split('.', 2)[2]}"
  if any(fnmatch.fnmatch(key, pattern) for pattern in _FREE):
    return ""
  if key in _NEVER or (key.startswith("method.") and not (_is_number(ours) and _is_number(theirs))):
    return None
  if key in _PLACES:
    return "the images there are the same"
  return next(
    (effect for pattern, effect in _FROM_NOW_ON.items() if fnmatch.fnmatch(key, pattern)), None
  )


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _start_from(workdir: pathlib.Path, config: Config) -> str:
  """Describes how to learn on from a run's network under other options."""
  options = [
    f"--config.init_from={workdir}",
    *(["--config.network.pretrained="] if config.network.pretrained else []),
  ]
  return f" (with {shlex.join(options)} to start from the network of this one)"
