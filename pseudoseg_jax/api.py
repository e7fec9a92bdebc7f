"""Training, evaluation, loading and export from Python.

They work as from the command line, whose commands call these functions.

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
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from pseudoseg_jax import (
  build,
  checks,
  config as configs,
  notebook,
  settings,
  workdir as workdirs,
)
from pseudoseg_jax.contract import Method, State
from pseudoseg_jax.data.pipeline import PipelineSpec
from pseudoseg_jax.engine import agreement, loop, mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints
from pseudoseg_jax.engine.records import Records
from pseudoseg_jax.engine.stopping import StopRequest
from pseudoseg_jax.evaluation import pictures, report
from pseudoseg_jax.evaluation.display import RunResults, ScoreTable
from pseudoseg_jax.evaluation.predictor import Predictor
from pseudoseg_jax.options import Config
from pseudoseg_jax.scoring import Scoring, about_run, config_file_of, file_name, make_evaluators
from pseudoseg_jax.starting import given_nets, log_start, put_nets, put_weights, starting_weights
from pseudoseg_jax.summary import summarize
from pseudoseg_jax.trained import (
  check_plain,
  is_exported,
  open_trained,
)

log = logging.getLogger("pseudoseg_jax")


@notebook.root_handlers_kept()
def train(
  config: configs.ConfigDict | str,
  workdir: str | pathlib.Path,
  overrides: Mapping[str, Any] | None = None,
  *,
  data: build.Data | None = None,
  owns_process: bool = False,
) -> RunResults:
  """Trains (or goes on training) in `workdir` and returns its results.

  The results are the content of results.json, `finished` and `stopped_by`.

  SIGTERM and Ctrl-C (in a notebook: interrupting the cell) save and leave; the same call resumes.
  Where nothing is lost by it, at set-up or while compiling, they leave at once, by
  KeyboardInterrupt.

  Args:
    config: a config, or the path of a config file with its argument,
      "configs/camvid.py:method=cps". A file that is not there is sought among those that are
      installed with the package.
    overrides: dotted options, {"data.root": "/data/camvid"}.
    data: the result of `make_data`, in the place of the data that config.data describes.
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
  """The parts of a run, opened and checked.

  No option of its config is open.
  """

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
  """Makes every process get through the body, or none of them go on.

  They must also get through it with the same values in `compared`, which is filled meanwhile.
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
  """Returns the config as the run reads it, after its checks.

  Everything that is wrong with it is reported at once.
  """
  problems = checks.Problems("the config cannot be run")
  settled = configs.frozen(config, problems)
  if data is not None:
    settled = build.name_given(settled, data)
  settled = build.take_normalization(settled)
  build.check_run(settled, problems)
  return settled


def _agreed(config: Config, workdir: pathlib.Path, data: build.Data | None) -> _Run:
  """Opens everything, and makes the workdir this run's.

  This fails if another process cannot do so or would run something else.
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
  weights = functools.cache(lambda: starting_weights(config, data.classes))
  earlier_nets = functools.cache(lambda: given_nets(config.nets_from, method, data.classes))
  if not begun:
    weights()
    earlier_nets()

  def prepare(state: State) -> State:
    state = put_nets(put_weights(state, *weights()), earlier_nets())
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
      log_start(config, domains, run.specs[0], mesh, workdir, fresh=checkpoints.step() is None)
      if run.chosen:
        log.info("%s", settings.in_words(run.chosen))
      for change in run.changes:
        log.warning("resumed with a change: %s", change)
      scoring = Scoring(config, source, domains, method, run.specs, workdir, records, mesh)
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
      log.info("%s", summarize(scoring, workdir, source, overrides))
    ending = {"finished": outcome.finished, "stopped_by": outcome.stopped_by}
    return RunResults((scoring.results or {}) | ending, domains[0].data.classes, str(workdir))
  finally:
    checkpoints.close()
    _list_skipped(domains, workdir)


def _list_skipped(domains: Sequence[build.Domain], workdir: pathlib.Path) -> None:
  """Lists in skipped.json the files that this process could not read.

  The run did without them.
  """
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


@contextlib.contextmanager
def _ending_logged(records: Records) -> Iterator[None]:
  """Logs in log.txt what ended a run."""
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
  """Scores a trained workdir (or an exported folder) again.

  Returns {predictor: Scores}, and prints protocol, progress and table. Every predictor is scored on
  the data of its own domain.

  A workdir keeps results.json, scores.csv and pictures below evaluations/PROTOCOL/CHECKPOINT; those
  of training stay as they are. `overrides` may change evaluation or data.root; the latter is needed
  with an exported folder, which records no place. `data`, the result of `make_data`, are scored in
  the place of those that the config describes; their scores are returned, and not written.
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
  evaluators = make_evaluators(domains, trained.method, mesh)
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
        / (config.evaluation.preset or file_name(build.describe_protocol(config)))
        / checkpoint
      )
      of_training = workdir / "results.json"
      source = config_file_of(of_training)
      results = about_run(config, source, data) | {
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


@contextlib.contextmanager
def _on_console():
  """Shows the log of process 0 on the console meanwhile.

  Training has a log of its own.
  """
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
  """Opens a trained workdir (or an exported folder) as a predictor.

  The predictor takes any image and returns class ids. It needs no data set.

  Args:
    predictor: one of the method's predictors ("student", "teacher", "a", ...), which also sets the
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
