"""GCT: kernels, flaw maps, losses, the flaw detector and whole steps against the official code."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_train_steps import labels

from pseudoseg_jax import optim
from pseudoseg_jax.contract import IGNORE_LABEL, Task
from pseudoseg_jax.methods import gct
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.table import as_network
from pseudoseg_jax.ops import flaws, losses, schedules


def maps(array):
  """Flaw maps [N, 1, H, W] -> [N, H, W]."""
  return jnp.asarray(array[:, 0])


def close(got, want, atol, rtol=0.0):
  np.testing.assert_allclose(np.asarray(got), want, atol=atol, rtol=rtol)


@pytest.mark.golden("gct_gaussian_kernel")
def test_kernels(golden):
  sizes = [[flaws.odd(side / part) for part in (8, 4, 16)] for side in golden["im_size"].tolist()]
  np.testing.assert_array_equal(sizes, golden["ksize_blur_reblur_handler"])
  kernels = {
    int(name.removeprefix("kernel_")): kernel
    for name, kernel in golden.items()
    if re.fullmatch(r"kernel_\d+", name)
  }
  assert kernels
  for size, kernel in kernels.items():
    taps = flaws.blur_taps(size)
    close(np.outer(taps, taps), kernel, 1e-7)
    impulse = np.zeros((1, 2 * size + 1, 2 * size + 3), np.float32)
    impulse[0, size, size + 1] = 1
    around = (
      slice(size - size // 2, size + size // 2 + 1),
      slice(size + 1 - size // 2, size + 2 + size // 2),
    )
    close(flaws.blur(impulse, size)[0][around], kernel, 1e-7)


@pytest.mark.golden("gct_flawmap_target", case=r"case\d+")
def test_flaw_target(golden):
  probabilities = jax.nn.softmax(toy.nhwc(golden["logits"]))
  # Ignored pixels are those whose one-hot vector is all zero.
  label = jnp.where(golden["onehot_sum"] == 0, IGNORE_LABEL, labels(golden["label"]))
  np.testing.assert_array_equal(label == IGNORE_LABEL, golden["label"] == IGNORE_LABEL)
  close(
    2 * golden["mu"].item() * flaws.difference(probabilities, label),
    golden["diff_before_pipeline"][:, 0],
    1e-6,
  )
  target = flaws.flaw_target(
    probabilities, label, base_pixels=golden["im_size"].item(), dilations=golden["nu"].item()
  )
  close(target, golden["target"][:, 0], 1e-5)


@pytest.mark.golden("gct_flawmap_target_edge")
def test_flaw_target_of_a_perfect_prediction(golden):
  label = labels(golden["label"])
  perfect = jax.nn.one_hot(label, 3)
  target = flaws.flaw_target(
    perfect, label, base_pixels=golden["im_size"].item(), dilations=golden["nu"].item()
  )
  np.testing.assert_array_equal(target, golden["target_when_pred_equals_onehot"][:, 0])


@pytest.mark.golden("gct_flawmap_handler", case=r"case\d+")
def test_handler(golden):
  handled, clipped = flaws.handle_flaws(maps(golden["raw"]), base_pixels=golden["im_size"].item())
  close(handled, golden["handled"][:, 0], 1e-5)
  np.testing.assert_array_equal(clipped, golden["raw_after_call"][:, 0])


@pytest.mark.golden("gct_dynamic_consistency", case=r"case\d+")
def test_dynamic_consistency(golden):
  first, second, both_bad = flaws.dynamic_consistency(
    toy.nhwc(golden["l_pred"]),
    toy.nhwc(golden["r_pred"]),
    maps(golden["l_flaw"]),
    maps(golden["r_flaw"]),
    threshold=golden["threshold"].item(),
  )
  np.testing.assert_array_equal(first, toy.nhwc(golden["l_dc_target"]))
  np.testing.assert_array_equal(second, toy.nhwc(golden["r_dc_target"]))
  for side in "lr":
    np.testing.assert_array_equal(both_bad, golden[f"{side}_fc_mask"][:, 0])


@pytest.mark.golden("gct_losses")
def test_losses(golden):
  labeled = golden["labeled_batch_size"].item()
  label, target, both_bad = (
    labels(golden["label"])[:labeled],
    toy.nhwc(golden["dc_target"]),
    maps(golden["fc_mask"]) > 0,
  )
  of_consistency = golden["dc_rampup"].item() * golden["dc_scale"].item()

  def total(logits, flaw_map):
    supervised = losses.cross_entropy_mean(logits[:labeled], label, denominator="all")
    corrected = golden["fc_scale"].item() * gct.flaw_correction(flaw_map, both_bad)
    consistent = of_consistency * gct.consistency(jax.nn.softmax(logits), target)
    return supervised + corrected + consistent, (supervised, corrected, consistent)

  (loss, parts), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(
    toy.nhwc(golden["logits"]), maps(golden["flawmap"])
  )
  close(loss, golden["total_loss"], 1e-6, 1e-5)
  for part, name in zip(parts, ("task_loss", "fc_loss", "dc_loss"), strict=True):
    close(part, golden[name], 1e-6, 1e-5)
  close(gradients[0], toy.nhwc(golden["grad_logits"]), 1e-6, 1e-5)
  close(gradients[1], golden["grad_flawmap"][:, 0], 1e-6, 1e-5)

  def detector_loss(left, right):
    each = [
      golden["fd_scale"].item() * gct.detection(flaw_map[:labeled], maps(golden[name]))
      for flaw_map, name in ((left, "l_flaw_target"), (right, "r_flaw_target"))
    ]
    return sum(each) / 2, each

  flaw_maps = maps(golden["l_flawmap"]), maps(golden["r_flawmap"])
  (loss, each), gradients = jax.value_and_grad(detector_loss, (0, 1), has_aux=True)(*flaw_maps)
  close(loss, golden["fd_loss"], 1e-6, 1e-5)
  for side, part, gradient in zip("lr", each, gradients, strict=True):
    close(part, golden[f"{side}_fd_loss"], 1e-6, 1e-5)
    close(gradient, golden[f"grad_{side}_flawmap"][:, 0], 1e-6, 1e-5)


def stages_of(arrays):
  return 1 + sum(bool(re.fullmatch(r"(.*/)?conv\d+_1\.weight", name)) for name in arrays)


@pytest.mark.golden("gct_flaw_detector")
def test_flaw_detector(golden):
  arrays = golden.under("param/")
  params, stats = toy.from_torch(arrays)
  images, said = toy.nhwc(golden["image"]), toy.nhwc(golden["pred"])
  detector = heads.flaw_detector(
    images.shape[-1] + said.shape[-1], width=golden["ndf"].item(), stages=stages_of(arrays)
  )
  born, born_stats = detector.init(jax.random.key(0))
  assert jax.tree.map(jnp.shape, (born, born_stats)) == jax.tree.map(jnp.shape, (params, stats))

  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def mean_square(params, said):
    flaw_map, moved = detector.apply(params, stats, images, said, train=True)
    return jnp.mean(jnp.square(flaw_map)), (flaw_map, moved)

  (_, (flaw_map, moved)), (by_params, by_said) = jax.jit(mean_square)(params, said)
  close(flaw_map, golden["flawmap_train"][:, 0], 2e-5, 1e-4)
  toy.assert_tree_close(
    moved, toy.from_torch(golden.under("after_train_forward/"))[1], 1e-5, "statistics"
  )
  in_inference, _ = detector.apply(params, moved, images, said, train=False)
  close(in_inference, golden["flawmap_eval_after_one_train_forward"][:, 0], 2e-5, 1e-4)

  for name in ("conv1", "classifier"):
    want = golden[f"grad_{name}_weight"].transpose(2, 3, 1, 0)
    close(by_params[name]["kernel"], want, 1e-6, 1e-3)
  close(by_said[:, 40:56, 30:46], toy.nhwc(golden["grad_pred_of_mean_sq_patch"]), 1e-6, 1e-3)
  close(jnp.sum(by_said, (0, 1, 2)), golden["grad_pred_of_mean_sq_channel_sum"], 1e-6, 1e-3)
  close(jnp.linalg.norm(by_said), golden["grad_pred_of_mean_sq_l2"], 1e-6, 1e-3)


def without_idle_biases(params):
  """Biases before a normalization have no gradient but round-off, which Adam makes steps of."""
  return {
    name: {"kernel": part["kernel"]} if name.startswith("conv") else part
    for name, part in params.items()
  }


@pytest.mark.golden("gct_train_steps")
def test_steps(golden):
  hp = {name: value.item() for name, value in golden.under("hp/").items()}
  # Of the run, which began in the midst, the ramp counts the steps before it, the learning rates do
  # not. Counted from the run's beginning, (1 - t)^0.9 is the same curve but for a factor.
  begun, length = hp["epoch"] * hp["iters_per_epoch"], hp["epochs"] * hp["iters_per_epoch"]
  total_steps = begun + length
  grown = (total_steps / length) ** 0.9
  optimizer = optim.sgd(
    functools.partial(
      schedules.poly, base=grown * hp["lr"], total_steps=total_steps, shift_steps=1
    ),
    momentum=hp["momentum"],
    weight_decay=hp["weight_decay"],
    decay_scope="all",
    factors={"^cls": 10.0},
  )
  network = as_network(toy.Toy(hp["hid"], hp["num_classes"]))
  criterion = functools.partial(losses.cross_entropy_mean, denominator="all")
  method = gct.gct(
    Task(hp["num_classes"], total_steps, network, optimizer, criterion),
    weight=hp["dc_ssl_scale"],
    flaw_correction_weight=hp["fc_ssl_scale"],
    detector_weight=hp["fd_scale"],
    threshold=round(hp["dc_threshold"], 6),
    rampup_fraction=hp["dc_rampup_epochs"] * hp["iters_per_epoch"] / total_steps,
    dilations=hp["nu"],
    detector_learning_rate=grown * hp["fd_lr"],
    detector_width=hp["ndf"],
    detector_stages=stages_of(golden.under("init/fd/")),
    kernel_base_pixels=hp["im_size"],
  )
  prefixes = {"left": "l/", "right": "r/", "detector": "fd/"}
  state = toy.start(method, golden, {role: f"init/{prefix}" for role, prefix in prefixes.items()})
  state = state.replace(step=jnp.int32(begun))
  labeled = hp["labeled_batch_size"]
  batches = [
    {
      "labeled": {
        "image": toy.nhwc(golden[f"image_{index}"][:labeled]),
        "label": labels(golden[f"label_{index}"][:labeled]),
      },
      "unlabeled": {"weak": toy.nhwc(golden[f"image_{index}"][labeled:])},
    }
    for index in range(len(golden["log/l_task_loss"]))
  ]
  logged = {
    "supervised": ("task", 1),
    "flaw_correction": ("fc", 1),
    "consistency": ("dc", 1),
    "detector": ("fd", 2),
  }
  for index, (state, metrics) in enumerate(toy.run(method, state, batches)):  # noqa: B007 - the last one is compared below
    for ours, (theirs, factor) in logged.items():
      for role in gct.PAIR:
        want = golden[f"log/{prefixes[role][0]}_{theirs}_loss"][index]
        np.testing.assert_allclose(
          factor * metrics[f"loss_{ours}_{role}"],
          want,
          rtol=0,
          atol=1e-4,
          err_msg=f"{ours} {role} {index}",
        )
  for role in gct.PAIR:
    toy.assert_net(
      state.nets[role], golden, f"final/{prefixes[role]}", params=2e-6, statistics=2e-6
    )
  params, stats = toy.from_torch(golden.under("final/fd/"))
  detector = state.nets["detector"]
  toy.assert_tree_close(
    without_idle_biases(detector.params), without_idle_biases(params), 2e-6, "detector"
  )
  toy.assert_tree_close(detector.batch_stats, stats, 1e-4, "statistics")
