"""Graceful shutdown of a run.

SIGTERM and Ctrl-C are acknowledged at once, and a run saves and leaves as soon as nothing is lost
by it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from pseudoseg_jax import command_line

log = logging.getLogger("pseudoseg_jax")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PREEMPTION = "preemption"  # what several processes agree on, whichever of them got the signal

# For Python to unwind, before a command that has nothing to lose ends without it.
_GRACE_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
  """A signal that came while nothing could be lost by leaving at once.

  It came at set-up, while compiling, or in an evaluation.

  name: of the signal.
  """

  def __init__(self, name: str):
    super().__init__(name)
    self.name, self.exit_code = name, exit_code(name)

  def _render_traceback_(self) -> list[str]:
    """Returns what IPython shows in the place of a traceback.

    An interruption is no error.
    """
    return [
      f"stopped by {self.name}; what was saved before stays, and running the cell again goes on from there"
    ]


def exit_code(name: str) -> int:
  """Returns the shell's exit code for an end by a signal, by name.

  130 for "SIGINT", 143 for "SIGTERM" and a preemption.
  """
  return 128 + (signal.SIGTERM if name == PREEMPTION else signal.Signals[name])


class StopRequest:
  """A context manager over a run that handles SIGTERM and SIGINT.

  The first signal is noted and acknowledged; a second one, later, leaves at once.

  The loop asks `requested` after each step, saves and leaves. Inside of `nothing_to_lose` the
  signal raises Interrupted instead. Python runs signal handlers only between its own instructions,
  and compiled code (XLA's compiler) may take minutes: so a thread that C wakes up acknowledges the
  signal and, where the process is a command's own (`owns_process`), ends it.

  With several processes the decision is agreed on through JAX's preemption notice, so that all stop
  at the same step; nothing is raised then, since the others would wait for this one.

  Args:
    owns_process: this process may be ended without unwinding Python where that loses nothing; never
      in a notebook.
  """

  def __init__(self, *, owns_process: bool = False):
    self.name: str | None = None
    self._owns_process = owns_process
    self._several = jax.process_count() > 1
    self._noticed_early = False
    self._nothing_to_lose = False
    self._leaving = False
    self._handled = command_line.SignalCount()  # by the main thread, ...
    # ... and by the watcher: compiled code lets several signals become one call of the handler.
    self._seen = command_line.SignalCount()
    self._previous: dict[int, object] = {}
    self._left = threading.Event()
    self._watcher: threading.Thread | None = None

  def __enter__(self) -> StopRequest:
    if threading.current_thread() is not threading.main_thread():
      return self  # a notebook's worker: signals stay with whoever has them
    # SIGTERM of one process among several belongs to JAX, which tells the others.
    for number in (signal.SIGINT,) if self._several else SIGNALS:
      # Shells have jobs in the background ignore Ctrl-C.
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._previous[number] = signal.signal(number, self._handle)
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._previous_descriptor = signal.set_wakeup_fd(
      self._writer.fileno(), warn_on_full_buffer=False
    )
    self._watcher = threading.Thread(target=self._watch, name="stop-request", daemon=True)
    self._watcher.start()
    return self

  def __exit__(self, *_):
    self._left.set()
    if self._watcher is None:
      return
    signal.set_wakeup_fd(self._previous_descriptor)
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._writer.close()  # ends the watcher
    self._watcher.join()
    self._reader.close()

  @contextlib.contextmanager
  def nothing_to_lose(self) -> Iterator[None]:
    """Lets a signal raise Interrupted at once, for as long as it is open.

    A signal that came before raises here.
    """
    if self._several:
      yield
      return
    self._nothing_to_lose = True
    try:
      if self.name is not None:
        raise Interrupted(self.name)
      yield
    finally:
      self._nothing_to_lose = False

  def resumed(self, step: int) -> None:
    """Announces that the first step is after `step`, before it is begun.

    With several processes all of them do. JAX has all processes stop at the step after the newest
    that any of them has asked for, and takes that to be 0 before the first: a notice until now is
    due at step 1, which a resumed run never comes to, and JAX reports it once.
    """
    if self._several and step > 0:
      self._noticed_early = multihost_utils.reached_preemption_sync_point(1)
      multihost_utils.reached_preemption_sync_point(step)

  def requested(self, step: int) -> bool:
    """Tells whether to save and leave after `step`.

    With several processes it is what all of them answer at this step.
    """
    if self._several:
      if self._noticed_early or multihost_utils.reached_preemption_sync_point(step):
        self.name = self.name or PREEMPTION
        return True
      return False
    return self.name is not None

  def _handle(self, number, frame):
    """Handles a signal in the main thread, maybe long after it came."""
    if self._several and self.name is None:
      self.name = signal.Signals(number).name
      os.kill(os.getpid(), signal.SIGTERM)  # JAX's notice
      return
    self._handled.add()
    self.name = signal.Signals(number).name
    if self._nothing_to_lose or max(self._handled.value, self._seen.value) > 1:
      self._leaving = True
      raise Interrupted(self.name)

  def _watch(self):
    """Acknowledges signals in a thread of its own, which each one wakes."""
    while received := self._reader.recv(64):
      for number in received:
        if number in self._previous:
          self._acknowledge(signal.Signals(number))

  def _acknowledge(self, number: signal.Signals):
    if not self._seen.add():
      return
    if self._seen.value == 1 and not (self._nothing_to_lose or self._leaving):
      log.warning(
        "%s: saving and leaving after the step under way; once more to leave at once, without saving",
        number.name,
      )
      return
    log.warning("%s: leaving; what was saved before stays", number.name)
    if (
      self._owns_process
      and not self._left.wait(_GRACE_SECONDS)
      and (self._nothing_to_lose or self._seen.value > 1)
    ):
      command_line.leave(exit_code(number.name))
