"""COCO 2017, 80 things and background, with the settings of PseudoSeg's official code.

  --config=configs/coco.py:method=pseudoseg,split=1_512 --config.data.root=DIR
  --config=configs/coco.py:method=pseudoseg,split=1_512,form=tfds --config.data.root=DIR/tfds    (after `prepare ... --format=tfds`)

DIR holds train2017/, val2017/ (the images) and masks/ (NAME.png for the images of both: 0
background, 1..80 the things in the order of their category ids without the gaps, 255 ignored),
as `prepare coco` makes them. For unlabeled images with image-level labels:
--config.method.image_labels=True --config.data.image_labels=FILE (CSV or JSON of the classes in each image).

split: 1_512, 1_256, 1_128, 1_64 or 1_32 (the published lists of 232 to 3697 labeled images),
another 1_k (our own draw, of config.data.split_seed), or the path of a list of labeled images.
"""

from pseudoseg_jax import checks, config as configs, recipes
from pseudoseg_jax.data import splits


def get_config(argument=""):
  chosen = configs.arguments(
    argument,
    method="pseudoseg",
    convention="",
    split="1_512",
    network="",
    backbone="",
    form="folder",
  )
  checks.check_name("form", chosen["form"], ("folder", "tfds"))
  split = splits.published_or_own("coco2017", "", chosen["split"], default="pseudoseg")
  config = configs.base(configs.method(chosen["method"], chosen["convention"]))
  config.data.update(
    configs.tfds_data(
      dataset="coco2017/1.0.0", classes="coco", split=split, unlabeled_split="train"
    )
    if chosen["form"] == "tfds"
    else configs.folder_data(
      classes="coco",
      image_pattern="train2017/{id}.jpg",
      label_pattern="masks/{id}.png",
      split=split,
      unlabeled_folder="train2017",  # all of them, the labeled ones included, as in the official run
      eval_image_pattern="val2017/{id}.jpg",
    )
  )
  recipes.pseudoseg(config, "coco", chosen["split"])
  configs.choose_network(config, chosen["network"], chosen["backbone"])
  config.log_every_steps = 50
  config.eval_every_steps = 10_000
  config.checkpoint_every_steps = 1000
  return config
