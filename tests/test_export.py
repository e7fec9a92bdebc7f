"""Trained networks as folders that go anywhere, and runs that start from them."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
from mutations import mutated

import pseudoseg_jax
from pseudoseg_jax import (
  build,
  checks,
  config as configs,
  export_model,
  main as command_line,
  nets,
  starting,
  trained as opened,
)
from pseudoseg_jax.engine import loop, mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints
from pseudoseg_jax.evaluation import report
from pseudoseg_jax.methods import table as methods_table

QUICKSTART = {
  "total_steps": 2,
  "log_every_steps": 1,
  "eval_every_steps": 2,
  "checkpoint_every_steps": 2,
  "network.width": 4,
  "views.crop_size": "33,33",
  "evaluation.batch_size": 8,
  "evaluation.pictures": 0,
  "data.num_scenes": 24,
  "data.num_labeled": 8,
  "data.num_eval_scenes": 9,
  "data.size": "40,48",
}
IMAGE = np.random.default_rng(0).integers(0, 256, (37, 51, 3), np.uint8)


def noisy(state):
  """Statistics too must differ from those of a fresh network, or losing them would not show."""
  rng = np.random.default_rng(0)

  def moved(leaf):
    noise = rng.uniform(0, 0.1, leaf.shape) if leaf.dtype == np.float32 else 0
    return jax.device_put((np.asarray(leaf) + noise).astype(leaf.dtype), leaf.sharding)

  nets_ = jax.tree.map(moved, state.nets)
  return state.replace(step=jax.device_put(np.int32(2), state.step.sharding), nets=nets_)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir as training leaves it, at step 2, without the training."""
  workdir = tmp_path_factory.mktemp("trained")
  config = configs.load("configs/quickstart.py:method=cps", QUICKSTART)
  frozen = configs.frozen(config)
  classes = build.build_classes(frozen.data)
  (workdir / "config.json").write_text(configs.to_json(config))
  (workdir / "classes.json").write_text(json.dumps(dataclasses.asdict(classes)))
  state = noisy(loop.jit_init(build.build_method(frozen, len(classes)), meshes.make_mesh(), 0))
  checkpoints = Checkpoints(workdir / "checkpoints")
  for series in ("last", "best"):
    checkpoints.save(state, series=series)
  checkpoints.close()
  entry = {"step": 2, "predictors": {"a": {"miou": 0.25}, "b": {"miou": 0.5}}}
  about = {
    "config": {"path": "", "argument": ""},
    "seed": 0,
    "method": "cps",
    "split": "8 of 24",
    "protocol": "whole",
  }
  report.write_results(workdir / "results.json", about | {"last": entry, "best": entry})
  return workdir


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
  out = tmp_path_factory.mktemp("exported") / "b"
  assert (
    export_model.main(
      [f"--workdir={trained}", f"--out={out}", "--predictor=b", "--checkpoint=last"]
    )
    == 0
  )
  return out


def started(argument, classes=None, **options):
  """A fresh state of a config, before and after what it starts from; classes: others than the
  config's.
  """
  config = configs.frozen(configs.load(f"configs/quickstart.py:{argument}", QUICKSTART | options))
  method = build.build_method(config, len(build.build_classes(config.data)))
  fresh = loop.jit_init(method, meshes.make_mesh(), 0)
  return fresh, starting.put_weights(
    fresh, *starting.starting_weights(config, classes or build.build_classes(config.data))
  )


def kernel(state, role, part):
  leaves = jax.tree.leaves(state.nets[role].params[part])
  return np.asarray(max(leaves, key=np.size))


def test_predictions_equal_those_of_the_workdir_bit_for_bit(trained, exported):
  here = pseudoseg_jax.load(trained, predictor="b", checkpoint="last")
  there = pseudoseg_jax.load(exported)
  assert there.name == "b" and there.classes == here.classes and there.protocol == here.protocol
  np.testing.assert_array_equal(there.probabilities(IMAGE), here.probabilities(IMAGE))
  np.testing.assert_array_equal(there.predict(IMAGE), here.predict(IMAGE))


