"""The toy networks on which the official training loops were recorded, and the way from PyTorch
names to our trees.
"""

from __future__ import annotations

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pseudoseg_jax.contract import Optimizer
from pseudoseg_jax.models.layers import BatchNorm

_LEAF = {"running_mean": "mean", "running_var": "var", "bias": "bias"}


def nhwc(array: np.ndarray) -> jax.Array:
  return jnp.asarray(np.moveaxis(array, 1, -1))


def from_torch(arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
  """{"bn.weight": ...} -> (params, batch_stats) in our layout."""
  params, stats = {}, {}
  for name, value in arrays.items():
    *path, leaf = name.split(".")
    if leaf == "weight":
      leaf = "kernel" if value.ndim == 4 else "scale"
    leaf = _LEAF.get(leaf, leaf)
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    (stats if leaf in ("mean", "var") else params)[(*path, leaf)] = jnp.asarray(value)
  return flax.traverse_util.unflatten_dict(params), flax.traverse_util.unflatten_dict(stats)


class Toy(nn.Module):
  """conv3x3 -> batch norm -> ReLU -> conv1x1."""

  hidden: int
  num_classes: int

  @nn.compact
  def __call__(self, x, *, train, groups=1):
    x = nn.Conv(self.hidden, (3, 3), padding=1, use_bias=False, name="conv")(x)
    x = nn.relu(BatchNorm(name="bn")(x, train=train, groups=groups))
    return nn.Conv(self.num_classes, (1, 1), name="cls")(x)


class _UniMatchBackbone(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x, *, train, groups=1):
    x = nn.Conv(self.hidden, (3, 3), padding=1, use_bias=False, name="conv1")(x)
    low = nn.relu(BatchNorm(name="bn1")(x, train=train, groups=groups))
    x = nn.Conv(2 * self.hidden, (3, 3), padding=1, use_bias=False, name="conv2")(low)
    return low, nn.relu(BatchNorm(name="bn2")(x, train=train, groups=groups))


class UniMatchToy(nn.Module):
  """The UniMatch files' network: two taps, fused."""

  hidden: int
  num_classes: int

  @nn.compact
  def __call__(self, x, *, train, groups=1):
    taps = _UniMatchBackbone(self.hidden, name="backbone")(x, train=train, groups=groups)
    x = nn.Conv(self.hidden, (3, 3), padding=1, use_bias=False, name="fuse")(
      jnp.concatenate(taps, axis=-1)
    )
    x = nn.relu(BatchNorm(name="fuse_bn")(x, train=train, groups=groups))
    return nn.Conv(self.num_classes, (1, 1), name="classifier")(x)


def recording(optimizer: Optimizer) -> Optimizer:
  """The same optimizer, whose state also keeps the gradient it was last given: opt_state[0]."""
  recorder = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda gradient, state, params=None: (gradient, gradient),
  )
  return optimizer._replace(transform=optax.chain(recorder, optimizer.transform))


def start(method, golden, prefixes: dict[str, str]):
  """The method's own initial state with the recorded weights in it; prefixes: role -> name prefix
  in the file.
  """
  state = method.init(jax.random.key(0))
  for role, prefix in prefixes.items():
    params, stats = from_torch(golden.under(prefix))
    assert jax.tree.structure(params) == jax.tree.structure(state.nets[role].params)
    state.nets[role] = state.nets[role].replace(params=params, batch_stats=stats)
  return state


def assert_tree_close(got, want, atol, what):
  assert jax.tree.structure(got) == jax.tree.structure(want), what
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=atol, err_msg=f"{what}{jax.tree_util.keystr(path)}"
    ),
    got,
    want,
  )


def assert_net(net, golden, prefix, *, params=1e-5, statistics=1e-5):
  want_params, want_stats = from_torch(golden.under(prefix))
  assert_tree_close(net.params, want_params, params, prefix)
  assert_tree_close(net.batch_stats, want_stats, statistics, prefix)


def assert_gradient(net, golden, prefix, atol=1e-5):
  assert_tree_close(net.opt_state[0], from_torch(golden.under(prefix))[0], atol, prefix)


def num_steps(golden) -> int:
  return 1 + max(
    int(name.split("/")[0][4:]) for name in golden if name.startswith("step") and "/" in name
  )


def run(method, state, batches, recorded=None):
  """Yields (state, metrics) after each step of the method, jitted once; recorded: the draws of each
  step that the file fixes.
  """
  update = jax.jit(method.update)
  for index, batch in enumerate(batches):
    draws = method.draw(jax.random.key(index), batch)
    state, metrics = update(state, batch, draws | (recorded[index] if recorded else {}))
    yield state, metrics
