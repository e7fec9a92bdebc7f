"""The options that published code trains with, apart from its data.

A recipe sets those options of a config, with their sources. It is a function (config, dataset,
split): dataset is "voc" or "cityscapes" (PseudoSeg's also "coco"); split is that of the config's
argument, "1_8" or "92" say, by which published code chooses the number of steps. Networks,
optimizer, views, steps, criterion and evaluation are the code's, and the options of its method
where the data set changes them.
"""

from __future__ import annotations

import math
import re

from pseudoseg_jax import config as configs

TRAIN_IMAGES = {"voc": 10582, "cityscapes": 2975}


# Epochs of CPS's official scripts by labeled share; an epoch is one pass over the longer of the two
# lists. [cps, schedule]
_CPS_EPOCHS = {
  "voc": {"1_16": 32, "1_8": 34, "1_4": 40, "1_2": 60},
  "cityscapes": {"1_16": 128, "1_8": 137, "1_4": 160, "1_2": 240},
}


def labeled_images(split: str, num_images: int) -> int:
  """Returns how many of the training images a split labels.

  The split is a share, "1_8", or the number, "92"; of another list, an eighth is presumed.
  """
  if split.isdigit():
    return int(split)
  return math.ceil(num_images / (int(split[2:]) if re.fullmatch(r"1_\d+", split) else 8))


def by_labeled_share(config: configs.ConfigDict, share: float) -> None:
  """Sets the weights of Laine & Aila's two methods by the labeled share.

  They are 100 and 30 times the share. [their official code, smlaine2/tempens]
  """
  greatest = {"pi_model": 100.0, "temporal_ensembling": 30.0}
  if config.method.name in greatest:
    config.method.weight = share * greatest[config.method.name]


