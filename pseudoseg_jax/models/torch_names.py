"""Names and layout of the tensors of published PyTorch networks.

They are translated for our trees. Ours -> theirs is a pure function of the paths, so each leaf is
named once; `from_torch` then insists that both sides are used up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pseudoseg_jax import checks
from pseudoseg_jax.contract import PyTree

_LEAVES = {
  "kernel": "weight",
  "depthwise": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}

# A row is one brick: the pattern of our module, their convolution, their batch norm. Our halves of
# a brick end in "/conv" and "/bn"; a module that is only one of the two has no such ending, and
# None stands for what it lacks. Bare numbers are places in an nn.Sequential.
Rows = list[tuple[str, str | None, str | None]]

_PLAIN_STEM: Rows = [(r"stem/unit(\d)", r"conv\1", r"bn\1")]
_DEEP_STEM: Rows = [
  (r"stem/unit1", "conv1.0", "conv1.1"),
  (r"stem/unit2", "conv1.3", "conv1.4"),
  (r"stem/unit3", "conv1.6", "bn1"),
]
_BLOCKS: Rows = [
  (r"layer(\d)_(\d+)/unit(\d)", r"layer\1.\2.conv\3", r"layer\1.\2.bn\3"),
  (r"layer(\d)_(\d+)/shortcut", r"layer\1.\2.downsample.0", r"layer\1.\2.downsample.1"),
]
_HIGH_RESOLUTION: Rows = [
  (r"stem(\d)", r"conv\1", r"bn\1"),
  (r"transition1_0", "transition1.0.0", "transition1.0.1"),
  (r"transition(\d)_(\d)", r"transition\1.\2.0.0", r"transition\1.\2.0.1"),
  (
    r"stage(\d)_(\d)/branch(\d)_(\d)/unit(\d)",
    r"stage\1.\2.branches.\3.\4.conv\5",
    r"stage\1.\2.branches.\3.\4.bn\5",
  ),
  (
    r"stage(\d)_(\d)/fuse(\d)_(\d)",
    r"stage\1.\2.fuse_layers.\3.\4.0",
    r"stage\1.\2.fuse_layers.\3.\4.1",
  ),
  (
    r"stage(\d)_(\d)/fuse(\d)_(\d)_(\d)",
    r"stage\1.\2.fuse_layers.\3.\4.\5.0",
    r"stage\1.\2.fuse_layers.\3.\4.\5.1",
  ),
]
_EFFICIENTNET: Rows = [
  (r"stem", "_conv_stem", "_bn0"),
  (r"block(\d+)/expand", r"_blocks.\1._expand_conv", r"_blocks.\1._bn0"),
  (r"block(\d+)/depthwise", r"_blocks.\1._depthwise_conv", r"_blocks.\1._bn1"),
  (r"block(\d+)/project", r"_blocks.\1._project_conv", r"_blocks.\1._bn2"),
]

_CPS_HEAD: Rows = [
  (r"aspp/branch(\d)", r"head.aspp.map_convs.\1", None),
  (r"aspp/branches_bn", None, "head.aspp.map_bn"),
  (r"aspp/project", "head.aspp.red_conv", None),
  (r"aspp/pool", "head.aspp.global_pooling_conv", "head.aspp.global_pooling_bn"),
  (r"aspp/pool_project", "head.aspp.pool_red_conv", None),
  (r"aspp", None, "head.aspp.red_bn"),
  (r"low", "head.reduce.0", "head.reduce.1"),
  (r"unit1", "head.last_conv.0", "head.last_conv.1"),
  (r"unit2", "head.last_conv.3", "head.last_conv.4"),
  (r"classifier", "classifier", None),
]
_UNIMATCH_HEAD: Rows = [
  (r"aspp/branch(\d)", r"head.b\1.0", r"head.b\1.1"),
  (r"aspp/pool", "head.b4.gap.1", "head.b4.gap.2"),
  (r"aspp/project", "head.project.0", "head.project.1"),
  (r"low", "reduce.0", "reduce.1"),
  (r"unit1", "fuse.0", "fuse.1"),
  (r"unit2", "fuse.3", "fuse.4"),
  (r"classifier", "classifier", None),
]
_HRNET_HEAD: Rows = [
  (r"unit", "last_layer.0", "last_layer.1"),
  (r"classifier", "last_layer.3", None),
]
_PSP: Rows = [
  (r"bin1", "stages.0.1", "stages.0.2"),
  (r"bin2", "stages.1.1", "stages.1.2"),
  (r"bin3", "stages.2.1", "stages.2.2"),
  (r"bin6", "stages.3.1", "stages.3.2"),
  (r"unit", "bottleneck.0", "bottleneck.1"),
]
_SHUFFLE: Rows = [(r"classifier", "0", None), (r"subpixel(\d)", r"\1.conv", None)]
_CCT_RESNET: Rows = [
  (r"stem/unit(\d)", r"0.0.conv\1", r"0.0.bn\1"),
  (r"layer(\d)_(\d+)/unit(\d)", r"\1.\2.conv\3", r"\1.\2.bn\3"),
  (r"layer(\d)_(\d+)/shortcut", r"\1.\2.downsample.0", r"\1.\2.downsample.1"),
]


def _below(ours: str, theirs: str, rows: Rows) -> Rows:
  return [(ours + module, conv and theirs + conv, bn and theirs + bn) for module, conv, bn in rows]


_HEADS: dict[str, Rows] = {
  "deeplabv3plus": _below("head/", "", _CPS_HEAD),
  "deeplabv3plus_unimatch": _below("head/", "", _UNIMATCH_HEAD),
  # of whole images.
  "efficientnet_lite": _below(
    "head/", "", [(r"unit", "_conv_head", "_bn1"), (r"classifier", "_fc", None)]
  ),
  "hrnet": _below("head/", "", _HRNET_HEAD),
  "pspnet": [
    *_below("backbone/", "encoder.base.", _CCT_RESNET),
    *_below("backbone/psp/", "encoder.psp.", _PSP),
    *_below("head/", "main_decoder.upsample.", _SHUFFLE),
  ],
  "pspnet_pixelssl": [
    *_below("backbone/psp/", "psp.", _PSP),
    *_below("head/", "decoder.", _SHUFFLE),
  ],
}
_BACKBONE_PREFIX = {
  "deeplabv3plus": "backbone.",
  "deeplabv3plus_unimatch": "backbone.",
  "pspnet_pixelssl": "backbone.",
  "hrnet": "",
  "efficientnet_lite": "",
}


def _backbone_rows(paths: Iterable[str], prefix: str) -> Rows:
  deep_stem = any(path.startswith("backbone/stem/unit3/") for path in paths)
  stem = _DEEP_STEM if deep_stem else _PLAIN_STEM
  return _below("backbone/", prefix, [*stem, *_BLOCKS, *_HIGH_RESOLUTION, *_EFFICIENTNET])


def _name(path: str, rows: Rows) -> str | None:
  module, leaf = path.rsplit("/", 1)
  brick, _, half = module.rpartition("/")
  if half not in ("conv", "bn"):
    brick, half = module, None
  for pattern, conv, bn in rows:
    if match := re.fullmatch(pattern, brick):
      found = {"conv": conv, "bn": bn, None: conv or bn}[half]
      return found and f"{match.expand(found)}.{_LEAVES[leaf]}"
  return None


def names(paths: Iterable[str], network: str) -> dict[str, str | None]:
  """Returns the names of our leaves in a network's published PyTorch code.

  Args:
    paths: of all leaves (the stem's kind is read off them), parameters and statistics, such as
      "backbone/layer1_0/unit2/conv/kernel".
    network: a key of `table.NETWORKS`.

  Returns:
    path -> name, here "backbone.layer1.0.conv2.weight" (CPS, UniMatch, PixelSSL),
    "encoder.base.1.0.conv2.weight" (CCT) or "layer1.0.conv2.weight" (HRNet); None for a leaf that
    the published network does not have.
  """
  paths = list(paths)
  rows = list(_HEADS.get(network, []))
  if network in _BACKBONE_PREFIX:
    rows += _backbone_rows(paths, _BACKBONE_PREFIX[network])
  return {path: _name(path, rows) for path in paths}


def backbone_names(paths: Iterable[str]) -> dict[str, str | None]:
  """Returns names as `names` does, for files of a backbone alone.

  ResNets have torchvision's names, HRNets the official (and timm's), EfficientNet-Lites those of
  the PyPI package efficientnet_lite_pytorch.

  A deep stem has the names of CPS, UniMatch and timm ("conv1.0" ...). None for what is no part of
  the backbone proper (heads, pyramid pooling).
  """
  paths = list(paths)
  rows = _backbone_rows(paths, "")
  return {path: _name(path, rows) for path in paths}


def to_ours(value: np.ndarray, path: str) -> np.ndarray:
  """Converts one tensor to our layout.

  Kernels go from [Cout, Cin, k, k] to [k, k, Cin, Cout], or from [Cout, Cin] to [Cin, Cout]. In
  depthwise kernels Cin is 1.
  """
  value = np.asarray(value)
  if path.endswith(("kernel", "depthwise")) and value.ndim in (2, 4):
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
  return value


def from_torch(
  state_dict: Mapping[str, np.ndarray],
  params: PyTree,
  batch_stats: PyTree,
  network: str = "deeplabv3plus",
) -> tuple[PyTree, PyTree]:
  """Fills our trees with the values of a PyTorch state dict.

  The state dict is of the same network. `num_batches_tracked` is dropped, since the momentum is
  constant.

  Args:
    state_dict: name -> array, names of one network of the published code without any "branch1." or
      "module." prefix.
    params, batch_stats: trees of the network; only paths and shapes are read.
    network: a key of `table.NETWORKS`.

  Raises:
    checks.InputError: lists together every leaf that has no source, every shape that differs and
      every tensor left over.
  """
  ours = traverse_util.flatten_dict({"params": params, "batch_stats": batch_stats}, sep="/")
  named = names([path.split("/", 1)[1] for path in ours], network)
  left = {
    name: value for name, value in state_dict.items() if not name.endswith("num_batches_tracked")
  }
  problems = checks.Problems("the PyTorch weights do not fit the network")
  filled = {}
  for path, leaf in ours.items():
    name = named[path.split("/", 1)[1]]
    if name not in left:
      problems.add(
        path,
        got=f"no tensor '{name}' in the file"
        if name
        else "a leaf that the PyTorch network does not have",
      )
      continue
    value = to_ours(left.pop(name), path).astype(np.float32)
    if value.shape != leaf.shape:
      problems.add(
        path, got=f"{name} of shape {value.shape} (height, width, in, out)", allowed=leaf.shape
      )
    filled[path] = jnp.asarray(value)
  problems.extend(
    f"{name} of shape {np.shape(value)}: not used by any of our leaves"
    for name, value in left.items()
  )
  problems.raise_if_any()
  trees = traverse_util.unflatten_dict(filled, sep="/")
  return trees["params"], trees["batch_stats"]
