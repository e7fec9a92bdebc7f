"""Checkpoints under faults: what is restored is what was saved, or an older one and told; nobody
waits for a failed save.
"""

import errno
import json
import logging
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from pseudoseg_jax import checks
from pseudoseg_jax.contract import NetState, State
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints, NonFiniteState

ROOT = pathlib.Path(__file__).parents[1]
TX = optax.sgd(0.1, momentum=0.9)


def make_state(step, width=48):
  key = jax.random.key(step)
  params = {
    "conv": {"kernel": jax.random.normal(key, (3, width, width))},
    "scale": jnp.ones(width, jnp.bfloat16),
  }
  net = NetState.create(
    apply_fn=None, params=params, tx=TX, batch_stats={"mean": jax.random.normal(key, (width,))}
  )
  memory = {"seen": jax.random.uniform(key, (8, 5), jnp.float16), "count": jnp.arange(3)}
  return State(
    jnp.asarray(step, jnp.int32), {"net": net.replace(step=jnp.asarray(step, jnp.int32))}, memory
  )


LIKE = jax.eval_shape(lambda: make_state(0))


def change(state, path, value):
  """The state with the first number of a leaf replaced."""

  def one(where, leaf):
    chosen = jax.tree_util.keystr(where, simple=True, separator="/") == path
    return leaf.reshape(-1).at[0].set(value).reshape(leaf.shape) if chosen else leaf

  return jax.tree_util.tree_map_with_path(one, state)


