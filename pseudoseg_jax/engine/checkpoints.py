"""Checkpoints that survive: written in the background, whole or not at all; the last few and the best one are kept."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from pseudoseg_jax import checks
from pseudoseg_jax.contract import State

log = logging.getLogger("pseudoseg_jax")
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is asked for here: a read-only folder


class Checkpoints:
  """Two series below `directory`: `last/STEP` (the newest `keep_last`) and `best/STEP` (one, by the headline score).

  A save that fails (a full disk, say) is told and the run goes on: what was saved before stays, and the next save tries again.
  """

  def __init__(self, directory: str | pathlib.Path, *, keep_last: int = 2, read_only: bool = False):
    self.directory = pathlib.Path(directory).absolute()
    self._managers = {
      "last": self._manager("last", keep_last, read_only),
      "best": self._manager("best", 1, read_only),
    }
    self.failed: dict[str, str] = {}  # series -> what its newest save died of; empty while all is well

  def _manager(self, series: str, keep: int, read_only: bool) -> ocp.CheckpointManager:
    path = self.directory / series
    if not read_only:
      path.mkdir(parents=True, exist_ok=True)
    if read_only:
      options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    else:
      options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(path, options=options)

  def step(self, series: str = "last") -> int | None:
    """The newest whole step of a series, None where there is none."""
    return self._managers[series].latest_step()

  def save(self, state: State, *, series: str = "last", note: dict[str, Any] | None = None) -> None:
    """Starts writing `state` under its own step; returns once the device's arrays are copied."""
    manager, step = self._managers[series], int(state.step)
    if manager.latest_step() == step:
      return
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(note or {}))
    try:
      manager.save(step, args=items, force=True)
      self.failed.pop(series, None)
    except Exception as error:  # whatever storage can do wrong: the run is worth more than this save
      self._tell(series, f" of step {step}", error)

  def _tell(self, series: str, step: str, error: Exception) -> None:
    self.failed[series] = f"{type(error).__name__}: {error}"
    log.error("could not save the %s checkpoint%s in %s: %s", series, step, self.directory, self.failed[series])

  def wait(self) -> None:
    """Until everything started is on disk."""
    for series, manager in self._managers.items():
      try:
        manager.wait_until_finished()
      except Exception as error:
        self._tell(series, "", error)

  def restore(self, like: State, *, series: str = "last", step: int | None = None, memory: bool = True) -> State:
    """The state of a series' newest step (or `step`), with the structure, dtypes and shardings of `like` (shapes suffice).

    memory=False reads the networks alone: what a method remembers may be large, and is of no use but to go on training.
    """
    manager = self._managers[series]
    step = manager.latest_step() if step is None else step
    if step is None:
      raise checks.InputError(f"no {series} checkpoint in {self.directory}: train first, or name another --workdir")
    networks = {"step": like.step, "nets": like.nets}
    how = ocp.args.StandardRestore(like) if memory else ocp.args.PyTreeRestore(
      item=networks, restore_args=ocp.checkpoint_utils.construct_restore_args(networks), partial_restore=True
    )  # fmt: skip
    try:
      restored = manager.restore(step, args=ocp.args.Composite(state=how))["state"]
      if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(restored)):
        raise ValueError("it lacks some of the networks' arrays")  # a partial restore says nothing of them
      return restored if memory else State(**restored)
    except (ValueError, KeyError, FileNotFoundError) as error:
      raise checks.InputError(
        f"checkpoint {self.directory / series / str(step)} does not fit this model or is damaged: {error}\n"
        "  Remedy: use the config it was trained with, or remove that folder to go on from an older step."
      ) from error

  def note(self, series: str = "last") -> dict[str, Any]:
    """What was noted at the newest save of a series, {} where there is none."""
    manager = self._managers[series]
    if manager.latest_step() is None:
      return {}
    return manager.restore(manager.latest_step(), args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]

  def close(self) -> None:
    self.wait()
    for manager in self._managers.values():
      manager.close()
