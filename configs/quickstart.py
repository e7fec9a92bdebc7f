"""Synthetic scenes and a tiny network: the whole way in minutes on a CPU.

  --config=configs/quickstart.py                      the semi-supervised method
  --config=configs/quickstart.py:method=supervised    the baseline: the same labels, the same steps
  --config=configs/quickstart.py:method=pseudoseg,image_labels=1    the unlabeled scenes come with the classes they show

labels: how many of the 800 scenes are labeled; batch: labeled images a step.
"""

from pseudoseg_jax import config as configs, recipes

# Where published settings presume other data or a pretrained network.
_OPTIONS = {
  # On 64 images from scratch the classifier learns them by heart and takes the features along: at
  # weight 1 below supervised.
  "pseudoseg": {"classification_weight": 0.1},
  # Hard labels of networks that know little yet; CPS has 1.5 on pretrained ones.
  "cps": {"weight": 0.3},
  "single_pseudo": {"weight": 0.3},
  # At 100 times the labeled share, 8, it stayed below supervised.
  "pi_model": {"weight": 2.0, "strong_views": 1},
  # Batch statistics as for mean_teacher.
  "temporal_ensembling": {"grid": (32, 32), "shared_batch_norm": False},
  # The strong views that mean_teacher has too.
  "cutmix_seg": {"strong_views": 1},
  "ict": {"strong_views": 1},
  "vat": {"strong_views": 1},
  "classmix": {"color_jitter": True, "blur": True},
  # A detector for small crops, that learns in a short run; weights that wait for it. At 100 and 1
  # it stayed below supervised.
  "gct": {
    "detector_stages": 2,
    "detector_width": 16,
    "detector_learning_rate": 1e-3,
    "rampup_fraction": 0.4,
    "shared_batch_norm": False,
    "weight": 30.0,
    "flaw_correction_weight": 0.1,
  },
  # IoUs of a small network from scratch, to the power of 8, are no weights at all.
  "learn_pseudo": {"score_power": 2.0},
  "ael": {"bank_momentum": 0.99},  # 0.999 takes longer than this run to forget the random start
}


def get_config(argument=""):
  chosen = configs.arguments(
    argument, method="mean_teacher", convention="", labels=64, batch=8, image_labels=0
  )
  if chosen["image_labels"]:
    method = configs.method(chosen["method"], chosen["convention"], image_labels=True)
  elif chosen["method"] == "mean_teacher" and not chosen["convention"]:
    # The student sees a strong view and the teacher a weak one. A fifth of the published weight,
    # rising slowly: with a network from scratch the teacher has nothing to teach at first. Strong
    # and labeled images pass with batch statistics of their own: over three seeds two points better
    # than common ones.
    method = configs.method(
      "mean_teacher", "official", weight=20.0, rampup_fraction=0.3, shared_batch_norm=False
    )
  else:
    method = configs.method(chosen["method"], chosen["convention"])
  config = configs.base(method)
  recipes.by_labeled_share(config, chosen["labels"] / 800)
  if not (chosen["convention"] or chosen["image_labels"]):
    config.method.update(_OPTIONS.get(chosen["method"], {}))
  config.data.update(configs.synthetic_data(num_labeled=chosen["labels"]))
  config.total_steps = 3000
  config.batch_size_global = {"labeled": chosen["batch"], "unlabeled": 8}
  # UniMatch halves the sum of its losses, so that the labeled images need twice the rate to be
  # learned from as by others.
  config.optimizer.learning_rate = 0.2 if chosen["method"] in ("unimatch", "fixmatch") else 0.1
  config.views.crop_size = (64, 64)
  config.views.scales = (0.75, 1.0, 1.25)
  config.log_every_steps = 100
  config.eval_every_steps = 1000
  config.checkpoint_every_steps = 500
  config.evaluation.batch_size = 50
  return config
