"""A polite end: SIGTERM and Ctrl-C ask the loop to save and leave after the step under way."""

from __future__ import annotations

import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Context manager that turns the first SIGTERM or SIGINT into a flag; a second one acts as usual.

  Without `jax.distributed` JAX installs no handler and a preempted run would simply be killed; with several processes the
  decision is agreed on through JAX's own preemption notice, so that all stop at the same step.
  """

  def __init__(self):
    self.name: str | None = None
    self._previous: dict[int, object] = {}

  def __enter__(self) -> StopRequest:
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._note)
    except ValueError:
      pass  # not the main thread (a notebook's worker): signals stay with whoever has them
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    self.name = signal.Signals(number).name
    signal.signal(number, self._previous[number])

  def requested(self, step: int) -> bool:
    if jax.process_count() > 1:
      if multihost_utils.reached_preemption_sync_point(step):
        self.name = self.name or "preemption"
        return True
      return False
    return self.name is not None
