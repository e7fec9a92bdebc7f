"""PyTorch checkpoints of the official CPS network (and torchvision's backbone names) in our trees.

Ours -> theirs is a pure function of the path, so each leaf is named once; `from_torch` then insists that both sides are used up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pseudoseg_jax import checks
from pseudoseg_jax.contract import PyTree

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# Module paths, tried in order. The deep stem and the decoder are nn.Sequential there, hence the bare indices.
_DEEP_STEM = {
  "unit1/conv": "conv1.0",
  "unit1/bn": "conv1.1",
  "unit2/conv": "conv1.3",
  "unit2/bn": "conv1.4",
  "unit3/conv": "conv1.6",
  "unit3/bn": "bn1",
}
_PLAIN_STEM = {"unit1/conv": "conv1", "unit1/bn": "bn1"}
_HEAD = {
  "aspp/branches_bn": "head.aspp.map_bn",
  "aspp/project": "head.aspp.red_conv",
  "aspp/pool/conv": "head.aspp.global_pooling_conv",
  "aspp/pool/bn": "head.aspp.global_pooling_bn",
  "aspp/pool_project": "head.aspp.pool_red_conv",
  "aspp/bn": "head.aspp.red_bn",
  "low/conv": "head.reduce.0",
  "low/bn": "head.reduce.1",
  "unit1/conv": "head.last_conv.0",
  "unit1/bn": "head.last_conv.1",
  "unit2/conv": "head.last_conv.3",
  "unit2/bn": "head.last_conv.4",
  "classifier": "classifier",
}


def torch_name(path: str, *, deep_stem: bool) -> str | None:
  """The PyTorch name of one of our leaves, e.g. "backbone/layer1_0/unit2/conv/kernel" -> "backbone.layer1.0.conv2.weight".

  None for a path that the CPS network does not have.
  """
  module, leaf = path.rsplit("/", 1)
  part, _, rest = module.partition("/")
  found = None
  if part == "head":
    branch = re.fullmatch(r"aspp/branch(\d)", rest)
    found = f"head.aspp.map_convs.{branch[1]}" if branch else _HEAD.get(rest)
  elif rest.startswith("stem/"):
    stem = (_DEEP_STEM if deep_stem else _PLAIN_STEM).get(rest.removeprefix("stem/"))
    found = stem and f"backbone.{stem}"
  elif block := re.fullmatch(r"layer(\d)_(\d+)/(?:unit(\d)|shortcut)/(conv|bn)", rest):
    stage, index, unit, kind = block.groups()
    last = f"{kind}{unit}" if unit else f"downsample.{('conv', 'bn').index(kind)}"
    found = f"backbone.layer{stage}.{index}.{last}"
  return found and f"{found}.{_LEAVES[leaf]}"


def from_torch(state_dict: Mapping[str, np.ndarray], params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
  """Our trees with the values of a PyTorch state dict of the same network.

  Kernels go from [Cout, Cin, k, k] to [k, k, Cin, Cout]; `num_batches_tracked` is dropped, since the momentum is constant.

  Args:
    state_dict: name -> array, names of one network of the CPS code without any "branch1." prefix.
    params, batch_stats: trees of a "deeplabv3plus" network; only paths and shapes are read.

  Raises:
    checks.InputError: lists together every leaf that has no source, every shape that differs and every tensor left over.
  """
  ours = traverse_util.flatten_dict({"params": params, "batch_stats": batch_stats}, sep="/")
  deep_stem = "params/backbone/stem/unit3/conv/kernel" in ours
  left = {name: value for name, value in state_dict.items() if not name.endswith("num_batches_tracked")}
  problems = checks.Problems("the PyTorch weights do not fit the network")
  filled = {}
  for path, leaf in ours.items():
    name = torch_name(path.split("/", 1)[1], deep_stem=deep_stem)
    if name not in left:
      problems.add(path, got=f"no tensor '{name}' in the file" if name else "a leaf that the PyTorch network does not have")
      continue
    value = np.asarray(left.pop(name), np.float32)
    if value.ndim == 4:
      value = value.transpose(2, 3, 1, 0)
    if value.shape != leaf.shape:
      problems.add(path, got=f"{name} of shape {value.shape} (height, width, in, out)", allowed=leaf.shape)
    filled[path] = jnp.asarray(value)
  problems.extend(f"{name} of shape {np.shape(value)}: not used by any of our leaves" for name, value in left.items())
  problems.raise_if_any()
  trees = traverse_util.unflatten_dict(filled, sep="/")
  return trees["params"], trees["batch_stats"]
