"""The files that training does without."""

from __future__ import annotations

import logging
import os
import threading

log = logging.getLogger("pseudoseg_jax")


class Skipped:
  """A record of the files that a run leaves out since they cannot be read.

  Each is reported once, when it is met, and may be listed at any time.

  Sources and pipelines share one; any thread may add to it.
  """

  def __init__(self):
    self._reasons: dict[str, str] = {}
    self._lock = threading.Lock()

  def add(self, path: str | os.PathLike, reason: str) -> None:
    path = str(path)
    with self._lock:
      if path in self._reasons:
        return
      self._reasons[path] = reason
      count = len(self._reasons)
    log.warning("skipped %s (file %d that is skipped): %s", path, count, reason)

  def reasons(self) -> dict[str, str]:
    """Maps each path to why, in the order in which the files were met."""
    with self._lock:
      return dict(self._reasons)