def assert_is(restored, step, memory=True):
  saved = make_state(step) if memory else make_state(step).replace(memory={})
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
    assert isinstance(ours, jax.Array) and ours.dtype == theirs.dtype
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def saved(folder, *steps, notes=True, **options):
  checkpoints = Checkpoints(folder, **options)
  for step in steps:
    checkpoints.save(
      make_state(step),
      note={"score": step / 8, "names": {"2": 1, "10": [None, "x"]}} if notes else None,
    )
  checkpoints.close()
  assert not checkpoints.failed
  return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Two whole steps, 1 and 2."""
  return saved(tmp_path_factory.mktemp("whole"), 1, 2)


@pytest.fixture
def folder(whole, tmp_path):
  """A copy of them, to be damaged."""
  shutil.copytree(whole, tmp_path / "checkpoints")
  return tmp_path / "checkpoints"


def kept(folder, series="last"):
  """What a series holds, but for what failed saves leave until the next one."""
  return sorted(path.name for path in (folder / series).iterdir() if not path.name.endswith("-tmp"))


def largest(path):
  return max(
    (file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
  )


def flip(file, position, bit=0):
  content = bytearray(file.read_bytes())
  content[position] ^= 1 << bit
  file.write_bytes(content)


# --- what is saved, and kept ----------------------------------------------------------------------


@pytest.mark.parametrize(
  "keep_last, expected", [(1, ["2", "3"]), (2, ["2", "3"]), (3, ["1", "2", "3"])]
)
def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path, keep_last, expected):
  assert kept(saved(tmp_path, 1, 2, 3, keep_last=keep_last)) == expected
  checkpoints = Checkpoints(tmp_path, read_only=True)
  assert (
    checkpoints.step() == 3 and checkpoints.step("best") is None and checkpoints.note("best") == {}
  )
  assert_is(checkpoints.restore(LIKE), 3)
  assert_is(checkpoints.restore(LIKE, memory=False), 3, memory=False)
  assert_is(checkpoints.restore(LIKE, step=2), 2)


def test_a_note_comes_back_as_it_was_given(whole):
  assert Checkpoints(whole, read_only=True).note() == {
    "score": 0.25,
    "names": {"2": 1, "10": [None, "x"]},
  }


def test_one_manager_saves_and_restores_in_any_order(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in range(1, 4):
    checkpoints.save(make_state(step), note={"step": step})
    assert_is(checkpoints.restore(LIKE, memory=step % 2 == 0), step, memory=step % 2 == 0)
    assert checkpoints.note() == {"step": step}
  checkpoints.close()


def test_a_step_that_is_there_stays_as_it_is_unless_there_is_more_to_note(folder):
  checkpoints = Checkpoints(folder)
  checkpoints.save(change(make_state(2), "nets/net/batch_stats/mean", 7.0), note=checkpoints.note())
  checkpoints.wait()
  assert_is(Checkpoints(folder).restore(LIKE), 2)
  checkpoints.save(make_state(2), note={"score": 0.5})
  checkpoints.close()
  assert_is(Checkpoints(folder).restore(LIKE), 2)
  assert Checkpoints(folder).note() == {"score": 0.5}


def test_saving_behind_a_newer_step_sets_that_one_aside(tmp_path):
  """A run that fell back to an older `last` finds a best state between that and the best of its
  lost future.
  """
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(make_state(8), series="best", note={"score": 0.5})
  checkpoints.save(make_state(7), series="best", note={"score": 0.6})
  checkpoints.close()
  assert kept(tmp_path, "best") == ["7"] and kept(tmp_path, "damaged") == ["best-8"]
  assert Checkpoints(tmp_path).note("best") == {"score": 0.6}


@pytest.mark.parametrize(
  "path, value",
  [
    ("nets/net/params/conv/kernel", np.nan),
    ("nets/net/params/scale", np.inf),
    ("nets/net/batch_stats/mean", -np.inf),
    ("nets/net/opt_state/0/trace/conv/kernel", np.inf),
    ("memory/seen", np.nan),
  ],
)
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, path, value):
  saved(tmp_path, 1)
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(
    NonFiniteState, match=f"state of step 2 holds NaN or infinite numbers in {path}"
  ) as error:
    checkpoints.save(change(make_state(2), path, value))
  assert isinstance(error.value, FloatingPointError)
  checkpoints.close()
  assert kept(tmp_path) == ["1"] and not checkpoints.failed


def test_drop_sets_aside_what_is_ruined_in_both_series(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (3, 4):
    checkpoints.save(make_state(step))
  checkpoints.save(make_state(4), series="best", note={"score": 1})
  checkpoints.drop(4)
  assert (
    checkpoints.step() == 3 and checkpoints.step("best") is None and checkpoints.note("best") == {}
  )
  assert kept(tmp_path, "damaged") == ["best-4", "last-4"]
  checkpoints.save(make_state(4))
  checkpoints.drop(4)
  assert kept(tmp_path, "damaged") == ["best-4", "last-4", "last-4-1"]
  assert_is(checkpoints.restore(LIKE), 3)
  checkpoints.drop(9)
  checkpoints.close()
  assert kept(tmp_path) == ["3"]


# --- damage ---------------------------------------------------------------------------------------


def replace(file, old, new):
  file.write_text(file.read_text().replace(old, new, 1))


def cut(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
  "arrays cut": lambda step: cut(largest(step / "state" / "d")),
  "arrays gone": lambda step: largest(step / "state" / "d").unlink(),
  "one bit": lambda step: flip(
    largest(step / "state" / "d"), largest(step / "state" / "d").stat().st_size // 2
  ),
  "manifest": lambda step: (step / "state" / "manifest.ocdbt").write_bytes(b""),
  "metadata": lambda step: (step / "state" / "_METADATA").write_text("{"),
  "metadata of nothing": lambda step: (step / "state" / "_METADATA").write_text(
    '{"tree_metadata": {}}'
  ),
  "digests garbled": lambda step: (step / "digests" / "metadata").write_text("[3]"),
  "digests gone": lambda step: (step / "digests" / "metadata").unlink(),
  "a shape in the digests": lambda step: replace(step / "digests" / "metadata", "48", "49"),
  "no state": lambda step: shutil.rmtree(step / "state"),
  "a file for a folder": lambda step: (
    shutil.rmtree(step / "state"),
    (step / "state").write_text(""),
  ),
  "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
  "another step": lambda step: (shutil.rmtree(step), shutil.copytree(step.parent / "1", step)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_step_is_told_and_the_one_before_is_taken(folder, name, caplog, capfd):
  DAMAGE[name](folder / "last" / "2")
  checkpoints = Checkpoints(folder, read_only=True)
  assert_is(checkpoints.restore(LIKE), 1)
  assert f"checkpoint {folder}/last/2 is damaged: " in caplog.text
  with pytest.raises(checks.InputError, match="step 2: got "):
    checkpoints.restore(LIKE, step=2)
  # Whoever only reads changes nothing.
  assert kept(folder) == ["1", "2"] and not (folder / "damaged").exists()

  checkpoints = Checkpoints(folder)
  assert_is(checkpoints.restore(LIKE), 1)
  assert kept(folder) == ["1"] and kept(folder, "damaged") == ["last-2"] and checkpoints.step() == 1
  for step in (2, 3):  # the run saves that step again, and what is kept is counted as ever
    checkpoints.save(make_state(step))
  checkpoints.close()
  assert not checkpoints.failed and kept(folder) == ["2", "3"]
  assert_is(Checkpoints(folder).restore(LIKE, step=2), 2)
  assert "Traceback" not in "".join(capfd.readouterr())


def test_a_folder_that_lost_its_digests_is_read_as_one_of_before_there_were_any(folder):
  shutil.rmtree(folder / "last" / "2" / "digests")
  checkpoints = Checkpoints(folder)
  assert_is(checkpoints.restore(LIKE), 2)
  assert checkpoints.note()["score"] == 0.25


def test_where_no_step_is_sound_all_are_told_and_both_remedies_work(folder, whole):
  for step in ("1", "2"):
    DAMAGE["arrays cut"](folder / "last" / step)
  checkpoints = Checkpoints(folder)
  with pytest.raises(checks.InputError) as error:
    checkpoints.restore(LIKE)
  text = str(error.value)
  assert "step 1: got " in text and "step 2: got " in text and kept(folder) == ["1", "2"]
  move_away = re.search(
    "remedy: put back a copy of one of these folders, or move (.+) away to train from the start",
    text,
  ).group(1)
  shutil.rmtree(folder / "last" / "1")
  shutil.copytree(whole / "last" / "1", folder / "last" / "1")
  assert_is(Checkpoints(folder, read_only=True).restore(LIKE), 1)
  pathlib.Path(move_away).rename(folder / "away")
  assert Checkpoints(folder).step() is None


def test_no_bit_that_flips_is_restored(folder, caplog):
  """Of every file of the newest step, and most of them where the arrays are."""
  caplog.set_level(logging.CRITICAL)
  draw = random.Random(0)
  step = folder / "last" / "2"
  files = sorted(file for file in step.rglob("*") if file.is_file() and file.stat().st_size)
  arrays = largest(step / "state" / "d")
  fell_back = []
  for file in [*files, *[arrays] * 40]:
    content = file.read_bytes()
    flip(file, draw.randrange(len(content)), draw.randrange(8))
    checkpoints = Checkpoints(folder, read_only=True)
    restored = checkpoints.restore(LIKE)
    assert_is(restored, int(restored.step))
    assert checkpoints.note() in ({}, {"score": 0.25, "names": {"2": 1, "10": [None, "x"]}})
    fell_back.append((file == arrays, int(restored.step) == 1))
    file.write_bytes(content)
  # a bit that compression does not need may flip.
  assert sum(old for of_arrays, old in fell_back if of_arrays) >= 38
  assert_is(Checkpoints(folder, read_only=True).restore(LIKE), 2)


def test_files_cut_lost_or_filled_with_anything_end_in_the_saved_values(folder, caplog):
  caplog.set_level(logging.CRITICAL)
  draw = random.Random(1)
  step = folder / "last" / "2"
  for file in sorted(file for file in step.rglob("*") if file.is_file()):
    content = file.read_bytes()
    for damaged in (
      None,
      b"",
      content[: draw.randrange(len(content) + 1)],
      draw.randbytes(len(content)),
      b"null",
      b"{}",
    ):
      file.unlink() if damaged is None else file.write_bytes(damaged)
      checkpoints = Checkpoints(folder, read_only=True)
      memory = draw.random() < 0.5
      restored = checkpoints.restore(LIKE, memory=memory)
      assert_is(restored, int(restored.step), memory=memory)
      assert checkpoints.note().get("score", 0.25) == 0.25 and checkpoints.step() == 2
      file.write_bytes(content)


@pytest.mark.parametrize("series", ["last", "best"])
@pytest.mark.parametrize(
  "stray",
  [
    "99/",
    "99",
    "3/",
    "3",
    "007/",
    "abc",
    "abc/",
    "3.orbax-checkpoint-tmp",
    "3.orbax-checkpoint-tmp/",
    "-5/",
    "\u0663/",
  ],
)
def test_strays_beside_the_steps_hinder_nothing(folder, series, stray):
  if series == "best":
    shutil.copytree(folder / "last", folder / "best", dirs_exist_ok=True)
  path = folder / series / stray
  path.mkdir() if stray.endswith("/") else path.write_text("x")
  for checkpoints in (Checkpoints(folder, read_only=True), Checkpoints(folder)):
    assert checkpoints.step(series) == 2
    assert checkpoints.note(series)["score"] == 0.25
    assert_is(checkpoints.restore(LIKE, series=series), 2)
  for step in (3, 4):
    checkpoints.save(make_state(step), series=series)
  checkpoints.close()
  assert not checkpoints.failed and checkpoints.step(series) == 4
  assert [name for name in kept(folder, series) if re.fullmatch("[1-9]", name)] == {
    "last": ["3", "4"],
    "best": ["4"],
  }[series]
  in_the_way = {"99/", "3", "3/", "3.orbax-checkpoint-tmp"}
  assert (folder / "damaged" / f"{series}-{path.name}").exists() == (stray in in_the_way)
  assert stray in in_the_way or stray == "3.orbax-checkpoint-tmp/" or path.exists()


def test_a_stray_folder_alone_is_no_step(tmp_path):
  (tmp_path / "last" / "3").mkdir(parents=True)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.step() is None and checkpoints.note() == {}
  for step in (1, 2, 3):
    checkpoints.save(make_state(step))
  checkpoints.close()
  assert not checkpoints.failed and kept(tmp_path) == ["2", "3"]


NOTES = ["", "{", "[]", "3", "null", '"x"', "\x00", '{"score": 0.9}', '{"score": 0.25}', "[" * 5000]


@pytest.mark.parametrize("content", [*NOTES, None], ids=range(len(NOTES) + 1))
def test_a_damaged_note_is_told_and_left_out(folder, content, caplog):
  file = folder / "last" / "2" / "note" / "metadata"
  file.unlink() if content is None else file.write_text(content)
  checkpoints = Checkpoints(folder, read_only=True)
  assert checkpoints.note() == {}
  assert f"the note of checkpoint {folder}/last/2 is damaged" in caplog.text
  assert_is(checkpoints.restore(LIKE), 2)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/last", "checkpoints/best"])
@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_where_a_folder_should_be_is_an_error_whose_remedy_works(tmp_path, place, read_only):
  (tmp_path / place).parent.mkdir(exist_ok=True)
  (tmp_path / place).write_text("")
  with pytest.raises(checks.InputError, match="move away what is there"):
    Checkpoints(tmp_path / "checkpoints", read_only=read_only)
  (tmp_path / place).rename(tmp_path / "away")
  assert Checkpoints(tmp_path / "checkpoints", read_only=read_only).step() is None


def test_no_checkpoint_is_told(tmp_path):
  for read_only in (True, False):
    with pytest.raises(checks.InputError, match=f"no best checkpoint in {tmp_path}: train first"):
      Checkpoints(tmp_path, read_only=read_only).restore(LIKE, series="best")


# --- another model, older checkpoints -------------------------------------------------------------


def save_as_before(folder, *states):
  """Without digests, and without a look at what is saved."""
  with ocp.CheckpointManager(
    folder / "last", options=ocp.CheckpointManagerOptions(create=True)
  ) as manager:
    for state in states:
      items = {"state": ocp.args.StandardSave(state), "note": ocp.args.JsonSave({"score": 0.5})}
      manager.save(int(state.step), args=ocp.args.Composite(**items))
    manager.wait_until_finished()


OTHERS = {
  "nets/net/params/conv/kernel: got float32[3, 48, 48] in the checkpoint; allowed: float32[3, 40, 40]": jax.eval_shape(
    lambda: make_state(0, 40)
  ),
  "memory/more: got nothing in the checkpoint; allowed: int32[3]": LIKE.replace(
    memory=LIKE.memory | {"more": LIKE.memory["count"]}
  ),
  "memory/count: got int32[3] in the checkpoint; allowed: nothing": LIKE.replace(
    memory={"seen": LIKE.memory["seen"]}
  ),
  "memory/count: got int32[3] in the checkpoint; allowed: float32[3]": LIKE.replace(
    memory=LIKE.memory | {"count": jax.ShapeDtypeStruct((3,), jnp.float32)}
  ),
  "nets/teacher/params/conv/kernel: got nothing": LIKE.replace(
    nets=LIKE.nets | {"teacher": LIKE.nets["net"]}
  ),
}


@pytest.mark.parametrize("difference", OTHERS)
@pytest.mark.parametrize("with_digests", [True, False])
def test_a_checkpoint_of_another_model_is_no_damage(tmp_path, difference, with_digests):
  saved(tmp_path, 1, 2) if with_digests else save_as_before(tmp_path, make_state(1), make_state(2))
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(
    checks.InputError,
    match="last/2 does not fit this model; use the config that it was trained with",
  ) as error:
    checkpoints.restore(OTHERS[difference])
  assert difference in str(error.value)
  assert kept(tmp_path) == ["1", "2"] and not (tmp_path / "damaged").exists()
  if difference.startswith("memory"):  # which networks alone are read without
    assert_is(checkpoints.restore(OTHERS[difference], memory=False), 2, memory=False)


def test_checkpoints_without_digests_are_restored_and_go_on(tmp_path):
  save_as_before(tmp_path, make_state(1), make_state(2))
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.note() == {"score": 0.5}
  assert_is(checkpoints.restore(LIKE), 2)
  assert_is(checkpoints.restore(LIKE, memory=False), 2, memory=False)
  checkpoints.save(make_state(3))
  checkpoints.close()
  assert kept(tmp_path) == ["2", "3"]
  DAMAGE["one bit"](tmp_path / "last" / "3")
  assert_is(Checkpoints(tmp_path).restore(LIKE), 2)


@pytest.mark.parametrize(
  "name", ["arrays cut", "arrays gone", "manifest", "metadata", "no state", "empty"]
)
def test_damage_that_shows_without_digests_falls_back_too(tmp_path, name):
  save_as_before(tmp_path, make_state(1), make_state(2))
  DAMAGE[name](tmp_path / "last" / "2")
  assert_is(Checkpoints(tmp_path).restore(LIKE), 1)


def test_a_ruined_state_that_an_older_release_saved_is_gone_back_from(tmp_path, caplog):
  save_as_before(
    tmp_path, make_state(1), change(make_state(2), "nets/net/params/conv/kernel", np.nan)
  )
  assert_is(Checkpoints(tmp_path).restore(LIKE), 1)
  assert "it holds NaN or infinite numbers in nets/net/params/conv/kernel" in caplog.text


# --- several devices and processes ----------------------------------------------------------------


def placed(state, devices):
  """A state on the first devices, the memory's `seen` split over them."""
  mesh = meshes.make_mesh(jax.devices()[:devices])
  whole, parts = meshes.replicated(mesh), meshes.split(mesh)
  shardings = State(whole, whole, {"seen": parts, "count": whole})

  def place(sharding, part):
    if isinstance(jax.tree.leaves(part)[0], jax.ShapeDtypeStruct):
      return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
      )
    return jax.device_put(part, sharding)

  return jax.tree.map(place, shardings, state)


