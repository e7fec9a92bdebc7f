"""The progress of a long pass over images."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
  """A reporter of the progress of a long pass over images.

  It reports now and then how many images are done, how fast, and how long the rest takes; the first
  ones (compiling) are left out.

  Args:
    total: number of images.
    say: takes a line, e.g. a logger's `info`.
    every_seconds: how often; a pass that is shorter reports nothing.
  """

  def __init__(self, total: int, say: Callable[[str], None], *, every_seconds: float = 5.0):
    self.total, self.done, self._say, self._every = total, 0, say, every_seconds
    self.started = time.perf_counter()
    self._told, self._first, self._spoke = self.started, None, False

  def seconds(self) -> float:
    return time.perf_counter() - self.started

  def more(self, count: int = 1) -> None:
    """Counts `count` further images as done."""
    self.done += count
    now = time.perf_counter()
    if self._first is None:
      self._first, self._told = (now, self.done), now
    elif now - self._told > self._every or (self._spoke and self.done == self.total):
      rate = (self.done - self._first[1]) / max(now - self._first[0], 1e-9)
      left = (self.total - self.done) / rate
      self._say(
        f"{self.done}/{self.total} images  {rate:.1f} images/s  left {int(left // 60)} min {left % 60:.0f} s"
      )
      self._told, self._spoke = now, True
