"""The one training loop, for all methods.

It knows a state, a step and a clock, and no method by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pseudoseg_jax import checks, rng
from pseudoseg_jax.contract import Method, State
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints, NonFiniteState
from pseudoseg_jax.engine.records import Records
from pseudoseg_jax.engine.stopping import Interrupted, StopRequest

log = logging.getLogger("pseudoseg_jax")

# Batches on the device before they are needed, and steps in flight before the loop waits.
_AHEAD = 2


class NonFiniteLoss(FloatingPointError):
  """The error of a loss term that became NaN or infinite.

  The state at the beginning of that step is of no use, and is not kept.

  step: of that state.
  terms: "loss = nan, loss_supervised = nan".
  """

  def __init__(self, step: int, terms: str, remedy: str = ""):
    super().__init__(f"step {step}: {terms}{remedy}")
    self.step, self.terms = step, terms


class Intervals(NamedTuple):
  """The steps between two logs, two evaluations and two saves of a run."""

  log_steps: int
  eval_steps: int
  checkpoint_steps: int


class Outcome(NamedTuple):
  state: State
  finished: bool
  stopped_by: str | None  # a signal's name, or "preemption"


class Scored(NamedTuple):
  """The result of an evaluation.

  score: by which the best state is chosen; NaN where nothing could be scored.
  note: kept with the best state (JSON).
  """

  score: float
  note: dict[str, Any]


def jit_step(method: Method, mesh: Mesh, seed: int) -> Callable[[State, Any], tuple[State, dict]]:
  """Compiles the method's step over the mesh.

  Its state is donated, its key derived from (seed, step).
  """

  def step(state, batch):
    return method.step(state, batch, rng.step_key(seed, state.step))

  state, batch, whole = state_shardings(method, mesh), meshes.split(mesh), meshes.replicated(mesh)
  return jax.jit(step, in_shardings=(state, batch), out_shardings=(state, whole), donate_argnums=0)


def state_shardings(method: Method, mesh: Mesh) -> State:
  """Returns where the parts of a state lie, a prefix of the state's tree.

  They lie on every device, but for `method.split_memory`.
  """
  memory = jax.eval_shape(method.init, jax.random.key(0)).memory
  problems = checks.Problems("the method's memory cannot be split over the devices")
  for name in method.split_memory:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(memory[name])}
    if any(size % mesh.size for size in sizes):
      got = f"a leading axis of {', '.join(map(str, sizes))}"
      problems.add(f"memory '{name}'", got=got, allowed=f"a multiple of the {mesh.size} devices")
  problems.raise_if_any()
  whole, parts = meshes.replicated(mesh), meshes.split(mesh)
  return State(
    step=whole,
    nets=whole,
    memory={name: parts if name in method.split_memory else whole for name in memory},
  )


def _initial_state(method: Method, key) -> State:
  """Computes the initial state with strong dtypes.

  A weak one (`jnp.ones(3) * 1.0`) would compile the step twice.
  """
  return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), method.init(key))


def jit_init(method: Method, mesh: Mesh, seed: int) -> State:
  """Computes the method's initial state, a function of the seed alone.

  It lies where the step wants it.
  """
  init = jax.jit(
    functools.partial(_initial_state, method), out_shardings=state_shardings(method, mesh)
  )
  return init(rng.stream(jax.random.key(seed), "init"))


def abstract_state(method: Method, mesh: Mesh) -> State:
  """Returns the shapes, dtypes and shardings of the method's state.

  The state is not computed.
  """
  shapes = jax.eval_shape(functools.partial(_initial_state, method), jax.random.key(0))

  def placed(sharding, part):
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
    )

  return jax.tree.map(placed, state_shardings(method, mesh), shapes)


def _on_device(mesh: Mesh, batches: Iterator[Any]) -> Iterator[Any]:
  """Yields batches as global arrays.

  The next ones are already on their way while a step runs.
  """
  waiting = deque()
  for batch in batches:
    waiting.append(meshes.global_batch(mesh, batch))
    if len(waiting) >= _AHEAD:
      yield waiting.popleft()
  yield from waiting


def _trim_host_memory() -> None:
  """Hands back the memory that the compiler freed.

  glibc keeps it, some hundred megabytes for a ResNet-50 that nothing uses again.
  """
  if sys.platform == "linux":
    try:
      ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
      pass  # another C library


def _check_finite(first_step: int, values: dict[str, np.ndarray]) -> None:
  """Raises NonFiniteLoss if a loss is not finite.

  Args:
    first_step: the step from which steps are counted.
    values: name -> [steps].
  """
  bad = {name: ~np.isfinite(column) for name, column in values.items() if name.startswith("loss")}
  if not any(column.any() for column in bad.values()):
    return
  index = min(int(np.argmax(column)) for column in bad.values() if column.any())
  terms = ", ".join(f"{name} = {values[name][index]}" for name in sorted(bad) if bad[name][index])
  raise NonFiniteLoss(first_step + index, terms)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Stopwatch:
  """The seconds of training since the last restart, evaluation left out.

  It also holds those of them spent waiting for input.
  """

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    self.started, self.waited = time.perf_counter(), 0.0

  def seconds(self) -> float:
    return time.perf_counter() - self.started

  @contextlib.contextmanager
  def waiting(self):
    before = time.perf_counter()
    yield
    self.waited += time.perf_counter() - before

  @contextlib.contextmanager
  def paused(self):
    before = time.perf_counter()
    yield
    self.started += time.perf_counter() - before


def fit(
  method: Method,
  *,
  mesh: Mesh,
  seed: int,
  total_steps: int,
  batches: Callable[[int], Iterator[Any]],
  images_per_step: int,
  intervals: Intervals,
  checkpoints: Checkpoints,
  records: Records,
  evaluate: Callable[[State], Scored],
  publish: Callable[[dict[str, Any]], None] = lambda best: None,
  evaluated_step: int | None = None,
  is_comparable: Callable[[dict[str, Any]], bool] = lambda note: True,
  prepare: Callable[[State], State] = lambda state: state,
  patience: int = 0,
  stop: StopRequest | None = None,
) -> Outcome:
  """Trains from the newest checkpoint (or from the start) to `total_steps`.

  Args:
    batches: start_step -> iterator of this process's share of each global batch from that step on;
      with close(), if it holds anything.
    images_per_step: images of all streams in a global batch, for the rate.
    evaluate: state -> score and note, called every `eval_steps` and at the end. The best state is
      kept.
    publish: called after each evaluation with the note of the best state, once that state is on
      disk.
    evaluated_step: the newest step whose evaluation was published. A run that is resumed at a step
      to be evaluated, and was killed before it was, evaluates first.
    is_comparable: whether the state that was kept as the best, by its note, was chosen by the
      scores that `evaluate` gives now.
    prepare: fresh state -> the state to start from (pretrained weights), outside of jit; not called
      where a run is resumed.
    patience: evaluations in a row that may find nothing better; after so many the run has ended. 0:
      as many as there are.
    stop: the signals that end a run early; None: SIGTERM and SIGINT, for the time of this call.

  Returns:
    The last state; `finished` is False where a signal ended the run early (it is saved, and the
    same call resumes it), and True where patience did.

  Raises:
    NonFiniteLoss: names the step and the loss terms. States that it shows to be ruined are no
      longer among the checkpoints.
    NonFiniteState: a state to be saved holds NaN or infinite numbers.
    FileNotFoundError: the folder of the checkpoints was removed meanwhile.
    Interrupted: a signal came before the first step was done, or a second one.
  """
  with contextlib.ExitStack() as open_resources:
    stop = stop or open_resources.enter_context(StopRequest())
    with stop.nothing_to_lose():
      state, start = _starting_state(method, mesh, seed, checkpoints, prepare)
      if start:
        log.info("resumed at step %d of %d", start, total_steps)
    stop.resumed(start)
    best = _best_note(checkpoints, is_comparable)
    step_fn = jit_step(method, mesh, seed)

    pending: deque[dict] = deque()  # metrics of the newest steps, still on the device
    unlogged: dict[str, list[float]] = {}  # those fetched and checked since the last log line
    watch = _Stopwatch()

    def fetch(done: int) -> None:
      """Fetches and checks the pending metrics (waits for step `done - 1`)."""
      columns = jax.device_get(list(pending))
      pending.clear()
      if columns:
        values = {name: np.asarray([column[name] for column in columns]) for name in columns[0]}
        _check_finite(done - len(columns), values)
        for name, column in values.items():
          unlogged.setdefault(name, []).extend(column.tolist())

    def report(done: int) -> None:
      steps = len(unlogged["loss"])
      steps_per_second = steps / max(watch.seconds(), 1e-9)
      means = {name: float(np.mean(column)) for name, column in unlogged.items()}
      rates = {
        "steps_per_second": steps_per_second,
        "images_per_second": steps_per_second * images_per_step,
        "input_wait_fraction": watch.waited / max(watch.seconds(), 1e-9),
      }
      log.info(
        "step %d/%d (%d%%)  %.2f steps/s  %.1f images/s  input wait %.0f%%  left %s  %s",
        done,
        total_steps,
        100 * done // total_steps,
        steps_per_second,
        rates["images_per_second"],
        100 * rates["input_wait_fraction"],
        _clock((total_steps - done) / steps_per_second),
        "  ".join(
          f"{name} {value:.4f}" for name, value in means.items() if name.startswith("loss")
        ),
        extra={"slot": "progress", "fraction": done / total_steps},
      )
      records.scalars(
        done,
        {f"train/{name}": value for name, value in means.items()}
        | {f"rate/{k}": v for k, v in rates.items()},
      )
      unlogged.clear()
      watch.restart()

    def save(state: State) -> None:
      if checkpoints.removed():
        raise FileNotFoundError(
          f"{checkpoints.directory} was removed while the run was going on: nothing of it can be saved there"
        )
      checkpoints.save(state)

    def score(state: State) -> str | None:
      """Evaluates a state that is saved.

      Leaving meanwhile loses nothing, since the resumed run evaluates it first.

      Returns:
        The name of the signal that ended the evaluation, None for none.
      """
      nonlocal best
      checkpoints.wait()
      saved = "last" not in checkpoints.failed
      try:
        with watch.paused(), stop.nothing_to_lose() if saved else contextlib.nullcontext():
          scored = evaluate(state)
      except Interrupted as interrupted:
        if saved:
          return interrupted.name
        raise
      value = -np.inf if np.isnan(scored.score) else scored.score
      if best is None or value > best["score"]:
        note = scored.note | {
          "score": value if np.isfinite(value) else None,
          "step": int(state.step),
        }
        checkpoints.save(state, series="best", note=note)
        checkpoints.wait()  # what is published as the best is on disk
        if "best" not in checkpoints.failed:
          best = note | {"score": value}
      publish(best or {})
      return None

    def next_batch(done: int) -> Any:
      try:
        with watch.waiting():
          return next(feed)
      except Exception:
        # A file that cannot be read says nothing against the state. With several processes the
        # others are in the step by now.
        if done - 1 > start and jax.process_count() == 1:
          fetch(done - 1)
          save(state)
          checkpoints.wait()
          log.info("saved after step %d; the same command resumes there", done - 1)
        raise

    def outlasted(done: int) -> bool:
      """Tells whether patience has run out.

      It is for good: a run that is resumed there has ended too.
      """
      if not patience or best is None or done - best["step"] < patience * intervals.eval_steps:
        return False
      log.info(
        "ended at step %d of %d: nothing better than step %d in %d evaluations",
        done,
        total_steps,
        best["step"],
        patience,
      )
      return True

    stopped_by = None
    try:
      # Killed between a save and the evaluation of what was saved: without it, `best` would not be
      # what it is undisturbed.
      if (
        start
        and start != evaluated_step
        and (start >= total_steps or start % intervals.eval_steps == 0)
      ):
        stopped_by = score(state)
        evaluated_step = None if stopped_by else start
      # Only where this state was evaluated: what results.json says is of the last state.
      feed, ended = (
        iter(()),
        0 < start == evaluated_step and start < total_steps and outlasted(start),
      )
      if start < total_steps and not stopped_by and not ended:
        source = batches(start)
        open_resources.callback(getattr(source, "close", lambda: None))
        feed = _on_device(mesh, source)
      for done in () if stopped_by or ended else range(start + 1, total_steps + 1):
        with stop.nothing_to_lose() if done == start + 1 else contextlib.nullcontext():
          batch = next_batch(done)
          state, metrics = step_fn(state, batch)
          pending.append(metrics)
          if done == start + 1:
            fetch(done)
            _trim_host_memory()
            log.info("first step after %.1f s, compilation included", watch.seconds())
            unlogged.clear()
            watch.restart()
        if len(pending) > _AHEAD:
          # Not to read a value, only to let no more than two steps pile up: so that waiting for
          # input is told from computing.
          jax.block_until_ready(pending[-1 - _AHEAD])
        if done > start + 1 and (done % intervals.log_steps == 0 or done == total_steps):
          fetch(done)
          report(done)

        stopped_by = stop.name if done < total_steps and stop.requested(done) else None
        evaluating = done % intervals.eval_steps == 0 or done == total_steps
        if stopped_by or evaluating or done % intervals.checkpoint_steps == 0:
          fetch(done)  # a state behind a non-finite loss is never saved
          save(state)
        if stopped_by:
          break
        if evaluating:
          stopped_by = score(state)
          if stopped_by or (done < total_steps and outlasted(done)):
            break
    except NonFiniteLoss as error:
      checkpoints.drop(error.step)  # its loss was not known when it was saved
      raise NonFiniteLoss(error.step, error.terms, _after_non_finite(checkpoints)) from None
    except NonFiniteState as error:
      raise NonFiniteState(f"{error}{_after_non_finite(checkpoints)}") from None
    checkpoints.wait()
    if stopped_by:
      log.info(
        "stopped by %s after step %d of %d; the same command resumes here",
        stopped_by,
        int(state.step),
        total_steps,
      )
    return Outcome(state, finished=stopped_by is None, stopped_by=stopped_by)


def _starting_state(method, mesh, seed, checkpoints, prepare) -> tuple[State, int]:
  """Returns the state to start from, and its step.

  It is that of the newest checkpoint that is whole, or a fresh one.
  """
  if checkpoints.step() is None:
    return prepare(jit_init(method, mesh, seed)), 0
  state = checkpoints.restore(abstract_state(method, mesh))
  return state, int(state.step)


def _best_note(
  checkpoints: Checkpoints, is_comparable: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
  """Returns what was noted with the best state, its score a number.

  None where there is none to compare with.
  """
  note = checkpoints.note("best")
  if "score" not in note or not is_comparable(note):
    return None
  return note | {"score": -np.inf if note["score"] is None else note["score"]}


def _after_non_finite(checkpoints: Checkpoints) -> str:
  step = checkpoints.step()
  resumes = (
    "starts anew, since nothing older is kept" if step is None else f"resumes at step {step}"
  )
  return (
    f". That state is not kept; the same command {resumes}, and meets the same loss again unless something is changed: "
    "give it a lower --config.optimizer.learning_rate or a lower weight of the term, or check the data (pseudoseg_jax.check_data)"
  )
