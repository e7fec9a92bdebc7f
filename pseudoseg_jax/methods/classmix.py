"""ClassMix: half of an image's classes are pasted on the next image.

The classes are half of those that the teacher sees in an image. They are pasted, with the teacher's
labels, on the next image of the batch.

Olsson et al., "ClassMix: Segmentation-Based Data Augmentation for Semi-Supervised Learning", WACV
2021; facts from the official code, which is followed where the paper differs from it.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks, nets, rng
from pseudoseg_jax.contract import Method, Needs, Panel, Task
from pseudoseg_jax.ops import color, distances, gaussian, losses, mixing, schedules, targets
from pseudoseg_jax.options import NotNegative, Share, checked

# As the official code changes colors and blurs: all images of a batch, or none of them.
_JITTER_PROBABILITY, _JITTER_STRENGTH = 0.8, 0.25
_BLUR_PROBABILITY, _BLUR_SIGMA_PIXELS = 0.5, (0.15, 1.15)


def paste_on_next(mask, x):
  """Pastes each image on the next one, and the last on the first.

  bool[B, H, W], [B, H, W, ...] -> [B, H, W, ...]: x where the mask is true, elsewhere x of the next
  image. The paper pastes on a second sampled image; the official code makes B mixed images of the B
  of a batch.
  """
  return mixing.mix(mask, jnp.roll(x, -1, axis=0), x)


def consistency(loss, student_logits, mixed_logits):
  """Measures the student against the mixed teacher, per pixel.

  [B, H, W, K] x [B, H, W, K] -> [B, H, W]. The teacher's side gets no gradient.

  Args:
    loss: "cross_entropy" with the likeliest class, or "mse", see `distances`.
  """
  if loss == "mse":
    return distances.per_pixel("mse", student_logits, mixed_logits)
  return losses.cross_entropy(student_logits, targets.hard_label(mixed_logits)[0])


def pixel_weight(confidence, step, *, by, min_confidence, rampup_steps):
  """Computes what each pixel counts, without gradient.

  f32[] or f32[B, H, W].

  Args:
    confidence: f32[B, H, W], the teacher's greatest probability after mixing.
    by: "batch", "pixel" or "none" as `targets.confidence_weight` says, or "ramp", exp(-5 (1 - t)^2)
      with t = step / rampup_steps.
  """
  if by == "ramp":
    return schedules.sigmoid_rampup(step, rampup_steps)
  return targets.confidence_weight(confidence, threshold=min_confidence, per=by)


def _rules(problems, task, *, color_jitter, **_):
  if color_jitter and task.network.in_channels != 3:
    problems.add(
      "color_jitter",
      got=f"images of {task.network.in_channels} channels",
      allowed="3, RGB",
      remedy="switch it off",
    )


@checked(rules=_rules)
def classmix(
  task: Task,
  *,
  weight: NotNegative = 1.0,
  mask: Literal["class", "cut", "cow"] = "class",
  loss: Literal["cross_entropy", "mse"] = "cross_entropy",
  weight_by: Literal["batch", "pixel", "ramp", "none"] = "batch",
  min_confidence: Share = 0.968,
  rampup_fraction: Share = 0.25,
  color_jitter: bool = False,
  blur: bool = False,
  decay: Share = 0.99,
) -> Method:
  """Trains a student by gradient and a teacher by average on mixed images.

  Both are in training mode; the headline is the student. [ClassMix, trainSSL.py]

  Labeled, weak and mixed images pass with batch statistics of their own. The teacher's running
  statistics follow its own passes and serve its predictor alone; the official ones start at 0 and
  1, these as the student's.

  Args:
    weight: of the unsupervised term.
    mask: what is pasted: "class", half of the predicted classes; or of the paper's comparison,
      "cut", all but a box of half the area, and "cow", random blobs.
    loss: "cross_entropy" or "mse", see `consistency`. The official code weighs "mse" by "batch"
      whatever the option says.
    weight_by: by what pixels count: the confident share of the "batch", each "pixel" that is
      confident, a "ramp" over the steps, or "none"; see `pixel_weight`.
    min_confidence: pixels are confident from it on.
    rampup_fraction: part of the training over which the weight rises by "ramp"; the official 10000
      of 40000 steps.
    color_jitter, blur: of the mixed images, as on Cityscapes: brightness, contrast, saturation and
      hue, then a Gaussian of a deviation up to 1.15 pixels. Color jitter is for RGB alone.
    decay: of the teacher, after 0, 1/2, 2/3, ...
  """

  def draw(key, batch):
    num_images, *size, _ = batch["unlabeled"]["weak"].shape
    if num_images < 2:
      problems = checks.Problems("classmix cannot mix")
      problems.add(
        "unlabeled images of a batch",
        got=num_images,
        allowed="2 or more",
        remedy="batch_size_global.unlabeled",
      )
      problems.raise_if_any()
    mask_key, jitter_key, blur_key = (rng.stream(key, name) for name in ("mask", "jitter", "blur"))
    if mask == "class":
      draws = {"mask": jax.random.uniform(mask_key, (num_images, task.num_classes))}
    elif mask == "cut":
      draws = {"mask": jax.random.uniform(mask_key, (num_images, 3))}
    else:
      draws = {"mask": mixing.draw_cow(mask_key, num_images, size)}
    if color_jitter:
      draws |= {
        "jitter": color.draw_jitter(jitter_key, num_images),
        "jitters": jax.random.uniform(rng.stream(key, "jitters")),
      }
    if blur:
      draws |= dict(zip(("blurs", "sigma"), jax.random.uniform(blur_key, (2,)), strict=True))
    return draws | {"dropout": nets.dropout_keys(key, "teacher", "student")}

  def pasted(logits, draws):
    """Marks the pixels where an image is pasted on the next one.

    bool[B, H, W], True there.
    """
    if mask == "class":
      label, _ = targets.hard_label(logits)
      return mixing.class_masks(label, mixing.choose_classes(draws["mask"], label))
    return (
      mixing.cut_masks(draws["mask"], logits.shape[1:3])
      if mask == "cut"
      else mixing.cow_masks(draws["mask"])
    )

  def perturbed(images, draws):
    """Applies color jitter and blur to mixed images.

    The images are normalized before and after.
    """
    if color_jitter:
      mean, std = jnp.asarray(task.mean), jnp.asarray(task.std)
      jittered = color.color_jitter(images * std + mean, draws["jitter"], strength=_JITTER_STRENGTH)
      images = jnp.where(draws["jitters"] < _JITTER_PROBABILITY, (jittered - mean) / std, images)
    if blur:
      low, high = _BLUR_SIGMA_PIXELS
      sigma = low + (high - low) * draws["sigma"]
      radius = tuple(side // 2 for side in gaussian.kernel_size(images.shape[1:3]))
      blurred = gaussian.blur(images, sigma[None], radius=radius)
      images = jnp.where(draws["blurs"] < _BLUR_PROBABILITY, blurred, images)
    return images

  def teach(teacher, batch, draws):
    """Predicts the weak images with the teacher, and mixes images and logits.

    Returns the teacher's logits, the mask, the mixed images, the mixed logits, and the teacher
    after its pass.
    """
    weak = batch["unlabeled"]["weak"]
    (logits,), teacher = nets.forward(
      task.network, teacher, weak, dropout=draws["dropout"]["teacher"]
    )
    # Padding is pasted, labeled and learned like everything else, as in the official code.
    here = pasted(logits, draws)
    mixed = perturbed(paste_on_next(here, weak), draws)
    # Each pixel is one image's or the other's, so that logits may be mixed in place of
    # probabilities.
    return logits, here, mixed, paste_on_next(here, logits), teacher

  def weigh(logits, step):
    """Computes the weight of each pixel and the share of confident ones.

    The weights are f32[B, H, W].
    """
    _, confidence = targets.hard_label(logits)
    rampup_steps = rampup_fraction * task.total_steps
    weights = pixel_weight(
      confidence, step, by=weight_by, min_confidence=min_confidence, rampup_steps=rampup_steps
    )
    return jnp.broadcast_to(weights, confidence.shape), jnp.mean(confidence >= min_confidence)

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    _, here, mixed, mixed_logits, teacher = teach(state.nets["teacher"], batch, draws)
    pixel_weights, confident_fraction = weigh(mixed_logits, state.step)

    def objective(live):
      (logits_labeled, logits_mixed), net = nets.forward(
        task.network, live["student"], labeled, mixed, dropout=draws["dropout"]["student"]
      )
      supervised_loss = task.criterion(logits_labeled, label)
      per_pixel = pixel_weights * consistency(loss, logits_mixed, mixed_logits)
      # The mean is over all pixels.
      unsupervised_loss = task.unlabeled_weight(state.step) * weight * jnp.mean(per_pixel)
      return nets.Outcome(
        {"supervised": supervised_loss, "unsupervised": unsupervised_loss},
        {"student": net},
        {"confident_fraction": confident_fraction, "pasted_fraction": jnp.mean(here)},
      )

    after, metrics = nets.descend(task.optimizer, state, objective, learning=["student"])
    teacher = nets.ema(
      teacher, after.nets["student"], schedules.ema_decay(state.step, decay, "from_copy")
    )
    return after.with_nets(teacher=teacher), metrics

  def show(state, batch, draws):
    logits, here, mixed, _, _ = teach(state.nets["teacher"], batch, draws)
    pixel_weights, _ = weigh(logits, state.step)
    # The pseudo label as it is before mixing: it is compared with the truth of the weak image.
    panels = [
      Panel("weak view", "image", batch["unlabeled"]["weak"]),
      Panel("pseudo label", "classes", jax.nn.softmax(logits)),
      Panel("pasted", "heat", here.astype(logits.dtype)),
      Panel("mixed image", "image", mixed),
    ]
    return panels, pixel_weights > 0

  return Method(
    Needs(),
    nets.init_student_and_teacher(task),
    draw,
    update,
    nets.predictors(task.network, "student", "teacher"),
    show,
  )
