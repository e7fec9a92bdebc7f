"""What a run leaves to read: a text log, TensorBoard events and a history for the curves."""

from __future__ import annotations

import json
import logging
import pathlib
import sys

import jax
import numpy as np
from clu import metric_writers

log = logging.getLogger("pseudoseg_jax")


class Records:
  """Scalars, images and texts of a run, into `workdir`: log.txt, tensorboard/, history.jsonl. Only process 0 writes."""

  def __init__(self, workdir: str | pathlib.Path):
    self.workdir = pathlib.Path(workdir)
    self._handlers: list[logging.Handler] = []
    self._tensorboard = None
    if jax.process_index() != 0:
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(self.workdir / "log.txt")]
    self._handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    for handler in self._handlers:
      log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    self._tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(self.workdir / "tensorboard")))

  @property
  def history_path(self) -> pathlib.Path:
    return self.workdir / "history.jsonl"

  def scalars(self, step: int, values: dict[str, float]) -> None:
    if self._tensorboard is None:
      return
    self._tensorboard.write_scalars(step, values)
    with self.history_path.open("a") as file:
      file.write(json.dumps({"step": step, **{name: float(value) for name, value in values.items()}}) + "\n")

  def texts(self, step: int, texts: dict[str, str]) -> None:
    if self._tensorboard is not None:
      self._tensorboard.write_texts(step, texts)

  def images(self, step: int, images: dict[str, np.ndarray]) -> None:
    """images: name -> uint8[N, H, W, 3]."""
    if self._tensorboard is not None:
      self._tensorboard.write_images(step, images)

  def history(self) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), ...]} in the order of steps; a step told twice (after a kill and resume) counts as told last."""
    told: dict[str, dict[int, float]] = {}
    if self.history_path.exists():
      for line in self.history_path.read_text().splitlines():
        try:
          entry = json.loads(line)
        except json.JSONDecodeError:
          continue  # the line a kill cut short
        step = entry.pop("step")
        for name, value in entry.items():
          told.setdefault(name, {})[step] = value
    return {name: sorted(values.items()) for name, values in told.items()}

  def close(self) -> None:
    if self._tensorboard is not None:
      self._tensorboard.flush()
      self._tensorboard.close()
    for handler in self._handlers:
      log.removeHandler(handler)
      handler.flush()
      if isinstance(handler, logging.FileHandler):
        handler.close()
