"""The loop with a method of four numbers: what it saves, when it stops and what it says."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pseudoseg_jax.contract import Method, Needs, NetState, State
from pseudoseg_jax.engine import loop
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints
from pseudoseg_jax.engine.records import Records

TX = optax.identity()


def make_method():
  """Adds the mean of the batch and a random number to its one parameter; a NaN image gives a NaN loss."""

  def init(key):
    net = NetState.create(apply_fn=None, params={"w": jnp.zeros(4) + jax.random.uniform(key)}, tx=TX, batch_stats={})
    return State(step=jnp.zeros([], jnp.int32), nets={"net": net.replace(step=jnp.zeros([], jnp.int32))})

  def update(state, batch, draws):
    net = state.nets["net"]
    loss = jnp.mean(batch["labeled"]["image"])
    after = net.replace(params={"w": net.params["w"] + loss + draws})
    return state.replace(step=state.step + 1, nets={"net": after}), {"loss": loss, "loss_other": jnp.ones([]), "kept": loss}

  return Method(Needs(unlabeled=False), init, lambda key, batch: jax.random.normal(key), update, {})


def batches(start, *, at=lambda step: None):
  step = start
  while True:
    step += 1
    value = at(step)
    yield {"labeled": {"image": np.full((8, 2, 2, 3), step if value is None else value, np.float32)}}


class Run:
  """fit() in a folder, as often as asked; counts its evaluations."""

  def __init__(self, workdir, total_steps=10, scores=lambda step: step):
    self.workdir, self.total_steps, self.scores = workdir, total_steps, scores
    self.evaluated = []

  def __call__(self, feed=batches, checkpoints=None, **options):
    def evaluate(state):
      self.evaluated.append(int(state.step))
      return loop.Scored(self.scores(int(state.step)), {})

    records = Records(self.workdir)
    checkpoints = checkpoints or Checkpoints(self.workdir / "checkpoints")
    try:
      return loop.fit(
        make_method(), mesh=meshes.make_mesh(), seed=0, total_steps=self.total_steps, batches=feed, images_per_step=8,
        every=loop.Every(log_steps=2, eval_steps=4, checkpoint_steps=3), checkpoints=checkpoints, records=records, evaluate=evaluate, **options,
      )  # fmt: skip
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
  assert sorted(path.name for path in (tmp_path / "checkpoints" / "last").iterdir() if path.name.isdigit()) == ["10", "9"]
  text = (tmp_path / "log.txt").read_text()
  assert "steps/s" in text and "images/s" in text and "input wait" in text and "left" in text
  assert list((tmp_path / "tensorboard").iterdir())


def test_history_holds_means_over_the_steps_since_the_last_line(tmp_path):
  Run(tmp_path)()
  records = Records(tmp_path)
  history = records.history()
  # The first step, compilation, is not logged; then steps 2, 3-4, 5-6, ... whose losses are the step numbers.
  assert history["train/loss"] == [(2, 2.0), (4, 3.5), (6, 5.5), (8, 7.5), (10, 9.5)]
  with records.history_path.open("a") as file:
    file.write('{"step": 10, "train/loss": 7.0}\n{"step": 12, "tra')  # told again after a resume; then cut short by a kill
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


def test_a_finished_run_only_evaluates(tmp_path):
  Run(tmp_path)()
  again = Run(tmp_path)
  assert again(lambda start: pytest.fail("no batch is needed")).finished
  assert again.evaluated == [10]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_loss_stops_the_run_and_is_never_saved(tmp_path, value):
  with pytest.raises(loop.NonFiniteLoss, match=r"step 7: loss = (nan|inf)\..* resumes at step 6") as error:
    Run(tmp_path)(lambda start: batches(start, at=lambda step: value if step == 8 else None))
  assert "loss_other" not in str(error.value)
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).step() == 6


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
