"""The folder of a run: its lock, what may change when a run is resumed, and damage to its small
files.
"""

import json
import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from mutations import mutated

from pseudoseg_jax import checks, config as configs, workdir as workdirs
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.evaluation import report

CLASSES = {"": Classes(("background", "red", "green"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))}
DATA = {
  "": {
    "labeled": {"images": 3, "sha256": "a"},
    "unlabeled": {"images": 5, "sha256": "b"},
    "evaluated": {"images": 2, "sha256": "c"},
  }
}


def make_config(**overrides):
  config = configs.base(configs.method("mean_teacher"))
  config.data.update(configs.folder_data(root="/data", image_pattern="images/{id}.jpg"))
  configs.override(config, overrides)
  return configs.frozen(config)


@pytest.fixture
def workdir(tmp_path):
  """That of a run which is at step 500 of 1000."""
  workdirs.claim(tmp_path, make_config(), CLASSES, DATA, step=None)
  return tmp_path


def check(workdir, config=None, classes=CLASSES, data=DATA, step=500):
  return workdirs.check_claim(workdir, config or make_config(), classes, data, step=step)


def message(*args, **options):
  with pytest.raises(checks.InputError) as error:
    check(*args, **options)
  return str(error.value)


# --- what may change ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "option",
  [
    {"log_every_steps": 7},
    {"eval_every_steps": 7},
    {"checkpoint_every_steps": 7},
    {"keep_last_checkpoints": 7},
    {"evaluation.pictures": 0},
    {"evaluation.batch_size": 1},
    {"data.skip_unreadable": "True"},
  ],
)
def test_what_changes_neither_network_nor_data_is_free(workdir, option):
  assert check(workdir, make_config(**option)) == []


@pytest.mark.parametrize(
  "option, told",
  [
    ({"total_steps": 2000}, "total_steps: 2000 now, 1000 there"),
    ({"total_steps": 500}, "the new length"),
    ({"optimizer.learning_rate": 0.001}, "optimizer.learning_rate: 0.001 now, 0.01 there"),
    ({"optimizer.momentum": 0.8}, "from here on"),
    ({"method.weight": 0.5}, "method.weight"),
    ({"evaluation.flip": "True"}, "chosen anew"),
    ({"evaluation.style": "slide"}, "chosen anew"),
    ({"evaluation.pad_multiple": 32}, "chosen anew"),
    ({"data.root": "/moved"}, "the images there are the same"),
    ({"data.split": "listed.txt"}, "the images there are the same"),
  ],
)
def test_what_a_run_can_go_on_with_is_told(workdir, option, told):
  (line,) = check(workdir, make_config(**option))
  assert told in line


@pytest.mark.parametrize(
  "option",
  [
    {"seed": 1},
    {"optimizer.name": "adamw"},
    {"views.crop_size": "33,33"},
    {"batch_size_global.labeled": 4},
    {"network.width": 4},
    {"criterion.name": "ohem"},
    {"data.label_map": "1:255"},
    {"data.exif_orientation": "ignore"},
    {"labeled_every": 2},
    {"data.image_pattern": "photos/{id}.jpg"},
  ],
)
def test_what_makes_another_run_is_refused_with_a_way_out(workdir, option):
  text = message(workdir, make_config(**option))
  assert (
    f"{next(iter(option))}: " in text
    and "another --workdir" in text
    and f"--config.init_from={workdir}" in text
  )


def test_every_option_has_an_effect_of_one_of_three_kinds():
  options = configs.all_options(make_config())
  effects = {key: workdirs._effect(key, value, value) for key, value in options.items()}
  assert all(effect is None or isinstance(effect, str) for effect in effects.values())
  assert (
    effects["method.name"] is None and effects["seed"] is None and effects["views.flip"] is None
  )


def test_a_run_is_not_made_shorter_than_it_is(workdir):
  text = message(workdir, make_config(total_steps=400))
  assert "--config.total_steps=500 or more" in text
  check(workdir, make_config(total_steps=500))


def test_without_a_checkpoint_any_config_takes_the_workdir(workdir):
  (workdir / "history.jsonl").write_text('{"step": 50, "train/loss": 1.0}\n')
  check(workdir, make_config(seed=1), step=None)
  workdirs.claim(workdir, make_config(seed=1), CLASSES, DATA, step=None)
  assert workdirs.saved_config(workdir).seed == 1
  assert not (workdir / "history.jsonl").exists() and (workdir / "history.jsonl.before").exists()


def test_classes_are_compared_by_name_and_order(workdir):
  palette = CLASSES[""].palette
  swapped = {"": Classes(("background", "green", "red"), palette)}
  assert "the same names in another order: class 1 is 'green'" in message(workdir, classes=swapped)
  assert "'red', as of the run" in message(workdir, classes=swapped)
  renamed = {"": Classes(("background", "red", "blue"), palette)}
  assert "class 2 is 'blue'" in message(workdir, classes=renamed)
  check(workdir, classes={"": Classes(CLASSES[""].names, palette[::-1])})  # colors are for display


