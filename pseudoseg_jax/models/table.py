"""Networks by name.

A network leaves here as pure functions (contract.Network); nobody above sees a Flax module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Array, Network, PyTree
from pseudoseg_jax.models.backbones import Still
from pseudoseg_jax.models.deeplab import deeplabv3plus
from pseudoseg_jax.models.deeplab_tf import deeplabv3plus_tf
from pseudoseg_jax.models.deeplab_unimatch import deeplabv3plus_unimatch
from pseudoseg_jax.models.hrnet import hrnet
from pseudoseg_jax.models.initial import initial_values
from pseudoseg_jax.models.pspnet import Backbone as PyramidBackbone, pspnet, pspnet_pixelssl
from pseudoseg_jax.models.tiny import tiny
from pseudoseg_jax.ops import resize

# name -> factory (num_classes, *, option=default, ...) -> (backbone module, head module), and where
# it is not the align-corners one, what makes logits of scores: the first arguments of `compose`.
NETWORKS = {
  "deeplabv3plus": deeplabv3plus,
  "deeplabv3plus_tf": deeplabv3plus_tf,
  "deeplabv3plus_unimatch": deeplabv3plus_unimatch,
  "hrnet": hrnet,
  "pspnet": pspnet,
  "pspnet_pixelssl": pspnet_pixelssl,
  "tiny": tiny,
}


# What stays as it is of the encoder -> the paths of its parameters. PSPNet's pyramid ends its
# backbone, but starts as fresh as its head.
FROZEN = {
  "none": "",
  "batch_norm": r"^backbone/(?!psp/).*bn/(scale|bias)$",
  "encoder": r"^backbone/(?!psp/)",
}


def make_network(
  name: str, *, num_classes: int, in_channels: int = 3, freeze: str = "none", **options
) -> Network:
  """Builds the network `name` with its own options.

  The options are the keywords of its factory in NETWORKS. Parameters are float32 in a dict tree
  whose first level is "backbone" and "head"; logits are float32 whatever the dtype.

  Args:
    freeze: a name of FROZEN; but for "none" the encoder's batch norm runs on its stored statistics,
      which stay. That its parameters stay too is up to the optimizer: `optim.freeze` with FROZEN's
      pattern.

  Raises:
    checks.InputError: unknown name, or an option this network does not have or allow.
  """
  checks.check_name("network.name", name, NETWORKS)
  checks.check_name("network.freeze", freeze, FROZEN)
  factory = NETWORKS[name]
  known = [option for option in inspect.signature(factory).parameters if option != "num_classes"]
  for option in options:
    checks.check_name(f"option of network '{name}'", option, known)
  if in_channels < 1:
    problems = checks.Problems("the network cannot be built")
    problems.add(
      "in_channels", got=in_channels, allowed="1 or more: 1 grey, 3 color, more for other sensors"
    )
    problems.raise_if_any()
  backbone, *rest = factory(num_classes, **options)
  if freeze != "none":
    pyramid = isinstance(backbone, PyramidBackbone)
    backbone = PyramidBackbone(Still(backbone.body)) if pyramid else Still(backbone)
  return compose(backbone, *rest, in_channels=in_channels)


def compose(
  backbone: nn.Module,
  head: nn.Module,
  upsample: Callable[[Array, tuple[int, int]], Array] = resize.bilinear_align_corners,
  *,
  in_channels: int = 3,
) -> Network:
  """Makes a network of two modules.

  Their kernels are drawn by `initial_values`.

  Args:
    backbone: (images f32[B, H, W, in_channels], *, train, groups) -> tuple of maps.
    head: (maps, *, train, groups) -> scores f32[B, h, w, K].
    upsample: scores, (H, W) -> logits f32[B, H, W, K].
  """

  @jax.jit
  def init(key: Array) -> tuple[PyTree, PyTree]:
    # Shapes of parameters do not depend on the image's size; only shapes are computed here.
    def traced(images):
      maps, body = backbone.init_with_output(jax.random.key(0), images, train=False)
      return {"backbone": body, "head": head.init(jax.random.key(0), maps, train=False)}

    parts = jax.eval_shape(traced, jnp.zeros((1, 32, 32, in_channels)))
    shapes = {
      name: {part: parts[part].get(name, {}) for part in parts}
      for name in ("batch_stats", "params")
    }
    variables = initial_values(key, shapes)
    return variables["params"], variables.get("batch_stats", {})

  encode, decode = _part("backbone", backbone), _part("head", head)

  def apply(params: PyTree, batch_stats: PyTree, images: Array, **keywords) -> tuple[Array, PyTree]:
    maps, batch_stats = encode(params, batch_stats, images, **keywords)
    scores, batch_stats = decode(params, batch_stats, maps, **keywords)
    return upsample(scores, images.shape[1:3]), batch_stats

  return Network(init, apply, encode, decode, upsample, in_channels)


def _part(name: str, module: nn.Module):
  """Makes a module a pure function over the whole trees.

  The module owns the part `name` of the trees.
  """
  run = _pure(module)

  def call(params, batch_stats, x, **keywords):
    y, moved = run(params[name], batch_stats.get(name, {}), x, **keywords)
    return y, batch_stats | ({name: moved} if moved else {})

  return call


def _pure(module: nn.Module):
  def call(params, batch_stats, x, *, train: bool, groups: int = 1, dropout: Array | None = None):
    variables = {"params": params, "batch_stats": batch_stats}
    if not train:
      return module.apply(variables, x, train=False), batch_stats
    rngs = {} if dropout is None else {"dropout": dropout}
    y, moved = module.apply(
      variables, x, train=True, groups=groups, mutable=["batch_stats"], rngs=rngs
    )
    return y, moved.get("batch_stats", {})

  return call


def as_network(module: nn.Module) -> Network:
  """Makes a network of one whole module, for methods that need only logits.

  The module is (images, *, train, groups) -> logits.
  """

  @jax.jit
  def init(key: Array) -> tuple[PyTree, PyTree]:
    shapes = jax.eval_shape(
      lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    variables = initial_values(key, shapes)
    return variables["params"], variables["batch_stats"]

  return Network(init, _pure(module))
