"""Whole training steps of the official UniMatch and FixMatch loops, reproduced by our own update on
the recorded network and draws.
"""

import functools
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from pseudoseg_jax import optim
from pseudoseg_jax.contract import Task
from pseudoseg_jax.methods import unimatch
from pseudoseg_jax.models.layers import BatchNorm
from pseudoseg_jax.models.table import compose
from pseudoseg_jax.ops import losses, schedules


class Decoder(nn.Module):
  """The recorded network's head, which fuses both taps."""

  hidden: int
  num_classes: int

  @nn.compact
  def __call__(self, maps, *, train, groups=1):
    x = nn.Conv(self.hidden, (3, 3), padding=1, use_bias=False, name="fuse")(
      jnp.concatenate(maps, axis=-1)
    )
    x = nn.relu(BatchNorm(name="fuse_bn")(x, train=train, groups=groups))
    return nn.Conv(self.num_classes, (1, 1), name="classifier")(x)


def with_head(golden):
  """The same arrays, with the names of parameters that are not the backbone's below "head", as our
  networks have them.
  """
  renamed = type(golden)(
    (re.sub(r"^(init/|step\d+/after/)(?!backbone)", r"\1head.", name), golden[name])
    for name in golden
  )
  renamed.path = golden.path
  return renamed


def make_task(golden):
  hp = {name: value.item() for name, value in golden.under("hp/").items()}
  criterion = losses.cross_entropy_mean
  if hp["criterion"] == "OHEM":
    ohem = {"min_confidence": hp["ohem_thresh"], "min_kept": hp["ohem_min_kept"]}
    criterion = functools.partial(losses.ohem_cross_entropy, scope="batch", **ohem)
  total_steps = hp["epochs"] * hp["iters_per_epoch"]
  # Set after each step, so that it lags by one; weight decay on every parameter. [README_e: SGD
  # 0.9, decay 1e-4]
  rate = functools.partial(schedules.poly, base=hp["lr"], total_steps=total_steps, shift_steps=-1)
  factors = {"^(?!backbone)": hp["lr_multi"]}
  optimizer = optim.sgd(rate, momentum=0.9, weight_decay=1e-4, decay_scope="all", factors=factors)
  head = Decoder(hp["hid"], hp["num_classes"])
  network = compose(toy._UniMatchBackbone(hp["hid"]), head, upsample=lambda scores, size: scores)
  return Task(hp["num_classes"], total_steps, network, toy.recording(optimizer), criterion)


def unlabeled_of(step, views, partner=""):
  """partner: "" or "_mix", the suffix of the partner's arrays."""
  return {
    "weak": toy.nhwc(step[f"img_u_w{partner}"]),
    "strong": jnp.stack([toy.nhwc(step[f"img_u_s{view}{partner}"]) for view in views], axis=1),
    "valid": jnp.asarray(step[f"ignore_mask{partner}"] != 255),
  }


def check(golden, factory, views, logged):
  """Runs all recorded steps; logged: our metric -> (the recorded one, what it is multiplied by in
  the loss).
  """
  golden = with_head(golden)
  method = factory(make_task(golden), min_confidence=float(golden["hp/conf_thresh"]))
  state = toy.start(method, golden, {"student": "init/"})
  steps = [golden.under(f"step{index}/") for index in range(toy.num_steps(golden))]
  batches = [
    {
      "labeled": {
        "image": toy.nhwc(step["img_x"]),
        "label": jnp.asarray(step["mask_x"].astype(np.int32)),
      },
      "unlabeled": unlabeled_of(step, views),
      "partner": unlabeled_of(step, views, "_mix"),
    }
    for step in steps
  ]
  draws = [
    {"box": jnp.stack([jnp.asarray(step[f"cutmix_box{view}"] > 0) for view in views], axis=1)}
    for step in steps
  ]
  for recorded, step in zip(draws, steps, strict=True):
    if "fp_mask_low" in step:
      recorded["kept_channels"] = tuple(
        jnp.asarray(step[f"fp_mask_{tap}"]) for tap in ("low", "high")
      )
  for index, (after, metrics) in enumerate(toy.run(method, state, batches, draws)):
    for ours, (theirs, factor) in logged.items():
      want = factor * golden[f"log/{theirs}"][index]
      np.testing.assert_allclose(metrics[ours], want, rtol=0, atol=1e-5, err_msg=f"{ours} {index}")
    np.testing.assert_allclose(metrics["learning_rate"], steps[index]["lr_in_force"][0], rtol=1e-6)
    toy.assert_net(
      after.nets["student"], golden, f"step{index}/after/", params=2e-6, statistics=5e-6
    )


@pytest.mark.golden("unimatch_train_steps", case=r"case\d+")
def test_unimatch_steps(golden):
  logged = {
    "loss": ("loss_all", 1),
    "loss_supervised": ("loss_x", 1 / 2),
    "loss_strong": ("loss_s", 1 / 4),
    "loss_features": ("loss_w_fp", 1 / 4),
    "kept_fraction": ("mask_ratio", 1),
  }
  check(golden, unimatch.unimatch, (1, 2), logged)


@pytest.mark.golden("unimatch_fixmatch_train_steps", case=r"case\d+")
def test_fixmatch_steps(golden):
  logged = {
    "loss": ("loss_all", 1),
    "loss_supervised": ("loss_x", 1 / 2),
    "loss_strong": ("loss_s", 1 / 2),
    "kept_fraction": ("mask_ratio", 1),
  }
  check(golden, unimatch.fixmatch, (1,), logged)
