"""Real processes that end while images are being read: each of them is gone within seconds of its
last word.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
STARTS_WITHIN, ENDS_WITHIN = 240, 30  # seconds on a busy machine

PREPARED = """
import sys, threading, time
import numpy as np
from pseudoseg_jax import checks
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import pipeline, synthetic
from pseudoseg_jax.data.geometry import Geometry

pipeline._NUM_WORKERS, pipeline._PATIENCE_SECONDS = 8, 1.0
scenes = synthetic.SyntheticScenes(12, (32, 40))

class Source:
  ids, has_labels, channels, dtype, label, size = scenes.ids, True, 3, np.uint8, scenes.label, scenes.size

  def __init__(self, seconds, begun=lambda: None):
    self.seconds, self.begun = seconds, begun

  def __len__(self):
    return 12

  def image(self, row):
    self.begun()
    end = time.monotonic() + self.seconds
    while time.monotonic() < end:
      time.sleep(0.001)  # asks for the interpreter's lock again and again
    return scenes.image(row)

def feed_of(*arguments):
  source = Source(*arguments)
  options = dict(batch_size_labeled_global=2, batch_size_unlabeled_global=4, geometry=Geometry((24, 28)), needs=Needs())
  return pipeline.train_batches(pipeline.PipelineSpec(labeled=source, unlabeled=source, **options))
"""


def started(*command):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
  environment.pop("XLA_FLAGS", None)  # one device
  return subprocess.Popen(
    [sys.executable, *command],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@contextlib.contextmanager
def killed_after(process, seconds):
  """A process that has not done within that time what is waited for is killed, and fails the
  test.
  """
  killer = threading.Timer(seconds, process.kill)
  killer.start()
  yield
  assert killer.is_alive(), f"nothing happened within {seconds} s"
  killer.cancel()


def wait_for_line(process, line):
  """What is printed until that line."""
  printed = []
  with killed_after(process, STARTS_WITHIN):
    while not printed or printed[-1] != f"{line}\n":
      printed.append(process.stdout.readline())
      assert printed[-1], "".join(printed)
  return "".join(printed)


def ended(process, seconds):
  """(exit code, output) of a process that ends."""
  with killed_after(process, seconds):
    # Not by communicate(), which would lose what was read together with a line.
    output = process.stdout.read()
    code = process.wait()
  return code, output


@pytest.mark.slow
@pytest.mark.parametrize(
  ("last_line", "code", "says"),
  [
    ("pass", 0, ""),
    ("raise RuntimeError('of the script')", 1, "of the script"),
    ("sys.exit(3)", 3, ""),
    ("next(bad)", 1, "InputError: a bad file"),
  ],
)
def test_scripts_that_leave_feeds_open(last_line, code, says):
  script = f"""{PREPARED}
def fail():
  raise checks.InputError("a bad file")

fresh, used, bad = feed_of(0.2), feed_of(0.05), feed_of(0, fail)
next(used), next(used)
cycle = [feed_of(0.05)]  # which only the garbage collector would find
next(cycle[0])
cycle.append(cycle)
waiting = threading.Thread(target=lambda: [0 for _ in used], daemon=True)
waiting.start()
print("ready")
{last_line}
"""
  process = started("-c", script)
  wait_for_line(process, "ready")
  found, output = ended(process, ENDS_WITHIN)
  assert found == code and says in output, output
  assert "Exception ignored" not in output and "Fatal" not in output


@pytest.mark.parametrize("seconds", [2, 3600])
def test_ctrl_c_while_a_slow_file_is_waited_for(seconds):
  script = f"""{PREPARED}
reading = threading.Event()
feed = feed_of({seconds}, reading.set)
reading.wait()
print("waiting")
for _ in feed:
  pass
"""
  process = started("-c", script)
  wait_for_line(process, "waiting")
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  code, output = ended(process, ENDS_WITHIN)
  assert code == -signal.SIGINT and "KeyboardInterrupt" in output, output


@pytest.fixture
def folder(tmp_path):
  """Sixteen images: twelve labeled ones, of which i08 has a mask with a value that is no class, and
  two to evaluate on.
  """
  rng = np.random.default_rng(0)
  names = [f"i{number:02d}" for number in range(16)]
  for kind in ("images", "masks"):
    (tmp_path / kind).mkdir()
  for name in names:
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(
      tmp_path / "images" / f"{name}.jpg"
    )
    mask = rng.integers(0, 3, (40, 50)).astype(np.uint8)
    mask[3, 4] = 9 if name == "i08" else 0
    Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
  (tmp_path / "classes.txt").write_text("ground\ncat\ndog\n")
  (tmp_path / "labeled.txt").write_text("\n".join(names[:12]) + "\n")
  (tmp_path / "val.txt").write_text("\n".join(names[12:14]) + "\n")
  return tmp_path


CONFIG = "configs/folder.py:method=supervised,network=tiny,crop=33,steps=4"
OPTIONS = {
  "batch_size_global.labeled": 2,
  "batch_size_global.unlabeled": 2,
  "evaluation.pictures": 0,
}


def command(root, **options):
  options = OPTIONS | {"data.root": root} | options
  arguments = [f"--config.{name}={value}" for name, value in options.items()]
  return ["-m", "pseudoseg_jax.main", f"--config={CONFIG}", f"--workdir={root / 'run'}", *arguments]


@pytest.mark.slow
def test_bad_mask_ends_a_training_command(folder):
  code, output = ended(started(*command(folder)), STARTS_WITHIN)
  assert code == 2 and str(folder / "masks" / "i08.png") in output and "9 on 1 pixels" in output, (
    output
  )


@pytest.mark.slow
def test_bad_mask_ends_a_script_that_trains(folder):
  overrides = OPTIONS | {"data.root": str(folder)}
  script = f"""
import pseudoseg_jax
try:
  pseudoseg_jax.train({CONFIG!r}, {str(folder / "run")!r}, {overrides!r})
except ValueError as error:
  kept = error  # with all frames of the run
  print(kept)
  print("ready")
"""
  process = started("-c", script)
  assert str(folder / "masks" / "i08.png") in wait_for_line(process, "ready")
  assert ended(process, ENDS_WITHIN)[0] == 0


@pytest.mark.slow
def test_unreadable_files_do_not_end_a_training_command_that_may_skip_them(folder):
  for name in ("i03", "i15"):  # a labeled and an unlabeled one
    (folder / "images" / f"{name}.jpg").write_bytes(b"broken")
  options = {"data.skip_unreadable": True, "total_steps": 12}
  code, output = ended(started(*command(folder, **options)), STARTS_WITHIN)
  assert code == 0 and "12 labeled, 2 unlabeled" in output, output
  for path in ("images/i03.jpg", "images/i15.jpg", "masks/i08.png"):
    assert output.count(f"skipped {folder / path}") == 1, output
    assert str(folder / path) in (folder / "run" / "skipped.json").read_text()
