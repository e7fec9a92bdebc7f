"""What published code trains with, apart from its data: sets those options of a config, with their sources.

A recipe is a function (config, dataset, split): dataset is "voc" or "cityscapes" (PseudoSeg's also "coco"); split is that of the config's argument, "1_8" or
"92" say, by which published code chooses the number of steps. Networks, optimiser, views, steps, criterion and evaluation are the
code's, and the options of its method where the data set changes them.
"""

from __future__ import annotations

from pseudoseg_jax import config as configs

TRAIN_IMAGES = {"voc": 10582, "cityscapes": 2975}


# Epochs of CPS's official scripts by labeled share; an epoch is one pass over the longer of the two lists. [cps, schedule]
_CPS_EPOCHS = {
  "voc": {"1_16": 32, "1_8": 34, "1_4": 40, "1_2": 60},
  "cityscapes": {"1_16": 128, "1_8": 137, "1_4": 160, "1_2": 240},
}


def cps(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """CPS's official runs (TorchSemiSeg), and of what it compares with: any method without a recipe of its own."""
  config.network = configs.network("deeplabv3plus")
  config.batch_size_global = {"labeled": 8, "unlabeled": 8}
  split = split if split in _CPS_EPOCHS[dataset] else "1_8"
  longer = TRAIN_IMAGES[dataset] - TRAIN_IMAGES[dataset] // int(split[2:])
  config.total_steps = _CPS_EPOCHS[dataset][split] * (longer // 8)
  # The official 0.01 (Cityscapes: 0.02) reaches the optimiser divided by the number of GPUs, 4 (8): the loss is divided by it, then
  # the gradients are averaged once more. Weight decay, 1e-4, is not: 0.0025 with 4e-4 (8e-4) is what was trained. [cps, gradient scale]
  config.optimizer.update({"learning_rate": 0.0025, "weight_decay": {"voc": 4e-4, "cityscapes": 8e-4}[dataset]})
  config.views.scales = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)  # 1.25 is missing in the official list
  side = {"voc": 512, "cityscapes": 800}[dataset]
  config.views.crop_size = (side, side)
  config.evaluation.update({"style": "slide", "window_pixels": (side, side), "batch_size": 8})
  if dataset == "cityscapes":
    # Hard pixels, of the labeled images only: 50000 kept of an image, as each GPU had one. [cps, OHEM]
    config.criterion.update({"name": "ohem", "min_confidence": 0.7, "min_kept": 50_000, "scope": "image"})
    config.method.update({"cps": {"weight": 6.0}, "cps_cutmix": {"weight": 5.0}}.get(config.method.name, {}))  # [cps, method]
    config.evaluation.batch_size = 1  # the protocol "cps_cityscapes"; for the memory of 19 scores on 2048x1024 pixels


def pseudoseg(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """PseudoSeg's official runs on VOC and COCO (googleinterns/wss): 16 GPUs with 4 labeled and 4 unlabeled images each.

  There batch norm, the fusion's norm and every loss take the 4 images of their GPU; here they take the global batch. Nothing was
  published for Cityscapes: there CPS's recipe is used.
  """
  if dataset == "cityscapes":
    cps(config, dataset, split)
    config.method.background = False  # class 0 is road
    return
  config.network = configs.network("deeplabv3plus_tf")
  config.total_steps = {"voc": 30_000, "coco": 200_000}[dataset]
  config.batch_size_global = {"labeled": 64, "unlabeled": 64}
  config.optimizer.update({"learning_rate": 0.007, "power": 0.9, "momentum": 0.9, "weight_decay": 4e-5, "bias_multiplier": 2.0})
  config.data.update({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})  # images in -1..1, padding in the middle
  config.views.update({
    "convention": "tensorflow",
    "crop_size": (513, 513),
    "scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
    "jitter_probability": 1.0,
    "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.25,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
  })  # fmt: skip
  side = {"voc": 513, "coco": 641}[dataset]  # the protocols "pseudoseg_voc" and "pseudoseg_coco"
  config.evaluation.update({"style": "pad_to_crop", "window_pixels": (side, side), "batch_size": 16})


RECIPES = {"cps": cps, "pseudoseg": pseudoseg}


def of_method(method: str) -> str:
  """The recipe of a method's own code; CPS's where there is none."""
  of_family = {"ict": "cutmix_seg", "vat": "cutmix_seg", "fixmatch": "unimatch", "cct_domains": "cct"}
  name = of_family.get(method, method)
  return name if name in RECIPES else "cps"