def cps(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of CPS's official runs (TorchSemiSeg).

  They are also those of what it compares with: any method without a recipe of its own.
  """
  config.network = configs.network("deeplabv3plus")
  config.batch_size_global = {"labeled": 8, "unlabeled": 8}
  by_labeled_share(config, labeled_images(split, TRAIN_IMAGES[dataset]) / TRAIN_IMAGES[dataset])
  split = split if split in _CPS_EPOCHS[dataset] else "1_8"
  longer = TRAIN_IMAGES[dataset] - TRAIN_IMAGES[dataset] // int(split[2:])
  config.total_steps = _CPS_EPOCHS[dataset][split] * (longer // 8)
  # The official 0.01 (Cityscapes: 0.02) reaches the optimizer divided by the number of GPUs, 4 (8):
  # the loss is divided by it, then the gradients are averaged once more. Weight decay, 1e-4, is
  # not: 0.0025 with 4e-4 (8e-4) is what was trained. [cps, gradient scale]
  config.optimizer.update(
    {"learning_rate": 0.0025, "weight_decay": {"voc": 4e-4, "cityscapes": 8e-4}[dataset]}
  )
  config.views.scales = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)  # 1.25 is missing in the official list
  side = {"voc": 512, "cityscapes": 800}[dataset]
  config.views.crop_size = (side, side)
  config.evaluation.update({"style": "slide", "window_pixels": (side, side), "batch_size": 8})
  if dataset == "cityscapes":
    # Hard pixels, of the labeled images only: 50000 kept of an image, as each GPU had one. [cps,
    # OHEM]
    config.criterion.update(
      {"name": "ohem", "min_confidence": 0.7, "min_kept": 50_000, "scope": "image"}
    )
    # [cps, method]; of the other three, which its paper compares with, none is known.
    weights = {
      "cps": 6.0,
      "single_pseudo": 6.0,
      "cross_prob": 6.0,
      "cps_cutmix": 5.0,
      "single_pseudo_cutmix": 5.0,
    }
    config.method.update(
      {"weight": weights[config.method.name]} if config.method.name in weights else {}
    )
    if config.method.name == "temporal_ensembling":
      config.method.grid = (64, 128)  # images are twice as wide as high
    # The protocol "cps_cityscapes"; for the memory of 19 scores on 2048x1024 pixels.
    config.evaluation.batch_size = 1


def pseudoseg(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of PseudoSeg's official runs on VOC and COCO.

  The code is googleinterns/wss: 16 GPUs with 4 labeled and 4 unlabeled images each.

  There batch norm, the fusion's norm and every loss take the 4 images of their GPU; here they take
  the global batch. Nothing was published for Cityscapes: there CPS's recipe is used.
  """
  if dataset == "cityscapes":
    cps(config, dataset, split)
    config.method.background = False  # class 0 is road
    return
  config.network = configs.network("deeplabv3plus_tf")
  config.total_steps = {"voc": 30_000, "coco": 200_000}[dataset]
  config.batch_size_global = {"labeled": 64, "unlabeled": 64}
  config.optimizer.update(
    {
      "learning_rate": 0.007,
      "power": 0.9,
      "momentum": 0.9,
      "weight_decay": 4e-5,
      "bias_multiplier": 2.0,
    }
  )
  # Images in -1..1, padding in the middle.
  config.data.update({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
  config.views.update(
    {
      "convention": "tensorflow",
      "crop_size": (513, 513),
      "scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
      "jitter_probability": 1.0,
      "brightness": 0.5,
      "contrast": 0.5,
      "saturation": 0.5,
      "hue": 0.25,
      "grayscale_probability": 0.0,
      "blur_probability": 0.0,
    }
  )
  side = {"voc": 513, "coco": 641}[dataset]  # the protocols "pseudoseg_voc" and "pseudoseg_coco"
  config.evaluation.update(
    {"style": "pad_to_crop", "window_pixels": (side, side), "batch_size": 16}
  )


def classmix(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of ClassMix's official runs, for every split.

  The code is WilhelmT/ClassMix: trainSSL.py with configVOC.json or configCityscapes.json. The
  official network is DeepLab v2 on a ResNet-101 trained on COCO, head included.
  """
  config.network = configs.network("deeplabv3plus", backbone="resnet101")
  config.total_steps = 40_000
  size = {"voc": 10, "cityscapes": 2}[dataset]
  config.batch_size_global = {"labeled": size, "unlabeled": size}
  # The configs say 2.5e-4, and the code 10 times that for the head. But it lists the convolutions
  # of stages 1-4 three times, so that the optimizer moves them three times a step (the stem once,
  # shortcuts four times): 7.5e-4 and 2.5e-3 are what was trained. [classmix, optimisation]
  config.optimizer.update(
    {
      "learning_rate": 7.5e-4,
      "head_multiplier": 10 / 3,
      "power": 0.9,
      "momentum": 0.9,
      "weight_decay": 5e-4,
      "decay_scope": "all",
      "freeze_batch_norm": True,
    }
  )
  if dataset == "voc":
    # 0.5 + k/10, k up to 11; padding there is below and on the right. The mirror flag is off.
    # [classmix, data]
    config.views.update(
      {
        "crop_size": (321, 321),
        "scales": tuple(round(0.5 + k / 10, 1) for k in range(12)),
        "flip": False,
      }
    )
    config.evaluation.update({"style": "pad_to_crop", "window_pixels": (505, 505), "batch_size": 8})
    return
  # Whole images at half their size, as PIL resizes them.
  config.views.update(
    {"convention": "pillow", "crop_size": (512, 1024), "scales": (0.5,), "flip": False}
  )
  # Evaluated at half their size; there with masks of that size, here the scores are enlarged.
  config.evaluation.update({"style": "whole", "scales": (0.5,), "batch_size": 1})
  if config.method.name == "classmix":
    config.method.update({"color_jitter": True, "blur": True})


def cutmix_seg(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of CutMix-Seg's official runs, for every split.

  The code is Britefury/cutmix-semisup-seg: the scripts of DeepLab v3+ with color augmentation.

  On Cityscapes only DeepLab v2 was run (Adam, 3e-5, a tenth of it for pretrained parameters): there
  data and batch are the script's, and network and optimizer those of v3+ on VOC. Network and frozen
  batch norm are for ImageNet's weights in `config.network.pretrained`.
  """
  # torchvision's ResNet-101 and ASPP with rates 12, 24, 36; there with dropout 0.5 after the ASPP.
  # [cutmix, networks]
  config.network = configs.network(
    "deeplabv3plus_unimatch", backbone="resnet101", stem="plain", output_stride=8
  )
  config.total_steps = 40_000
  size = {"voc": 10, "cityscapes": 4}[dataset]
  config.batch_size_global = {"labeled": size, "unlabeled": size}
  # Adam at a constant rate, the same for all: the group of pretrained parameters is empty by
  # accident. [cutmix, discrepancies]
  config.optimizer.update(
    {"name": "adamw", "learning_rate": 1e-5, "power": 0.0, "weight_decay": 0.0}
  )
  config.views.update(
    {
      "convention": "cutmix_seg",
      "jitter_probability": 0.8,
      "brightness": 0.4,
      "contrast": 0.4,
      "saturation": 0.4,
      "hue": 0.1,
      "grayscale_probability": 0.2,
      "blur_probability": 0.0,
    }
  )
  if dataset == "voc":
    config.views.update(
      {"crop_size": (321, 321), "scales": tuple(round(0.5 + k / 10, 1) for k in range(11))}
    )
    config.evaluation.update({"style": "whole", "absent_classes": "zero", "batch_size": 8})
  else:
    # Trained and evaluated at half the size; there with masks of that size, by majority, here
    # scores are enlarged.
    config.views.update({"crop_size": (256, 512), "scales": (0.5,)})
    config.evaluation.update(
      {"style": "whole", "scales": (0.5,), "absent_classes": "zero", "batch_size": 1}
    )
  if config.method.name in ("cutmix_seg", "ict", "vat"):
    config.method.update({"strong_views": 1, "frozen_batch_norm": "backbone"})


def unimatch(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of UniMatch's official runs, FixMatch's among them.

  The code is LiheYoung/UniMatch, version 1: 4 GPUs with 2 + 2 images each.

  Batch norm is over all GPUs there, as here; losses are means over the images of a GPU, here over
  the global batch. The tables' networks are on resnet101 and resnet50. The official baseline
  (method=supervised) has 16 images and counts its epochs by labeled images, 400 steps in all for
  92.
  """
  config.network = configs.network("deeplabv3plus_unimatch")
  config.batch_size_global = {"labeled": 8, "unlabeled": 8}
  # Epochs over the unlabeled images, whatever the split. [unimatch, schedule]
  images, epochs = TRAIN_IMAGES[dataset], {"voc": 80, "cityscapes": 240}[dataset]
  labeled = labeled_images(split, images)
  config.total_steps = epochs * (math.ceil((images - labeled) / 4) // 2)
  # The rate is set after each step, so it lags by one. [unimatch, schedule]
  config.optimizer.update(
    {"power": 0.9, "shift_steps": -1, "momentum": 0.9, "weight_decay": 1e-4, "decay_scope": "all"}
  )
  config.views.update(
    {
      "convention": "pillow",
      "scales": (0.5, 2.0),
      "continuous": True,
      "jitter_probability": 0.8,
      "brightness": 0.5,
      "contrast": 0.5,
      "saturation": 0.5,
      "hue": 0.25,
      "grayscale_probability": 0.2,
      "blur_probability": 0.5,
      "blur_sigma_pixels": (0.1, 2.0),
    }
  )
  if dataset == "voc":
    config.optimizer.update({"learning_rate": 0.001, "head_multiplier": 10.0})
    # [unimatch, configs of the u2pl lists]
    side = 513 if "/u2pl/" in config.data.get("split", "") else 321
    config.views.crop_size = (side, side)
    # The protocol "unimatch_voc".
    config.evaluation.update({"style": "whole", "absent_classes": "zero", "batch_size": 8})
    return
  config.optimizer.update({"learning_rate": 0.005, "head_multiplier": 1.0})
  # There 200000 pixels are kept of the 2 images of a GPU together.
  config.criterion.update(
    {"name": "ohem", "min_confidence": 0.7, "min_kept": 100_000, "scope": "image"}
  )
  config.views.crop_size = (801, 801)
  # The protocol "unimatch_cityscapes".
  config.evaluation.update(
    {
      "style": "slide",
      "window_pixels": (801, 801),
      "edges": "cut",
      "summed": "probabilities",
      "absent_classes": "zero",
      "batch_size": 1,
    }
  )
  if config.method.name in ("unimatch", "fixmatch"):
    config.method.min_confidence = 0.0  # [unimatch, schedule]; VOC has 0.95


def ael(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of AEL's official runs.

  The code is hzhupku/SemiSeg-AEL: 8 GPUs, on each 2 labeled images and one mixed of two unlabeled
  ones a step.

  Batch norm is over all GPUs there, as here; the bank of confidences and all losses are of one GPU,
  here of the global batch. The official decoder keeps 256 channels of the first map (here 48),
  concatenates the pooled branch and has channel dropout 0.1; its last stage has dilations 4, 8, 8
  (here 4, 8, 16).
  """
  config.network = configs.network(
    "deeplabv3plus", backbone="resnet101", stem="deep", output_stride=8
  )
  config.batch_size_global = {"labeled": 16, "unlabeled": 8}
  # The paper's, whatever the split. The two shipped configs come to 39680 (VOC, 1/4) and 18600
  # (Cityscapes, 1/2). [ael, optimisation]
  config.total_steps = {"voc": 30_000, "cityscapes": 18_000}[dataset]
  # The official 0.01 and 1e-4: losses are divided by the number of GPUs, then gradients are
  # averaged once more, while weight decay is not. An eighth of the rate and eight times the decay
  # are what was trained. [ael, effective lr]
  config.optimizer.update(
    {
      "learning_rate": 0.00125,
      "power": 0.9,
      "momentum": 0.9,
      "weight_decay": 8e-4,
      "decay_scope": "all",
      "head_multiplier": 10.0,
    }
  )
  # There 100000 pixels are kept of the 2 images of a GPU together.
  config.criterion.update(
    {"name": "ohem", "min_confidence": 0.7, "min_kept": 50_000, "scope": "image"}
  )
  side = {"voc": 513, "cityscapes": 769}[dataset]
  config.views.update({"convention": "ael", "crop_size": (side, side), "scales": (0.5, 2.0)})
  config.evaluation.update({"style": "whole", "absent_classes": "zero", "batch_size": 8})
  options = {"min_confidence": 0.7, "region_area": 0.03, "presence_area": 0.03, "paste_draws": 1}
  if dataset == "cityscapes":
    config.evaluation.update(
      {"style": "slide", "window_pixels": (side, side), "summed": "probabilities", "batch_size": 1}
    )
    options = {"min_confidence": 0.0, "region_area": 0.005, "presence_area": 0.01, "paste_draws": 3}
    # Without road, sidewalk, building, vegetation, sky. The code leaves out the same numbers on
    # VOC, by accident. [ael, copy-paste]
    options["paste_classes"] = tuple(index for index in range(19) if index not in (0, 1, 2, 8, 10))
  if config.method.name == "ael":
    config.method.update(options)


def cct(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of CCT's official run on VOC.

  The code is yassouali/CCT: the shipped configuration, with a working VAT.

  There an epoch's first pass over the labeled images is repeated until the epoch ends, crops and
  all; here they are drawn anew. For Cityscapes neither code nor settings were published: there they
  are those of VOC, which is what the author reports.
  """
  config.network = configs.network("pspnet")
  config.batch_size_global = {"labeled": 10, "unlabeled": 10}
  # 80 epochs over the unlabeled images, last partial batches among them: 72960 steps for 1464.
  # [cct, data; the paper's runs have 50]
  images = TRAIN_IMAGES[dataset]
  labeled = labeled_images(split, images)
  config.total_steps = 80 * math.ceil((images - labeled) / 10)
  # 0.01 for pyramid and decoders, 0.001 for the ResNet; decay on everything. [cct, optimisation]
  config.optimizer.update(
    {
      "learning_rate": 0.001,
      "head_multiplier": 10.0,
      "power": 0.9,
      "momentum": 0.9,
      "weight_decay": 1e-4,
      "decay_scope": "all",
    }
  )
  # Longer sides of 200 to 800, of VOC's 500; without color jitter. [cct, data]
  scales = {"voc": (0.4, 1.6), "cityscapes": (0.5, 2.0)}[dataset]
  config.views.update({"convention": "cct", "crop_size": (320, 320), "scales": scales})
  # Padded to multiples of 8: there by reflection, here with the mean color. [cct, evaluation]
  config.evaluation.update({"style": "whole", "pad_multiple": 8, "absent_classes": "zero"})
  config.evaluation.batch_size = {"voc": 8, "cityscapes": 1}[dataset]


def gct(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of GCT's official runs on VOC.

  The code is ZHKKKe/PixelSSL, the PSPNet script: 4 GPUs with 2 + 2 images each; rates there are per
  GPU.

  The published backbone was trained on COCO as well. Padding is of class 0 there, and trained; here
  it has no label. Nothing was published for Cityscapes: there CPS's recipe is used.
  """
  if dataset == "cityscapes":
    cps(config, dataset, split)
    return
  config.network = configs.network("pspnet_pixelssl", backbone="resnet101")
  config.batch_size_global = {"labeled": 8, "unlabeled": 8}
  # An epoch is a pass over the unlabeled images; the consistency rises for 5 of them. [gct,
  # optimizers]
  epochs = {"1_16": 45, "1_8": 45, "1_4": 55, "1_2": 80}.get(split, 45)
  images = TRAIN_IMAGES[dataset]
  config.total_steps = epochs * ((images - labeled_images(split, images)) // 8)
  # The rate of every step is that of the next one, as its loops set it. [gct, golden training
  # steps]
  config.optimizer.update(
    {
      "learning_rate": 1e-3,
      "head_multiplier": 10.0,
      "power": 0.9,
      "shift_steps": 1,
      "momentum": 0.9,
      "weight_decay": 5e-4,
      "decay_scope": "all",
    }
  )
  config.criterion.denominator = "all"  # [gct, one training iteration]
  # Shorter sides of 256 to 1026, of VOC's 375. [gct, data]
  config.views.update({"convention": "pillow", "crop_size": (513, 513), "scales": (0.7, 2.7)})
  config.evaluation.update({"style": "whole", "batch_size": 8})
  if config.method.name == "gct":
    config.method.update({"detector_learning_rate": 4e-4, "rampup_fraction": 5 / epochs})


def learn_pseudo(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options of Learning Pseudo Labels' official runs on VOC.

  The code is YudeWang/Learning-Pseudo-Label: stage one, and stage two for any other method.

  The official decoder takes the first map through a 3x3 convolution (here 1x1) and its last stage
  has no multi-grid. Stage two walks its list in order there; here it is shuffled. Its dense CRF is
  left out. For Cityscapes, whose images hold nearly all classes, nothing was published: there CPS's
  recipe is used.
  """
  if dataset == "cityscapes":
    cps(config, dataset, split)
    # Class 0 is road.
    config.method.update({"background": False} if "background" in config.method else {})
    return
  config.network = configs.network(
    "deeplabv3plus", backbone="resnet101", stem="deep", output_stride=8
  )
  config.optimizer.update(
    {
      "classifier_multiplier": 10.0,
      "power": 0.9,
      "momentum": 0.9,
      "weight_decay": 4e-5,
      "decay_scope": "all",
    }
  )
  if config.method.name == "learn_pseudo":
    config.total_steps, config.optimizer.learning_rate = 20_000, 0.001
    config.batch_size_global = {"labeled": 5, "unlabeled": 5}
  else:
    config.total_steps, config.optimizer.learning_rate = 30_000, 0.007
    config.batch_size_global = {"labeled": 16, "unlabeled": 16}
  # Unlabeled images are only cropped. [learning_pseudo_labels, data]
  config.views.update(
    {
      "convention": "lpl",
      "crop_size": (384, 384),
      "scales": (1.0,),
      "flip": False,
      "labeled_operations": 2,
    }
  )
  config.evaluation.update(
    {
      "style": "whole",
      "scales": (0.5, 0.75, 1.0, 1.25, 1.5),
      "flip": True,
      "absent_classes": "zero",
      "batch_size": 4,
    }
  )


def self_correcting(config: configs.ConfigDict, dataset: str, split: str) -> None:
  """Sets the options for self-correcting networks.

  Their code and settings were not published. The options are the TensorFlow DeepLab's, with 16
  images a step. That library's DeepLabv3+ on Xception-65 is what the author names; learning rate,
  crop and steps are its defaults for VOC.
  """
  pseudoseg(config, "voc", split)
  config.network = configs.network("deeplabv3plus_tf", backbone="xception65")
  # [self_correcting, primary objective: batches hold both]
  labeled = 16 if config.method.name in ("ancillary", "supervised") else 8
  config.batch_size_global = {"labeled": labeled, "unlabeled": 8}
  if dataset == "cityscapes":
    config.views.crop_size = (769, 769)
    config.evaluation.update({"style": "whole", "batch_size": 1})
    # Class 0 is road.
    config.method.update({"background": False} if "background" in config.method else {})


RECIPES = {
  "ael": ael,
  "cct": cct,
  "classmix": classmix,
  "cps": cps,
  "cutmix_seg": cutmix_seg,
  "gct": gct,
  "learn_pseudo": learn_pseudo,
  "pseudoseg": pseudoseg,
  "self_correcting": self_correcting,
  "unimatch": unimatch,
}


def of_method(method: str) -> str:
  """Returns the recipe of a method's own code; CPS's where there is none."""
  of_family = {
    "ancillary": "self_correcting",
    "cct_domains": "cct",
    "fixmatch": "unimatch",
    "ict": "cutmix_seg",
    "vat": "cutmix_seg",
  }
  name = of_family.get(method, method)
  return name if name in RECIPES else "cps"
