"""Losses, masks, schedules and averages against the official functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import nets
from pseudoseg_jax.contract import IGNORE_LABEL, NetState
from pseudoseg_jax.methods import cps, mean_teacher
from pseudoseg_jax.ops import distances, losses, mixing, schedules


def last(array):
  """[N, C, ...] -> [N, ..., C]."""
  return jnp.asarray(np.moveaxis(array, 1, -1))


def labels(array):
  return jnp.asarray(array.astype(np.int32))


def close(got, want, atol, rtol=0.0):
  np.testing.assert_allclose(np.asarray(got), want, atol=atol, rtol=rtol)


@pytest.mark.golden("cps_loss", case=r"case\d+")
def test_cps_loss(golden):
  names = ("pred_sup_l", "pred_sup_r", "pred_unsup_l", "pred_unsup_r")
  logits = tuple(last(golden[name]) for name in names)
  label, weight = labels(golden["labels"]), golden["cps_weight"].item()
  labeled = logits[0].shape[0]

  def cross(sup_l, sup_r, unsup_l, unsup_r):
    return weight * cps.cross_supervision(
      (unsup_l, unsup_r, jnp.argmax(unsup_l, -1), jnp.argmax(unsup_r, -1)),
      (sup_l, sup_r, jnp.argmax(sup_l, -1), jnp.argmax(sup_r, -1)),
    )

  def total(sup_l, sup_r, unsup_l, unsup_r):
    supervised = losses.cross_entropy_mean(sup_l, label), losses.cross_entropy_mean(sup_r, label)
    return sum(supervised) + cross(sup_l, sup_r, unsup_l, unsup_r), supervised

  value, gradients = jax.value_and_grad(cross, range(4))(*logits)
  (total_value, supervised), total_gradients = jax.value_and_grad(total, range(4), has_aux=True)(
    *logits
  )
  close(value, golden["cps_loss_weighted"], 1e-5)
  close(supervised[0], golden["loss_sup_l"], 1e-5)
  close(supervised[1], golden["loss_sup_r"], 1e-5)
  close(total_value, golden["loss_total"], 1e-5, 1e-6)
  for name, gradient, total_gradient in zip(names, gradients, total_gradients, strict=True):
    close(gradient, np.moveaxis(golden[f"grad_cps_{name}"], 1, -1), 1e-7)
    close(total_gradient, np.moveaxis(golden[f"grad_total_{name}"], 1, -1), 1e-7)
  for side, (sup, unsup) in {"l": (0, 2), "r": (1, 3)}.items():
    pseudo = [jnp.argmax(logits[index], -1) for index in (sup, unsup)]
    np.testing.assert_array_equal(golden[f"pseudo_{side}"][:labeled], pseudo[0])
    np.testing.assert_array_equal(golden[f"pseudo_{side}"][labeled:], pseudo[1])


@pytest.mark.golden("cps_cutmix", case=r"mask\d+")
def test_box_masks(golden):
  random_aspect = golden["random_aspect_ratio"].item()
  # The recorded draws are float64, and an edge may round the other way in float32.
  with jax.enable_x64(True):
    draws = mixing.BoxDraws(
      area=jnp.asarray(golden["u0"]),
      aspect=jnp.asarray(golden["u1"]) if random_aspect else None,
      position=jnp.asarray(golden["u2"] if random_aspect else golden["u1"]),
    )
    masks = mixing.box_masks(
      draws,
      golden["masks"].shape[2:],
      area_range=tuple(golden["prop_range"].tolist()),
      by_area=golden["prop_by_area"].item(),
      within_bounds=golden["within_bounds"].item(),
      invert=golden["invert"].item(),
    )
    assert golden["u0"].shape[1] == golden["n_boxes"]
    np.testing.assert_array_equal(masks, golden["masks"][:, 0])


@pytest.mark.golden("cps_cutmix", case=r"mix\d+")
def test_cutmix_loss(golden):
  mask = jnp.asarray(golden["mask"][:, 0].astype(bool))
  mixed = mixing.mix(mask, last(golden["unsup_imgs_0"]), last(golden["unsup_imgs_1"]))
  np.testing.assert_array_equal(mixed, np.moveaxis(golden["imgs_mixed"], 1, -1))
  pseudo = [
    jnp.argmax(
      mixing.mix(mask, last(golden[f"logits_u0_tea_{net}"]), last(golden[f"logits_u1_tea_{net}"])),
      -1,
    )
    for net in (1, 2)
  ]
  np.testing.assert_array_equal(pseudo[0], golden["pseudo_1"])
  np.testing.assert_array_equal(pseudo[1], golden["pseudo_2"])

  def cross(student_1, student_2):
    return golden["cps_weight"].item() * cps.cross_supervision((student_1, student_2, *pseudo))

  students = last(golden["logits_cons_stu_1"]), last(golden["logits_cons_stu_2"])
  value, gradients = jax.value_and_grad(cross, (0, 1))(*students)
  close(value, golden["cps_loss_weighted"], 1e-5)
  for gradient, net in zip(gradients, (1, 2), strict=True):
    close(gradient, np.moveaxis(golden[f"grad_stu_{net}"], 1, -1), 1e-7)


@pytest.mark.golden("cps_ohem", case=r"case\d+")
def test_ohem(golden):
  logits, label = last(golden["logits"]), labels(golden["labels"])
  options = {"min_confidence": golden["thresh"].item(), "min_kept": golden["min_kept"].item()}
  kept = losses.ohem_kept(logits, label, **options)
  np.testing.assert_array_equal(np.where(kept, label, IGNORE_LABEL), golden["kept_labels"])
  loss = functools.partial(losses.ohem_cross_entropy, label=label, scope="batch", **options)
  value, gradient = jax.value_and_grad(loss)(logits)
  close(value, golden["loss"], 1e-6)
  close(gradient, np.moveaxis(golden["grad"], 1, -1), 1e-6)


@pytest.mark.golden("cps_mean_teacher", case=r"case\d+")
def test_cps_mean_teacher(golden):
  student, teacher = last(golden["student_logits"]), last(golden["teacher_logits"])
  label, weight = labels(golden["labels"]), golden["unsup_weight"].item()

  def consistency(student):
    return weight * jnp.mean(distances.per_pixel("mse", student, teacher))

  value, gradient = jax.value_and_grad(consistency)(student)
  close(value, golden["consistency_weighted"], 1e-6)
  close(gradient, np.moveaxis(golden["grad_consistency_student"], 1, -1), 1e-6)
  close(losses.cross_entropy_mean(student[: len(label)], label), golden["loss_sup"], 1e-6)

  net = flat_net(golden["ema_teacher0"])
  for new, want in zip(golden["ema_students"], golden["ema_teachers"], strict=True):
    net = nets.ema(net, flat_net(new), golden["ema_decay"].item())
    close(net.params["flat"], want, 1e-6)


def flat_net(*values):
  params = {
    f"{index}" if index else "flat": jnp.asarray(value) for index, value in enumerate(values)
  }
  return NetState(step=0, apply_fn=None, params=params, tx=None, opt_state=None, batch_stats={})


@pytest.mark.golden("cps_poly_lr", case=r"case\d+")
def test_poly(golden):
  options = {
    "base": golden["base_lr"].item(),
    "power": golden["power"].item(),
    "total_steps": golden["total_iters"].item(),
    "warmup_steps": golden["warmup_iters"].item(),
  }
  with jax.enable_x64(True):
    np.testing.assert_allclose(
      schedules.poly(golden["steps"], **options), golden["lr"], rtol=1e-12, atol=0
    )
  np.testing.assert_allclose(
    schedules.poly(golden["steps"].astype(np.int32), **options), golden["lr"], rtol=1e-6, atol=0
  )


@pytest.mark.golden("mt_ramps")
def test_ramps(golden):
  with jax.enable_x64(True):
    for row, length in enumerate(golden["lengths"].tolist()):
      np.testing.assert_allclose(
        schedules.sigmoid_rampup(golden["points"], length), golden["sigmoid_rampup"][row], rtol=1e-7
      )
      defined = ~np.isnan(golden["linear_rampup"][row])  # the official ramp refuses negative steps
      np.testing.assert_allclose(
        schedules.linear_rampup(golden["points"], length)[defined],
        golden["linear_rampup"][row][defined],
        rtol=1e-7,
      )
    np.testing.assert_allclose(
      schedules.cosine_rampdown(golden["cosine_points"], golden["cosine_total"].item()),
      golden["cosine_rampdown"],
      rtol=1e-7,
      atol=1e-15,
    )
    iterations = golden["poly_epochs"].item() * golden["poly_iters_per_epoch"].item()
    poly = schedules.poly(
      np.arange(iterations),
      base=golden["poly_base_lr"].item(),
      power=golden["poly_power"].item(),
      total_steps=iterations,
      shift_steps=1,
    )
    np.testing.assert_allclose(poly, golden["poly_lr_used_at_iter"], rtol=1e-7)
    steps, up, down, total = (
      golden[f"tf_{name}"]
      for name in ("steps", "rampup_length", "rampdown_length", "training_length")
    )
    rising = schedules.sigmoid_rampup(steps, up.item())
    falling = schedules.sigmoid_rampdown(steps, down.item(), total.item())
    np.testing.assert_allclose(rising, golden["tf_sigmoid_rampup"], rtol=1e-7)
    np.testing.assert_allclose(falling, golden["tf_sigmoid_rampdown"], rtol=1e-7)


@pytest.mark.golden("mt_ema_update")
def test_ema_with_warmup(golden):
  warmups = {"official": "from_half", "pixelssl": "from_copy", "fixed_decay": "none"}
  for convention, warmup in warmups.items():
    teacher = flat_net(golden["init_teacher_w"], golden["init_teacher_b"])
    for step, student in enumerate(zip(golden["student_w"], golden["student_b"], strict=True)):
      decay = schedules.ema_decay(step, golden["alpha"].item(), warmup)
      if f"{convention}_effective_decay" in golden:
        close(decay, golden[f"{convention}_effective_decay"][step], 1e-6)
      teacher = nets.ema(teacher, flat_net(*student), decay)
      close(teacher.params["flat"], golden[f"{convention}_teacher_w"][step], 1e-6)
      close(teacher.params["1"], golden[f"{convention}_teacher_b"][step], 1e-6)


@pytest.mark.golden("mt_consistency_losses")
def test_consistency_losses(golden):
  def check(loss, student, name, gradient_name=None):
    value, gradient = jax.value_and_grad(loss)(student)
    close(value, golden[name], 1e-6, 1e-5)
    want = golden[gradient_name or f"{name}_grad"]
    close(gradient, np.moveaxis(want, 1, -1) if want.ndim == 4 else want, 1e-6, 1e-5)

  student, teacher = (
    jnp.asarray(golden["vec_student_logits"]),
    jnp.asarray(golden["vec_teacher_logits"]),
  )
  for distance in ("softmax_mse", "softmax_kl"):
    name = mean_teacher.DISTANCES[distance]
    per_item = functools.partial(distances.per_pixel, name, target_logits=teacher)
    check(
      lambda student: jnp.sum(per_item(student)),
      student,
      f"vec_{distance}_sum",
      f"vec_{distance}_grad",
    )
    close(jnp.mean(per_item(student)), golden[f"vec_{distance}_over_batch"], 1e-6, 1e-5)
  # The symmetric form stops neither side: it is the bare distance.
  check(
    lambda student: jnp.sum(losses.squared_distance(student, teacher)),
    student,
    "vec_symmetric_mse_sum",
    "vec_symmetric_mse_grad",
  )
  close(
    jnp.mean(losses.squared_distance(student, teacher)),
    golden["vec_symmetric_mse_over_batch"],
    1e-6,
    1e-5,
  )

  student, teacher = last(golden["map_student_logits"]), last(golden["map_teacher_logits"])
  labeled = golden["labeled_batch_size"].item()

  def of_map(distance, reduce, start=0):
    return lambda student: reduce(
      distances.per_pixel(mean_teacher.DISTANCES[distance], student[start:], teacher[start:])
    )

  check(of_map("logit_mse", jnp.mean), student, "map_pixelssl_logit_mse_all")
  check(of_map("logit_mse", jnp.mean, labeled), student, "map_pixelssl_logit_mse_unlabeled_only")
  check(of_map("softmax_mse", jnp.mean), student, "map_torchsemiseg_prob_mse_all")
  check(of_map("softmax_mse", jnp.sum), student, "map_official_softmax_mse_sum_over_everything")