@pytest.mark.parametrize("before, after", [(8, 1), (1, 8), (8, 2)])
def test_digests_hold_on_any_number_of_devices(tmp_path, before, after):
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(placed(make_state(step), before))
  checkpoints.close()
  restored = Checkpoints(tmp_path, read_only=True).restore(placed(LIKE, after))
  assert_is(restored, 2)
  assert len(restored.memory["seen"].sharding.device_set) == after
  content = json.loads((tmp_path / "last" / "2" / "digests" / "metadata").read_text())["leaves"]
  saved(tmp_path / "one", 2)
  assert (
    content
    == json.loads((tmp_path / "one" / "last" / "2" / "digests" / "metadata").read_text())["leaves"]
  )


PROCESS = """
import pathlib, sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.experimental import multihost_utils
sys.path[:0] = [sys.argv[3]]
import test_checkpoints as test
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints, NonFiniteState

folder = pathlib.Path(sys.argv[4])
mesh = meshes.make_mesh()
whole, parts = meshes.replicated(mesh), meshes.split(mesh)

def put(state):
  def on(sharding, leaf):
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: jax.device_get(leaf)[index])

  memory = {"seen": on(parts, state.memory["seen"]), "count": on(whole, state.memory["count"])}
  return jax.tree.map(lambda leaf: on(whole, leaf), state.replace(memory={})).replace(memory=memory)

checkpoints = Checkpoints(folder)
for step in (1, 2, 3):
  checkpoints.save(put(test.make_state(step)))
checkpoints.wait()
assert not checkpoints.failed and checkpoints.step() == 3
try:
  checkpoints.save(put(test.change(test.make_state(4), "memory/seen", float("nan"))))  # in the rows of process 0
  raise SystemExit("saved")
except NonFiniteState:
  pass
if jax.process_index() == 0:
  test.DAMAGE["one bit"](folder / "last" / "3")
multihost_utils.sync_global_devices("damaged")
like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), put(test.make_state(0)))
restored = checkpoints.restore(like)
assert int(restored.step) == 2
checkpoints.save(put(test.make_state(3)))
checkpoints.drop(3)
assert checkpoints.step() == 2
checkpoints.close()
print("done", flush=True)
"""


