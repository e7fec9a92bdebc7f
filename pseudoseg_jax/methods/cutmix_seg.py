"""CutMix-Seg: on an image mixed of two, the student agrees with its teacher's predictions on the
two, mixed alike.

French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC
2020, and French & Mackiewicz, "Color augmentation for improved semi-supervised semantic
segmentation", 2021; facts from the official code.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks, nets, rng
from pseudoseg_jax.contract import Method, Needs, Panels, Task
from pseudoseg_jax.ops import losses, mixing, schedules, targets

DISTANCES = ("var", "logits_var", "logits_smoothl1", "bce", "kld")
FROZEN = ("none", "backbone", "all")


def consistency(distance, student_logits, teacher_logits):
  """Distance per pixel by its official name, [..., K] x [..., K] -> [...]; the teacher's side gets
  no gradient.

  "var": squared difference of the probabilities, summed over classes; "logits_var",
  "logits_smoothl1": squared and smooth L1 difference of the logits, summed and divided by sqrt(K);
  "bce": binary cross entropy of each class, summed; "kld": KL divergence.
  """
  num_classes = student_logits.shape[-1]
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  student, teacher = jax.nn.softmax(student_logits), jax.nn.softmax(teacher_logits)
  if distance == "logits_var":
    return num_classes**0.5 * losses.squared_distance(student_logits, teacher_logits)
  if distance == "logits_smoothl1":
    return num_classes**0.5 * losses.smooth_l1_distance(student_logits, teacher_logits)
  if distance == "bce":
    return losses.binary_cross_entropy(student, teacher)
  if distance == "kld":
    return losses.kl_divergence(student_logits, teacher_logits)
  return num_classes * losses.squared_distance(student, teacher)


def confident_mean(values, confidence, valid, *, min_confidence, per="batch"):
  """Mean over all pixels of `values`, those that are not valid as 0, each times the confidence
  weight.

  Args:
    values: f32[B, H, W]; confidence: f32[B, H, W], of the teacher; valid: bool or share [B, H, W].
    min_confidence, per: see `targets.confidence_weight`.

  Returns:
    The mean f32[], and the mean of the weight, f32[].
  """
  # The share of confident pixels takes padding in, and the mean divides by it too, as in the
  # official code.
  weight = targets.confidence_weight(confidence, threshold=min_confidence, per=per)
  return jnp.mean(values * valid * weight), jnp.mean(weight)


def forward_with(network, frozen_batch_norm):
  """`nets.forward`, but with the batch norms of the backbone, or all, on stored statistics, which
  then do not move.

  Freezing "all" leaves out dropout as well: the pass is one of inference, with gradients.
  """

  def backbone_frozen(net, *batches, dropout):
    maps = [nets.infer_maps(network, net, images) for images in batches]
    scores, net = nets.decode(network, net, *maps, dropout=dropout)
    return tuple(
      network.upsample(part, images.shape[1:3])
      for part, images in zip(scores, batches, strict=True)
    ), net

  def all_frozen(net, *batches, dropout):
    return tuple(nets.infer(network, net, images) for images in batches), net

  def live(net, *batches, dropout):
    return nets.forward(network, net, *batches, dropout=dropout)

  return {"none": live, "backbone": backbone_frozen, "all": all_frozen}[frozen_batch_norm]


def check_options(method, *, strong_views, frozen_batch_norm="none", min_confidence, decay):
  """Problems of the options that this method's relatives share."""
  problems = checks.Problems(f"{method} cannot be run with these options")
  if strong_views not in (0, 1):
    problems.add("strong_views", got=strong_views, allowed="0 or 1")
  if frozen_batch_norm not in FROZEN:
    problems.add("frozen_batch_norm", got=repr(frozen_batch_norm), allowed=checks.choices(FROZEN))
  for name, value in (("min_confidence", min_confidence), ("decay", decay)):
    if not 0 <= value <= 1:
      problems.add(name, got=value, allowed="0..1")
  return problems


