"""Checkpoints that survive failures of a run and of its storage.

They are written in the background, whole or not at all, and known to be what was saved when they
are read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from pseudoseg_jax import checks
from pseudoseg_jax.contract import State

log = logging.getLogger("pseudoseg_jax")
# Orbax warns of what is asked for here: a read-only folder.
logging.getLogger("absl").setLevel(logging.ERROR)
# What Orbax logs as an error are tracebacks of what it raises as well; it is told here, in one
# line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_HALF_WRITTEN = ".orbax-checkpoint-tmp"
_PEER_SECONDS = 120  # how long a process that has written its part of a state waits for the others'


class NonFiniteState(FloatingPointError):
  """The error of a state that holds NaN or infinite numbers.

  Such a state is not saved, so that it takes the place of no good one.
  """


class _Damaged(Exception):
  """A checkpoint that cannot be read, or is not what was saved.

  The message is the cause.
  """


class _Leaf(NamedTuple):
  """The known properties of an array of a saved state.

  digest: see `_examine`, None in checkpoints that were saved without.
  """

  shape: tuple[int, ...]
  dtype: str
  digest: int | None = None

  def __str__(self) -> str:
    return f"{self.dtype}{list(self.shape)}"


class _Save(NamedTuple):
  """A save under way."""

  step: int
  num_bytes: int


class Checkpoints:
  """Two series of checkpoints below `directory`.

  `last/STEP` are the newest ones; `best/STEP` is one, by the headline score.

  In `last` the newest `keep_last` steps are kept, and never fewer than 2: where the newest is
  damaged, a run falls back to the one before.

  A digest of every array is saved with a state and checked when it is restored. A step that is
  damaged is reported and the next older one taken; unless `read_only`, the damaged folder is then
  moved to `damaged/SERIES-STEP`, so that the run can save that step again. Nothing whole is ever
  deleted but what newer steps replace.

  A save that fails (a full disk, say) is reported and the run goes on: what was saved before stays,
  and the next save tries again.

  With several processes all of them call save, restore, wait and drop together.

  Raises (at construction):
    checks.InputError: `directory` cannot be used.
  """

  def __init__(self, directory: str | pathlib.Path, *, keep_last: int = 2, read_only: bool = False):
    self.directory = pathlib.Path(directory).absolute()
    self.read_only = read_only
    _hush_unfinished()
    keep = {"last": max(2, keep_last), "best": 1}
    self._folders = {series: _Folder(self.directory / series, read_only) for series in keep}
    # What is only read needs no manager: which steps there are is seen from the folders themselves.
    self._managers = (
      {}
      if read_only
      else {series: _manager(self.directory / series, number) for series, number in keep.items()}
    )
    self._under_way: dict[str, _Save] = {}
    # Series -> step and cause of its newest save, if that failed; empty while all is well.
    self.failed: dict[str, str] = {}

  # --- which steps there are ----------------------------------------------------------------------

  def _numbered(self, series: str) -> list[int]:
    """Lists the steps that a series has folders for, the newest first."""
    try:
      names = [path.name for path in (self.directory / series).iterdir() if path.is_dir()]
    except OSError:  # the series' folder is gone, or may not be read: the same as none
      return []
    return sorted(
      (int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)), reverse=True
    )

  def steps(self, series: str) -> list[int]:
    """Lists the steps that are on disk, the newest first.

    Empty folders are no checkpoints.
    """
    return [
      step for step in self._numbered(series) if not _is_empty(self.directory / series / str(step))
    ]

  def step(self, series: str = "last") -> int | None:
    """Returns the newest step of a series on disk, None where there is none."""
    return max(self.steps(series), default=None)

  def removed(self) -> bool:
    """Tells whether a series' folder is no longer the one that was opened.

    What is saved then would be half a workdir.
    """
    return not all(folder.is_there() for folder in self._folders.values())

  # --- saving -------------------------------------------------------------------------------------

  def save(self, state: State, *, series: str = "last", note: dict[str, Any] | None = None) -> None:
    """Starts writing `state` under its own step.

    Returns once the arrays are copied and digested. A save of the series that is still under way is
    waited for. A step that is there already with this note stays as it is; newer steps, which a run
    went back from, are set aside.

    Raises:
      NonFiniteState: a floating array of the state, memory included (no method remembers infinite
        numbers), is not finite.
    """
    self._finish(series)
    step, note = int(state.step), json.loads(json.dumps(note or {}))
    if _of_first(step in self.steps(series) and self.note(series) == note):
      return
    leaves = _leaves(state)
    digests, not_finite = _examine(leaves)
    if not_finite:
      raise NonFiniteState(
        f"the state of step {step} holds NaN or infinite numbers in {_few(not_finite)}; it is not saved"
      )
    size = sum(leaf.nbytes for leaf in leaves.values())
    error = self._make_way(series, step) if jax.process_index() == 0 else None
    if _any(error is not None):
      self._tell(series, _Save(step, size), error)
      return
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      note=ocp.args.JsonSave(note),
      digests=ocp.args.JsonSave(_new_record(leaves, digests, note)),
    )
    manager = self._managers[series]
    try:
      manager.reload()  # what it remembers of the folder may not be true any more
      manager.save(step, args=items, force=True)
    # Whatever storage can do wrong: the run is worth more than this save.
    except Exception as failure:
      error = failure
    self._under_way[series] = _Save(step, size)
    if _any(error is not None):
      self._finish(series, error)

  def _make_way(self, series: str, step: int) -> OSError | None:
    """Sets aside whatever else has the place of a step.

    Returns an error if its series' folder cannot be written. A folder that was removed while the
    run was going on is not made anew: what else was in the workdir would be missing.
    """
    folder = self.directory / series
    try:
      if not self._folders[series].is_there():
        return FileNotFoundError(f"{folder} is not the folder any more that it was")
      os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=folder))
      _clear_half_written(folder)
      in_the_way = [folder / str(step), folder / f"{step}{_HALF_WRITTEN}"]
      in_the_way += [folder / str(other) for other in self._numbered(series) if other > step]
      for path in filter(os.path.lexists, in_the_way):
        log.warning(
          "%s is in the way of step %d, which is to be saved: %s", path, step, self._set_aside(path)
        )
      return None
    except OSError as error:
      return error

  def _finish(self, series: str, error: Exception | None = None, *, together: bool = True) -> None:
    """Waits for the save of a series that is under way, and books its end.

    It does nothing if none is under way. `error` is how the save ended, if that is known.
    """
    save = self._under_way.pop(series, None)
    if save is None:
      return
    try:
      self._managers[series].wait_until_finished()
    except Exception as failure:  # whatever storage can do wrong
      error = error or _before_waiting(failure)
    if jax.process_index() == 0:  # others may see an older listing of the folder
      if not self._folders[series].is_there() or save.step not in self.steps(series):
        error = error or FileNotFoundError(
          f"{self.directory / series / str(save.step)} was removed while it was written"
        )
      elif error is not None:
        log.warning(
          "%s is saved, but an older step could not be removed: %s",
          self.directory / series / str(save.step),
          _text(error),
        )
        error = None
    if _any(error is not None) if together else error is not None:
      self._tell(series, save, error)
    else:
      self.failed.pop(series, None)

  def _tell(self, series: str, save: _Save, error: Exception | None) -> None:
    """Books and reports a save that failed.

    It failed here or (error None) in another process.
    """
    folder, cause = (
      self.directory / series,
      _text(error) if error else "another process could not write it",
    )
    remedy = f"see to it that {folder} can be written"
    there = self._folders[series].is_there()
    if not there:
      cause, remedy = (
        f"{folder} was removed or replaced while the run was going on",
        "put back the one that was there",
      )
    elif full := next(
      (os.strerror(code) for code in _FULL if os.strerror(code) in str(error)), None
    ):
      free, remedy = shutil.disk_usage(folder).free, "free some space"
      cause = f"{full}: {_size(free)} are free, and a state takes {_size(save.num_bytes)}, written before an older one is removed"
    self.failed[series] = f"step {save.step}: {cause}"
    log.error(
      "could not save the %s checkpoint of step %d in %s: %s; %s: the run goes on, and its next save tries again",
      series,
      save.step,
      folder,
      cause,
      remedy,
    )
    if jax.process_index() == 0:
      # Parts of it may still be under way: the next save clears what they leave.
      _clear_half_written(folder)
      if not there:
        for path in (folder, self.directory, self.directory.parent):
          with contextlib.suppress(OSError):
            path.rmdir()  # if it is empty: it was made anew by what was just being written

  def wait(self) -> None:
    """Waits until everything started is on disk, or has failed."""
    for series in self._managers:
      self._finish(series)

  # --- restoring ----------------------------------------------------------------------------------

  def restore(
    self, like: State, *, series: str = "last", step: int | None = None, memory: bool = True
  ) -> State:
    """Returns the state of a series' newest sound step (or of `step`).

    It has the structure and shardings of `like` (shapes suffice). Steps that are damaged are
    reported. memory=False reads the networks alone: what a method remembers may be large, and is of
    no use but to go on training.

    Raises:
      checks.InputError: there is no step, none that is sound, or the newest is of another model.
    """
    self._finish(series)
    folder, causes = self.directory / series, {}
    for candidate in _steps_of_first(self._numbered(series)) if step is None else [step]:
      try:
        restored = self._read(series, candidate, like, memory)
      except _Damaged as error:
        causes[candidate] = str(error)
        log.error("checkpoint %s is damaged: %s", folder / str(candidate), error)
        continue
      self._move(series, causes, f"step {candidate} is taken in its place")
      return restored
    if not causes:
      raise checks.InputError(
        f"no {series} checkpoint in {self.directory}: train first, or name another --workdir"
      )
    problems = checks.Problems(f"no {series} checkpoint in {folder} can be used")
    for candidate, cause in causes.items():
      problems.add(f"step {candidate}", got=cause)
    problems.add(
      f"remedy: put back a copy of one of these folders, or move {folder} away to train from the start"
    )
    problems.raise_if_any()

  def _read(self, series: str, step: int, like: State, memory: bool) -> State:
    """Reads the state of one step.

    Every process finds it damaged, or none does.
    """
    restored, error = None, None
    try:
      restored = self._verified(series, step, like, memory)
    except _Damaged as damage:
      error = damage
    if _any(error is not None):
      raise error or _Damaged("another process could not read it")
    return restored

  def _verified(self, series: str, step: int, like: State, memory: bool) -> State:
    folder = self.directory / series / str(step)
    if not folder.is_dir():
      raise _Damaged("it is missing, or no folder")
    if _is_empty(folder):
      raise _Damaged("it is empty")
    saved = _saved_leaves(folder)
    wanted = like if memory else {"step": like.step, "nets": like.nets}
    _check_fits(folder, saved, _leaves(wanted), whole=memory)
    how = ocp.args.PyTreeRestore(
      item=wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=not memory,
    )
    restored = _read(
      ocp.PyTreeCheckpointHandler(), lambda handler: handler.restore(folder / "state", args=how)
    )
    leaves = _leaves(restored)
    absent = [name for name, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if absent:  # a partial restore says nothing of them
      raise _Damaged(f"it lacks {_few(absent)}")
    digests, not_finite = _examine(leaves)
    changed = [name for name, digest in digests.items() if saved[name].digest not in (None, digest)]
    if changed:
      raise _Damaged(f"it does not hold what was saved: {_few(changed)} changed since")
    if not_finite:  # saved before that was looked at
      raise _Damaged(f"it holds NaN or infinite numbers in {_few(not_finite)}")
    restored = jax.tree.map(
      lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, restored
    )
    restored = restored if memory else State(**restored)
    if int(restored.step) != step:
      raise _Damaged(f"it holds the state of step {int(restored.step)}")
    return restored

  def note(self, series: str = "last") -> dict[str, Any]:
    """Returns what was noted at the newest save of a series.

    {} where there is none, or where it is damaged, which is reported.
    """
    step = self.step(series)
    if step is None:
      return {}
    folder = self.directory / series / str(step)
    try:
      record, note = _record(folder), _read_json(folder / "note")
      if not isinstance(note, dict) or record is not None and record["note"] != _seal(note):
        raise _Damaged("it changed since it was saved")
      return note
    except _Damaged as error:
      log.error("the note of checkpoint %s is damaged, and left out: %s", folder, error)
      return {}

  # --- going back ---------------------------------------------------------------------------------

  def drop(self, first_step: int) -> None:
    """Sets aside every kept step from `first_step` on, in both series.

    It is for a run that found out that those states are ruined.
    """
    self.wait()
    for series in self._managers:
      ruined = [step for step in self.steps(series) if step >= first_step]
      self._move(series, ruined, f"states from step {first_step} on are of no use")

  def _move(self, series: str, steps: Sequence[int] | Mapping[int, str], reason: str) -> None:
    if self.read_only or not _of_first(len(steps)):
      return
    if jax.process_index() == 0:
      for step in steps:
        path = self.directory / series / str(step)
        try:
          log.warning("%s: %s; %s", path, self._set_aside(path), reason)
        except OSError as error:
          log.error(
            "%s could not be set aside (%s): move it away, or that step cannot be saved again",
            path,
            _text(error),
          )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("checkpoints set aside")

  def _set_aside(self, path: pathlib.Path) -> str:
    """Moves what has the place of a step to `damaged/`.

    Returns a text with the place where it is now.
    """
    place = self.directory / "damaged" / f"{path.parent.name}-{path.name}"
    place.parent.mkdir(exist_ok=True)
    numbered, count = place, 0
    while os.path.lexists(numbered):
      count += 1
      numbered = place.with_name(f"{place.name}-{count}")
    path.rename(numbered)
    return f"moved to {numbered}"

  def close(self) -> None:
    """Waits for what is under way and closes the series.

    One process alone may call it, since an error may have ended that one alone.
    """
    for series, manager in self._managers.items():
      self._finish(series, together=False)
      try:
        manager.close()
      except Exception as error:  # whatever storage can do wrong
        log.error("closing the %s checkpoints in %s: %s", series, self.directory, _text(error))
    for folder in self._folders.values():
      folder.close()


class _Folder:
  """The folder of a series, recognized again later.

  What was just being written to a folder that is removed makes another in its place.

  Raises (at construction):
    checks.InputError: it cannot be read, or made.
  """

  def __init__(self, path: pathlib.Path, read_only: bool):
    self.path = path
    try:
      if not read_only:
        path.mkdir(parents=True, exist_ok=True)
      with contextlib.suppress(FileNotFoundError):
        next(path.iterdir(), None)
      # Held open, so that no other folder can be given its number.
      held = (
        None
        if read_only or not hasattr(os, "O_DIRECTORY")
        else os.open(path, os.O_RDONLY | os.O_DIRECTORY)
      )
    except OSError as error:
      raise _cannot_open(path, error) from error
    self._held = held
    self.close = (lambda: None) if held is None else weakref.finalize(self, os.close, held)

  def is_there(self) -> bool:
    try:
      return self.path.is_dir() and (
        self._held is None or os.path.samestat(os.fstat(self._held), os.stat(self.path))
      )
    except OSError:
      return False


def _manager(path: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  # Folders are made before the writing in the background begins: threads there wait for minutes,
  # and keep the process as long, for a folder that cannot be made.
  background = ocp.AsyncOptions(create_directories_asynchronously=False)
  if jax.process_count() > 1:
    # Nor do processes that are done wait as long as a save may take for one that has failed.
    barrier = ocp.multihost.get_barrier_sync_fn()
    background.barrier_sync_fn = lambda *, key, timeout_ms: barrier(
      key=key, timeout_ms=min(timeout_ms, 1000 * _PEER_SECONDS)
    )
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, create=False, cleanup_tmp_directories=True, async_options=background
  )
  try:
    return ocp.CheckpointManager(path, options=options)
  except (OSError, ValueError) as error:
    raise _cannot_open(path, error) from error


def _cannot_open(path: pathlib.Path, error: Exception) -> checks.InputError:
  return checks.InputError(
    f"checkpoints cannot be kept or found in {path}: got {_text(error)}; allowed: a folder that this user may read, and write to "
    "train; move away what is there, or name another --workdir"
  )


def _read(handler: ocp.CheckpointHandler, read: Callable[[ocp.CheckpointHandler], Any]) -> Any:
  """Returns what `read` gets by a handler from an item of a checkpoint.

  Raises _Damaged for whatever files can hold.
  """
  try:
    with contextlib.closing(handler):
      return read(handler)
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise  # no room for it: that is no damage
  except Exception as error:
    raise _Damaged(_text(error)) from None


def _read_json(path: pathlib.Path) -> Any:
  return _read(
    ocp.JsonCheckpointHandler(), lambda handler: handler.restore(path, args=ocp.args.JsonRestore())
  )


def _record(folder: pathlib.Path) -> dict[str, Any] | None:
  """Reads and checks the record of the digests saved with a step.

  None in checkpoints from before there were any.
  """
  if not os.path.lexists(folder / "digests"):
    return None
  record = _read_json(folder / "digests")
  if not isinstance(record, dict) or record.pop("seal", None) != _seal(record):
    raise _Damaged("its record of digests changed since it was saved")
  return record


def _saved_leaves(folder: pathlib.Path) -> dict[str, _Leaf]:
  """Returns path -> what was saved there.

  It comes from the record of digests or, in checkpoints without, from what Orbax has.
  """
  record = _record(folder)
  if record is not None:
    return {
      name: _Leaf(tuple(shape), dtype, digest)
      for name, (*shape, dtype, digest) in record["leaves"].items()
    }

  def read(handler):
    arrays = _named(handler.metadata(folder / "state").tree)
    return {
      name: _Leaf(tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in arrays.items()
    }

  return _read(ocp.PyTreeCheckpointHandler(), read)


@functools.cache
def _hush_unfinished() -> None:
  """Silences the tracebacks of what Orbax leaves unfinished.

  Where reading or writing fails, Orbax leaves the rest unfinished, which prints a traceback for
  each part when it is thrown away.
  """
  others = sys.unraisablehook

  def hook(unraisable):
    if not re.match(
      "Event loop is closed|Encountered error while reading array index", str(unraisable.exc_value)
    ):
      others(unraisable)

  sys.unraisablehook = hook
  warnings.filterwarnings("ignore", "coroutine '_read_array.*' was never awaited", RuntimeWarning)
  logging.getLogger("asyncio").addFilter(
    lambda record: not re.search("tensorstore|orbax", record.getMessage())
  )


def _clear_half_written(folder: pathlib.Path) -> None:
  """Removes what failed saves left of a series.

  The next save may need the place of it.
  """
  for path in folder.glob(f"*{_HALF_WRITTEN}"):
    shutil.rmtree(path, ignore_errors=True)


def _is_empty(folder: pathlib.Path) -> bool:
  try:
    return not any(folder.iterdir())
  except OSError:  # removed since it was listed
    return True


# --- what a state is made of ----------------------------------------------------------------------


def _named(tree: Any) -> dict[str, Any]:
  """Returns leaves by their path: "nets/student/params/head/kernel"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _leaves(tree: Any) -> dict[str, Any]:
  """Returns arrays (or shapes) by their path.

  Python's numbers become the arrays that they are restored as.
  """
  return {
    name: jnp.asarray(leaf) if isinstance(leaf, (bool, int, float)) else leaf
    for name, leaf in _named(tree).items()
  }


