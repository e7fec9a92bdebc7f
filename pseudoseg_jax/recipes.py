"""What published code trains with, apart from its data: sets those options of a config, with their sources."""

from __future__ import annotations

from pseudoseg_jax import config as configs


def pseudoseg(config: configs.ConfigDict) -> None:
  """PseudoSeg's official runs (googleinterns/wss): 16 GPUs with 4 labeled and 4 unlabeled images each.

  There batch norm, the fusion's norm and every loss take the 4 images of their GPU; here they take the global batch.
  """
  config.network = configs.network("deeplabv3plus_tf")
  config.total_steps = 30_000
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
  # The protocol "pseudoseg_voc".
  config.evaluation.update({"style": "pad_to_crop", "window_pixels": (513, 513), "batch_size": 16})
