"""Heads that methods add to a network, as pure functions (contract.Head)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from pseudoseg_jax import rng
from pseudoseg_jax.contract import Array, Head, PyTree
from pseudoseg_jax.models.detector import FlawDetector, least_side
from pseudoseg_jax.models.initial import initial_values
from pseudoseg_jax.models.layers import BatchNorm, Conv, ConvBN, convolve
from pseudoseg_jax.models.pspnet import pixel_shuffle
from pseudoseg_jax.ops import attention, cam as cams, resize

_glorot = jax.nn.initializers.glorot_uniform()


def image_classifier(channels: int, num_classes: int) -> Head:
  """Builds a head that classifies images: spatial mean and linear layer.

  The mean is of a map f32[B, h, w, channels]. Output: logits f32[B, num_classes].
  """

  def init(key: Array) -> tuple[PyTree, PyTree]:
    # The truncated normal that TF-slim gives to its last layers. Class activation maps read the
    # kernel.
    kernel = 0.01 * jax.random.truncated_normal(key, -2, 2, (channels, num_classes))
    return {"kernel": kernel, "bias": jnp.zeros(num_classes)}, {}

  def apply(params, batch_stats, features, *, train):
    return jnp.mean(features, axis=(1, 2)) @ params["kernel"] + params["bias"], batch_stats

  return Head(init, apply)


def self_attention(
  channels: int, num_classes: int, *, attention_dim: int = 128, background: bool = True
) -> Head:
  """Builds the head of self-attention Grad-CAM.

  Class activation maps are spread to where the features are alike. [PseudoSeg, SGC]

  Inputs of `apply`: features f32[B, h, w, channels], cam f32[B, h, w, K'] in 0..1, valid bool[B, h,
  w]; the caller stops their gradients. Output: logits f32[B, h, w, K], K = num_classes. The sum of
  map and spread map, in 0..2, is mixed over classes by a linear layer and normalized by the batch's
  own statistics (the official code has no other mode).

  Args:
    attention_dim: D, channels of key and query.
    background: K' = K - 1, and class 0 gets what the strongest other class leaves of 2. False: K' =
      K.
  """
  normalize = BatchNorm(momentum=0.999, eps=1e-3, use_scale=False)

  def init(key: Array) -> tuple[PyTree, PyTree]:
    # Not called `kernel`: weight decay, which acts on kernels, spares this head in the official
    # code.
    shapes = {
      "key": (channels, attention_dim),
      "query": (channels, attention_dim),
      "mix": (num_classes, num_classes),
    }
    params = {
      name: _glorot(part, shape)
      for part, (name, shape) in zip(jax.random.split(key, 3), shapes.items(), strict=True)
    }
    stats = {"mean": jnp.zeros(num_classes), "var": jnp.ones(num_classes)}
    return params | {"bn": {"bias": jnp.zeros(num_classes)}}, {"bn": stats}

  def apply(params, batch_stats, features, cam, valid, *, train):
    spread = (
      attention.propagate(features @ params["key"], features @ params["query"], cam, valid) + cam
    )
    scores = cams.with_background(spread, total=2.0) if background else spread
    variables = {"params": params["bn"], "batch_stats": batch_stats["bn"]}
    logits, moved = normalize.apply(
      variables, scores @ params["mix"], train=True, mutable=["batch_stats"]
    )
    return logits, {"bn": moved["batch_stats"]} if train else batch_stats

  return Head(init, apply)


class _Auxiliary(nn.Module):
  num_classes: int
  features: int
  dropout: float

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    x = ConvBN(self.features, 3, name="unit")(x, train=train)
    if train and self.has_rng("dropout"):
      x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=False)(x)
    return Conv(self.num_classes, use_bias=True, name="classifier")(x)


def auxiliary(
  channels: int, num_classes: int, *, features: int = 256, dropout: float = 0.1
) -> Head:
  """Builds a second segmentation head, for a map in the midst of a backbone.

  Map f32[B, h, w, channels] -> scores f32[B, h, w, num_classes]. A 3x3 convolution to `features`,
  batch norm, ReLU, dropout of whole channels, a linear layer. [Zhao et al. 2017, auxiliary loss]
  `apply` also takes dropout=key; without a key no channel is dropped.
  """
  module = _Auxiliary(num_classes, features, dropout)

  def init(key: Array) -> tuple[PyTree, PyTree]:
    shapes = jax.eval_shape(
      lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, channels)), train=False)
    )
    values = initial_values(key, shapes)
    return values["params"], values["batch_stats"]

  def apply(params, batch_stats, features, *, train, dropout=None):
    variables = {"params": params, "batch_stats": batch_stats}
    if not train:
      return module.apply(variables, features, train=False), batch_stats
    rngs = {} if dropout is None else {"dropout": dropout}
    scores, moved = module.apply(
      variables, features, train=True, mutable=["batch_stats"], rngs=rngs
    )
    return scores, moved["batch_stats"]

  return Head(init, apply)


def subpixel_decoder(channels: int, num_classes: int, *, doublings: int) -> Head:
  """Builds CCT's decoder, which doubles the sides of a map several times.

  Map f32[B, h, w, channels] -> scores f32[B, h 2^doublings, w 2^doublings, num_classes], none below
  0. A linear layer, then `doublings` times a linear layer, a ReLU and four channels that become
  four pixels. [CCT, decoders.py]
  """
  steps = [f"subpixel{step + 1}" for step in range(doublings)]

  def init(key: Array) -> tuple[PyTree, PyTree]:
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = {
      name: {"kernel": leaf(num_classes, 4 * num_classes), "bias": leaf(4 * num_classes)}
      for name in steps
    }
    return initial_values(key, shapes | {"classifier": {"kernel": leaf(channels, num_classes)}}), {}

  def apply(params, batch_stats, features, *, train):
    x = features @ params["classifier"]["kernel"]
    for name in steps:
      x = pixel_shuffle(jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"]))
    return x, batch_stats

  return Head(init, apply)


def stack_heads(head: Head, counts: Mapping[str, int]) -> Head:
  """Builds groups of independently initialized copies of a head.

  The head has no statistics. Its parameters become {"name": parameters with a leading axis of
  counts["name"]}. `apply` is that of one copy, on its part of the parameters.
  """

  def init(key: Array) -> tuple[PyTree, PyTree]:
    keys = {name: jax.random.split(rng.stream(key, name), count) for name, count in counts.items()}
    return {name: jax.vmap(lambda key: head.init(key)[0])(keys) for name, keys in keys.items()}, {}

  return Head(init, head.apply)


def _conv3x3(channels: int, features: int) -> PyTree:
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return {"kernel": leaf(3, 3, channels, features), "bias": leaf(features)}


def _convolved(params: PyTree, x: Array) -> Array:
  return convolve(x, params["kernel"]) + params["bias"]


def box_encoder(num_planes: int, channels: Sequence[int]) -> Head:
  """Builds the head that computes factors on maps from known boxes.

  Maps are multiplied by them where boxes are known; a 3x3 convolution and a sigmoid make each.
  [self-correcting networks]

  Inputs of `apply`: planes f32[B, H, W, num_planes] of 0 and 1, and the size (h, w) of each of the
  maps, to which the planes are resized by nearest neighbor. Output: f32[B, h, w, C] in 0..1 for
  each, C one of `channels`.
  """
  scales = [f"scale{number}" for number in range(1, len(channels) + 1)]

  def init(key: Array) -> tuple[PyTree, PyTree]:
    return initial_values(
      key,
      {scale: _conv3x3(num_planes, count) for scale, count in zip(scales, channels, strict=True)},
    ), {}

  def apply(params, batch_stats, planes, sizes, *, train):
    resized = (resize.nearest(planes, size) for size in sizes)
    return tuple(
      jax.nn.sigmoid(_convolved(params[scale], x)) for scale, x in zip(scales, resized, strict=True)
    ), batch_stats

  return Head(init, apply)


def correction_net(num_classes: int, *, hidden: int = 128) -> Head:
  """Builds the head that merges two predictions into one.

  Two 3x3 convolutions with a ReLU between. [self-correcting networks, convolutional
  self-correction]

  Inputs of `apply`: the primary and the ancillary logits, f32[B, H, W, K] each, K = num_classes.
  Output: logits f32[B, H, W, K]. Width and activation are not in the sources; 128 and ReLU are
  those of re-implementations.
  """

  def init(key: Array) -> tuple[PyTree, PyTree]:
    return initial_values(
      key, {"conv1": _conv3x3(2 * num_classes, hidden), "conv2": _conv3x3(hidden, num_classes)}
    ), {}

  def apply(params, batch_stats, primary_logits, ancillary_logits, *, train):
    both = jnp.concatenate([primary_logits, ancillary_logits], axis=-1)
    return _convolved(params["conv2"], jax.nn.relu(_convolved(params["conv1"], both))), batch_stats

  return Head(init, apply)


def flaw_detector(in_channels: int, *, width: int = 64, stages: int = 4) -> Head:
  """Builds GCT's flaw detector as a head, a network of its own.

  It is created by nets.create_from_head; see `detector.FlawDetector`.

  Inputs of `apply`: images f32[B, H, W, C] and probabilities f32[B, H, W, K]. Output: flaw map
  f32[B, H, W].

  Args:
    in_channels: C + K.
    width: channels of the first stage.
    stages: how often sides halve before the classifier; 4 ask for images of 60 pixels or more a
      side, 3 for 28, 2 for 12.
  """
  module = FlawDetector(width, stages)

  @jax.jit
  def init(key: Array) -> tuple[PyTree, PyTree]:
    side = least_side(stages)
    images, nothing = jnp.zeros((1, side, side, in_channels)), jnp.zeros((1, side, side, 0))
    values = module.init(key, images, nothing, train=False)
    return values["params"], values["batch_stats"]

  def apply(params, batch_stats, images, probabilities, *, train):
    variables = {"params": params, "batch_stats": batch_stats}
    if not train:
      return module.apply(variables, images, probabilities, train=False), batch_stats
    flaws, moved = module.apply(
      variables, images, probabilities, train=True, mutable=["batch_stats"]
    )
    return flaws, moved["batch_stats"]

  return Head(init, apply)
