"""Networks by name. A network leaves here as two pure functions (contract.Network); nobody above sees a Flax module."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Array, Network, PyTree
from pseudoseg_jax.models import resnet
from pseudoseg_jax.models.deeplab import DeepLabV3Plus
from pseudoseg_jax.models.initial import initial_values
from pseudoseg_jax.models.tiny import Tiny


def deeplabv3plus(
  num_classes: int, *, backbone: str = "resnet50", stem: str = "deep", output_stride: int = 16, dtype: Any = jnp.float32
) -> DeepLabV3Plus:
  """DeepLabv3+ on a ResNet; backbone, stem and output_stride: one of those in `resnet`."""
  checks.check_name("network.backbone", backbone, resnet.BLOCKS)
  checks.check_name("network.stem", stem, resnet.STEMS)
  if output_stride not in resnet.OUTPUT_STRIDES:
    problems = checks.Problems("the network cannot be built")
    problems.add("network.output_stride", got=output_stride, allowed=resnet.OUTPUT_STRIDES)
    problems.raise_if_any()
  return DeepLabV3Plus(num_classes, backbone, stem, output_stride, dtype)


def tiny(num_classes: int, *, width: int = 16, dtype: Any = jnp.float32) -> Tiny:
  """A small encoder-decoder; `width` is its number of channels at stride 2."""
  return Tiny(num_classes, width, dtype)


NETWORKS = {"deeplabv3plus": deeplabv3plus, "tiny": tiny}


def make_network(name: str, *, num_classes: int, **options) -> Network:
  """The network `name` with its own options (the keywords of its factory in NETWORKS), as init and apply.

  Parameters are float32 in a dict tree whose first level is "backbone" and "head"; logits are float32 whatever the dtype.

  Raises:
    checks.InputError: unknown name, or an option this network does not have or allow.
  """
  checks.check_name("network.name", name, NETWORKS)
  factory = NETWORKS[name]
  known = [option for option in inspect.signature(factory).parameters if option != "num_classes"]
  for option in options:
    checks.check_name(f"option of network '{name}'", option, known)
  return as_network(factory(num_classes, **options))


def as_network(module: nn.Module) -> Network:
  """A module (images, *, train, groups) -> logits as two pure functions; its kernels are drawn anew by `initial_values`."""

  @jax.jit
  def init(key: Array) -> tuple[PyTree, PyTree]:
    # Shapes of parameters do not depend on the image's size; only shapes are computed here.
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    variables = initial_values(key, shapes)
    return variables["params"], variables["batch_stats"]

  def apply(params: PyTree, batch_stats: PyTree, images: Array, *, train: bool, groups: int = 1) -> tuple[Array, PyTree]:
    variables = {"params": params, "batch_stats": batch_stats}
    if not train:
      return module.apply(variables, images, train=False), batch_stats
    logits, moved = module.apply(variables, images, train=True, groups=groups, mutable=["batch_stats"])
    return logits, moved["batch_stats"]

  return Network(init, apply)