def test_the_folder_says_what_it_is_and_names_no_place(trained, exported):
  assert sorted(path.name for path in exported.iterdir()) == ["config.json", "model.safetensors"]
  text = (exported / "config.json").read_text()
  about = json.loads(text)
  assert (
    about["provenance"]["step"] == 2
    and about["provenance"]["method"] == "cps"
    and about["predictor"] == "b"
  )
  assert about["provenance"]["scores"] == {"miou": 0.5}
  assert str(trained) not in text


def test_it_is_scored_as_a_workdir_is(trained, exported, tmp_path, capsys):
  moved = shutil.copytree(exported, tmp_path / "elsewhere")
  assert command_line.main(["--mode=eval", f"--workdir={moved}"]) == 0
  assert "mean IoU" in capsys.readouterr().out
  here, there = pseudoseg_jax.evaluate(trained)["b"], pseudoseg_jax.evaluate(moved)["b"]
  np.testing.assert_array_equal(here.iou, there.iou)


@pytest.mark.parametrize("source", ["trained", "exported"])
def test_a_run_starts_from_it(source, request):
  folder = request.getfixturevalue(source)
  _, state = started("method=supervised", init_from=str(folder))
  there = opened.weights_of(
    opened.open_trained(folder, meshes.make_mesh(), "best"), "b" if source == "exported" else "a"
  )
  for part in ("backbone", "head"):
    assert any(np.array_equal(kernel(state, "student", part), value) for value in there.values())


def test_a_teacher_gets_the_same_values_in_arrays_of_its_own(exported):
  _, state = started("method=mean_teacher", init_from=str(exported))
  leaves = lambda role: jax.tree.leaves((state.nets[role].params, state.nets[role].batch_stats))
  for student, teacher in zip(leaves("student"), leaves("teacher"), strict=True):
    np.testing.assert_array_equal(student, teacher)
    apart = {
      shard.data.unsafe_buffer_pointer()
      for array in (student, teacher)
      for shard in array.addressable_shards
    }
    assert len(apart) == 2 * len(student.addressable_shards)


def test_heads_that_are_born_apart_stay_apart(exported, caplog):
  caplog.set_level("INFO")
  fresh, state = started("method=cps", init_from=str(exported))
  assert "the backbone alone" in caplog.text
  np.testing.assert_array_equal(kernel(state, "a", "backbone"), kernel(state, "b", "backbone"))
  assert not np.array_equal(kernel(state, "a", "backbone"), kernel(fresh, "a", "backbone"))
  for role in ("a", "b"):
    np.testing.assert_array_equal(kernel(state, role, "head"), kernel(fresh, role, "head"))


@pytest.mark.slow
def test_training_from_it_begins_there_and_goes_on_without_it(exported, tmp_path):
  source = shutil.copytree(exported, tmp_path / "source")
  overrides = QUICKSTART | {"init_from": str(source), "optimizer.learning_rate": 1e-12}
  pseudoseg_jax.train("configs/quickstart.py:method=supervised", tmp_path / "w", overrides)
  assert (tmp_path / "w" / "log.txt").read_text().count(f"weights of {source}") == 1
  got = opened.weights_of(
    opened.open_trained(tmp_path / "w", meshes.make_mesh(), "last"), "student"
  )
  want = opened.weights_of(opened.open_trained(source, meshes.make_mesh(), "last"), "b")
  for key, value in want.items():
    if key.startswith("params"):
      np.testing.assert_allclose(got[key], value, atol=1e-7)
  shutil.rmtree(source)
  pseudoseg_jax.train("configs/quickstart.py:method=supervised", tmp_path / "w", overrides)
  text = (tmp_path / "w" / "log.txt").read_text()
  assert "resumed" in text and text.count("weights of") == 1


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"init_from": "/nowhere"}, ["/nowhere", "config.json"]),
    ({"network.pretrained": "/nowhere/r50.pth"}, ["/nowhere/r50.pth"]),
    ({"network.pretrained": "a", "init_from": "b"}, ["config.init_from", "keep one"]),
  ],
)
def test_a_start_that_is_not_there_is_told_before_the_workdir_is_taken(
  options, said, tmp_path, capsys
):
  flags = [f"--config.{key}={value}" for key, value in (QUICKSTART | options).items()]
  assert (
    command_line.main(["--config=configs/quickstart.py", f"--workdir={tmp_path}/w", *flags]) == 2
  )
  error = capsys.readouterr().err
  assert all(part in error for part in said), error
  assert not (tmp_path / "w").exists()


