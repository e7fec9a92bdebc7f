"""Scores of a run while it trains.

Every evaluation makes tables, pictures, panels and results.json.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from pseudoseg_jax import (
  build,
  checks,
  rng,
  workdir as workdirs,
)
from pseudoseg_jax.contract import Method, State
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.engine.loop import Scored
from pseudoseg_jax.evaluation import panels, pictures, report
from pseudoseg_jax.evaluation.evaluator import Evaluator
from pseudoseg_jax.options import Config

log = logging.getLogger("pseudoseg_jax")

_PANEL_IMAGES = 8


class Scoring:
  """The evaluation of a run, which scores every predictor of its method.

  Each predictor is scored on its domain. Tables, pictures and results.json are left in the workdir.
  """

  def __init__(
    self,
    config,
    source: dict[str, str],
    domains,
    method: Method,
    specs,
    workdir: pathlib.Path,
    records,
    mesh,
  ):
    data = domains[0].data
    self.config, self.domains, self.data, self.method = config, domains, data, method
    self.workdir, self.records = workdir, records
    self._evaluator, *self._other_evaluators = make_evaluators(domains, method, mesh)
    self._panels = None
    if method.show is not None and config.evaluation.pictures:
      self._panels = _PanelScoring(config, data, method, specs, mesh)
    self._results_path = workdir / "results.json"
    self.results = self._read_results()
    self._about = about_run(config, source, data)
    self._last: dict[str, Any] = {}  # what results.json is to say of the newest evaluation
    self.failed = ""  # what the newest attempt to write died of

  def _read_results(self) -> report.Results | None:
    """Reads the results of the run so far.

    A damaged file is reported and written anew at the next evaluation.
    """
    if not self._results_path.exists():
      return None
    try:
      return report.read_results(self._results_path)
    except checks.InputError as error:
      log.warning("%s\n  it is written anew", error)
      return None

  @property
  def evaluated_step(self) -> int | None:
    """Returns the newest step that results.json has scores of.

    Only scores by this protocol count.
    """
    same = self.results is not None and self.results["protocol"] == self._about["protocol"]
    return self.results["last"].get("step") if same else None

  def __call__(self, state: State) -> Scored:
    """Scores a state; reports scores and pictures.

    Returns the headline mIoU, and what results.json records of it.
    """
    step = int(state.step)
    images = sum(len(domain.data.evaluated) for domain in self.domains)
    log.info("step %d: evaluating %d images ...", step, images, extra={"slot": "evaluation"})
    networks = state.replace(memory={})  # a memory may be large, and split over the devices
    scores = self.scores = self._evaluator(networks)
    other_scores = [evaluator(networks) for evaluator in self._other_evaluators]
    headline = next(iter(self.method.predictors))
    # The same few images at every evaluation; every process takes part in the prediction, one
    # writes.
    count = min(self.config.evaluation.pictures, len(self.data.evaluated))
    rows = np.unique(np.linspace(0, len(self.data.evaluated) - 1, count).astype(int)).tolist()
    predictions = self._evaluator.predictions(networks, rows) if rows else {}
    sheet = self._panels(state) if self._panels is not None else None
    self._last = report.entry(self.data.classes, step, scores)
    if other_scores:
      of_domains = zip(self.domains[1:], other_scores, strict=True)
      self._last["domains"] = {
        name: report.entry(data.classes, step, found) for (name, _, data), found in of_domains
      }
    if jax.process_index() == 0:
      for domain, of_domain in zip(self.domains, [scores, *other_scores], strict=True):
        self._record(step, domain, of_domain)
      with self._unless_failed():
        report.write_atomically(self.workdir / "scores.csv", report.csv(self.data.classes, scores))
        if sheet is not None:
          self._show(step, *sheet)
        self._draw(step, rows, predictions)
    selected_by = f"mIoU of '{headline}' on the evaluated images"
    note = {"protocol": self._about["protocol"], "entry": self._last | {"selected_by": selected_by}}
    return Scored(float(scores[headline].miou), note)

  def is_comparable(self, note: Mapping[str, Any]) -> bool:
    """Tells whether a best state was chosen by the scores of this run.

    These are the scores by this run's protocol.
    """
    return note.get("protocol", self._about["protocol"]) == self._about["protocol"]

  def publish(self, best: Mapping[str, Any]) -> None:
    """Writes results.json: the newest evaluation, and that of the best state.

    The best state is on disk by now.
    """
    before = (self.results or {}).get("best")
    best_entry = best.get("entry") or (
      before if before and before["step"] == best.get("step") else None
    )
    if not best_entry:  # a state kept by an older release, or none
      best_entry = before or self._last | {"selected_by": "nothing else was kept"}
    last, best_entry = dict(self._last), dict(best_entry)
    of_domains = [entry.pop("domains", {}) for entry in (last, best_entry)]
    self.results = {**self._about, "last": last, "best": best_entry}
    if self.domains[1:]:
      self.results["domains"] = {
        name: {
          "split": data.split,
          "last": of_domains[0][name],
          "best": of_domains[1].get(name, of_domains[0][name]),
        }
        for name, _, data in self.domains[1:]
      }
    self._write_results(finished=last["step"] >= self.config.total_steps)

  def end_early(self):
    """Notes in results.json that the run has ended early.

    Nothing better was found for so long that it ended.
    """
    self.results = {**self.results, "ended_early": True}
    self._write_results(finished=True)

  def _write_results(self, *, finished: bool):
    if jax.process_index() == 0:
      of_headline = next(iter(self.results["last"]["predictors"].values()))
      if self.config.method.name != "supervised" and finished and of_headline["miou"] is not None:
        if baseline := workdirs.supervised_beside(self.workdir, self.config, self.results):
          self.results["baseline"] = baseline
      with self._unless_failed():
        report.write_results(self._results_path, self.results)

  @contextlib.contextmanager
  def _unless_failed(self):
    """Logs what cannot be written, and goes on.

    The networks are worth more than the reports on them.
    """
    try:
      yield
      self.failed = ""
    except OSError as error:
      self.failed = f"{type(error).__name__}: {error}"
      log.error("could not write what the evaluation found: %s", self.failed)

  def _record(self, step, domain: build.Domain, scores):
    """Logs a domain's table, and records its numbers for TensorBoard."""
    names, prefix = domain.data.classes.names, "/".join(filter(None, ["evaluation", domain.name]))
    table = report.table(domain.data.classes, scores)
    heading = f"step {step}{domain.name and f', {domain.name}'} ({self._about['protocol']})"
    log.info("%s\n%s", heading, table, extra={"slot": f"scores {domain.name}"})
    values = {f"{prefix}/{name}/miou": score.miou for name, score in scores.items()}
    values |= {
      f"{prefix}/{name}/pixel_accuracy": score.pixel_accuracy for name, score in scores.items()
    }
    values |= {
      f"{prefix}/{name}/iou/{class_name}": value
      for name, score in scores.items()
      for class_name, value in zip(names, score.iou, strict=True)
      if not np.isnan(value)
    }
    self.records.scalars(step, values)
    self.records.texts(step, {f"{prefix}/table": f"```\n{table}\n```"})

  def _draw(self, step, rows, predictions):
    """Draws overlays of a few images, and the curves so far."""
    folder = self.workdir / "pictures"
    folder.mkdir(exist_ok=True)
    report.write_atomically(folder / "curves.png", pictures.curves(self.records.history()))
    pictures.scores(self.data.classes, self.scores, folder)
    if not rows:
      return
    images, labels = zip(
      *((self.data.evaluated.image(row), self.data.evaluated.label(row)) for row in rows),
      strict=True,
    )
    sheet = pictures.contact_sheet(images, labels, predictions, self.data.classes)
    pictures.save(sheet, folder / "overlays.png")
    self.records.images(step, {"overlays": np.asarray(sheet)[None]})

  def _show(self, step, sheet, values):
    """Shows what is learned from unlabeled images, as a picture and numbers."""
    if jax.process_index() == 0:
      (self.workdir / "pictures").mkdir(exist_ok=True)
      pictures.save(sheet, self.workdir / "pictures" / "panels.png")
      self.records.images(step, {"panels": np.asarray(sheet)[None]})
      self.records.scalars(step, {f"panels/{name}": value for name, value in values.items()})
      if values:
        shares = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        text = "on %d unlabeled training images, where the pseudo label is kept: %s"
        log.info(text, _PANEL_IMAGES, shares, extra={"slot": "panels"})