@pytest.mark.slow
def test_two_processes_save_check_and_fall_back_together(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        "-c",
        PROCESS,
        str(port),
        str(index),
        str(ROOT / "tests"),
        str(tmp_path / "c"),
      ],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert kept(tmp_path / "c", "damaged") == ["last-3", "last-3-1"]
  assert_is(Checkpoints(tmp_path / "c").restore(LIKE), 2)  # in one process, on one device


# --- saves that fail ------------------------------------------------------------------------------


def test_a_save_that_fails_in_the_background_is_booked_under_its_own_step(
  tmp_path, monkeypatch, caplog
):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(make_state(1))
  checkpoints.wait()

  async def full(handler, content, directory):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
    checkpoints.save(make_state(2))
    assert not checkpoints.failed
  begun = time.monotonic()
  checkpoints.save(make_state(3))  # finds it out, and is not taken along
  checkpoints.wait()
  assert not checkpoints.failed and kept(tmp_path) == ["1", "3"]
  message = next(
    record.getMessage() for record in caplog.records if record.levelno == logging.ERROR
  )
  free = shutil.disk_usage(tmp_path).free / 1e6
  assert (
    f"could not save the last checkpoint of step 2 in {tmp_path}/last: No space left on device: "
    in message
  )
  assert (
    abs(float(re.search(r"([\d.]+) MB are free", message).group(1)) - free) < 1000
    and "a state takes 0.1 MB" in message
  )
  assert "free some space: the run goes on, and its next save tries again" in message
  with monkeypatch.context() as patch:
    patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
    checkpoints.save(make_state(4), series="best")
    checkpoints.save(make_state(4))
    checkpoints.close()
  assert {series: text.split(":")[0] for series, text in checkpoints.failed.items()} == {
    "last": "step 4",
    "best": "step 4",
  }
  assert kept(tmp_path) == ["1", "3"] and kept(tmp_path, "best") == []
  assert time.monotonic() - begun < 10