def _examine(leaves: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
  """Computes digests of arrays, and finds those that are not finite.

  Returns digests by path, and paths of floating arrays that are not finite.

  A digest is the CRC-32 of the CRC-32s of an array's rows. In a method's memory, which may be split
  over devices and processes, these are the rows along the leading axis, so that the digest does not
  depend on where they are. Elsewhere the array is one row.
  """
  # All copies at once; each is kept with its array.
  jax.device_get([leaf for leaf in leaves.values() if _is_here(leaf)])
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    examined = list(pool.map(_examine_rows, leaves, leaves.values()))
  if jax.process_count() > 1:
    flat = multihost_utils.process_allgather(np.concatenate(examined)).max(axis=0)
    examined = np.split(flat, np.cumsum([len(rows) for rows in examined])[:-1])
  digests = {
    name: zlib.crc32(rows[1:].astype("<u4").tobytes())
    for name, rows in zip(leaves, examined, strict=True)
  }
  return digests, [name for name, rows in zip(leaves, examined, strict=True) if rows[0]]


def _is_here(leaf: Any) -> bool:
  """Tells whether this process has all of an array."""
  return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _examine_rows(name: str, leaf: Any) -> np.ndarray:
  """Computes the checksum of each row of an array: u32[1 + rows].

  The first number is 1 if any number here is not finite. Then comes the CRC-32 of each row that
  this process has, 0 for the others.
  """
  if not name.startswith("memory/") or not leaf.ndim:
    parts, rows = [(0, np.asarray(leaf)[None])], 1
  elif _is_here(leaf):
    parts, rows = [(0, np.asarray(leaf))], len(leaf)
  else:
    parts, rows = (
      [(shard.index[0].start or 0, np.asarray(shard.data)) for shard in leaf.addressable_shards],
      len(leaf),
    )
  examined = np.zeros(1 + rows, np.uint32)
  for start, part in parts:
    if jnp.issubdtype(part.dtype, jnp.floating) and not np.isfinite(part).all():
      examined[0] = 1
    examined[1 + start : 1 + start + len(part)] = [
      zlib.crc32(np.ascontiguousarray(row).reshape(-1).view(np.uint8)) for row in part
    ]
  return examined


def _seal(content: Any) -> int:
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _new_record(
  leaves: Mapping[str, Any], digests: Mapping[str, int], note: dict[str, Any]
) -> dict[str, Any]:
  """Makes the record that `_record` reads.

  It holds leaves, path -> [*shape, dtype, digest], and the seals of the note and of all this.
  """
  record = {
    "leaves": {
      name: [*leaf.shape, leaf.dtype.name, digests[name]] for name, leaf in leaves.items()
    },
    "note": _seal(note),
  }
  return record | {"seal": _seal(record)}


def _check_fits(
  folder: pathlib.Path, saved: Mapping[str, _Leaf], wanted: Mapping[str, Any], *, whole: bool
) -> None:
  """Raises InputError unless a checkpoint's arrays are those of a model.

  Args:
    whole: whether all arrays of the checkpoint have to be.
  """
  problems = checks.Problems(
    f"checkpoint {folder} does not fit this model; use the config that it was trained with"
  )
  for name, leaf in wanted.items():
    model = _Leaf(leaf.shape, leaf.dtype.name)
    if name not in saved:
      problems.add(name, got="nothing in the checkpoint", allowed=f"{model} as in the model")
    elif saved[name][:2] != model[:2]:
      problems.add(name, got=f"{saved[name]} in the checkpoint", allowed=f"{model} as in the model")
  for name in saved.keys() - wanted.keys() if whole else ():
    problems.add(name, got=f"{saved[name]} in the checkpoint", allowed="nothing, as in the model")
  problems.raise_if_any(most=6)


# --- several processes ----------------------------------------------------------------------------


def _any(flag: bool) -> bool:
  """Tells whether the flag is true in any process."""
  return (
    bool(multihost_utils.process_allgather(np.asarray(flag)).any())
    if jax.process_count() > 1
    else flag
  )


def _of_first(number: int) -> int:
  """Returns the number of the first process.

  Others may see an older listing of a folder.
  """
  return (
    int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if jax.process_count() > 1
    else number
  )


def _steps_of_first(steps: Sequence[int]) -> list[int]:
  if jax.process_count() == 1:
    return list(steps)
  steps = [step for step in steps if step < 2**31]
  padded = np.full(_of_first(len(steps)), -1, np.int32)
  kept = steps[: len(padded)]
  padded[: len(kept)] = kept
  return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]


# --- words ----------------------------------------------------------------------------------------


def _text(error: Exception) -> str:
  """Describes an error in one line that is not too long."""
  text = " ".join(f"{error}".split())
  return f"{type(error).__name__}: {text if len(text) < 300 else text[:300] + ' ...'}"


def _before_waiting(error: Exception) -> Exception:
  """Returns what ended a process's part of a save.

  It looks behind an error that only reports the wait for other processes, which did not come.
  """
  while (
    isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)) and error.__context__ is not None
  ):
    error = error.__context__
  return (
    TimeoutError("another process did not write its part")
    if "DEADLINE_EXCEEDED" in str(error)
    else error
  )


def _few(names: Sequence[str]) -> str:
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _size(num_bytes: int) -> str:
  return f"{num_bytes / 1e6:.1f} MB"
