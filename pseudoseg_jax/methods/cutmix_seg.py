"""CutMix-Seg: consistency with a teacher on images mixed of two.

On an image mixed of two, the student agrees with its teacher's predictions on the two, mixed alike.

French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC
2020, and French & Mackiewicz, "Color augmentation for improved semi-supervised semantic
segmentation", 2021; facts from the official code.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, rng
from pseudoseg_jax.contract import Method, Needs, Panel, Task
from pseudoseg_jax.ops import distances, mixing, schedules, targets
from pseudoseg_jax.options import Allowed, Count, NotNegative, Share, ShareRange, checked

# By their official names.
DISTANCES = {
  "var": "sse",
  "logits_var": "logit_sse_by_root",
  "logits_smoothl1": "logit_huber_by_root",
  "bce": "bce",
  "kld": "kl",
}


@checked
def cutmix_seg(
  task: Task,
  *,
  mask: Literal["cutmix", "cutout"] = "cutmix",
  boxes: Count = 1,
  area_range: ShareRange = (0.5, 0.5),
  strong_views: Literal[0, 1] = 0,
  distance: Annotated[str, Allowed(one_of=tuple(DISTANCES))] = "var",
  weight: NotNegative = 1.0,
  min_confidence: Share = 0.97,
  confidence: Literal["batch", "pixel", "none"] = "batch",
  rampup_fraction: NotNegative = 0.0,
  decay: Share = 0.99,
  frozen_batch_norm: Literal["none", "backbone", "all"] = "none",
) -> Method:
  """Trains Mean Teacher with masks that mix or cut the images.

  The confident share of the teacher's pixels is the only ramp. [French et al. 2020, section 4]

  Args:
    mask: "cutmix": the box is taken from a second image; "cutout": outside the box the image is
      zeroed and teaches nothing (the official generator's default; its manual says the reverse).
    boxes, area_range: boxes of a mask, and the share of the image they cover together; (0, 1) in
      the official CutOut runs.
    strong_views: 1 gives the student a photometric view while the teacher sees the weak one (second
      paper); 0 the weak one too.
    distance: of the probabilities "var", the squared difference, summed over classes, "bce",
      binary cross entropy of each class, summed, or "kld", KL divergence; of the logits
      "logits_var", "logits_smoothl1", squared and smooth L1 difference, summed and divided by
      sqrt(K).
    weight: of the consistency term.
    min_confidence, confidence: pixels are confident from it on; the term is multiplied by their
      share ("batch"), is of them alone ("pixel"), or neither ("none"). See
      `targets.confidence_weight`.
    rampup_fraction: part of the training over which the weight rises as exp(-5 (1 - t)^2), by steps
      (officially by whole epochs); 0 for none.
    decay: of the teacher, constant; parameters and batch-norm statistics alike.
    frozen_batch_norm: "none", or batch norm on the stored statistics of pretrained weights, in both
      networks: of the "backbone" (the official DeepLab v3+) or "all" (DeepLab v2, where scale and
      bias do not learn either: a matter of the optimizer).
  """
  mixes = mask == "cutmix"
  forward = nets.forward_with(task.network, frozen_batch_norm)

  def draw(key, batch):
    num_masks, height, width, _ = batch["unlabeled"]["weak"].shape
    uniforms = mixing.draw_boxes(rng.stream(key, "mask"), num_masks, boxes=boxes)
    drawn = mixing.box_masks(uniforms, (height, width), area_range=area_range)
    return {"mask": drawn} | nets.dropout_keys(key, "teacher", "student")

  def student_view(images):
    return images["strong"][:, 0] if strong_views else images["weak"]

  def teach(teacher, batch, draws):
    """Masks the student's image and predicts it with the teacher.

    Returns the student's image, the teacher's logits on it, and what is valid of it; and the
    teacher after its passes.
    """
    box, first = draws["mask"], batch["unlabeled"]
    if not mixes:
      (logits,), teacher = forward(teacher, first["weak"], dropout=draws["teacher"])
      image = student_view(first)
      return (mixing.mix(box, jnp.zeros_like(image), image), logits, first["valid"] * box), teacher
    second = batch["partner"]
    both, teacher = forward(teacher, first["weak"], second["weak"], dropout=draws["teacher"])
    pairs = (student_view(first), student_view(second)), both, (first["valid"], second["valid"])
    return tuple(mixing.mix(box, *pair) for pair in pairs), teacher

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    (mixed, teacher_logits, valid), teacher = teach(state.nets["teacher"], batch, draws)
    confidence_map = jnp.max(jax.nn.softmax(teacher_logits), axis=-1)
    ramp = task.unlabeled_weight(state.step) * schedules.sigmoid_rampup(
      state.step, rampup_fraction * task.total_steps
    )

    def objective(live):
      (logits_labeled, logits_mixed), student = forward(
        live["student"], labeled, mixed, dropout=draws["student"]
      )
      supervised_loss = task.criterion(logits_labeled, label)
      per_pixel = distances.per_pixel(DISTANCES[distance], logits_mixed, teacher_logits)
      consistency_loss, confident = targets.confident_mean(
        per_pixel, confidence_map, valid, min_confidence=min_confidence, per=confidence
      )
      return nets.Outcome(
        {"supervised": supervised_loss, "consistency": ramp * weight * consistency_loss},
        {"student": student},
        {"confident_fraction": confident},
      )

    after, metrics = nets.descend(task.optimizer, state, objective, learning=["student"])
    teacher = nets.ema(teacher, after.nets["student"], decay, statistics="average")
    return after.with_nets(teacher=teacher), metrics

  def show(state, batch, draws):
    (mixed, _, _), _ = teach(state.nets["teacher"], batch, draws)
    first = batch["unlabeled"]
    # The teacher's prediction as it is before mixing: it is compared with the truth of the first
    # image.
    (logits,), _ = forward(state.nets["teacher"], first["weak"], dropout=draws["teacher"])
    prediction = jax.nn.softmax(logits)
    kept = first["valid"] if mixes else first["valid"] & draws["mask"]
    if confidence == "pixel":
      kept &= jnp.max(prediction, axis=-1) >= min_confidence
    mask_panel = Panel("mask", "heat", draws["mask"].astype(prediction.dtype))
    if not mixes:
      return [
        Panel("image", "image", first["weak"]),
        mask_panel,
        Panel("cut", "image", mixed),
        Panel("teacher", "classes", prediction),
      ], kept
    return [
      Panel("first image", "image", first["weak"]),
      Panel("second image", "image", batch["partner"]["weak"]),
      mask_panel,
      Panel("mixed", "image", mixed),
      Panel("teacher on the first", "classes", prediction),
    ], kept

  return Method(
    Needs(partner=mixes, strong_views=strong_views),
    nets.init_student_and_teacher(task),
    draw,
    update,
    nets.predictors(task.network, "teacher", "student"),
    show,
  )
