"""PASCAL VOC 2012 in the VOCdevkit layout, 21 classes, with the settings of CPS's official code.

  --config=configs/voc.py:method=cps,split=1_8 --config.data.root=DIR      (DIR holds VOCdevkit/)

split: 1_16, 1_8, 1_4, 1_2 or full (every k-th id of the training list), or the path of a list of labeled ids.
"""

from pseudoseg_jax import config as configs

# Epochs of CPS's official scripts by labeled share; an epoch is one pass over the longer of the two lists. [cps, schedule]
_EPOCHS = {"1_16": 32, "1_8": 34, "1_4": 40, "1_2": 60}
_TRAIN_AUG = 10582


def get_config(argument=""):
  chosen = configs.arguments(
    argument, method="cps", convention="", split="1_8", network="deeplabv3plus", backbone="resnet50", train="train_aug"
  )
  config = configs.base(configs.method(chosen["method"], chosen["convention"]))
  config.data.update(configs.folder_data(
    classes="voc",
    image_pattern="VOCdevkit/VOC2012/JPEGImages/{id}.jpg",
    label_pattern="VOCdevkit/VOC2012/SegmentationClassAug/{id}.png",
    train_list=f"VOCdevkit/VOC2012/ImageSets/Segmentation/{chosen['train']}.txt",
    split=chosen["split"],
    eval_label_pattern="VOCdevkit/VOC2012/SegmentationClass/{id}.png",
    eval_list="VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
  ))  # fmt: skip
  if chosen["network"] == "deeplabv3plus":
    config.network = configs.network("deeplabv3plus", backbone=chosen["backbone"])
  else:
    config.network = configs.network(chosen["network"])
  config.batch_size_global = {"labeled": 8, "unlabeled": 8}
  share = int(chosen["split"][2:]) if chosen["split"] in _EPOCHS else 8
  longer = _TRAIN_AUG - _TRAIN_AUG // share
  config.total_steps = _EPOCHS.get(chosen["split"], 34) * (longer // 8)
  # The official 0.01 reaches the optimiser divided by the number of GPUs (the loss is divided by it, then the gradients are
  # averaged once more), while weight decay does not: 0.0025 with 4e-4 is what was trained. [cps, gradient scale]
  config.optimizer.learning_rate = 0.0025
  config.optimizer.weight_decay = 4e-4
  config.views.crop_size = (512, 512)
  config.views.scales = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)  # 1.25 is missing in the official list
  config.log_every_steps = 50
  config.eval_every_steps = 2000
  config.checkpoint_every_steps = 1000
  config.evaluation.update({"style": "slide", "window_pixels": (512, 512), "batch_size": 8})
  return config
