"""Oxford-IIIT Pet through TensorFlow Datasets: background, cat, dog. A demo on real photographs
that downloads its data itself.

  --config=configs/pets.py                                              (800 MB at first, into ~/tensorflow_datasets)
  --config=configs/pets.py:split=1_100 --config.data.root=DIR           (DIR: where TFDS keeps data sets)

3680 images to train on, 3669 to evaluate. The published masks say pet, background and border, and
which animal it is the image's species; the border has no label here.

split: the labeled part, 1_50 (74 images) by default; 1_k is our own random draw, of
  config.data.split_seed.
"""

from pseudoseg_jax import config as configs


def get_config(argument=""):
  chosen = configs.arguments(
    argument, method="cps", convention="", split="1_50", network="tiny", backbone=""
  )
  config = configs.base(configs.method(chosen["method"], chosen["convention"]))
  config.data.update(
    configs.tfds_data(
      dataset="oxford_iiit_pet",
      classes="pets",
      label_key="segmentation_mask",
      label_map="1:1,2:0,3:255",  # pet, background, border
      class_key="species",  # cat, dog
      id_key="file_name",
      split=chosen["split"],
      eval_split="test",
    )
  )
  config.network = configs.network_on(chosen["network"], chosen["backbone"])
  config.total_steps = 3000
  config.batch_size_global = {"labeled": 8, "unlabeled": 8}
  config.optimizer.learning_rate = 0.05
  # Photographs of about 500x375, seen at half their size, so that a small network sees whole
  # animals.
  config.views.crop_size = (128, 128)
  config.views.scales = (0.3, 0.4, 0.5, 0.6)
  config.log_every_steps = 50
  config.eval_every_steps = 1000
  config.checkpoint_every_steps = 500
  config.evaluation.update({"scales": (0.5,), "pad_multiple": 128, "batch_size": 8})
  return config
