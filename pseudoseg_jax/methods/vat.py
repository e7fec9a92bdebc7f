"""Virtual adversarial training (VAT), per pixel.

The student keeps to its teacher's prediction where an image is changed in the worst direction.

Miyato et al., "Virtual Adversarial Training", TPAMI 2018, per pixel, as the baseline of French et
al., "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC 2020; facts
from the official code.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, rng
from pseudoseg_jax.contract import Method, Needs, Panel, Task
from pseudoseg_jax.ops import losses, perturb, targets
from pseudoseg_jax.options import NotNegative, Share, checked

# Root mean square of the trial step that finds the direction, in units of the normalized image. The
# official step's length of 1e-9 H W is lost in float32 (2e-7 a value, on values near 1): the
# direction would be half round-off.
_TRIAL_STEP = 1e-3


def adaptive_radius(images, factor=1.0):
  """Computes the length of the perturbation of each image.

  It is factor times half the Euclidean length of all central differences, down and across. The
  pixel next door has the most similar surroundings, so that is how far another prediction may lie.
  [French et al. 2020]

  Args:
    images: f32[B, H, W, C].

  Returns:
    f32[B].
  """
  differences = images[:, 2:] - images[:, :-2], images[:, :, 2:] - images[:, :, :-2]
  return (
    0.5
    * factor
    * jnp.sqrt(sum(jnp.sum(jnp.square(difference), axis=(1, 2, 3)) for difference in differences))
  )


@checked
def vat(
  task: Task,
  *,
  radius: NotNegative = 1.0,
  strong_views: Literal[0, 1] = 0,
  weight: NotNegative = 0.1,
  min_confidence: Share = 0.97,
  decay: Share = 0.99,
  frozen_batch_norm: Literal["none", "backbone", "all"] = "none",
) -> Method:
  """Trains Mean Teacher on adversarial images.

  [French et al. 2020, section 4.2]

  The teacher is in inference mode everywhere: the official code puts it there to find the
  direction, and never back within an epoch. It gives the direction as well as the target, by KL
  divergence.

  Args:
    radius: factor on `adaptive_radius`.
    strong_views, weight, min_confidence, decay, frozen_batch_norm: as in `cutmix_seg`; the term is
      always multiplied by the share of confident pixels, and `frozen_batch_norm` is of the student.
  """
  network = task.network
  forward = nets.forward_with(network, frozen_batch_norm)

  def draw(key, batch):
    noise = jax.random.normal(rng.stream(key, "noise"), batch["unlabeled"]["weak"].shape)
    return {"noise": noise} | nets.dropout_keys(key, "student")

  def teach(teacher, batch, draws):
    """Perturbs the student's view, and predicts the weak one with the teacher.

    Returns the student's view before and after the perturbation, and the teacher's logits on the
    weak view.
    """
    unlabeled, noise = batch["unlabeled"], draws["noise"]
    teacher_logits = nets.infer(network, teacher, unlabeled["weak"])
    view = unlabeled["strong"][:, 0] if strong_views else unlabeled["weak"]

    def divergence(step):
      logits = nets.infer(network, teacher, view + step)
      return jnp.sum(losses.kl_divergence(logits, teacher_logits))

    xi = _TRIAL_STEP * noise[0].size ** 0.5
    direction = perturb.adversarial_direction(divergence, noise, xi=xi)
    length = adaptive_radius(view, radius)[:, None, None, None]
    return view, view + length * direction, teacher_logits

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    _, adversarial, teacher_logits = teach(state.nets["teacher"], batch, draws)
    confidence = jnp.max(jax.nn.softmax(teacher_logits), axis=-1)

    def objective(live):
      (logits_labeled, logits_adversarial), student = forward(
        live["student"], labeled, adversarial, dropout=draws["student"]
      )
      supervised_loss = task.criterion(logits_labeled, label)
      consistency_loss, confident = targets.confident_mean(
        losses.kl_divergence(logits_adversarial, teacher_logits),
        confidence,
        batch["unlabeled"]["valid"],
        min_confidence=min_confidence,
      )
      consistency_loss = task.unlabeled_weight(state.step) * weight * consistency_loss
      return nets.Outcome(
        {"supervised": supervised_loss, "consistency": consistency_loss},
        {"student": student},
        {"confident_fraction": confident},
      )

    after, metrics = nets.descend(task.optimizer, state, objective, learning=["student"])
    teacher = nets.ema(state.nets["teacher"], after.nets["student"], decay, statistics="average")
    return after.with_nets(teacher=teacher), metrics

  def show(state, batch, draws):
    view, adversarial, teacher_logits = teach(state.nets["teacher"], batch, draws)
    student_logits = nets.infer(network, state.nets["student"], adversarial)
    panels = [
      Panel("image", "image", view),
      Panel("adversarial image", "image", adversarial),
      Panel("student on it", "classes", jax.nn.softmax(student_logits)),
      Panel("teacher", "classes", jax.nn.softmax(teacher_logits)),
    ]
    return panels, batch["unlabeled"]["valid"]

  return Method(
    Needs(strong_views=strong_views),
    nets.init_student_and_teacher(task),
    draw,
    update,
    nets.predictors(network, "teacher", "student"),
    show,
  )