@pytest.mark.parametrize("role", ["labeled", "unlabeled", "evaluated"])
def test_other_images_are_refused(workdir, role):
  more = {"": DATA[""] | {role: {"images": 9, "sha256": "z"}}}
  text = message(workdir, data=more)
  assert (
    f"{role} images: got 9 images, not {DATA[''][role]['images']} images" in text
    and f"{role}.txt" in text
  )
  other = {"": DATA[""] | {role: DATA[""][role] | {"sha256": "z"}}}
  assert "other ones than" in message(workdir, data=other)


# --- damage ---------------------------------------------------------------------------------------

DAMAGE = {
  "empty": "",
  "cut": '{"seed": 0, "tot',
  "of another type": "[1, 2]",
  "null": "null",
  "binary": b"\xff\xfe\x00\x01",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "classes.json", "data.json"])
def test_damaged_small_files_are_named_with_a_remedy_that_works(workdir, name, content):
  (workdir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  text = message(workdir)
  assert str(workdir / name) in text and "remove the file" in text
  (workdir / name).unlink()
  check(workdir)
  workdirs.claim(workdir, make_config(), CLASSES, DATA, step=500)
  assert json.loads((workdir / name).read_text())


def test_no_config_that_anybody_edited_is_a_traceback(workdir):
  rng = random.Random(0)
  content = json.loads((workdir / "config.json").read_text())
  refused = 0
  for _ in range(150):
    (workdir / "config.json").write_text(json.dumps(mutated(content, rng)))
    try:
      workdirs.saved_config(workdir)
    except checks.InputError:
      refused += 1
  assert refused > 50


def test_no_classes_that_anybody_edited_are_a_traceback(workdir):
  rng = random.Random(0)
  content = json.loads((workdir / "classes.json").read_text())
  for _ in range(150):
    (workdir / "classes.json").write_text(json.dumps(mutated(content, rng)))
    try:
      classes, _ = workdirs.saved_classes(workdir)
    except checks.InputError:
      continue
    assert all(isinstance(name, str) for name in classes.names)


# --- the lock -------------------------------------------------------------------------------------


def hold_lock(workdir, then="time.sleep(60)"):
  code = f"""
    import pathlib, sys, time
    from pseudoseg_jax import workdir
    with workdir.locked(pathlib.Path({str(workdir)!r})):
      print("held", flush=True)
      {then}
  """
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  return process


def test_one_run_at_a_time_writes_into_a_workdir(tmp_path):
  process = hold_lock(tmp_path / "run")
  try:
    with pytest.raises(
      checks.InputError, match=rf"held by process {process.pid} on .*, started 2"
    ) as error:
      with workdirs.locked(tmp_path / "run"):
        pass
    assert "another --workdir" in str(error.value)
  finally:
    process.kill()
    process.wait()
  with workdirs.locked(tmp_path / "run"):  # what a killed process left is taken over
    pass


def test_a_lock_that_was_left_is_taken_over_and_told(tmp_path, caplog):
  caplog.set_level("INFO")
  (tmp_path / "lock").write_text(json.dumps({"host": "far", "process": 7, "started": "2020-01-01"}))
  with workdirs.locked(tmp_path) as token:
    assert workdirs.token(tmp_path) == token
  assert "process 7 on far" in caplog.text
  (tmp_path / "lock").write_text("{")  # cut short by a full disk
  with workdirs.locked(tmp_path):
    assert "not left" not in caplog.text.partition("taken over")[2]


def test_a_lock_in_the_same_process_holds_too_and_leaves_nothing(tmp_path):
  before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
  with workdirs.locked(tmp_path / "run"):
    with pytest.raises(checks.InputError, match="held by process"):
      with workdirs.locked(tmp_path / "run"):
        pass
  assert not (tmp_path / "run").exists()
  assert before == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(checks.InputError, match="a file"):
      with workdirs.locked(path):
        pass


def test_fingerprints_know_images_and_weak_labels():
  class Source:
    def __init__(self, *ids):
      self.ids = ids

  class Data:
    labeled, unlabeled, evaluated, pseudo_labeled = Source("a"), Source("b", "c"), Source("d"), None

  found = workdirs.fingerprint(Data)
  assert {role: of["images"] for role, of in found.items()} == {
    "labeled": 1,
    "unlabeled": 2,
    "evaluated": 1,
  }
  tags = np.eye(3, dtype=np.float32)
  ours, theirs = (workdirs.fingerprint(Data, (None, array)) for array in (tags, 1 - tags))
  assert ours["weak labels"] != theirs["weak labels"] and "weak labels" not in found


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  def full(self, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("pathlib.Path.write_bytes", full)
  with pytest.raises(OSError, match="No space left on device: '.*results.json'") as error:
    report.write_atomically(tmp_path / "results.json", "{}")
  assert error.value.errno == 28 and not list(tmp_path.iterdir())
