"""The loop with a method of four numbers: what it saves, when it stops and what it says."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pseudoseg_jax.contract import Method, Needs, NetState, State
from pseudoseg_jax.engine import loop, mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints, NonFiniteState
from pseudoseg_jax.engine.records import Records

TX = optax.identity()


def make_method(ruined_at=-1):
  """Adds the mean of the batch and a random number to its one parameter; a NaN image gives a NaN
  loss.

  ruined_at: the step that makes the parameter infinite, by a finite loss.
  """

  def init(key):
    net = NetState.create(
      apply_fn=None, params={"w": jnp.zeros(4) + jax.random.uniform(key)}, tx=TX, batch_stats={}
    )
    return State(
      step=jnp.zeros([], jnp.int32), nets={"net": net.replace(step=jnp.zeros([], jnp.int32))}
    )

  def update(state, batch, draws):
    net = state.nets["net"]
    loss = jnp.mean(batch["labeled"]["image"])
    after = net.replace(
      params={
        "w": net.params["w"] + loss + draws + jnp.where(state.step == ruined_at, jnp.inf, 0.0)
      }
    )
    return state.replace(step=state.step + 1, nets={"net": after}), {
      "loss": loss,
      "loss_other": jnp.ones([]),
      "kept": loss,
    }

  return Method(Needs(unlabeled=False), init, lambda key, batch: jax.random.normal(key), update, {})


def batches(start, *, at=lambda step: None):
  step = start
  while True:
    step += 1
    value = at(step)
    yield {
      "labeled": {"image": np.full((8, 2, 2, 3), step if value is None else value, np.float32)}
    }


class Run:
  """fit() in a folder, as often as asked; counts its evaluations."""

  def __init__(self, workdir, total_steps=10, scores=lambda step: step, method=None):
    self.workdir, self.total_steps, self.scores, self.method = (
      workdir,
      total_steps,
      scores,
      method or make_method(),
    )
    self.evaluated = []

  def __call__(self, feed=batches, checkpoints=None, **options):
    def evaluate(state):
      self.evaluated.append(int(state.step))
      return loop.Scored(self.scores(int(state.step)), {})

    records = Records(self.workdir)
    checkpoints = checkpoints or Checkpoints(self.workdir / "checkpoints")
    try:
      return loop.fit(
        self.method,
        mesh=meshes.make_mesh(),
        seed=0,
        total_steps=self.total_steps,
        batches=feed,
        images_per_step=8,
        intervals=loop.Intervals(log_steps=2, eval_steps=4, checkpoint_steps=3),
        checkpoints=checkpoints,
        records=records,
        evaluate=evaluate,
        **options,
      )
    finally:
      checkpoints.close()
      records.close()


def parameters(outcome):
  return np.asarray(outcome.state.nets["net"].params["w"])


def test_trains_evaluates_and_keeps_the_last_and_the_best(tmp_path):
  run = Run(tmp_path, scores=lambda step: {4: 0.2, 8: 0.9, 10: 0.5}[step])
  outcome = run()
  assert outcome.finished and int(outcome.state.step) == 10
  assert run.evaluated == [4, 8, 10]
  checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
  assert checkpoints.step("last") == 10 and checkpoints.step("best") == 8
  assert checkpoints.note("best") == {"score": 0.9, "step": 8}
  assert sorted(
    path.name for path in (tmp_path / "checkpoints" / "last").iterdir() if path.name.isdigit()
  ) == ["10", "9"]
  text = (tmp_path / "log.txt").read_text()
  assert "steps/s" in text and "images/s" in text and "input wait" in text and "left" in text
  assert list((tmp_path / "tensorboard").iterdir())


def test_history_holds_means_over_the_steps_since_the_last_line(tmp_path):
  Run(tmp_path)()
  records = Records(tmp_path)
  history = records.history()
  # The first step, compilation, is not logged; then steps 2, 3-4, 5-6, ... whose losses are the
  # step numbers.
  assert history["train/loss"] == [(2, 2.0), (4, 3.5), (6, 5.5), (8, 7.5), (10, 9.5)]
  with records.history_path.open("a") as file:
    # Told again after a resume; then cut short by a kill.
    file.write('{"step": 10, "train/loss": 7.0}\n{"step": 12, "tra')
  assert records.history()["train/loss"][-1] == (10, 7.0)
  records.close()


def test_a_signal_saves_and_the_same_call_goes_on_to_the_same_end(tmp_path):
  def at(step):
    if step == 5:
      os.kill(os.getpid(), signal.SIGTERM)

  handler = signal.getsignal(signal.SIGTERM)
  stopped = Run(tmp_path / "stopped")(lambda start: batches(start, at=at))
  assert not stopped.finished and stopped.stopped_by == "SIGTERM"
  assert signal.getsignal(signal.SIGTERM) is handler
  assert int(stopped.state.step) < 10
  assert "the same command resumes here" in (tmp_path / "stopped" / "log.txt").read_text()
  starts = []
  again = Run(tmp_path / "stopped")(lambda start: (starts.append(start), batches(start))[1])
  assert starts == [int(stopped.state.step)]
  whole = Run(tmp_path / "whole")()
  np.testing.assert_array_equal(parameters(again), parameters(whole))


@pytest.mark.parametrize("patience, last", [(0, 20), (1, 12), (2, 16), (3, 20)])
def test_a_run_ends_when_nothing_gets_better(tmp_path, patience, last):
  scores = lambda step: {4: 0.2, 8: 0.9, 12: 0.5, 16: 0.9, 20: 0.3}[step]  # as good is not better
  run = Run(tmp_path / "run", total_steps=20, scores=scores)
  outcome = run(patience=patience)
  assert (
    outcome.finished
    and outcome.stopped_by is None
    and int(outcome.state.step) == last == run.evaluated[-1]
  )
  checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
  assert checkpoints.step("last") == last and checkpoints.step("best") == 8
  for evaluated_step in (last, None):  # None: killed before its scores were published
    again = run(patience=patience, evaluated_step=evaluated_step)
    assert again.finished and int(again.state.step) == last  # it has ended
    np.testing.assert_array_equal(parameters(again), parameters(outcome))

  def at(step):
    if step == 6:
      os.kill(os.getpid(), signal.SIGTERM)

  interrupted = Run(tmp_path / "interrupted", total_steps=20, scores=scores)
  assert not interrupted(lambda start: batches(start, at=at), patience=patience).finished
  resumed = interrupted(patience=patience)
  assert int(resumed.state.step) == last
  np.testing.assert_array_equal(parameters(resumed), parameters(outcome))


def test_a_finished_run_only_evaluates(tmp_path):
  Run(tmp_path)()
  again = Run(tmp_path)
  assert again(lambda start: pytest.fail("no batch is needed")).finished
  assert again.evaluated == [10]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_loss_stops_the_run_and_is_never_saved(tmp_path, value):
  with pytest.raises(
    loop.NonFiniteLoss, match=r"step 7: loss = (nan|inf)\..* resumes at step 6"
  ) as error:
    Run(tmp_path)(lambda start: batches(start, at=lambda step: value if step == 8 else None))
  assert "loss_other" not in str(error.value) and "learning_rate" in str(error.value)
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).step() == 6


def test_a_state_that_its_next_loss_shows_to_be_ruined_is_not_kept(tmp_path):
  # 6 had been saved by then.
  with pytest.raises(loop.NonFiniteLoss, match=r"step 6: loss = nan\..* resumes at step 4"):
    Run(tmp_path)(lambda start: batches(start, at=lambda step: np.nan if step == 7 else None))
  resumed = Run(tmp_path)
  starts = []
  assert resumed(lambda start: (starts.append(start), batches(start))[1]).finished
  assert starts == [4]


def test_a_run_with_nothing_older_starts_anew(tmp_path):
  with pytest.raises(loop.NonFiniteLoss, match="starts anew"):
    Run(tmp_path)(lambda start: batches(start, at=lambda step: np.nan if step == 2 else None))


def test_an_evaluation_that_a_kill_cut_short_is_made_up_for(tmp_path):
  scores = {4: 0.9, 8: 0.2, 10: 0.5}.__getitem__

  class Killed(BaseException):
    pass

  class KilledRun(Run):
    def __call__(self, **options):
      self.scores = lambda step: (_ for _ in ()).throw(Killed) if step == 4 else scores(step)
      return super().__call__(**options)

  with pytest.raises(Killed):
    KilledRun(tmp_path)()
  published = []
  resumed = Run(tmp_path, scores=scores)
  resumed(publish=published.append)
  assert resumed.evaluated == [4, 8, 10]
  assert [best["step"] for best in published] == [4, 4, 4]
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).step("best") == 4
  again = Run(tmp_path, scores=scores)
  again(lambda start: pytest.fail("no batch is needed"), evaluated_step=10)
  assert again.evaluated == []


def test_a_best_state_of_other_scores_does_not_count(tmp_path):
  Run(tmp_path, total_steps=8, scores={4: 0.9, 8: 0.8}.__getitem__)()
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).step("best") == 4
  Run(tmp_path, scores={10: 0.1}.__getitem__)(is_comparable=lambda note: False, evaluated_step=8)
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).step("best") == 10
  # The same state, scored in another way: what is noted with it is its newest score.
  Run(tmp_path, scores={10: 0.05}.__getitem__)(is_comparable=lambda note: False)
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).note("best")["score"] == 0.05


def test_a_state_that_is_not_finite_ends_the_run_though_its_loss_is(tmp_path):
  with pytest.raises(NonFiniteState, match=r"step 6 .*net.*resumes at step 4.*learning_rate"):
    Run(tmp_path, method=make_method(ruined_at=5))()


def test_a_signal_in_an_evaluation_leaves_at_once_and_the_resumed_run_evaluates(tmp_path):
  class Signalled(Run):
    def __call__(self, **options):
      def scores(step):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("the signal was not noticed")

      self.scores = scores
      return super().__call__(**options)

  stopped = Signalled(tmp_path)()
  assert not stopped.finished and stopped.stopped_by == "SIGINT" and int(stopped.state.step) == 4
  resumed = Run(tmp_path)
  assert resumed().finished and resumed.evaluated == [4, 8, 10]


def test_a_file_that_cannot_be_read_costs_no_step(tmp_path):
  def feed(start):
    for batch in batches(start):
      # Two batches are on their way: steps 7 and 8 are not taken.
      if batch["labeled"]["image"].flat[0] == 9:
        raise OSError("cannot read b.jpg")
      yield batch

  with pytest.raises(OSError, match="b.jpg"):
    Run(tmp_path)(feed)
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).step() == 7
  assert "saved after step 7" in (tmp_path / "log.txt").read_text()


def test_the_feed_is_closed_however_a_run_ends(tmp_path):
  closed = []

  class Feed:
    def __init__(self, start, at):
      self._batches = batches(start, at=at)

    def __iter__(self):
      return self

    def __next__(self):
      return next(self._batches)

    def close(self):
      closed.append(True)

  with pytest.raises(loop.NonFiniteLoss):
    Run(tmp_path / "bad")(lambda start: Feed(start, lambda step: np.nan if step == 3 else None))
  Run(tmp_path / "good")(lambda start: Feed(start, lambda step: None))
  assert len(closed) == 2


def test_a_workdir_that_is_removed_ends_the_run(tmp_path):
  workdir = tmp_path / "run"

  def at(step):
    if step == 5:
      # at once, unlike the removal of what is just being written to.
      workdir.rename(tmp_path / "elsewhere")

  with pytest.raises(FileNotFoundError, match="was removed"):
    Run(workdir)(lambda start: batches(start, at=at))


def test_what_cannot_be_written_beside_the_networks_is_told_once(tmp_path, capsys):
  (tmp_path / "tensorboard").write_text("")
  (tmp_path / "history.jsonl").mkdir()
  before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
  handlers = list(loop.log.handlers)
  assert Run(tmp_path)().finished
  text = (tmp_path / "log.txt").read_text()
  assert (
    text.count("tensorboard (") == 1
    and text.count("history.jsonl (") == 1
    and "the run goes on without it" in text
  )
  assert loop.log.handlers == handlers
  assert not before or len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize(
  "line",
  [
    "",
    "[]",
    "3",
    "null",
    '{"train/loss": 1}',
    '{"step": "x"}',
    '{"step": 4, "train/loss": [1]}',
    '{"st',
    "\x00",
  ],
)
def test_damaged_lines_of_the_history_are_left_out(tmp_path, line):
  records = Records(tmp_path)
  records.scalars(2, {"train/loss": 1.0})
  with records.history_path.open("ab") as file:
    file.write(line.encode() + b"\xff\n")
  records.scalars(4, {"train/loss": 2.0})
  assert records.history() == {"train/loss": [(2, 1.0), (4, 2.0)]}
  records.close()


def test_a_full_disk_costs_a_save_not_the_run(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  manager = checkpoints._managers["last"]
  save = manager.save

  def full(step, **options):
    if step in (8, 9, 10):
      raise OSError(28, "No space left on device")
    return save(step, **options)

  monkeypatch.setattr(manager, "save", full)
  assert Run(tmp_path)(checkpoints=checkpoints).finished
  assert list(checkpoints.failed) == ["last"] and "No space left" in checkpoints.failed["last"]
  assert "could not save" in (tmp_path / "log.txt").read_text()
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).step() == 6


def test_a_save_cut_short_leaves_the_older_checkpoint(tmp_path):
  Run(tmp_path)()
  last = tmp_path / "checkpoints" / "last"
  (last / "11.orbax-checkpoint-tmp-0").mkdir()  # what a kill in the middle of a save leaves
  assert Checkpoints(tmp_path / "checkpoints").step() == 10
