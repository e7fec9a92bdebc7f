"""Initial values of a network, from the names and shapes of its leaves."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import traverse_util

from pseudoseg_jax import rng
from pseudoseg_jax.contract import Array, PyTree


def _cut(draws: Array, shapes: list[tuple[int, ...]]) -> list[Array]:
  ends = [0]
  for shape in shapes:
    ends.append(ends[-1] + math.prod(shape))
  return [draws[start:end].reshape(shape) for start, end, shape in zip(ends, ends[1:], shapes)]


def initial_values(key: Array, shapes: PyTree) -> PyTree:
  """Draws Kaiming normal kernels, PyTorch's biases, neutral batch norms.

  A `kernel` or `depthwise` is normal with variance 2 / fan_in (He et al. 2015). The `bias` beside a
  kernel is uniform in +-1/sqrt(fan_in), as PyTorch's; beside a `scale` it is 0. `scale` and `var`
  are 1, `mean` is 0. In modules whose name begins with "subpixel", which make four pixels of one,
  the four channels of a class start with one kernel (ICNR, Aitken et al. 2017).

  All kernels are cut from one draw. A draw apiece, which is how Flax's initializers work, takes XLA
  over ten seconds to compile for a ResNet-50; this takes two.

  Args:
    key: a random key.
    shapes: nested dict of arrays or jax.ShapeDtypeStruct, as the modules name them.

  Returns:
    A nested dict of f32 arrays.
  """
  leaves = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()}
  fan_in = {
    path[:-1]: math.prod(shape[:-1]) for path, shape in leaves.items() if path[-1] == "kernel"
  }
  kernels = [path for path in leaves if path[-1] == "kernel"]
  depthwise = [path for path in leaves if path[-1] == "depthwise"]
  biases = [path for path in leaves if path[-1] == "bias" and path[:-1] in fan_in]

  def draw(name, sample, paths):
    total = sum(math.prod(leaves[path]) for path in paths)
    # The barrier keeps XLA from redoing the whole draw inside every cut.
    draws = jax.lax.optimization_barrier(sample(rng.stream(key, name), (total,)))
    return dict(zip(paths, _cut(draws, [leaves[path] for path in paths])))

  values = {
    path: jnp.full(shape, float(path[-1] in ("scale", "var"))) for path, shape in leaves.items()
  }
  for path, value in draw("kernels", jax.random.normal, kernels).items():
    values[path] = value * (2 / fan_in[path[:-1]]) ** 0.5
    if path[-2].startswith("subpixel"):
      values[path] = jnp.repeat(values[path][..., ::4], 4, axis=-1)
  for path, value in draw("depthwise", jax.random.normal, depthwise).items():
    values[path] = value * (2 / math.prod(leaves[path][:-1])) ** 0.5
  for path, value in draw(
    "biases", lambda key, shape: jax.random.uniform(key, shape, minval=-1.0), biases
  ).items():
    values[path] = value * fan_in[path[:-1]] ** -0.5
  return traverse_util.unflatten_dict(values)