def test_export_errors(trained, tmp_path, capsys):
  assert export_model.main([f"--workdir={tmp_path}", f"--out={tmp_path}/out"]) == 2
  assert export_model.main([f"--workdir={trained}", f"--out={tmp_path}/out", "--predictor=c"]) == 2
  assert "'c'" in capsys.readouterr().err
  with pytest.raises(checks.InputError, match="is a workdir"):
    pseudoseg_jax.export(trained, trained)


def test_a_damaged_folder_is_named(exported, tmp_path):
  damaged = shutil.copytree(exported, tmp_path / "damaged")
  (damaged / "config.json").write_text("{")
  with pytest.raises(checks.InputError, match="config.json"):
    pseudoseg_jax.load(damaged)


@pytest.mark.parametrize("name", sorted(methods_table.METHODS))
def test_predictors_that_are_named_as_networks_are_these_networks(name):
  """What export relies on: such a predictor is the plain network, without anything that the method
  adds.
  """
  config = configs.load("configs/quickstart.py", QUICKSTART)
  config.method = configs.method(name)
  config = configs.frozen(config)
  network, method = build.build_network(config, 3), build.build_method(config, 3)
  state = jax.eval_shape(method.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((1, 33, 33, 3), np.float32)
  # Those are not exported.
  plain = {name for name, predict in method.predictors.items() if not predict.weak_label}
  for role in plain & state.nets.keys():
    alone = jax.make_jaxpr(
      lambda state, images, role=role: nets.infer(network, state.nets[role], images)
    )(state, images)
    assert str(jax.make_jaxpr(method.predictors[role])(state, images)) == str(alone)


def test_the_classifier_of_classes_in_another_order_is_not_taken(exported, caplog):
  known = build.build_classes(configs.frozen(configs.load("configs/quickstart.py")).data)
  swapped = dataclasses.replace(
    known, names=(known.names[0], known.names[2], known.names[1], *known.names[3:])
  )
  option = {"init_from": str(exported)}
  fresh, same = started("method=supervised", **option)
  _, other = started("method=supervised", classes=swapped, **option)
  leaves = lambda state: jax.tree_util.tree_leaves_with_path(state.nets["student"].params)
  classifier = lambda state: [
    leaf for path, leaf in leaves(state) if "classifier" in jax.tree_util.keystr(path)
  ]
  for before, taken, left in zip(
    classifier(fresh), classifier(same), classifier(other), strict=True
  ):
    assert not np.array_equal(before, taken)
    np.testing.assert_array_equal(before, left)
  np.testing.assert_array_equal(
    kernel(same, "student", "backbone"), kernel(other, "student", "backbone")
  )
  assert (
    "the same names in another order" in caplog.text
    and "its classifier is not taken" in caplog.text
  )


def test_no_exported_config_that_anybody_edited_is_a_traceback(exported, tmp_path):
  out = tmp_path / "edited"
  shutil.copytree(exported, out)
  rng = random.Random(0)
  content = json.loads((out / "config.json").read_text())
  refused = 0
  for _ in range(60):
    (out / "config.json").write_text(json.dumps(mutated(content, rng)))
    try:
      opened.open_trained(out, meshes.make_mesh(jax.devices()[:1]), "best")
    except checks.InputError:
      refused += 1
  assert refused > 20