def cutmix_seg(
  task: Task,
  *,
  mask: str = "cutmix",
  boxes: int = 1,
  area_range: tuple[float, float] = (0.5, 0.5),
  strong_views: int = 0,
  distance: str = "var",
  weight: float = 1.0,
  min_confidence: float = 0.97,
  confidence: str = "batch",
  rampup_fraction: float = 0.0,
  decay: float = 0.99,
  frozen_batch_norm: str = "none",
) -> Method:
  """Mean Teacher with masks: the confident share of the teacher's pixels is the only ramp. [French
  et al. 2020, section 4]

  Args:
    mask: "cutmix": the box is taken from a second image; "cutout": outside the box the image is
      zeroed and teaches nothing (the official generator's default; its manual says the reverse).
    boxes, area_range: boxes of a mask, and the share of the image they cover together; (0, 1) in
      the official CutOut runs.
    strong_views: 1 gives the student a photometric view while the teacher sees the weak one (second
      paper); 0 the weak one too.
    distance: "var", "logits_var", "logits_smoothl1", "bce" or "kld", see `consistency`.
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
  problems = check_options(
    "cutmix_seg",
    strong_views=strong_views,
    frozen_batch_norm=frozen_batch_norm,
    min_confidence=min_confidence,
    decay=decay,
  )
  for name, value, allowed in (
    ("mask", mask, ("cutmix", "cutout")),
    ("distance", distance, DISTANCES),
    ("confidence", confidence, ("batch", "pixel", "none")),
  ):
    if value not in allowed:
      problems.add(name, got=repr(value), allowed=checks.choices(allowed))
  if boxes < 1:
    problems.add("boxes", got=boxes, allowed="1 or more")
  if not 0 <= area_range[0] <= area_range[1] <= 1:
    problems.add(
      "area_range", got=area_range, allowed="two shares of the image, 0..1, the smaller first"
    )
  problems.raise_if_any()
  mixes = mask == "cutmix"
  forward = forward_with(task.network, frozen_batch_norm)

  def draw(key, batch):
    num_masks, height, width, _ = batch["unlabeled"]["weak"].shape
    uniforms = mixing.draw_boxes(rng.stream(key, "mask"), num_masks, boxes=boxes)
    drawn = mixing.box_masks(uniforms, (height, width), area_range=area_range)
    return {"mask": drawn} | nets.dropout_keys(key, "teacher", "student")

  def student_view(images):
    return images["strong"][:, 0] if strong_views else images["weak"]

  def teach(teacher, batch, draws):
    """What the student sees, the teacher's logits there and what is valid of it; and the teacher
    after its passes.
    """
    box, first = draws["mask"], batch["unlabeled"]
    if not mixes:
      (logits,), teacher = forward(teacher, first["weak"], dropout=draws["teacher"])
      seen = student_view(first)
      return (mixing.mix(box, jnp.zeros_like(seen), seen), logits, first["valid"] * box), teacher
    second = batch["partner"]
    both, teacher = forward(teacher, first["weak"], second["weak"], dropout=draws["teacher"])
    pairs = (student_view(first), student_view(second)), both, (first["valid"], second["valid"])
    return tuple(mixing.mix(box, *pair) for pair in pairs), teacher

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    (seen, taught, valid), teacher = teach(state.nets["teacher"], batch, draws)
    sure = jnp.max(jax.nn.softmax(taught), axis=-1)
    ramp = task.unlabeled_weight(state.step) * schedules.sigmoid_rampup(
      state.step, rampup_fraction * task.total_steps
    )

    def objective(live):
      (on_labeled, on_seen), student = forward(
        live["student"], labeled, seen, dropout=draws["student"]
      )
      supervised = task.criterion(on_labeled, label)
      apart = consistency(distance, on_seen, taught)
      agreement, confident = confident_mean(
        apart, sure, valid, min_confidence=min_confidence, per=confidence
      )
      agreement = ramp * weight * agreement
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
    (seen, _, _), _ = teach(state.nets["teacher"], batch, draws)
    first, sources = (
      batch["unlabeled"],
      [batch[stream]["weak"] for stream in ("unlabeled", "partner")[: 1 + mixes]],
    )
    (taught,), _ = forward(state.nets["teacher"], first["weak"], dropout=draws["teacher"])
    opinion = jax.nn.softmax(taught)
    kept = first["valid"] if mixes else first["valid"] & draws["mask"]
    if confidence == "pixel":
      kept &= jnp.max(opinion, axis=-1) >= min_confidence
    return (*sources, draws["mask"].astype(opinion.dtype), seen, opinion), kept

  # The teacher's prediction as it is before mixing: it is compared with the truth of the first
  # image.
  names: tuple[str, ...] = ("image", "mask", "cut", "teacher")
  if mixes:
    names = ("first image", "second image", "mask", "mixed", "teacher on the first")
  kinds = ("image",) * (1 + mixes) + ("heat", "image", "classes")
  needs = Needs(partner=mixes, strong_views=strong_views)
  predictors = nets.predictors(task.network, "teacher", "student")
  return Method(
    needs, nets.init_student_and_teacher(task), draw, update, predictors, Panels(names, kinds, show)
  )
