"""Cityscapes in the official layout, 19 classes, with the settings of CPS's official code.

  --config=configs/cityscapes.py:method=cps,split=1_8 --config.data.root=DIR
  --config=configs/cityscapes.py:method=cps,split=1_8,form=tfds --config.data.root=DIR/tfds    (after `prepare ... --format=tfds`)

DIR holds leftImg8bit/{train,val}/CITY/ and gtFine/{train,val}/CITY/. Masks are the labelIds of the download; their 19 scored
classes are picked while reading, so nothing is to be converted, whatever masks a list names. For the extra images as unlabeled
ones: --config.data.unlabeled_folder=leftImg8bit/train_extra.

split: 1_30, 1_16, 1_8, 1_4 or 1_2 (the lists of CPS, or from 1_16 on those of U2PL with lists=u2pl; with lists=random our own
draw, of config.data.split_seed); full; or the path of a list of labeled images.
"""

from pseudoseg_jax import checks, config as configs
from pseudoseg_jax.data import splits

_TRAIN = 2975


def get_config(argument=""):
  chosen = configs.arguments(
    argument, method="cps", convention="", split="1_8", lists="", network="deeplabv3plus", backbone="", form="folder"
  )
  checks.check_name("form", chosen["form"], ("folder", "tfds"))
  split = splits.published_or_own("cityscapes", chosen["lists"], chosen["split"], default="cps")
  config = configs.base(configs.method(chosen["method"], chosen["convention"]))
  config.data.update(configs.tfds_data(
    dataset="cityscapes/1.0.0", classes="cityscapes", label_map="cityscapes", split=split
  ) if chosen["form"] == "tfds" else configs.folder_data(
    classes="cityscapes",
    image_pattern="leftImg8bit/train/{id}_leftImg8bit.png",
    label_pattern="gtFine/train/{id}_gtFine_labelIds.png",
    label_map="cityscapes",
    # Unlabeled in labelIds, which know no 255: so labelTrainIds, which would be misread, are refused.
    ignore_index=0,
    split=split,
    eval_image_pattern="leftImg8bit/val/{id}_leftImg8bit.png",
    eval_label_pattern="gtFine/val/{id}_gtFine_labelIds.png",
  ))  # fmt: skip
  if chosen["method"] == "cps":
    config.method.weight = 6.0  # [cps, method]; VOC has 1.5
  elif chosen["method"] == "cps_cutmix":
    config.method.weight = 5.0
  elif chosen["method"] == "pseudoseg":
    config.method.background = False  # class 0 is road
  config.network = configs.network_on(chosen["network"], chosen["backbone"])
  config.batch_size_global = {"labeled": 8, "unlabeled": 8}
  config.total_steps = _total_steps(chosen["split"])
  # The official 0.02 and 1e-4 on 8 GPUs: the loss is divided by their number, then the gradients are averaged once more, while
  # weight decay is not. An eighth of the rate and eight times the decay are what was trained. [cps, gradient scale]
  config.optimizer.learning_rate = 0.0025
  config.optimizer.weight_decay = 8e-4
  # Hard pixels, of the labeled images only: 50000 kept of an image, as each GPU had one. [cps, OHEM]
  config.criterion.update({"name": "ohem", "min_confidence": 0.7, "min_kept": 50_000, "scope": "image"})
  config.views.crop_size = (800, 800)
  config.views.scales = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)  # 1.25 is missing in the official list
  config.log_every_steps = 50
  config.eval_every_steps = 5000
  config.checkpoint_every_steps = 1000
  # The protocol "cps_cityscapes"; one image at a time, for the memory of 19 scores on 2048x1024 pixels.
  config.evaluation.update({"style": "slide", "window_pixels": (800, 800), "batch_size": 1})
  return config


# Epochs of CPS's official scripts by labeled share; an epoch is one pass over the longer of the two lists. [cps, schedule]
_EPOCHS = {"1_16": 128, "1_8": 137, "1_4": 160, "1_2": 240}


def _total_steps(split):
  split = split if split in _EPOCHS else "1_8"
  return _EPOCHS[split] * ((_TRAIN - _TRAIN // int(split[2:])) // 8)
