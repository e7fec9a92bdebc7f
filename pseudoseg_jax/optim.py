"""Optimizers with rules by parameter path.

Their learning rate and weight decay depend on a parameter's path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import jax
import optax

from pseudoseg_jax.contract import Optimizer, PyTree


def path_name(path) -> str:
  """Writes a tree path as text.

  (DictKey("backbone"), DictKey("kernel")) -> "backbone/kernel".
  """
  return "/".join(
    str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
  )


def by_path(rule: Callable[[str], object], params: PyTree) -> PyTree:
  """Builds a tree like `params` whose leaves a rule gives by their paths.

  A leaf is rule("backbone/conv1/kernel").
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: rule(path_name(path)), params)


def decays(path: str, scope: str) -> bool:
  """Tells whether weight decay acts on this parameter.

  Args:
    scope: "kernels" (no batch norm, no bias; CPS) or "all" (PixelSSL, UniMatch).
  """
  return scope == "all" or path.endswith("kernel")


def multiplier_table(factors: Mapping[str, float]) -> Callable[[str], float]:
  """Builds a function from parameter path to learning-rate factor.

  The table is like {"^backbone": 0.1}; the first pattern found wins, else the factor is 1.
  """

  def multiplier(path: str) -> float:
    return next((factor for pattern, factor in factors.items() if re.search(pattern, path)), 1.0)

  return multiplier


def freeze(optimizer: Optimizer, pattern: str) -> Optimizer:
  """Returns the optimizer with the parameters that `pattern` finds at rest.

  The pattern is searched in a parameter's path. Such a parameter has no rate, hence no gradient,
  and no state.
  """

  def frozen(path: str) -> bool:
    return re.search(pattern, path) is not None

  transform = optax.masked(
    optimizer.transform, lambda params: by_path(lambda path: not frozen(path), params)
  )
  return Optimizer(
    transform,
    optimizer.learning_rate,
    lambda path: 0.0 if frozen(path) else optimizer.multiplier(path),
  )


def clip(optimizer: Optimizer, norm: float) -> Optimizer:
  """Returns the optimizer with gradients clipped by their global norm.

  Gradients whose global norm is above `norm` are scaled down to it, before all else.

  Its state is that of the optimizer (optax.chain would nest it), so that a run can be resumed with
  another norm, or with none.
  """
  clipping, inner = optax.clip_by_global_norm(norm), optimizer.transform

  def update(gradients, state, params=None):
    gradients, _ = clipping.update(gradients, optax.EmptyState())
    return inner.update(gradients, state, params)

  return optimizer._replace(transform=optax.GradientTransformation(inner.init, update))


def sgd(
  learning_rate: Callable,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  decay_scope: str = "kernels",
  factors=None,
) -> Optimizer:
  """Builds PyTorch's SGD.

  Weight decay is added to the gradient, before momentum. There is no dampening and no Nesterov
  momentum.
  """
  transform = optax.chain(
    optax.add_decayed_weights(
      weight_decay, mask=lambda params: by_path(lambda path: decays(path, decay_scope), params)
    ),
    optax.trace(decay=momentum),
  )
  return Optimizer(transform, learning_rate, multiplier_table(factors or {}))


def adamw(
  learning_rate: Callable,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  weight_decay: float = 0.0,
  decay_scope: str = "kernels",
  factors=None,
) -> Optimizer:
  """Builds AdamW: decoupled weight decay, scaled by the learning rate."""
  transform = optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2),
    optax.add_decayed_weights(
      weight_decay, mask=lambda params: by_path(lambda path: decays(path, decay_scope), params)
    ),
  )
  return Optimizer(transform, learning_rate, multiplier_table(factors or {}))
