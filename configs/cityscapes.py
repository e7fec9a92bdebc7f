"""Cityscapes in the official layout, 19 classes.

  --config=configs/cityscapes.py:method=cps,split=1_8 --config.data.root=DIR
  --config=configs/cityscapes.py:method=cps,split=1_8,form=tfds --config.data.root=DIR/tfds    (after `prepare ... --format=tfds`)

DIR holds leftImg8bit/{train,val}/CITY/ and gtFine/{train,val}/CITY/. Masks are the labelIds of the
download; their 19 scored classes are picked while reading, so nothing is to be converted, whatever
masks a list names. For the extra images as unlabeled ones:
--config.data.unlabeled_folder=leftImg8bit/train_extra.

split: 1_30, 1_16, 1_8, 1_4 or 1_2 (the lists of CPS, or from 1_16 on those of U2PL with lists=u2pl;
with lists=random our own draw, of config.data.split_seed); full; or the path of a list of labeled
images.
recipe: whose network and training settings, as in voc.py.
"""

from pseudoseg_jax import checks, config as configs, recipes
from pseudoseg_jax.data import splits


def get_config(argument=""):
  chosen = configs.arguments(
    argument,
    method="cps",
    convention="",
    split="1_8",
    lists="",
    network="",
    backbone="",
    recipe="",
    form="folder",
  )
  recipe = chosen["recipe"] or recipes.of_method(chosen["method"])
  checks.check_name("recipe", recipe, recipes.RECIPES)
  checks.check_name("form", chosen["form"], ("folder", "tfds"))
  split = splits.published_or_own("cityscapes", chosen["lists"], chosen["split"], default="cps")
  config = configs.base(configs.method(chosen["method"], chosen["convention"]))
  config.data.update(
    configs.tfds_data(
      dataset="cityscapes/1.0.0", classes="cityscapes", label_map="cityscapes", split=split
    )
    if chosen["form"] == "tfds"
    else configs.folder_data(
      classes="cityscapes",
      image_pattern="leftImg8bit/train/{id}_leftImg8bit.png",
      label_pattern="gtFine/train/{id}_gtFine_labelIds.png",
      label_map="cityscapes",
      # Unlabeled in labelIds, which know no 255: so labelTrainIds, which would be misread, are
      # refused.
      ignore_index=0,
      split=split,
      eval_image_pattern="leftImg8bit/val/{id}_leftImg8bit.png",
      eval_label_pattern="gtFine/val/{id}_gtFine_labelIds.png",
    )
  )
  recipes.RECIPES[recipe](config, "cityscapes", chosen["split"])
  configs.choose_network(config, chosen["network"], chosen["backbone"])
  config.log_every_steps = 50
  config.eval_every_steps = 5000
  config.checkpoint_every_steps = 1000
  return config
