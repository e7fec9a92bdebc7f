"""Records of a run: a text log, TensorBoard events and a history.

The history is for the curves.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping

import jax
import numpy as np
from clu import metric_writers

from pseudoseg_jax import notebook
from pseudoseg_jax.notebook import CellConsole

log = logging.getLogger("pseudoseg_jax")

History = dict[str, list[tuple[int, float]]]  # name -> [(step, value), ...]


class Records:
  """The scalars, images and texts of a run, written to `workdir`.

  The files are log.txt, tensorboard/ and history.jsonl. Only process 0 writes.

  What cannot be written (a full disk, a file in the place of a folder) is reported once, and the
  run goes on without it: it is worth more than its curves.

  draw_curves: history -> a PNG, which a notebook shows while the run goes on.
  """

  def __init__(
    self, workdir: str | pathlib.Path, *, draw_curves: Callable[[History], bytes] | None = None
  ):
    self.workdir = pathlib.Path(workdir)
    self._draw_curves = draw_curves
    self._cell: CellConsole | None = None
    self._handlers: list[logging.Handler] = []
    self._tensorboard = None
    self._lost: set[str] = set()  # what was told to be lost
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._log_settings = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    # What the writing thread logs as an error is the traceback of what it raises as well; it is
    # told here, in one line.
    logging.getLogger("absl").addFilter(_not_of_writer)
    console = notebook.console()
    self._add_handler(console)
    self._cell = console if isinstance(console, CellConsole) else None
    self._attempt("log.txt", lambda: self._add_handler(_LogFile(self.workdir / "log.txt")))
    self._attempt("tensorboard", self._open_tensorboard)

  @property
  def history_path(self) -> pathlib.Path:
    return self.workdir / "history.jsonl"

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    if not self._writes:
      return
    line = (
      json.dumps({"step": step, **{name: float(value) for name, value in values.items()}}) + "\n"
    )
    self._attempt("history.jsonl", lambda: self._append(line))
    self._to_tensorboard(lambda writer: writer.write_scalars(step, values))
    self._show_curves()

  def texts(self, step: int, texts: Mapping[str, str]) -> None:
    self._to_tensorboard(lambda writer: writer.write_texts(step, texts))

  def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes images to TensorBoard.

    Args:
      images: name -> uint8[N, H, W, 3].
    """
    self._to_tensorboard(lambda writer: writer.write_images(step, images))

  def error(self, text: str) -> None:
    """Writes what ended the run into log.txt alone.

    The console gets it from whoever catches the error.
    """
    for handler in self._handlers:
      if isinstance(handler, _LogFile):
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (text,), None))

  def history(self) -> History:
    """Returns {name: [(step, value), ...]} in the order of steps.

    A step recorded twice (after a kill and resume) counts as recorded last. Lines that are no such
    entries (cut short by a kill, or damaged) are left out.
    """
    told: dict[str, dict[int, float]] = {}
    if self.history_path.is_file():
      for line in self.history_path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
          entry = json.loads(line)
          step = int(entry.pop("step"))
          values = {str(name): float(value) for name, value in entry.items()}
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
          continue
        for name, value in values.items():
          told.setdefault(name, {})[step] = value
    return {name: sorted(values.items()) for name, values in told.items()}

  def close(self) -> None:
    self._show_curves(now=True)
    if self._tensorboard is not None:
      self._to_tensorboard(lambda writer: writer.flush())
    if self._tensorboard is not None:
      self._to_tensorboard(lambda writer: writer.close())
    for handler in self._handlers:
      log.removeHandler(handler)
      with contextlib.suppress(OSError):  # of a full disk, which was told
        handler.flush()
      with contextlib.suppress(OSError):
        handler.close()
    if self._writes:
      logging.getLogger("absl").removeFilter(_not_of_writer)
      log.setLevel(self._log_settings[0])
      log.propagate = self._log_settings[1]

  def _show_curves(self, *, now: bool = False) -> None:
    if self._cell is not None and self._draw_curves is not None and self.history_path.is_file():
      self._attempt(
        "curves in the notebook",
        lambda: self._cell.picture(lambda: self._draw_curves(self.history()), now=now),
      )

  def _add_handler(self, handler: logging.Handler) -> None:
    self._handlers.append(handler)
    log.addHandler(handler)

  def _open_tensorboard(self) -> None:
    folder = self.workdir / "tensorboard"
    folder.mkdir(exist_ok=True)  # TensorFlow's own error for a file in its place names no path
    self._tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))

  def _append(self, line: str) -> None:
    with self.history_path.open("a", encoding="utf-8") as file:
      file.write(line)

  def _to_tensorboard(self, write: Callable[[metric_writers.MetricWriter], None]) -> None:
    writer = self._tensorboard
    if writer is not None and not self._attempt("tensorboard", lambda: write(writer)):
      # Its thread keeps the failure, and would tell it at every further call.
      self._tensorboard = None

  def _attempt(self, name: str, write: Callable[[], None]) -> bool:
    """Tells whether `write` went well.

    The first failure of a name is reported.
    """
    try:
      write()
      return True
    except Exception as error:  # TensorFlow tells a full disk by errors of its own
      if name not in self._lost:
        self._lost.add(name)
        log.error(
          "cannot write %s (%s: %s); the run goes on without it",
          self.workdir / name,
          type(error).__name__,
          error,
        )
      return False


def _not_of_writer(record: logging.LogRecord) -> bool:
  return not record.pathname.endswith("asynclib.py")


class _LogFile(logging.FileHandler):
  """A log file whose disk may fill up."""

  def __init__(self, path: pathlib.Path):
    super().__init__(path, encoding="utf-8", errors="backslashreplace")
    self.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))

  def handleError(self, record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    log.removeHandler(self)
    log.error("cannot write %s (%s); the run goes on without it", self.baseFilename, error)