@pytest.fixture
def small_disk(tmp_path):
  """A real file system of 2 MB."""
  path = tmp_path / "disk"
  path.mkdir()
  mounted = shutil.which("mount") and subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=2m", "none", path], capture_output=True
  )
  if not mounted or mounted.returncode:
    pytest.skip("only root may mount")
  yield path
  subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_costs_the_saves_until_there_is_space_again(small_disk):
  checkpoints = Checkpoints(small_disk / "checkpoints")
  checkpoints.save(make_state(1))
  checkpoints.wait()
  with (
    (small_disk / "other").open("wb", buffering=0) as file,
    pytest.raises(OSError, match="No space left"),
  ):
    while True:
      file.write(bytes(4096))
  for step in (2, 3):
    checkpoints.save(make_state(step))
    checkpoints.wait()
    assert checkpoints.failed["last"].startswith(f"step {step}: No space left on device: ")
    assert checkpoints.step() == 1 and kept(small_disk / "checkpoints") == ["1"]
  assert_is(checkpoints.restore(LIKE), 1)
  (small_disk / "other").unlink()  # the remedy
  checkpoints.save(make_state(4))
  checkpoints.close()
  assert not checkpoints.failed and kept(small_disk / "checkpoints") == ["1", "4"]


def test_a_workdir_that_is_removed_is_told_and_not_made_anew(tmp_path):
  workdir = tmp_path / "workdir"
  checkpoints = Checkpoints(workdir / "checkpoints")
  checkpoints.save(make_state(1))
  checkpoints.wait()
  assert not checkpoints.removed()
  workdir.rename(tmp_path / "elsewhere")
  for series in ("last", "best"):
    checkpoints.save(make_state(2), series=series)
    cause = f"{workdir}/checkpoints/{series} was removed or replaced while the run was going on"
    assert checkpoints.failed[series] == f"step 2: {cause}"
  assert checkpoints.removed() and not workdir.exists()
  workdir.mkdir()
  (workdir / "checkpoints").write_text("")  # and now something else has its place
  checkpoints.save(make_state(3))
  checkpoints.wait()
  assert checkpoints.failed["last"].startswith("step 3: ") and checkpoints.step() is None
  shutil.rmtree(workdir)
  (tmp_path / "elsewhere").rename(workdir)  # the remedy
  checkpoints.save(make_state(4))
  checkpoints.close()
  assert list(checkpoints.failed) == ["best"] and kept(workdir / "checkpoints") == ["1", "4"]


