"""Learning Pseudo Labels: its losses, its first stage and its inference against the official
code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_functions import close, labels, last

from pseudoseg_jax import optim
from pseudoseg_jax.contract import IGNORE_LABEL, Network, Task
from pseudoseg_jax.evaluation import inference, weak_labels
from pseudoseg_jax.methods import learn_pseudo
from pseudoseg_jax.models.table import as_network
from pseudoseg_jax.ops import class_aware, losses, resize, schedules


def mean_loss(logits, image_label, label, temperature=1.0):
  per_pixel = class_aware.cross_entropy(logits, image_label, label, temperature=temperature)
  return losses.mean_over(per_pixel, label != IGNORE_LABEL)


def check_class_aware(golden, atol, rtol):
  logits, image_label, label = (
    last(golden["logits"]),
    jnp.asarray(golden["category"]),
    labels(golden["label"]),
  )
  temperature = float(golden.get("T", 1))
  close(
    class_aware.softmax(logits, image_label, temperature=temperature),
    last(golden["softmax"]),
    atol,
    rtol,
  )
  close(
    class_aware.log_softmax(logits, image_label, temperature=temperature),
    last(golden["logsoftmax"]),
    1e-5,
    1e-4,
  )
  value, gradient = jax.value_and_grad(mean_loss)(logits, image_label, label, temperature)
  close(value, golden["loss_mean"], atol, rtol)
  close(gradient, last(golden["grad_logits"]), atol, rtol)
  return logits, image_label, label, temperature


@pytest.mark.golden("lpl_class_aware_ce", case=r"case\d+")
def test_class_aware_cross_entropy(golden):
  logits, image_label, label, temperature = check_class_aware(golden, 1e-6, 1e-5)
  per_pixel = class_aware.cross_entropy(logits, image_label, label, temperature=temperature)
  close(per_pixel, golden["loss_none"], 1e-6, 1e-5)
  np.testing.assert_array_equal(class_aware.best_class(logits, image_label), golden["argmax"])


@pytest.mark.golden("lpl_class_aware_ce_edge")
def test_class_aware_cross_entropy_of_extreme_logits(golden):
  logits, image_label, label, _ = check_class_aware(golden, 1e-5, 1e-4)
  close(
    mean_loss(logits, image_label, labels(golden["label_outside_set"])),
    golden["loss_label_outside_set"],
    1e-5,
    1e-4,
  )
  # NaN in the official code.
  assert (
    np.isnan(golden["loss_all_ignored"])
    and mean_loss(logits, image_label, jnp.full_like(label, IGNORE_LABEL)) == 0
  )


def batch_of(golden, strong):
  """A recorded batch, whose first images are the labeled ones; true labels of other images are left
  out where the run had none.
  """
  label = labels(golden["label"])
  known = jnp.asarray(golden["has_pixel_label"] > 0)[:, None, None]
  image = toy.nhwc(golden["image"]) if "image" in golden else jnp.zeros((*label.shape, 3))
  label, classes = (
    jnp.where(known, label, IGNORE_LABEL),
    jnp.asarray(golden["category"], jnp.float32),
  )
  parts = {"image": image, "label": label, "image_label": classes}
  labeled, unlabeled = (
    {name: array[rows] for name, array in parts.items()}
    for rows in (slice(strong), slice(strong, None))
  )
  unlabeled["weak"] = unlabeled.pop("image")
  return {"labeled": labeled, "unlabeled": unlabeled}


LOSSES = {
  "loss_classification": "loss_cls_hybrid",
  "loss_supervised": "loss_seg_hybrid",
  "loss_pseudo": "loss_seg_pseudo",
  "loss_progressive": "loss_pct",
  "loss": "loss",
}
COUNTS = {"count_truth": "count_gt", "count_predicted": "count_pred", "count_hit": "count_tp"}


def check_evaluation(memory, step, unlabeled, power):
  for ours, theirs in COUNTS.items():
    close(memory[ours], step[theirs], 1e-3)
  iou = learn_pseudo.running_iou(memory)
  close(iou, step["iou"], 1e-6)
  weight = learn_pseudo.sample_weight(iou, unlabeled["image_label"], power=power)
  close(weight, step["sample_weight"].reshape(-1), 1e-6)


def check_pseudo_labels(logits, batch, recorded):
  """The recorded ones are of the whole batch; of its unlabeled half, true labels stand in place of
  those of labeled images.
  """
  classes = jnp.concatenate([batch[half]["image_label"] for half in ("labeled", "unlabeled")])
  label = jnp.concatenate(
    [jnp.full_like(batch["labeled"]["label"], IGNORE_LABEL), batch["unlabeled"]["label"]]
  )
  np.testing.assert_array_equal(learn_pseudo.pseudo_label(logits, classes, label), recorded)


def logits_network(shape):
  """A network whose parameters are its logits."""

  def apply(params, batch_stats, images, **keywords):
    return params["logits"], batch_stats

  return Network(lambda key: ({"logits": jnp.zeros(shape)}, {}), apply)


@pytest.mark.golden("lpl_stage1_objective")
def test_objective(golden):
  count, height, width = golden["step0_label"].shape
  num_classes, power = golden["num_classes"].item(), golden["score_power"].item()
  network = logits_network((count, height, width, num_classes))
  optimizer = toy.recording(optim.sgd(lambda step: 1.0, momentum=0.0))
  method = learn_pseudo.learn_pseudo(
    Task(num_classes, 1, network, optimizer, losses.cross_entropy_mean),
    score_power=power,
    score_momentum=round(golden["score_momentum"].item(), 6),
  )
  state, update = method.init(jax.random.key(0)), jax.jit(method.update)
  for number in range(golden["steps"].item()):
    step = golden.under(f"step{number}_")
    logits = {role: last(step[f"pred_{role}"]) for role in ("hybrid", "pseudo")}
    batch = batch_of(step, golden["sub_batch"].item())
    for role, name in {"hybrid": "hybrid", "pseudo": "pseudonet"}.items():
      check_pseudo_labels(logits[role], batch, step[f"pseudo_label_from_{name}"])
      state.nets[role] = state.nets[role].replace(params={"logits": logits[role]})
    state, metrics = update(state, batch, method.draw(jax.random.key(number), batch))
    check_evaluation(state.memory, step, batch["unlabeled"], power)
    for ours, theirs in LOSSES.items():
      close(metrics[ours], step[theirs], 1e-6, 1e-5)
    for role in logits:
      close(state.nets[role].opt_state[0]["logits"], last(step[f"grad_pred_{role}"]), 1e-7, 1e-4)


@pytest.mark.golden("lpl_train_steps")
def test_steps(golden):
  hp = {name: value.item() for name, value in golden.under("hp/").items() if value.ndim == 0}
  rate = functools.partial(
    schedules.poly, base=hp["lr"], total_steps=hp["train_iterations"], power=hp["lr_power"]
  )
  # There are separate rates for the backbone, the rest of the network and its classifier.
  factors = dict(zip(("^conv", "^bn", "^cls"), golden["hp/lr_rate"].tolist(), strict=True))
  optimizer = optim.sgd(
    rate,
    momentum=hp["momentum"],
    weight_decay=hp["weight_decay"],
    decay_scope="all",
    factors=factors,
  )
  network = as_network(toy.Toy(hp["hid"], hp["num_classes"]))
  method = learn_pseudo.learn_pseudo(
    Task(
      hp["num_classes"],
      hp["train_iterations"],
      network,
      toy.recording(optimizer),
      losses.cross_entropy_mean,
    ),
    score_power=hp["score_pow"],
    score_momentum=hp["score_momentum"],
  )
  state = toy.start(method, golden, {"hybrid": "init/hybrid/", "pseudo": "init/pseudo/"})
  batches = []
  for number in range(toy.num_steps(golden)):
    recorded = {
      name: golden[f"{name}_{number}"] for name in ("image", "label", "category", "has_pixel_label")
    }
    batches.append(batch_of(recorded, hp["sub_batch"]))
  for number, (after, metrics) in enumerate(toy.run(method, state, batches)):
    check_evaluation(
      after.memory, golden.under(f"step{number}/"), batches[number]["unlabeled"], hp["score_pow"]
    )
    for ours, theirs in LOSSES.items():
      close(metrics[ours], golden[f"log/{theirs}"][number], 2e-5)
    close(metrics["learning_rate"] * golden["hp/lr_rate"], golden["log/lr_hybrid"][number], 0, 1e-6)
    for role in ("hybrid", "pseudo"):
      toy.assert_gradient(after.nets[role], golden, f"step{number}/grad/{role}/")
      toy.assert_net(after.nets[role], golden, f"step{number}/{role}/")


def both_ways(golden, scale):
  """The evaluator's sum of a recorded network's logits on an image and on its mirror image, at one
  of the recorded scales.
  """
  straight, mirrored = (last(golden[f"logits_scale{scale}_flip{flip}"]) for flip in (0, 1))
  _, height, width, _ = straight.shape
  ramp = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[:, None], (1, height, width, 1))
  network = lambda images: jnp.where(images[0, 0, 0, 0] < images[0, 0, -1, 0], straight, mirrored)
  size = jnp.array([[height, width]])
  return inference.infer(
    network, ramp, size, protocol=inference.Protocol(flip=True), mean=(0.0,), std=(1 / 255,)
  )


@pytest.mark.golden("lpl_inference_image_labels")
def test_inference_with_image_labels(golden):
  size, total, passes = (golden["height"].item(), golden["width"].item()), 0.0, 0.0
  for scale in range(len(golden["scales"])):
    scores, times = both_ways(golden, scale)
    # The official scores of a scale are resized with their corners on the image's; a Protocol puts
    # pixel centres there.
    total, passes = (
      total + resize.bilinear_align_corners(scores, size),
      passes + resize.bilinear_align_corners(times, size),
    )
  mean = total / passes
  close(mean[0], np.moveaxis(golden["mean_logits"], 0, -1), 1e-5)
  np.testing.assert_array_equal(jnp.argmax(mean[0], -1), golden["argmax_without_image_labels"])
  masked = weak_labels.mask_logits(
    mean, jnp.broadcast_to(jnp.asarray(golden["category"], jnp.float32), mean.shape)
  )
  close(jax.nn.softmax(masked), last(golden["masked_softmax"]), 1e-5)
  for name in ("pseudo_label", "val_label_with_image_labels"):
    np.testing.assert_array_equal(jnp.argmax(masked[0], -1), golden[name])