class _PanelScoring:
  """A method's panels of the same few unlabeled training images.

  The images are the same whatever the step. A call returns a sheet, and how often the panels are
  right.
  """

  def __init__(self, config, data: build.Data, method: Method, specs, mesh):
    self._classes, self._normalization = (
      data.classes,
      {"mean": config.data.mean, "std": config.data.std},
    )
    self._batch = build.panel_batch(specs, data, _PANEL_IMAGES)
    self._truth = self._batch["unlabeled"].pop("truth", None)

    def shown(state, batch):
      draws = method.draw(rng.stream(jax.random.key(config.seed), "panels"), batch)
      return method.show(state, batch, draws)

    self._shown = jax.jit(shown, out_shardings=meshes.replicated(mesh))

  def __call__(self, state: State) -> tuple[Image.Image, dict[str, float]]:
    shown, kept = jax.device_get(self._shown(state, self._batch))
    sheet = panels.panel_sheet(
      shown,
      self._classes,
      truth=self._truth,
      kept=kept,
      **self._normalization,
    )
    shares = {}
    if self._truth is not None:
      for panel in shown:
        if panel.kind == "classes":
          agreed = panels.agreement(panel.values, self._truth, kept)
          name = panel.name.replace(" ", "_")
          shares |= {f"{name}_{key}": share for key, share in agreed.items()}
    return sheet, shares


def make_evaluators(domains: Sequence[build.Domain], method: Method, mesh) -> list[Evaluator]:
  """Builds an evaluator for each domain."""
  return [
    build.build_evaluator(config, data, method, mesh, number)
    for number, (_, config, data) in enumerate(domains)
  ]


def about_run(config: Config, source: dict[str, str], data: build.Data) -> dict[str, Any]:
  """Returns what results.json holds besides scores."""
  return {
    "config": source,
    "seed": config.seed,
    "method": config.method.name,
    "split": data.split,
    "protocol": build.describe_protocol(config),
    "preset": config.evaluation.preset or None,
  }


def config_file_of(results: pathlib.Path) -> dict[str, str]:
  """Reads which config file results.json names, if it can be read.

  Scores can be reported without it.
  """
  try:
    return report.read_results(results)["config"]
  except checks.InputError:
    return {"path": "", "argument": ""}


def file_name(words: str) -> str:
  return re.sub(r"[^a-z0-9.]+", "_", words.lower())
