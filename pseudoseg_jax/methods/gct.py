"""Guided collaborative training (GCT): a flaw detector guides two networks.

The network in which the flaw detector finds fewer flaws teaches the other, pixel by pixel.

Ke et al., "Guided Collaborative Training for Pixel-wise Semi-Supervised Learning", ECCV 2020; facts
from the official code (ZHKKKe/PixelSSL), which is followed where the paper differs from it.
"""

import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, optim
from pseudoseg_jax.contract import Array, Method, Needs, NetState, Panel, State, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import flaws, losses, schedules
from pseudoseg_jax.options import Allowed, Count, NotNegative, Positive, Share, checked

PAIR = ("left", "right")


def detection(flaw_map, target):
  """Computes L_fd, the mean over pixels of (flaw map - target)^2.

  f32[B, H, W] x f32[B, H, W] -> f32[].
  """
  return jnp.mean(jnp.square(flaw_map - target))


def flaw_correction(flaw_map, both_bad):
  """Computes L_fc: flaws are to be 0 where both models are bad.

  f32[B, H, W] x bool[B, H, W] -> f32[], a mean over all pixels.
  """
  return jnp.mean(jnp.where(both_bad, jnp.square(flaw_map), 0))


def consistency(probabilities, target):
  """Computes L_dc, the mean over pixels and classes of (p - target)^2.

  f32[B, H, W, K] x f32[B, H, W, K] -> f32[].
  """
  return jnp.mean(losses.squared_distance(probabilities, target))


class Judgement(NamedTuple):
  """A judgment on which of both models is right where, by their roles.

  No gradient passes but that of the detector's passes.
  """

  probabilities: dict[str, Array]  # f32[B, H, W, K]
  flaw_maps: dict[str, Array]  # f32[B, H, W], with the detector's gradient
  handled_flaws: dict[str, Array]  # f32[B, H, W]
  targets: dict[str, Array]  # f32[B, H, W, K]
  both_bad: Array  # bool[B, H, W]


