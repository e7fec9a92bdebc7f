"""Whole training steps of the official loops, reproduced by each method's own update on the
recorded network and draws.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from pseudoseg_jax import optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import cps, mean_teacher, supervised
from pseudoseg_jax.models.table import as_network
from pseudoseg_jax.ops import losses, schedules


def labels(array):
  return jnp.asarray(array.astype(np.int32))


def make_task(
  golden,
  *,
  criterion=losses.cross_entropy_mean,
  module=toy.Toy,
  decay_scope="kernels",
  shift_steps=0,
  factors=None,
  **fixed,
):
  """The Task of a recorded run: every hyper-parameter from the file (`fixed`: those its README
  states instead).
  """
  hp = {name: value.item() for name, value in golden.under("hp/").items()} | fixed
  total_steps = hp["epochs"] * hp["iters_per_epoch"]
  rate = functools.partial(
    schedules.poly,
    base=hp["lr"],
    total_steps=total_steps,
    power=hp.get("lr_power", 0.9),
    shift_steps=shift_steps,
  )
  optimizer = optim.sgd(
    rate,
    momentum=hp["momentum"],
    weight_decay=hp["weight_decay"],
    decay_scope=decay_scope,
    factors=factors,
  )
  network = as_network(module(hp["hid"], hp["num_classes"]))
  return Task(hp["num_classes"], total_steps, network, toy.recording(optimizer), criterion)


def batch_of(golden, index, unlabeled="image_unsup", partner=None):
  batch = {
    "labeled": {
      "image": toy.nhwc(golden[f"image_{index}"]),
      "label": labels(golden[f"label_{index}"]),
    }
  }
  batch["unlabeled"] = {"weak": toy.nhwc(golden[f"{unlabeled}_{index}"])}
  if partner:
    batch["partner"] = {"weak": toy.nhwc(golden[f"{partner}_{index}"])}
  return batch


def check_pair(golden, method, batches, recorded=None, gradient=1e-5, loss_rtol=0.0):
  state = toy.start(method, golden, {"a": "init/l/", "b": "init/r/"})
  logged = {
    "loss_supervised_a": "loss_sup_l",
    "loss_supervised_b": "loss_sup_r",
    "loss_cross": "cps_loss",
    "loss": "loss",
    "learning_rate": "lr",
  }
  for index, (state, metrics) in enumerate(toy.run(method, state, batches, recorded)):
    for ours, theirs in logged.items():
      np.testing.assert_allclose(
        metrics[ours],
        golden[f"log/{theirs}"][index],
        rtol=loss_rtol,
        atol=2e-5,
        err_msg=f"{ours} {index}",
      )
    for role, prefix in {"a": "l", "b": "r"}.items():
      toy.assert_gradient(state.nets[role], golden, f"step{index}/grad/{prefix}/", gradient)
      toy.assert_net(state.nets[role], golden, f"step{index}/{prefix}/")
  assert state.step == len(batches)


@pytest.mark.golden("cps_train_steps")
def test_cps_steps(golden):
  method = cps.cps(make_task(golden), weight=golden["hp/cps_weight"].item())
  check_pair(golden, method, [batch_of(golden, index) for index in range(toy.num_steps(golden))])


@pytest.mark.golden("cps_cutmix_train_steps")
def test_cps_cutmix_steps(golden):
  method = cps.cps_cutmix(make_task(golden), weight=golden["hp/cps_weight"].item())
  count = range(toy.num_steps(golden))
  masks = [{"mask": jnp.asarray(golden[f"mask_{index}"][:, 0].astype(bool))} for index in count]
  check_pair(
    golden,
    method,
    [batch_of(golden, index, "image_unsup0", "image_unsup1") for index in count],
    masks,
  )


@pytest.mark.golden("cps_city_ohem_train_steps")
def test_cps_ohem_steps(golden):
  # One process held the whole labeled batch, so the recorded run mined it as one.
  criterion = functools.partial(
    losses.ohem_cross_entropy,
    min_confidence=golden["hp/ohem_thresh"].item(),
    min_kept=golden["hp/min_kept"].item(),
    scope="batch",
  )
  method = cps.cps(make_task(golden, criterion=criterion), weight=golden["hp/cps_weight"].item())
  batches = [batch_of(golden, index) for index in range(toy.num_steps(golden))]
  check_pair(golden, method, batches, gradient=2e-5, loss_rtol=1e-5)


@pytest.mark.golden("cps_mean_teacher_train_steps")
def test_torchsemiseg_mean_teacher_steps(golden):
  options = mean_teacher.CONVENTIONS["torchsemiseg"] | dict(
    weight=golden["hp/cons_weight"].item(), decay=golden["hp/ema_decay"].item()
  )
  method = mean_teacher.mean_teacher(make_task(golden), **options)
  state = toy.start(method, golden, {"student": "init/student/", "teacher": "init/teacher/"})
  batches = [batch_of(golden, index) for index in range(toy.num_steps(golden))]
  logged = {
    "loss_supervised": "s_loss_sup",
    "loss_consistency": "cons_loss",
    "loss": "loss",
    "learning_rate": "lr",
  }
  for index, (state, metrics) in enumerate(toy.run(method, state, batches)):
    for ours, theirs in logged.items():
      np.testing.assert_allclose(
        metrics[ours], golden[f"log/{theirs}"][index], rtol=0, atol=2e-5, err_msg=f"{ours} {index}"
      )
    toy.assert_gradient(state.nets["student"], golden, f"step{index}/grad/student/")
    for role in ("student", "teacher"):
      toy.assert_net(state.nets[role], golden, f"step{index}/{role}/")


@pytest.mark.golden("mt_pixelssl_train_steps")
def test_pixelssl_mean_teacher_steps(golden):
  hp = {name: value.item() for name, value in golden.under("hp/").items()}
  # PixelSSL: weight decay on every parameter, the classifier at ten times the rate, cross entropy
  # averaged over all pixels, and a learning rate that is one step ahead.
  criterion = functools.partial(losses.cross_entropy_mean, denominator="all")
  task = make_task(
    golden, criterion=criterion, decay_scope="all", shift_steps=1, factors={"^cls": 10.0}
  )
  steps = toy.num_steps(golden)
  options = mean_teacher.CONVENTIONS["pixelssl"] | dict(
    weight=hp["cons_scale"],
    decay=hp["ema_decay"],
    on_labeled=hp["cons_for_labeled"],
    rampup_fraction=steps * hp["cons_rampup_epochs"] / task.total_steps,
  )
  method = mean_teacher.mean_teacher(task, **options)
  state = toy.start(method, golden, {"student": "init/student/", "teacher": "init/teacher/"})
  labeled = hp["labeled_batch_size"]
  batches = [
    {
      "labeled": {
        "image": toy.nhwc(golden[f"image_{index}"][:labeled]),
        "label": labels(
          np.where(golden[f"label_{index}"] < 0, IGNORE_LABEL, golden[f"label_{index}"])[:labeled]
        ),
      },
      "unlabeled": {"weak": toy.nhwc(golden[f"image_{index}"][labeled:])},
    }
    for index in range(steps)
  ]
  for index, (state, metrics) in enumerate(toy.run(method, state, batches)):
    np.testing.assert_allclose(
      metrics["loss_supervised"], golden["log/s_task_loss"][index], rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
      metrics["loss_consistency"], golden["log/cons_loss"][index], rtol=0, atol=1e-5
    )
    for role in ("student", "teacher"):
      toy.assert_net(state.nets[role], golden, f"step{index}/{role}/", params=2e-6, statistics=2e-6)


@pytest.mark.golden("unimatch_supervised_train_steps", case=r"case\d+")
def test_unimatch_supervised_steps(golden):
  # UniMatch: weight decay 1e-4 on every parameter, momentum 0.9, head at lr_multi times the rate,
  # set after each step.
  criterion = losses.cross_entropy_mean
  if golden["hp/criterion"].item() == "OHEM":
    ohem = {
      "min_confidence": golden["hp/ohem_thresh"].item(),
      "min_kept": golden["hp/ohem_min_kept"].item(),
    }
    criterion = functools.partial(losses.ohem_cross_entropy, scope="batch", **ohem)
  task = make_task(
    golden,
    criterion=criterion,
    module=toy.UniMatchToy,
    decay_scope="all",
    shift_steps=-1,
    factors={"^(?!backbone)": golden["hp/lr_multi"].item()},
    momentum=0.9,
    weight_decay=1e-4,
  )
  method = supervised.supervised(task)
  state = toy.start(method, golden, {"student": "init/"})
  batches = [
    {
      "labeled": {
        "image": toy.nhwc(golden[f"step{index}/img_x"]),
        "label": labels(golden[f"step{index}/mask_x"]),
      }
    }
    for index in range(toy.num_steps(golden))
  ]
  for index, (state, metrics) in enumerate(toy.run(method, state, batches)):
    np.testing.assert_allclose(metrics["loss"], golden["log/loss_all"][index], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
      metrics["learning_rate"], golden[f"step{index}/lr_in_force"][0], rtol=1e-6
    )
    toy.assert_net(
      state.nets["student"], golden, f"step{index}/after/", params=2e-6, statistics=5e-6
    )
