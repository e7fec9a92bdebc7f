"""A notebook's cell as the console of a run.

What changes is shown in one place, everything else in lines.
"""

from __future__ import annotations

import base64
import contextlib
import html
import logging
import sys
import time
from collections.abc import Callable, Iterator

_LEAST_SECONDS_BETWEEN_PICTURES = 5.0
_DRAWING_SHARE = 0.05  # of the time, at most


def runs_here() -> bool:
  """Tells whether this is the kernel of a notebook.

  A notebook is one of Jupyter, Colab or VS Code, rather than a terminal or a script.
  """
  ipython = sys.modules.get("IPython")
  return hasattr(ipython.get_ipython(), "kernel") if ipython else False


@contextlib.contextmanager
def root_handlers_kept() -> Iterator[None]:
  """Removes the handlers that the root logger gains meanwhile.

  It is also a decorator. absl, through which other libraries log, gives the root logger a handler
  where it has none: what a notebook logs would come out in another form, and its
  logging.basicConfig() would do nothing.
  """
  before = logging.root.handlers[:]
  try:
    yield
  finally:
    for handler in logging.root.handlers[:]:
      if handler not in before:
        logging.root.removeHandler(handler)


def console(*, transient: bool = False) -> logging.Handler:
  """Returns a handler that shows the log to the person who started this.

  It writes in a cell (see CellConsole), or on the standard output.
  """
  return CellConsole(transient=transient) if runs_here() else logging.StreamHandler(sys.stdout)


class CellConsole(logging.Handler):
  """A handler that shows records in the cell that is running.

  A record with a `slot` (log.info(..., extra={"slot": "progress"})) takes the place of the one
  before it in that slot, and a `fraction` with it is shown as a bar; other records are lines.

  transient: the slots vanish when the handler is closed, for calls whose value shows the same.
  """

  def __init__(self, *, transient: bool = False):
    super().__init__()
    self._lines = logging.StreamHandler(sys.stdout)
    self._transient = transient
    self._texts: dict[str, str] = {}  # by slot, in the order of their first record
    self._fraction: float | None = None
    self._png = b""
    self._display = None
    self._drawn, self._drawing_seconds = -float("inf"), 0.0

  def emit(self, record: logging.LogRecord) -> None:
    slot = getattr(record, "slot", None)
    if slot is None:
      self._lines.emit(record)
      return
    if slot.startswith("scores"):
      self._texts.pop("evaluation", None)  # which is done
    self._texts[slot] = self.format(record)
    self._fraction = getattr(record, "fraction", self._fraction)
    try:
      self._update()
    except Exception:  # a run is worth more than its display
      self.handleError(record)

  def picture(self, draw: Callable[[], bytes], *, now: bool = False) -> None:
    """Shows the PNG that `draw` makes below the slots.

    It does so as often as drawing costs little; with `now`, in any case.
    """
    begun = time.perf_counter()
    pause = max(_LEAST_SECONDS_BETWEEN_PICTURES, self._drawing_seconds / _DRAWING_SHARE)
    if now or begun - self._drawn > pause:
      self._png = draw()
      self._drawn = time.perf_counter()
      self._drawing_seconds = self._drawn - begun
      self._update()

  def close(self) -> None:
    if self._transient and self._display is not None:
      self._texts, self._fraction, self._png = {}, None, b""
      self._update()
    super().close()

  def _update(self) -> None:
    from IPython.display import display

    shown = {"text/plain": "\n".join(self._texts.values()), "text/html": self._html()}
    if self._display is None:
      self._display = display(shown, raw=True, display_id=True)
    else:
      self._display.update(shown, raw=True)

  def _html(self) -> str:
    bar = (
      ""
      if self._fraction is None
      else f"<progress value='{self._fraction:.4f}' max='1' style='width:100%'></progress>"
    )
    style = "margin:0.3em 0;white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace"
    texts = "".join(
      f"<pre style='{style}'>{html.escape(text)}</pre>" for text in self._texts.values()
    )
    encoded = base64.b64encode(self._png).decode()
    picture = (
      f"<img src='data:image/png;base64,{encoded}' style='max-width:100%'>" if encoded else ""
    )
    return f"<div>{bar}{texts}{picture}</div>"
