"""Interpolation consistency: on a blend of two images, the student predicts the blend of its
teacher's predictions on the two.

Verma et al., "Interpolation Consistency Training for Semi-Supervised Learning", IJCAI 2019, per
pixel, as the baseline of French et al., "Semi-supervised semantic segmentation needs strong, varied
perturbations", BMVC 2020; facts from the latter's code.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, rng
from pseudoseg_jax.contract import Method, Needs, Panels, Task
from pseudoseg_jax.methods import cutmix_seg
from pseudoseg_jax.ops import losses


def blend(share, first, second):
  """(1 - share) * first + share * second: f32[B], [B, ...] x [B, ...] -> [B, ...]."""
  share = share.reshape(-1, *[1] * (first.ndim - 1))
  return (1 - share) * first + share * second


def blended_prediction(share, first_logits, second_logits):
  """Blended probabilities f32[B, H, W, K], and confidence f32[B, H, W]: the blend of the maxima,
  not the blend's maximum.
  """
  first, second = jax.nn.softmax(first_logits), jax.nn.softmax(second_logits)
  return blend(share, first, second), blend(
    share, jnp.max(first, axis=-1), jnp.max(second, axis=-1)
  )


def consistency(student_logits, target):
  """Squared difference of the probabilities per pixel, summed over classes: [..., K] x [..., K] ->
  [...].
  """
  return target.shape[-1] * losses.squared_distance(jax.nn.softmax(student_logits), target)


def ict(
  task: Task,
  *,
  beta: float = 0.1,
  strong_views: int = 0,
  weight: float = 1.0,
  min_confidence: float = 0.97,
  decay: float = 0.99,
  frozen_batch_norm: str = "none",
) -> Method:
  """Mean Teacher on blended images. [French et al. 2020, section 4.2]

  Args:
    beta: the second image's share in each blend is drawn from Beta(beta, beta).
    strong_views, weight, min_confidence, decay, frozen_batch_norm: as in `cutmix_seg`; the term is
      always multiplied by the share of confident pixels, since the official weight per pixel has an
      axis too many.
  """
  problems = cutmix_seg.check_options(
    "ict",
    strong_views=strong_views,
    frozen_batch_norm=frozen_batch_norm,
    min_confidence=min_confidence,
    decay=decay,
  )
  if not beta > 0:
    problems.add("beta", got=beta, allowed="above 0")
  problems.raise_if_any()
  forward = cutmix_seg.forward_with(task.network, frozen_batch_norm)

  def draw(key, batch):
    share = jax.random.beta(
      rng.stream(key, "share"), beta, beta, (len(batch["unlabeled"]["weak"]),)
    )
    return {"share": share} | nets.dropout_keys(key, "teacher", "student")

  def teach(teacher, batch, draws):
    """What the student sees, its target, the target's confidence and what is valid; and the teacher
    after its passes.
    """
    share, first, second = draws["share"], batch["unlabeled"], batch["partner"]
    views = [
      images["strong"][:, 0] if strong_views else images["weak"] for images in (first, second)
    ]
    both, teacher = forward(teacher, first["weak"], second["weak"], dropout=draws["teacher"])
    target, sure = blended_prediction(share, *both)
    return (
      blend(share, *views),
      target,
      sure,
      blend(share, first["valid"], second["valid"]),
    ), teacher

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    (seen, target, sure, valid), teacher = teach(state.nets["teacher"], batch, draws)

    def objective(live):
      (on_labeled, on_seen), student = forward(
        live["student"], labeled, seen, dropout=draws["student"]
      )
      supervised = task.criterion(on_labeled, label)
      apart = consistency(on_seen, target)
      agreement, confident = cutmix_seg.confident_mean(
        apart, sure, valid, min_confidence=min_confidence
      )
      agreement = task.unlabeled_weight(state.step) * weight * agreement
      loss = supervised + agreement
      terms = {
        "loss": loss,
        "loss_supervised": supervised,
        "loss_consistency": agreement,
        "confident_fraction": confident,
      }
      return loss, ({"student": student}, terms)

    after, metrics = nets.descend(
      task.optimizer, {"student": state.nets["student"]}, state.step, objective
    )
    teacher = nets.ema(teacher, after["student"], decay, statistics="average")
    return state.replace(step=state.step + 1, nets=after | {"teacher": teacher}), metrics

  def show(state, batch, draws):
    (seen, *_), _ = teach(state.nets["teacher"], batch, draws)
    first, second = batch["unlabeled"], batch["partner"]
    (taught,), _ = forward(state.nets["teacher"], first["weak"], dropout=draws["teacher"])
    return (first["weak"], second["weak"], seen, jax.nn.softmax(taught)), first["valid"]

  # The teacher's prediction as it is before blending: it is compared with the truth of the first
  # image.
  names = ("first image", "second image", "blend", "teacher on the first")
  panels = Panels(names, ("image", "image", "image", "classes"), show)
  needs = Needs(partner=True, strong_views=strong_views)
  predictors = nets.predictors(task.network, "teacher", "student")
  return Method(needs, nets.init_student_and_teacher(task), draw, update, predictors, panels)
