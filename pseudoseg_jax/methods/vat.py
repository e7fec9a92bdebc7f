"""Virtual adversarial training: the student keeps to its teacher's prediction where an image is
changed in the worst direction.

Miyato et al., "Virtual Adversarial Training", TPAMI 2018, per pixel, as the baseline of French et
al., "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC 2020; facts
from the official code.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, rng
from pseudoseg_jax.contract import Method, Needs, Panels, Task
from pseudoseg_jax.methods import cutmix_seg
from pseudoseg_jax.ops import losses, perturb

# Root mean square of the trial step that finds the direction, in units of the normalized image. The
# official step's length of 1e-9 H W is lost in float32 (2e-7 a value, on values near 1): the
# direction would be half round-off.
_TRIAL_STEP = 1e-3


def adaptive_radius(images, factor=1.0):
  """Length of the perturbation by image: factor times half the Euclidean length of all central
  differences, down and across.

  The pixel next door has the most similar surroundings, so that is how far another prediction may
  lie. [French et al. 2020]

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


def vat(
  task: Task,
  *,
  radius: float = 1.0,
  strong_views: int = 0,
  weight: float = 0.1,
  min_confidence: float = 0.97,
  decay: float = 0.99,
  frozen_batch_norm: str = "none",
) -> Method:
  """Mean Teacher on adversarial images. [French et al. 2020, section 4.2]

  The teacher is in inference mode everywhere: the official code puts it there to find the
  direction, and never back within an epoch. It gives the direction as well as the target, by KL
  divergence.

  Args:
    radius: factor on `adaptive_radius`.
    strong_views, weight, min_confidence, decay, frozen_batch_norm: as in `cutmix_seg`; the term is
      always multiplied by the share of confident pixels, and `frozen_batch_norm` is of the student.
  """
  problems = cutmix_seg.check_options(
    "vat",
    strong_views=strong_views,
    frozen_batch_norm=frozen_batch_norm,
    min_confidence=min_confidence,
    decay=decay,
  )
  if radius < 0:
    problems.add("radius", got=radius, allowed="0 or more")
  problems.raise_if_any()
  network = task.network
  forward = cutmix_seg.forward_with(network, frozen_batch_norm)

  def draw(key, batch):
    noise = jax.random.normal(rng.stream(key, "noise"), batch["unlabeled"]["weak"].shape)
    return {"noise": noise} | nets.dropout_keys(key, "student")

  def teach(teacher, batch, draws):
    """The student's view before and after the perturbation, and the teacher's logits on the weak
    one.
    """
    unlabeled, noise = batch["unlabeled"], draws["noise"]
    taught = nets.infer(network, teacher, unlabeled["weak"])
    view = unlabeled["strong"][:, 0] if strong_views else unlabeled["weak"]

    def divergence(step):
      return jnp.sum(losses.kl_divergence(nets.infer(network, teacher, view + step), taught))

    direction = perturb.adversarial_direction(
      divergence, noise, xi=_TRIAL_STEP * noise[0].size ** 0.5
    )
    return view, view + adaptive_radius(view, radius)[:, None, None, None] * direction, taught

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    _, seen, taught = teach(state.nets["teacher"], batch, draws)
    sure, valid = jnp.max(jax.nn.softmax(taught), axis=-1), batch["unlabeled"]["valid"]

    def objective(live):
      (on_labeled, on_seen), student = forward(
        live["student"], labeled, seen, dropout=draws["student"]
      )
      supervised = task.criterion(on_labeled, label)
      apart = losses.kl_divergence(on_seen, taught)
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
    teacher = nets.ema(state.nets["teacher"], after["student"], decay, statistics="average")
    return state.replace(step=state.step + 1, nets=after | {"teacher": teacher}), metrics

  def show(state, batch, draws):
    view, seen, taught = teach(state.nets["teacher"], batch, draws)
    on_seen = nets.infer(network, state.nets["student"], seen)
    return (view, seen, jax.nn.softmax(on_seen), jax.nn.softmax(taught)), batch["unlabeled"][
      "valid"
    ]

  panels = Panels(
    ("image", "adversarial image", "student on it", "teacher"),
    ("image", "image", "classes", "classes"),
    show,
  )
  predictors = nets.predictors(network, "teacher", "student")
  return Method(
    Needs(strong_views=strong_views),
    nets.init_student_and_teacher(task),
    draw,
    update,
    predictors,
    panels,
  )
