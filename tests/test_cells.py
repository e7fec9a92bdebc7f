"""A run in the cell of a real notebook kernel: interrupted anywhere, the same cell goes on, and
nothing is left behind.
"""

import ast
import os
import re

import pytest

pytestmark = pytest.mark.slow

# Some seconds of training, and of evaluation, whose first image compiles.
BEGIN = """
import logging, signal, time
def left():
  return str([signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), logging.root.handlers,
              logging.getLogger("absl").handlers, logging.getLogger("pseudoseg_jax").handlers])
before = left()
import pseudoseg_jax
from pseudoseg_jax.data import synthetic
scenes = synthetic.SyntheticScenes(16, (32, 32), seed=0)
images, masks = [scenes.image(row) for row in range(16)], [scenes.label(row) for row in range(16)]
data = pseudoseg_jax.make_data(images[:8], masks[:8], synthetic.CLASSES.names, evaluated=(images[8:], masks[8:]))
config = pseudoseg_jax.make_config("supervised", network="tiny", crop=17, steps=400, data=None, overrides={
  "network.width": 4, "log_every_steps": 10, "eval_every_steps": 200, "checkpoint_every_steps": 400, "evaluation.pictures": 0,
  "evaluation.style": "whole"})
"""
SLOW_SET_UP = """
from pseudoseg_jax import build
def opened(*arguments, of=build.build_domains):
  build.build_domains = of
  print("opening", flush=True)
  time.sleep(5)
  return of(*arguments)
build.build_domains = opened
"""
TRAIN = "results = pseudoseg_jax.train(config, {workdir!r}, data=data)\nresults"


class Output:
  """What a cell showed: items, in order; displays that were updated in place count once."""

  def __init__(self):
    self.lines, self.displays, self.error, self.value = "", {}, "", ""

  def add(self, kind, content):
    if kind == "stream":
      self.lines += content["text"]
    elif kind in ("display_data", "update_display_data"):
      self.displays[content["transient"]["display_id"]] = content["data"]
    elif kind == "error":
      self.error = "\n".join(content["traceback"])
    elif kind == "execute_result":
      self.value = content["data"]["text/plain"]


class Notebook:
  def __init__(self, folder):
    manager = pytest.importorskip("jupyter_client.manager")
    compiled = {
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    self._manager, self._client = manager.start_new_kernel(
      kernel_name="python3", env=dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu", **compiled)
    )

  def run(self, code, *, interrupt_at=""):
    """Runs a cell, and interrupts it as a user does when a text that fits `interrupt_at`
    appears.
    """
    cell, output = self._client.execute(code), Output()
    while True:
      message = self._client.get_iopub_msg(timeout=300)
      if message["parent_header"].get("msg_id") != cell:
        continue
      kind, content = message["msg_type"], message["content"]
      output.add(kind, content)
      if interrupt_at and re.search(interrupt_at, str(content)):
        self._manager.interrupt_kernel()
        interrupt_at = ""
      if kind == "status" and content["execution_state"] == "idle":
        assert not interrupt_at, f"never came: {interrupt_at}\n{output.lines}"
        return output

  def value(self, expression):
    return ast.literal_eval(self.run(expression).value)

  def close(self):
    self._client.stop_channels()
    self._manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
  opened = Notebook(tmp_path_factory.mktemp("notebook"))
  assert not opened.run(BEGIN).error
  yield opened
  opened.close()


@pytest.fixture(scope="module")
def undisturbed(notebook, tmp_path_factory):
  """The scores of a run that nobody interrupted, after a look at what it showed."""
  shown = notebook.run(TRAIN.format(workdir=str(tmp_path_factory.mktemp("undisturbed") / "w")))
  assert not shown.error and "supervised on given (8 labeled" in shown.lines
  (display,) = shown.displays.values()
  assert (
    "step 400/400 (100%)" in display["text/plain"]
    and "mean IoU" in display["text/plain"]
    and "step 10/" not in shown.lines
  )
  assert (
    "data:image/png;base64," in display["text/html"] and "value='1.0000'" in display["text/html"]
  )
  assert shown.value.startswith("Results")
  return notebook.value("results['last'], results['best'], results['finished']")


@pytest.mark.parametrize(
  "at, ends_with",
  [
    ("opening", "stopped by SIGINT; what was saved before stays"),
    ("supervised on given", "stopped by SIGINT; what was saved before stays"),
    (r"step \d\d/400", ""),
    ("step 200: evaluating", ""),
  ],
  ids=["set-up", "compilation", "steps", "evaluation"],
)
def test_an_interrupted_cell_goes_on_when_it_is_run_again(
  at, ends_with, notebook, undisturbed, tmp_path
):
  train = TRAIN.format(workdir=str(tmp_path / "w"))
  if at == "opening":
    notebook.run(SLOW_SET_UP)
  output = notebook.run(train, interrupt_at=at)
  if ends_with:
    assert re.search(ends_with, output.error)
  else:
    assert not output.error and "by SIGINT; the same call goes on" in output.value
    assert notebook.value("results['finished'], results['stopped_by']") == (False, "SIGINT")
  assert notebook.value("before == left()")
  assert not notebook.run(train).error
  assert notebook.value("results['last'], results['best'], results['finished']") == undisturbed
  assert notebook.value("before == left()")


def test_calls_whose_value_shows_the_same_leave_their_progress_to_it(
  notebook, undisturbed, tmp_path
):
  notebook.run(TRAIN.format(workdir=str(tmp_path / "w")))
  shown = notebook.run(f"pseudoseg_jax.evaluate({str(tmp_path / 'w')!r}, data=data)")
  assert (
    "mean IoU" in shown.value
    and "mean IoU" not in shown.lines
    and "mean IoU" not in str(shown.displays)
  )
  assert notebook.value("before == left()")
