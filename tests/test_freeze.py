"""network.freeze: what is frozen does not move, has no gradient computed and no optimizer state."""

import functools
import re

import jax
import numpy as np
import optax
import pytest

from pseudoseg_jax import api, build, checks, config as configs, nets, optim
from pseudoseg_jax.config import defaults_of
from pseudoseg_jax.contract import Task
from pseudoseg_jax.methods.table import METHODS
from pseudoseg_jax.models.table import FROZEN, NETWORKS, make_network
from pseudoseg_jax.ops import losses, schedules

K, SIZE = 3, 17


def make_method(name, freeze, optimizer=optim.sgd):
  network = make_network("tiny", num_classes=K, width=4, freeze=freeze)
  rate = functools.partial(schedules.poly, base=0.05, total_steps=10)
  descent = optimizer(rate, weight_decay=1e-2, decay_scope="all")
  if FROZEN[freeze]:
    descent = optim.freeze(descent, FROZEN[freeze])
  return METHODS[name](
    Task(K, 10, network, descent, losses.cross_entropy_mean), **defaults_of(METHODS[name])
  )


def make_batch():
  rng = np.random.default_rng(0)
  images = lambda: rng.normal(size=(8, SIZE, SIZE, 3)).astype(np.float32)
  valid = np.ones((8, SIZE, SIZE), bool)
  labeled = {
    "image": images(),
    "label": rng.integers(0, K, (8, SIZE, SIZE)).astype(np.int32),
    "valid": valid,
  }
  return {"labeled": labeled, "unlabeled": {"weak": images(), "valid": valid}}


def run(method, steps=3):
  batch, update = (
    make_batch(),
    jax.jit(lambda state, draws, batch: method.update(state, batch, draws)[0]),
  )
  state = before = method.init(jax.random.key(1))
  for index in range(steps):
    state = update(state, method.draw(jax.random.key(index), batch), batch)
  return jax.device_get(before), jax.device_get(state)


def leaves(tree):
  return {
    optim.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


@pytest.mark.parametrize(
  "name, freeze", [("mean_teacher", "encoder"), ("cps", "batch_norm"), ("supervised", "encoder")]
)
def test_what_is_frozen_stays_and_the_rest_learns(name, freeze):
  before, after = run(make_method(name, freeze))
  assert before.nets.keys() == after.nets.keys()
  for role in before.nets:
    old, new = leaves(before.nets[role].params), leaves(after.nets[role].params)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert moved == {
      path
      for path in old
      if freeze == "batch_norm" and path.endswith("kernel") or path.startswith("head/")
    }
    old, new = leaves(before.nets[role].batch_stats), leaves(after.nets[role].batch_stats)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert moved == {path for path in old if path.startswith("head/")}
    state = leaves(after.nets[role].opt_state)
    assert not [
      path
      for path in state
      if "backbone" in path and (freeze == "encoder" or path.endswith(("scale", "bias")))
    ]
    assert role == "teacher" or [path for path in state if "head" in path]


@pytest.mark.slow
def test_the_head_moves_as_on_an_encoder_that_is_no_part_of_the_gradient():
  optimizer = optim.adamw
  method = make_method("supervised", "encoder", optimizer)
  before, after = run(method, steps=1)
  net, batch = before.nets["student"], make_batch()["labeled"]
  network = make_network("tiny", num_classes=K, width=4)
  maps = nets.infer_maps(network, net, batch["image"])

  def loss(head):
    scores, _ = network.decode(net.params | {"head": head}, net.batch_stats, maps, train=True)
    return losses.cross_entropy_mean(network.upsample(scores, (SIZE, SIZE)), batch["label"])

  of_head = optimizer(lambda step: 0.05, weight_decay=1e-2, decay_scope="all").transform
  head = net.params["head"]
  direction, _ = of_head.update(jax.grad(loss)(head), of_head.init(head), head)
  expected = optax.apply_updates(head, jax.tree.map(lambda way: -0.05 * way, direction))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    after.nets["student"].params["head"],
    expected,
  )


