"""Interpolation consistency training (ICT), per pixel.

On a blend of two images, the student predicts the blend of its teacher's predictions on the two.

Verma et al., "Interpolation Consistency Training for Semi-Supervised Learning", IJCAI 2019, per
pixel, as the baseline of French et al., "Semi-supervised semantic segmentation needs strong, varied
perturbations", BMVC 2020; facts from the latter's code.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, rng
from pseudoseg_jax.contract import Method, Needs, Panel, Task
from pseudoseg_jax.ops import losses, targets
from pseudoseg_jax.options import NotNegative, Positive, Share, checked


def blend(share, first, second):
  """Blends two arrays, image by image.

  f32[B], [B, ...] x [B, ...] -> [B, ...]: (1 - share) * first + share * second.
  """
  share = share.reshape(-1, *[1] * (first.ndim - 1))
  return (1 - share) * first + share * second


def blended_prediction(share, first_logits, second_logits):
  """Blends two predictions and their confidences.

  Returns probabilities f32[B, H, W, K], and confidence f32[B, H, W]: the blend of the maxima, not
  the blend's maximum.
  """
  first, second = jax.nn.softmax(first_logits), jax.nn.softmax(second_logits)
  return blend(share, first, second), blend(
    share, jnp.max(first, axis=-1), jnp.max(second, axis=-1)
  )


def consistency(student_logits, target):
  """Computes the squared difference of the probabilities, per pixel.

  [..., K] x [..., K] -> [...], summed over classes.
  """
  return target.shape[-1] * losses.squared_distance(jax.nn.softmax(student_logits), target)


@checked
def ict(
  task: Task,
  *,
  beta: Positive = 0.1,
  strong_views: Literal[0, 1] = 0,
  weight: NotNegative = 1.0,
  min_confidence: Share = 0.97,
  decay: Share = 0.99,
  frozen_batch_norm: Literal["none", "backbone", "all"] = "none",
) -> Method:
  """Trains Mean Teacher on blended images.

  [French et al. 2020, section 4.2]

  Args:
    beta: the second image's share in each blend is drawn from Beta(beta, beta).
    strong_views, weight, min_confidence, decay, frozen_batch_norm: as in `cutmix_seg`; the term is
      always multiplied by the share of confident pixels, since the official weight per pixel has an
      axis too many.
  """
  forward = nets.forward_with(task.network, frozen_batch_norm)

  def draw(key, batch):
    share = jax.random.beta(
      rng.stream(key, "share"), beta, beta, (len(batch["unlabeled"]["weak"]),)
    )
    return {"share": share} | nets.dropout_keys(key, "teacher", "student")

  def teach(teacher, batch, draws):
    """Blends the student's image and its target.

    Returns the student's image, its target, the target's confidence and what is valid; and the
    teacher after its passes.
    """
    share, first, second = draws["share"], batch["unlabeled"], batch["partner"]
    views = [
      images["strong"][:, 0] if strong_views else images["weak"] for images in (first, second)
    ]
    both, teacher = forward(teacher, first["weak"], second["weak"], dropout=draws["teacher"])
    target, confidence = blended_prediction(share, *both)
    valid = blend(share, first["valid"], second["valid"])
    return (blend(share, *views), target, confidence, valid), teacher

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    (blended, target, confidence, valid), teacher = teach(state.nets["teacher"], batch, draws)

    def objective(live):
      (logits_labeled, logits_blended), student = forward(
        live["student"], labeled, blended, dropout=draws["student"]
      )
      supervised_loss = task.criterion(logits_labeled, label)
      consistency_loss, confident = targets.confident_mean(
        consistency(logits_blended, target), confidence, valid, min_confidence=min_confidence
      )
      consistency_loss = task.unlabeled_weight(state.step) * weight * consistency_loss
      return nets.Outcome(
        {"supervised": supervised_loss, "consistency": consistency_loss},
        {"student": student},
        {"confident_fraction": confident},
      )

    after, metrics = nets.descend(task.optimizer, state, objective, learning=["student"])
    teacher = nets.ema(teacher, after.nets["student"], decay, statistics="average")
    return after.with_nets(teacher=teacher), metrics

  def show(state, batch, draws):
    (blended, *_), _ = teach(state.nets["teacher"], batch, draws)
    first, second = batch["unlabeled"], batch["partner"]
    # The teacher's prediction as it is before blending: it is compared with the truth of the first
    # image.
    (logits,), _ = forward(state.nets["teacher"], first["weak"], dropout=draws["teacher"])
    panels = [
      Panel("first image", "image", first["weak"]),
      Panel("second image", "image", second["weak"]),
      Panel("blend", "image", blended),
      Panel("teacher on the first", "classes", jax.nn.softmax(logits)),
    ]
    return panels, first["valid"]

  return Method(
    Needs(partner=True, strong_views=strong_views),
    nets.init_student_and_teacher(task),
    draw,
    update,
    nets.predictors(task.network, "teacher", "student"),
    show,
  )
