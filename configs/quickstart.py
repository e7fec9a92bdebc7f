"""Synthetic scenes and a tiny network: the whole way in minutes on a CPU.

  --config=configs/quickstart.py                      the semi-supervised method
  --config=configs/quickstart.py:method=supervised    the baseline: the same labels, the same steps
"""

from pseudoseg_jax import config as configs


def get_config(argument=""):
  chosen = configs.arguments(argument, method="mean_teacher", convention="", labels=24)
  config = configs.base(configs.method(chosen["method"], chosen["convention"]))
  config.data.update({
    "name": "synthetic",
    "num_scenes": 800,
    "num_labeled": chosen["labels"],
    "num_eval_scenes": 200,
    "size": (64, 64),
    "scenes_seed": 0,  # of the scenes themselves, apart from the run's seed: every run sees the same data
  })
  config.total_steps = 800
  config.batch_size_global = {"labeled": 8, "unlabeled": 8}
  config.optimizer.learning_rate = 0.1
  config.views.crop_size = (64, 64)
  config.views.scales = (0.75, 1.0, 1.25)
  config.log_every_steps = 50
  config.eval_every_steps = 200
  config.checkpoint_every_steps = 200
  config.evaluation.batch_size = 50
  return config
