"""CamVid, 11 classes: images/{train,val,test}/NAME.jpg and labels/{train,val,test}/NAME.png below
config.data.root.

  --config=configs/camvid.py:method=cps,split=1_8 --config.data.root=DIR

split: 1_16, 1_8, 1_4, 1_2 or full (of the sorted frames every 16th, ...), or the path of a list of
  labeled images.
batch: labeled images a step. A small network at 240x180, so that a run takes minutes on a CPU;
  network=deeplabv3plus for a GPU.
"""

import re

from pseudoseg_jax import config as configs, recipes

_OPTIONS = {
  "pseudoseg": {"background": False},  # class 0 is sky
  "cct": {"background": False},
  # As in quickstart.py, for crops of 128.
  "gct": {
    "detector_stages": 3,
    "detector_width": 32,
    "detector_learning_rate": 1e-3,
    "rampup_fraction": 0.4,
    "shared_batch_norm": False,
    "weight": 30.0,
    "flaw_correction_weight": 0.1,
  },
  "learn_pseudo": {"background": False, "score_power": 2.0},
  "ancillary": {"background": False},
  "self_correcting": {"background": False},
  # As in quickstart.py.
  "pi_model": {"strong_views": 1},
  "temporal_ensembling": {"shared_batch_norm": False},
  "cutmix_seg": {"strong_views": 1},
  "ict": {"strong_views": 1},
  "vat": {"strong_views": 1},
  "classmix": {"color_jitter": True, "blur": True},
  # As on Cityscapes: small regions, and all classes but sky, building, road, pavement and tree are
  # pasted; but with VOC's threshold, for a network from scratch, and a shorter memory, for a
  # shorter run.
  "ael": {
    "region_area": 0.005,
    "presence_area": 0.01,
    "paste_classes": (2, 6, 7, 8, 9, 10),
    "bank_momentum": 0.99,
  },
}


def get_config(argument=""):
  chosen = configs.arguments(
    argument, method="cps", convention="", split="1_8", network="tiny", backbone="", batch=4
  )
  config = configs.base(configs.method(chosen["method"], chosen["convention"]))
  config.data.update(
    configs.folder_data(
      classes="camvid",
      label_map="11:255",  # void
      image_pattern="images/train/{id}.jpg",
      label_pattern="labels/train/{id}.png",
      # Every k-th frame, so that each of the video's sequences keeps its share.
      split=re.sub("^1_", "every_", chosen["split"]),
      # Test, not val: val is a dense stretch of one sequence that is also in train.
      eval_image_pattern="images/test/{id}.jpg",
      eval_label_pattern="labels/test/{id}.png",
    )
  )
  config.method.update(_OPTIONS.get(chosen["method"], {}))
  recipes.by_labeled_share(config, recipes.labeled_images(chosen["split"], 367) / 367)
  config.network = configs.network_on(chosen["network"], chosen["backbone"])
  config.total_steps = 1500
  config.batch_size_global = {"labeled": chosen["batch"], "unlabeled": 4}
  # as in quickstart.py.
  config.optimizer.learning_rate = 0.1 if chosen["method"] in ("unimatch", "fixmatch") else 0.05
  config.views.crop_size = (128, 128)
  config.views.scales = (0.75, 1.0, 1.25, 1.5)
  config.log_every_steps = 50
  config.eval_every_steps = 750
  config.checkpoint_every_steps = 500
  config.evaluation.batch_size = 8
  return config