def test_a_workdir_removed_while_a_state_is_written_stays_removed(tmp_path):
  workdir = tmp_path / "workdir"
  for trial in range(5):
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(make_state(1))
    workdir.rename(tmp_path / f"elsewhere{trial}")
    checkpoints.wait()
    checkpoints.save(make_state(2))
    checkpoints.close()
    assert (
      checkpoints.failed["last"].startswith("step 2: ")
      and "was removed or replaced" in checkpoints.failed["last"]
    )
    whole = workdir / "checkpoints" / "last" / "1"  # all of it was written after the removal
    assert not workdir.exists() or list(workdir.rglob("last/*")) == [whole]
    shutil.rmtree(workdir, ignore_errors=True)


FAILURES = """
import os, pathlib, resource, shutil, sys, threading, time
sys.path[:0] = [sys.argv[1]]
import test_checkpoints as test
from pseudoseg_jax.engine.checkpoints import Checkpoints

root = pathlib.Path(sys.argv[2])
state = [test.make_state(step) for step in range(6)]

two = [Checkpoints(root / "two"), Checkpoints(root / "two")]  # each takes the other's half-written step for its own
for step in (1, 2, 3):
  for checkpoints in two:
    checkpoints.save(state[step])
told = [checkpoints.close() or checkpoints.failed for checkpoints in two]

replaced = Checkpoints(root / "replaced")
replaced.save(state[1])
replaced.wait()
shutil.rmtree(root / "replaced" / "last")
(root / "replaced" / "last").write_text("")
replaced.save(state[2])
assert "removed or replaced" in replaced.failed["last"]

background = Checkpoints(root / "background")
background.save(state[1])
background.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # every file fails that is longer
background.save(state[2])
background.wait()
assert background.failed["last"].startswith("step 2: "), background.failed
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
background.save(state[3])  # neither waited for nor closed
print(time.time(), flush=True)
"""


# Another process, which knows no other way, saves what is compared.
@pytest.mark.optimized
def test_a_process_ends_after_failed_saves(tmp_path):
  command = [sys.executable, "-c", FAILURES, str(ROOT / "tests"), str(tmp_path)]
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    output, errors = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0, errors
  assert time.time() - float(output) < 5  # after its last line
  assert "Traceback" not in errors, errors
  assert "could not save the last checkpoint of step 2" in errors
  restored = Checkpoints(tmp_path / "background").restore(LIKE)
  assert_is(restored, int(restored.step))
