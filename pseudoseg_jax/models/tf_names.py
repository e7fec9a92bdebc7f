"""TensorFlow checkpoints in our trees.

They are those of the official PseudoSeg code, and of the DeepLab library's backbones. Ours ->
theirs is a pure function of the path, so each leaf is named once; `from_tf` then insists that both
sides are used up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pseudoseg_jax import checks
from pseudoseg_jax.contract import PyTree
from pseudoseg_jax.models import xception

SCOPES = {"resnet50": "resnet_v1_50", "resnet101": "resnet_v1_101", "xception65": "xception_65"}

# A leaf by which a backbone is known, tried in order.
_TELLING = {
  "xception65": "params/backbone/conv1/conv/kernel",
  "resnet101": "params/backbone/layer3_22/unit1/conv/kernel",
  "resnet50": "params/backbone/stem/unit1/conv/kernel",
}
# Leaves of a convolution with batch norm; such a pair shares one scope there.
_PAIR = {
  "conv/kernel": "weights",
  "conv/depthwise": "depthwise_weights",
  "bn/scale": "BatchNorm/gamma",
  "bn/bias": "BatchNorm/beta",
  "bn/mean": "BatchNorm/moving_mean",
  "bn/var": "BatchNorm/moving_variance",
}
# The pairs outside of the backbone.
_HEAD = {
  "aspp/pool": "image_pooling",
  "aspp/branch0": "aspp0",
  "aspp/project": "concat_projection",
  "low": "decoder/feature_projection0",
  **{
    f"aspp/branch{i}/{half}": f"aspp{i}_{half}"
    for i in (1, 2, 3)
    for half in ("depthwise", "pointwise")
  },
  **{
    f"unit{i}/{half}": f"decoder/decoder_conv{i - 1}_{half}"
    for i in (1, 2)
    for half in ("depthwise", "pointwise")
  },
}
# Leaves that are no such pair, among them those of the heads that PseudoSeg adds.
_SINGLE = {
  "head/classifier/kernel": "logits/semantic/weights",
  "head/classifier/bias": "logits/semantic/biases",
  "classifier/kernel": "{scope}/logits/weights",
  "classifier/bias": "{scope}/logits/biases",
  "attention/key": "hyper_column/key/weights",
  "attention/query": "hyper_column/query/weights",
  "attention/mix": "pixel_normalization/weights",
  "attention/bn/bias": "pixel_normalization/BatchNorm/beta",
  "attention/bn/mean": "pixel_normalization/BatchNorm/moving_mean",
  "attention/bn/var": "pixel_normalization/BatchNorm/moving_variance",
}
_OPTIMIZER = re.compile(r"(^|/)(global_step|Momentum|Adam(_1)?|RMSProp(_1)?|beta[12]_power)$")


def tf_name(path: str, *, variant: str) -> str | None:
  """Returns the TensorFlow name of one of our leaves.

  "backbone/layer1_0/unit2/conv/kernel" -> "resnet_v1_50/block1/unit_1/bottleneck_v1/conv2/weights".
  None for a path that the network does not have.

  Args:
    variant: one of SCOPES.
  """
  scope = SCOPES[variant]
  if path in _SINGLE:
    return _SINGLE[path].format(scope=scope)
  part, _, rest = path.partition("/")
  module, *leaf = rest.rsplit("/", 2)
  found = None
  if part == "head":
    found = _HEAD.get(module)
  elif part == "backbone" and variant == "xception65":
    found = xception.tf_scope(module)
  elif part == "backbone" and (stem := re.fullmatch(r"stem/unit(\d)", module)):
    found = f"{scope}/conv1_{stem[1]}"
  elif part == "backbone" and (
    block := re.fullmatch(r"layer(\d)_(\d+)/(?:unit(\d)|shortcut)", module)
  ):
    stage, index, unit = block.groups()
    found = f"{scope}/block{stage}/unit_{int(index) + 1}/bottleneck_v1/{f'conv{unit}' if unit else 'shortcut'}"
  return f"{found}/{_PAIR[kind]}" if found and (kind := "/".join(leaf)) in _PAIR else None


def _tf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a leaf in the TensorFlow checkpoint.

  There depthwise kernels are [k, k, C, 1], and linear layers are convolutions [1, 1, Cin, Cout].
  """
  if path.endswith("/depthwise"):
    return (*shape[:2], shape[3], shape[2])
  return (1, 1, *shape) if len(shape) == 2 else shape


def from_tf(
  variables: Mapping[str, np.ndarray], params: PyTree, batch_stats: PyTree
) -> tuple[PyTree, PyTree]:
  """Fills our trees with the values of a TensorFlow checkpoint.

  The checkpoint is of the same network.

  Args:
    variables: name -> array. The global step and the slots of optimizers are passed over.
    params, batch_stats: trees of a "deeplabv3plus_tf" network, with or without PseudoSeg's heads
      `classifier` and `attention`; only paths and shapes are read.

  Raises:
    checks.InputError: lists together every leaf that has no source, every shape that differs and
      every variable left over.
  """
  ours = traverse_util.flatten_dict({"params": params, "batch_stats": batch_stats}, sep="/")
  variant = next(name for name, path in _TELLING.items() if path in ours)
  left = {name: value for name, value in variables.items() if not _OPTIMIZER.search(name)}
  problems = checks.Problems("the TensorFlow weights do not fit the network")
  filled = {}
  for path, leaf in ours.items():
    name = tf_name(path.split("/", 1)[1], variant=variant)
    if name not in left:
      problems.add(
        path,
        got=f"no variable '{name}' in the file"
        if name
        else "a leaf that the TensorFlow network does not have",
      )
      continue
    value, shape = np.asarray(left.pop(name), np.float32), _tf_shape(path, leaf.shape)
    if value.shape != shape:
      problems.add(path, got=f"{name} of shape {value.shape}", allowed=shape)
      continue
    # Only axes of length 1 move, so that the order of the values is the same on both sides.
    filled[path] = jnp.asarray(value.reshape(leaf.shape))
  problems.extend(
    f"{name} of shape {np.shape(value)}: not used by any of our leaves"
    for name, value in left.items()
  )
  problems.raise_if_any()
  trees = traverse_util.unflatten_dict(filled, sep="/")
  return trees["params"], trees["batch_stats"]
