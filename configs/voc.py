"""PASCAL VOC 2012 in the VOCdevkit layout, 21 classes.

  --config=configs/voc.py:method=cps,split=1_8 --config.data.root=DIR                   (DIR holds VOCdevkit/)
  --config=configs/voc.py:method=cps,split=1_8,form=tfds --config.data.root=DIR/tfds    (after `prepare voc --format=tfds`)
  --config=configs/voc.py:method=pseudoseg,split=92 --config.data.root=DIR
      with --config.method.image_labels=True the unlabeled images have the image-level labels of
      VOC's own Annotations

split: 92, 183, 366, 732 or 1464 (the lists of PseudoSeg, clean masks); 1_16, 1_8, 1_4 or 1_2 (the
lists of CPS, or those of U2PL with lists=u2pl; with lists=random our own draw, of
config.data.split_seed); full; or the path of a list of labeled images.
recipe: cps, pseudoseg, cutmix_seg, classmix, ael, cct, unimatch, gct, learn_pseudo or
self_correcting, whose network and training settings; by default those of the method, where it has
its own, else CPS's. Methods of several stages are run by pipelines.py.
"""

from pseudoseg_jax import checks, config as configs, recipes
from pseudoseg_jax.data import splits

# Of published runs with a split of their own kind.
_SPLITS = {
  "pseudoseg": "92",
  "unimatch": "92",
  "learn_pseudo": "92",
  "cct": "1464",
  "self_correcting": "1464",
}


def get_config(argument=""):
  chosen = configs.arguments(
    argument,
    method="cps",
    convention="",
    split="",
    lists="",
    network="",
    backbone="",
    train="train_aug",
    recipe="",
    form="folder",
  )
  checks.check_name("form", chosen["form"], ("folder", "tfds"))
  recipe = chosen["recipe"] or recipes.of_method(chosen["method"])
  checks.check_name("recipe", recipe, recipes.RECIPES)
  split = chosen["split"] or _SPLITS.get(recipe, "1_8")
  clean = splits.published(f"voc2012/pseudoseg/{split}") is not None
  config = configs.base(configs.method(chosen["method"], chosen["convention"]))
  # The unlabeled images of these codes are all training images, the labeled ones among them.
  unlabeled = chosen["train"] if recipe in ("pseudoseg", "cutmix_seg") else ""
  named = splits.published_or_own(
    "voc2012", "pseudoseg" if clean else chosen["lists"], split, default="cps"
  )
  lists = "VOCdevkit/VOC2012/ImageSets/Segmentation"
  config.data.update(
    configs.tfds_data(
      dataset="voc2012/1.0.0",
      classes="voc",
      train_split=chosen["train"],
      split=named,
      unlabeled_split=unlabeled,
    )
    if chosen["form"] == "tfds"
    else configs.folder_data(
      classes="voc",
      image_pattern="VOCdevkit/VOC2012/JPEGImages/{id}.jpg",
      label_pattern=f"VOCdevkit/VOC2012/SegmentationClass{'' if clean else 'Aug'}/{{id}}.png",
      train_list=f"{lists}/{chosen['train']}.txt",
      split=named,
      unlabeled_list=f"{lists}/{unlabeled}.txt" if unlabeled else "",
      image_labels="VOCdevkit/VOC2012/Annotations",
      boxes="VOCdevkit/VOC2012/Annotations",
      eval_boxes="VOCdevkit/VOC2012/Annotations",
      eval_label_pattern="VOCdevkit/VOC2012/SegmentationClass/{id}.png",
      eval_list=f"{lists}/val.txt",
    )
  )
  recipes.RECIPES[recipe](config, "voc", split)
  configs.choose_network(config, chosen["network"], chosen["backbone"])
  config.log_every_steps = 50
  config.eval_every_steps = 2000
  config.checkpoint_every_steps = 1000
  return config
