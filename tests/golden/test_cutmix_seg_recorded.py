"""CutMix-Seg's masks, losses, averages and whole training steps against its official code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from pseudoseg_jax import nets, optim
from pseudoseg_jax.contract import NetState, Task
from pseudoseg_jax.methods import cutmix_seg, ict
from pseudoseg_jax.models.table import as_network
from pseudoseg_jax.ops import confusion, distances, losses, mixing, schedules, targets

# What the official scripts call what `targets.confidence_weight` calls per.
PER = {"avg": "batch", "perpixel": "pixel", "noconf": "none"}


def number(array):
  """A hyper-parameter that was stored as float32."""
  return round(array.item(), 6)


def single(array):
  """[N, 1, H, W] -> [N, H, W]."""
  return jnp.asarray(array[:, 0])


@pytest.mark.golden("cutmix_box_masks", case=r"c\d+")
def test_box_masks(golden):
  low, high, boxes, random_aspect, by_area, within_bounds, invert = golden["settings"].tolist()
  uniforms = [golden[name] for name in sorted(golden) if name.startswith("u")]
  assert len(uniforms) == 2 + random_aspect and uniforms[0].shape[1] == boxes
  # The recorded draws are float64, and an edge may round the other way in float32.
  with jax.enable_x64(True):
    area, *aspect, position = map(jnp.asarray, uniforms)
    masks = mixing.box_masks(
      mixing.BoxDraws(area, aspect[0] if aspect else None, position),
      tuple(golden["hw"].tolist()),
      area_range=(round(low, 6), round(high, 6)),
      by_area=bool(by_area),
      within_bounds=bool(within_bounds),
      invert=bool(invert),
    )
  np.testing.assert_array_equal(masks, golden["masks"])


@pytest.mark.golden("cutmix_box_masks")
def test_box_masks_are_distributed_as_the_official_ones(golden):
  for kind, area_range in {"cutmix": (0.5, 0.5), "cutout": (0.0, 1.0)}.items():
    stat = golden.under(f"stat_{kind}_")
    size = 8 * len(stat["pixel_mean_map"])  # the map holds every 8th pixel
    draws = mixing.draw_boxes(jax.random.key(0), 4000, boxes=1)
    masks = np.asarray(mixing.box_masks(draws, (size, size), area_range=area_range))
    area = masks.mean((1, 2))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=0.02)
    close([area.mean(), area.std(), area.min(), area.max()], stat["area_mean_std_min_max"])
    for side, axes in {"height": 2, "width": 1}.items():
      lengths = masks.any(axes).mean(1)
      close(
        np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95]), stat[f"{side}_quantiles_5_25_50_75_95"]
      )
    # The standard error of one pixel's mean is up to 0.008, in both maps.
    np.testing.assert_allclose(masks.mean(0)[::8, ::8], stat["pixel_mean_map"], rtol=0, atol=0.045)


@pytest.mark.golden("cutmix_consistency", case=r"c\d+")
def test_consistency(golden):
  mask = single(golden["mask"]).astype(bool)
  valid = mixing.mix(mask, single(golden["valid0"]), single(golden["valid1"]))
  teacher = mixing.mix(
    mask, toy.nhwc(golden["teacher_logits0"]), toy.nhwc(golden["teacher_logits1"])
  )
  mixed = mixing.mix(mask, toy.nhwc(golden["x0"]), toy.nhwc(golden["x1"]))
  for got, name in (
    (mixed, "x_mixed"),
    (valid[..., None], "valid_mixed"),
    (teacher, "teacher_logits_mixed"),
  ):
    np.testing.assert_array_equal(got, toy.nhwc(golden[name]))
  sure = jnp.max(jax.nn.softmax(teacher), axis=-1)

  def loss(student, distance, mode):
    values = distances.per_pixel(cutmix_seg.DISTANCES[distance], student, teacher)
    return targets.confident_mean(
      values, sure, valid, min_confidence=number(golden["conf_thresh"]), per=PER[mode]
    )

  student = toy.nhwc(golden["student_logits"])
  for distance in cutmix_seg.DISTANCES:
    rtol = 1e-5 if distance in ("var", "kld") else 1e-4
    for mode in PER:
      value, fraction = loss(student, distance, mode)
      np.testing.assert_allclose(
        value, golden[f"{distance}_{mode}"], rtol=rtol, err_msg=f"{distance} {mode}"
      )
      np.testing.assert_allclose(
        fraction, 1 if mode == "noconf" else golden["conf_rate"], rtol=1e-6
      )
  gradients = [name.removeprefix("grad_") for name in golden if name.startswith("grad_")]
  assert gradients
  for name in gradients:
    distance, mode = name.rsplit("_", 1)
    gradient = jax.grad(lambda student: loss(student, distance, mode)[0])(student)
    np.testing.assert_allclose(gradient, toy.nhwc(golden[f"grad_{name}"]), rtol=1e-4, atol=1e-8)


@pytest.mark.golden("cutmix_ict")
def test_ict(golden):
  share = jnp.asarray(golden["lam"].reshape(-1))
  seen = ict.blend(share, toy.nhwc(golden["x0"]), toy.nhwc(golden["x1"]))
  target, sure = ict.blended_prediction(
    share, toy.nhwc(golden["teacher_logits0"]), toy.nhwc(golden["teacher_logits1"])
  )
  np.testing.assert_allclose(seen, toy.nhwc(golden["x_mixed"]), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(target, toy.nhwc(golden["teacher_prob_mixed"]), rtol=1e-5, atol=1e-7)
  values = ict.consistency(toy.nhwc(golden["student_logits"]), target)
  everywhere = jnp.ones(values.shape, bool)
  value, fraction = targets.confident_mean(
    values, sure, everywhere, min_confidence=number(golden["conf_thresh"])
  )
  np.testing.assert_allclose(value, golden["loss_var"], rtol=1e-5)
  np.testing.assert_allclose(fraction, golden["conf_rate"], rtol=1e-6)


@pytest.mark.golden("cutmix_ema", case=r"c\d+")
def test_ema_with_statistics(golden):
  def net(prefix):
    arrays = {
      name: value
      for name, value in golden.under(prefix).items()
      if not name.endswith("num_batches_tracked")
    }
    params, stats = toy.from_torch(arrays)
    return NetState(
      step=0, apply_fn=None, params=params, tx=None, opt_state=None, batch_stats=stats
    )

  steps = 1 + max(int(name[1 : name.index("_")]) for name in golden if name.startswith("s"))
  teacher = net("t0_")
  toy.assert_tree_close(nets.teacher_of(net("s0_")).params, teacher.params, 0, "at birth")
  for step in range(1, steps):
    teacher = nets.ema(teacher, net(f"s{step}_"), number(golden["alpha"]), statistics="average")
    want = net(f"t{step}_")
    toy.assert_tree_close(teacher.params, want.params, 1e-6, f"step {step}")
    toy.assert_tree_close(teacher.batch_stats, want.batch_stats, 1e-6, f"step {step}")


@pytest.mark.golden("cutmix_schedules")
def test_schedules(golden):
  ramp = schedules.sigmoid_rampup(golden["ramp_epoch"], golden["ramp_len"].item())
  np.testing.assert_allclose(ramp, golden["ramp_val"], rtol=1e-6)
  steps = np.arange(len(golden["poly_lr"]))
  rate = schedules.poly(
    steps, base=number(golden["poly_base_lr"]), total_steps=golden["poly_total"].item()
  )
  np.testing.assert_allclose(rate, golden["poly_lr"], rtol=1e-6, atol=1e-9)


@pytest.mark.golden("cutmix_eval")
def test_iou_with_absent_classes_as_zero(golden):
  matrix = confusion.confusion_matrix(
    jnp.asarray(golden["truth"]), jnp.asarray(golden["pred"]), golden["num_classes"].item()
  )
  got = confusion.scores(matrix, absent_classes="zero")
  np.testing.assert_array_equal(np.diag(got.matrix), golden["intersection"])
  np.testing.assert_allclose(np.nan_to_num(got.iou), golden["iou"], atol=1e-6)
  np.testing.assert_allclose(got.miou, golden["miou"], atol=1e-6)


def check_steps(golden, *, factors=None, frozen_batch_norm="none"):
  hp = {name: value.item() for name, value in golden.under("hp/").items() if value.ndim == 0}
  b1, b2 = golden["hp/adam_betas"].tolist()
  steps = toy.num_steps(golden)
  # Adam at a constant rate; everything before the classifier at the rate of pretrained parameters.
  rates = (factors or {}) | {"^(?!cls)": hp["lr_conv_bn"] / hp["lr_cls"]}
  optimizer = optim.adamw(lambda step: hp["lr_cls"], b1=b1, b2=b2, weight_decay=0.0, factors=rates)
  network = as_network(toy.Toy(hp["hid"], hp["num_classes"]))
  task = Task(
    hp["num_classes"], steps, network, toy.recording(optimizer), losses.cross_entropy_mean
  )
  method = cutmix_seg.cutmix_seg(
    task,
    strong_views=1,
    weight=hp["cons_weight"],
    min_confidence=hp["conf_thresh"],
    decay=hp["teacher_alpha"],
    frozen_batch_norm=frozen_batch_norm,
  )
  state = toy.start(method, golden, {"student": "init/student/", "teacher": "init/teacher/"})

  def unlabeled(source, step):
    return {
      "weak": toy.nhwc(golden[f"image_unsup{source}_weak_{step}"]),
      "strong": toy.nhwc(golden[f"image_unsup{source}_strong_{step}"])[:, None],
      "valid": single(golden[f"valid{source}_{step}"]),
    }

  def batch(step):
    labeled = {
      "image": toy.nhwc(golden[f"image_{step}"]),
      "label": jnp.asarray(golden[f"label_{step}"].astype(np.int32)),
    }
    return {"labeled": labeled, "unlabeled": unlabeled(0, step), "partner": unlabeled(1, step)}

  masks = [{"mask": single(golden[f"mask_{step}"]).astype(bool)} for step in range(steps)]
  run = toy.run(method, state, map(batch, range(steps)), masks)
  for step, (after, metrics) in enumerate(run):
    np.testing.assert_allclose(
      metrics["loss_supervised"], golden["log/sup_loss"][step], rtol=0, atol=2e-5
    )
    weighted = hp["cons_weight"] * golden["log/cons_loss"][step]
    np.testing.assert_allclose(metrics["loss_consistency"], weighted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(
      metrics["confident_fraction"], golden["log/conf_rate"][step], rtol=0, atol=1e-6
    )
    for role in ("student", "teacher"):
      toy.assert_net(after.nets[role], golden, f"step{step}/{role}/")
    yield step, after


@pytest.mark.golden("cutmix_train_steps")
def test_steps(golden):
  for step, state in check_steps(golden):
    toy.assert_gradient(state.nets["student"], golden, f"step{step}/grad/student/")


@pytest.mark.golden("cutmix_frozen_bn_train_steps")
def test_steps_with_frozen_batch_norm(golden):
  start = toy.from_torch(golden.under("init/student/"))[1]
  # In the official DeepLab v2 scale and bias of batch norms do not learn.
  for step, state in check_steps(
    golden, factors={"bn/(scale|bias)$": 0.0}, frozen_batch_norm="all"
  ):
    for role in ("student", "teacher"):
      toy.assert_tree_close(state.nets[role].batch_stats, start, 1e-6, f"statistics of the {role}")
    want = toy.from_torch(golden.under(f"step{step}/grad/student/"))[0]
    gradient = state.nets["student"].opt_state[0]
    toy.assert_tree_close(
      {name: gradient[name] for name in want}, want, 1e-5, f"gradient of step {step}"
    )