@checked
def gct(
  task: Task,
  *,
  weight: NotNegative = 100.0,
  flaw_correction_weight: NotNegative = 1.0,
  detector_weight: NotNegative = 10.0,
  threshold: Share = 0.6,
  rampup_fraction: Share = 5 / 45,
  dilations: Annotated[int, Allowed(least=0, whole=True)] = 1,
  detector_learning_rate: Positive = 1e-4,
  detector_width: Annotated[int, Allowed(least=2, whole=True)] = 64,
  detector_stages: Count = 4,
  kernel_base_pixels: Annotated[int, Allowed(least=0, whole=True)] = 0,
  shared_batch_norm: bool = True,
  relu_straight_through_flaw: bool = True,
) -> Method:
  """Trains two task models and a detector of their flaws.

  The task models are "left" and "right". The "detector" learns from labeled images where they are
  wrong. [GCT, section 3]

  Consistency and flaw correction are both of labeled and unlabeled images; every pixel counts,
  padding too. As officially each task model sees the batch twice with the same weights, and the
  detector sees each prediction twice: running statistics move twice and four times a step. Only one
  of them need be computed: for the same reason both passes have one key for dropout. All three
  learn from one objective in which each loss reaches its own network alone. Which of the two models
  was reported is not known; both are scored. A weight of 0 leaves that constraint out; the official
  mode with flaw correction alone applies it to all pixels, not only where both are bad.

  Args:
    weight: of the consistency term.
    flaw_correction_weight: of the flaws that the detector sees where both models are bad.
    detector_weight: of the detector's own loss.
    threshold: flaws above it are bad, 0..1.
    rampup_fraction: part of the training over which `weight` rises as exp(-5 (1 - t)^2), 0.0067 at
      first; 0 for none.
    dilations: see `flaws.flaw_target`.
    detector_learning_rate: of the detector's Adam; falls to 0 as (1 - t)^0.9.
    detector_width, detector_stages: of the flaw detector, its first stage's channels and how often
      sides halve. Four stages say one thing for about 32x32 pixels: 15x15 flaws for 513 pixels a
      side, a single one below 92, which tells nothing; 128 pixels want 3 stages, 64 want 2.
    kernel_base_pixels: side that the sizes of blurs are derived from; 0 for the shorter side of the
      view. Officially the crop.
    shared_batch_norm: labeled and unlabeled images pass the task models as one batch with common
      batch statistics (PixelSSL), or separately (TorchSemiSeg's port, which made the rows of GCT in
      the CPS paper).
    relu_straight_through_flaw: the detector's own loss sees its negative flaws as 0, and its
      gradient does not.
  """
  network = task.network
  detector = heads.flaw_detector(
    network.in_channels + task.num_classes, width=detector_width, stages=detector_stages
  )
  # One step ahead, as PixelSSL's loops set all rates.
  rate = functools.partial(
    schedules.poly, base=detector_learning_rate, total_steps=task.total_steps, shift_steps=1
  )
  optimizers = dict.fromkeys(PAIR, task.optimizer) | {"detector": optim.adamw(rate, b2=0.99)}

  def init(key):
    keys = jax.random.split(key, 3)
    pair = {role: nets.create(task, key) for role, key in zip(PAIR, keys, strict=False)}
    networks = pair | {"detector": nets.create_from_head(detector, keys[2], optimizers["detector"])}
    return State(step=jnp.zeros([], jnp.int32), nets=networks)

  def draw(key, batch):
    return nets.dropout_keys(key, *PAIR)

  def base_pixels(images):
    return kernel_base_pixels or min(images.shape[1:3])

  def predict(live, role, images, num_labeled, draws):
    """Computes a task model's logits and probabilities.

    Returns both, and the network with its statistics moved; the first `num_labeled` of the images
    are labeled.
    """
    batches = (
      (images,)
      if shared_batch_norm or not num_labeled
      else (images[:num_labeled], images[num_labeled:])
    )
    logits, net = nets.forward(network, live[role], *batches, dropout=draws[role])
    logits = jnp.concatenate(logits)
    return logits, jax.nn.softmax(logits), net

  def detect(net, params, images, probabilities):
    """Computes the flaw map of a prediction.

    Returns the flaw map, and the detector with its statistics moved.

    Args:
      params: its parameters, or those without gradient.
    """
    flaw_map, batch_stats = detector.apply(
      params, net.batch_stats, images, probabilities, train=True
    )
    return flaw_map, net.replace(batch_stats=batch_stats)

  def judge(live, images, num_labeled, draws) -> tuple[Judgement, dict[str, NetState]]:
    """Judges which model is right where.

    Returns the judgment, and the networks with their statistics moved.
    """
    live, probabilities, flaw_maps, handled = dict(live), {}, {}, {}
    for role in PAIR:
      _, prediction, live[role] = predict(live, role, images, num_labeled, draws)
      probabilities[role] = jax.lax.stop_gradient(prediction)
      flaw_maps[role], live["detector"] = detect(
        live["detector"], live["detector"].params, images, probabilities[role]
      )
      handled[role], clipped = flaws.handle_flaws(flaw_maps[role], base_pixels=base_pixels(images))
      if relu_straight_through_flaw:
        # The official handler zeroes negatives in place, in the very map that the detector's loss
        # reads later; the gradient of that loss knows nothing of it. (On several GPUs only for the
        # images on the first.)
        flaw_maps[role] += jax.lax.stop_gradient(clipped - flaw_maps[role])
    *targets, both_bad = flaws.dynamic_consistency(
      *probabilities.values(), *handled.values(), threshold=threshold
    )
    by_role = dict(zip(PAIR, targets, strict=True))
    return Judgement(probabilities, flaw_maps, handled, by_role, both_bad), live

  def update(state, batch, draws):
    label, num_labeled = batch["labeled"]["label"], len(batch["labeled"]["image"])
    images = jnp.concatenate([batch["labeled"]["image"], batch["unlabeled"]["weak"]])
    unlabeled_weight = task.unlabeled_weight(state.step)
    ramp = unlabeled_weight * schedules.sigmoid_rampup(
      state.step, rampup_fraction * task.total_steps
    )

    def objective(live):
      judgement, moved = judge(live, images, num_labeled, draws)
      terms = {}
      for role in PAIR:
        logits, probabilities, moved[role] = predict(moved, role, images, num_labeled, draws)
        judged_by = jax.lax.stop_gradient(live["detector"].params)
        flaw_map, moved["detector"] = detect(moved["detector"], judged_by, images, probabilities)
        correction = flaw_correction(flaw_map, judgement.both_bad)
        distance = consistency(probabilities, judgement.targets[role])
        terms[f"supervised_{role}"] = task.criterion(logits[:num_labeled], label)
        terms[f"flaw_correction_{role}"] = unlabeled_weight * flaw_correction_weight * correction
        terms[f"consistency_{role}"] = ramp * weight * distance
      for role in PAIR:
        target = flaws.flaw_target(
          judgement.probabilities[role][:num_labeled],
          label,
          base_pixels=base_pixels(images),
          dilations=dilations,
        )
        # Halved, since the detector learns from the mean of both.
        detector_loss = detection(judgement.flaw_maps[role][:num_labeled], target) / 2
        terms[f"detector_{role}"] = detector_weight * detector_loss
      both_bad_fraction = jnp.mean(judgement.both_bad, dtype=jnp.float32)
      return nets.Outcome(terms, moved, {"both_bad_fraction": both_bad_fraction})

    return nets.descend(optimizers, state, objective)

  def show(state, batch, draws):
    weak, valid = batch["unlabeled"]["weak"], batch["unlabeled"]["valid"]
    judgement, _ = judge(state.nets, weak, 0, draws)
    panels = [
      Panel("weak view", "image", weak),
      *(Panel(role, "classes", judgement.probabilities[role]) for role in PAIR),
      *(
        Panel(f"flaws of {role}", "heat", jnp.clip(judgement.handled_flaws[role], 0, 1))
        for role in PAIR
      ),
      Panel("target of left", "classes", judgement.targets["left"]),
    ]
    return panels, valid & ~judgement.both_bad

  return Method(Needs(), init, draw, update, nets.predictors(network, *PAIR), show)
