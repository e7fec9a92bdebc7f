"""Heads that methods add to a network, as pure functions (contract.Head)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pseudoseg_jax.contract import Array, Head, PyTree
from pseudoseg_jax.models.layers import BatchNorm
from pseudoseg_jax.ops import attention, cam as cams

_glorot = jax.nn.initializers.glorot_uniform()


def image_classifier(channels: int, num_classes: int) -> Head:
  """The spatial mean of a map f32[B, h, w, channels], then a linear layer: logits f32[B, num_classes]."""

  def init(key: Array) -> tuple[PyTree, PyTree]:
    # The truncated normal that TF-slim gives to its last layers. Class activation maps read the kernel.
    kernel = 0.01 * jax.random.truncated_normal(key, -2, 2, (channels, num_classes))
    return {"kernel": kernel, "bias": jnp.zeros(num_classes)}, {}

  def apply(params, batch_stats, features, *, train):
    return jnp.mean(features, axis=(1, 2)) @ params["kernel"] + params["bias"], batch_stats

  return Head(init, apply)


def self_attention(channels: int, num_classes: int, *, attention_dim: int = 128, background: bool = True) -> Head:
  """Self-attention Grad-CAM: class activation maps spread to where the features are alike. [PseudoSeg, SGC]

  Inputs of `apply`: features f32[B, h, w, channels], cam f32[B, h, w, K'] in 0..1, valid bool[B, h, w]; the caller stops their
  gradients. Output: logits f32[B, h, w, K], K = num_classes. The sum of map and spread map, in 0..2, is mixed over classes by
  a linear layer and normalised by the batch's own statistics (the official code has no other mode).

  Args:
    attention_dim: D, channels of key and query.
    background: K' = K - 1, and class 0 gets what the strongest other class leaves of 2. False: K' = K.
  """
  normalize = BatchNorm(momentum=0.999, eps=1e-3, use_scale=False)

  def init(key: Array) -> tuple[PyTree, PyTree]:
    # Not called `kernel`: weight decay, which acts on kernels, spares this head in the official code.
    shapes = {"key": (channels, attention_dim), "query": (channels, attention_dim), "mix": (num_classes, num_classes)}
    params = {name: _glorot(part, shape) for part, (name, shape) in zip(jax.random.split(key, 3), shapes.items(), strict=True)}
    stats = {"mean": jnp.zeros(num_classes), "var": jnp.ones(num_classes)}
    return params | {"bn": {"bias": jnp.zeros(num_classes)}}, {"bn": stats}

  def apply(params, batch_stats, features, cam, valid, *, train):
    spread = attention.propagate(features @ params["key"], features @ params["query"], cam, valid) + cam
    scores = cams.with_background(spread, total=2.0) if background else spread
    variables = {"params": params["bn"], "batch_stats": batch_stats["bn"]}
    logits, moved = normalize.apply(variables, scores @ params["mix"], train=True, mutable=["batch_stats"])
    return logits, {"bn": moved["batch_stats"]} if train else batch_stats

  return Head(init, apply)