def test_no_backward_pass_runs_through_a_frozen_encoder():
  def flops(freeze):
    method, batch = make_method("supervised", freeze), make_batch()
    state = jax.eval_shape(method.init, jax.random.key(0))
    draws = jax.eval_shape(lambda: method.draw(jax.random.key(0), batch))
    return jax.jit(method.update).lower(state, batch, draws).cost_analysis()["flops"]

  network = make_network("tiny", num_classes=K, width=4)
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  encode = jax.jit(functools.partial(network.encode, train=False))
  forward = encode.lower(params, batch_stats, make_batch()["labeled"]["image"]).cost_analysis()[
    "flops"
  ]
  # The backward pass of a convolution is two of its size; that by the images is not made for the
  # first one, nor are all others one.
  assert flops("none") - flops("encoder") > 1.3 * forward


@pytest.mark.parametrize("name", NETWORKS)
def test_only_pretrained_parts_are_frozen(name):
  shapes = jax.eval_shape(make_network(name, num_classes=K).init, jax.random.key(0))
  frozen = jax.eval_shape(
    make_network(name, num_classes=K, freeze="encoder").init, jax.random.key(0)
  )
  assert shapes == frozen  # checkpoints of the one are those of the other
  fixed = optim.freeze(optim.sgd(lambda step: 1.0), FROZEN["encoder"])
  paths = leaves(shapes[0])
  learning = {path for path in paths if fixed.multiplier(path)}
  assert learning == {path for path in paths if path.startswith(("head/", "backbone/psp/"))}
  of_batch_norm = optim.freeze(optim.sgd(lambda step: 1.0), FROZEN["batch_norm"])
  normed = {f"backbone/{path.rpartition('/')[0]}" for path in leaves(shapes[1]["backbone"])}
  still = {path for path in paths if not of_batch_norm.multiplier(path)}
  assert still == {path for path in paths if path.rpartition("/")[0] in normed} - learning


def test_a_config_builds_it_and_refuses_a_frozen_encoder_that_knows_nothing(tmp_path):
  config = configs.make_config("supervised", network="tiny")
  config.network.freeze = "encoder"
  optimizer = build.build_optimizer(configs.frozen(config))
  assert optimizer.multiplier("backbone/stem/conv/kernel") == 0
  with pytest.raises(
    checks.InputError,
    match="config.network.freeze: got 'encoder' with random weights.*pretrained=imagenet",
  ):
    build.check_run(configs.frozen(config))
  config.network.freeze = "all"
  with pytest.raises(checks.InputError, match="network.freeze.*allowed: batch_norm, encoder, none"):
    configs.frozen(config)


def test_saved_configs_without_the_option_are_read_with_its_default():
  config = configs.make_config("supervised", network="tiny")
  content = config.to_dict()
  del content["network"]["freeze"]
  assert configs.from_saved(content).network.freeze == "none"


def test_how_much_stays_is_told(tmp_path):
  small = {
    "network.width": 4,
    "network.freeze": "batch_norm",
    "total_steps": 1,
    "batch_size_global.labeled": 8,
    "evaluation.pictures": 0,
    "data.num_eval_scenes": 8,
  }
  api.train("configs/quickstart.py:method=supervised", tmp_path / "run", small)
  told = re.search(
    r"network tiny: ([\d,]+) parameters; ([\d,]+) of them stay",
    (tmp_path / "run" / "log.txt").read_text(),
  )
  network = make_network("tiny", num_classes=7, width=4, freeze="batch_norm")
  sizes = {path: leaf.size for path, leaf in leaves(network.init(jax.random.key(0))[0]).items()}
  stay = sum(size for path, size in sizes.items() if re.search(FROZEN["batch_norm"], path))
  assert [int(number.replace(",", "")) for number in told.groups()] == [
    sum(sizes.values()),
    stay,
  ] and stay > 0
