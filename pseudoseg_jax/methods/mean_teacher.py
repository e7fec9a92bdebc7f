"""Mean Teacher per pixel: the student also learns to agree with the running average of itself.

Tarvainen & Valpola, "Mean teachers are better role models", NIPS 2017. Three published codes differ
in what the paper leaves open; every difference is an option here and CONVENTIONS names the three
sets.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks, nets
from pseudoseg_jax.contract import Method, Needs, Task
from pseudoseg_jax.ops import losses, schedules

# Options by published code. "torchsemiseg" made the Mean Teacher rows of the CPS paper; "official"
# is CuriousAI/mean-teacher taken per pixel; "pixelssl" made those of PixelSSL, with a distance of
# logits (not of probabilities, as the paper has it).
CONVENTIONS = {
  "torchsemiseg": dict(
    distance="softmax_mse",
    weight=100.0,
    rampup_fraction=0.0,
    on_labeled=True,
    decay=0.99,
    decay_warmup="none",
    average_when="between_passes",
    shared_batch_norm=False,
    strong_views=0,
    headline="student",
  ),
  "official": dict(
    distance="softmax_mse",
    weight=100.0,
    rampup_fraction=0.03,
    on_labeled=True,
    decay=0.99,
    decay_warmup="from_half",
    average_when="after_descent",
    shared_batch_norm=True,
    strong_views=1,
    headline="teacher",
  ),
  "pixelssl": dict(
    distance="logit_mse",
    weight=1.0,
    rampup_fraction=0.15,
    on_labeled=False,
    decay=0.99,
    decay_warmup="from_copy",
    average_when="after_descent",
    shared_batch_norm=True,
    strong_views=0,
    headline="teacher",
  ),
}


def consistency(distance: str, student_logits, teacher_logits):
  """Distance per pixel, [..., K] x [..., K] -> [...]; the teacher's side gets no gradient."""
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  if distance == "logit_mse":
    return losses.squared_distance(student_logits, teacher_logits)
  if distance == "softmax_kl":
    return losses.kl_divergence(student_logits, teacher_logits)
  return losses.squared_distance(jax.nn.softmax(student_logits), jax.nn.softmax(teacher_logits))


def mean_teacher(
  task: Task,
  *,
  distance: str = "softmax_mse",
  weight: float = 100.0,
  rampup_fraction: float = 0.0,
  on_labeled: bool = True,
  decay: float = 0.99,
  decay_warmup: str = "none",
  average_when: str = "between_passes",
  statistics: str = "own",
  shared_batch_norm: bool = False,
  strong_views: int = 0,
  headline: str = "student",
) -> Method:
  """Student by gradient, teacher by average; both run in training mode. Defaults:
  CONVENTIONS["torchsemiseg"].

  Args:
    distance: "softmax_mse" (squared difference of probabilities, mean over classes), "logit_mse" or
      "softmax_kl".
    weight: of the consistency term.
    rampup_fraction: part of the training over which the weight rises as exp(-5 (1 - t)^2); 0 for
      none.
    on_labeled: whether labeled images enter the consistency term (one mean over the pixels of
      both).
    decay: what the teacher keeps of itself in a step.
    decay_warmup: "none", or less at first: "from_half" or "from_copy", see `schedules.ema_decay`.
    average_when: "after_descent", or "between_passes": after the labeled pass and before the
      unlabeled one, with the student of before this step's descent (TorchSemiSeg, where the very
      first step sets the teacher to the student).
    statistics: what the average does to batch-norm statistics: "own" leaves them to the teacher's
      passes, "average" averages.
    shared_batch_norm: labeled and unlabeled images pass as one batch with common batch statistics,
      or separately.
    strong_views: 1 gives the student a photometric view of the unlabeled images while the teacher
      sees the weak one; 0 the same.
    headline: "student" or "teacher", which one is the method's answer; both are scored.
  """
  checks.check_name("option distance", distance, ("softmax_mse", "logit_mse", "softmax_kl"))
  checks.check_name("option decay_warmup", decay_warmup, ("none", "from_half", "from_copy"))
  checks.check_name("option average_when", average_when, ("after_descent", "between_passes"))
  checks.check_name("option statistics", statistics, ("own", "average"))
  checks.check_name("option headline", headline, ("student", "teacher"))
  from_the_student = average_when == "between_passes"

  def draw(key, batch):
    return nets.dropout_keys(key, "teacher_labeled", "teacher", "student")

  def passes(net, labeled, unlabeled, dropout):
    """Logits on labeled and unlabeled images, with common or separate batch statistics."""
    if not shared_batch_norm:
      return nets.forward(task.network, net, labeled, unlabeled, dropout=dropout)
    (joint,), net = nets.forward(
      task.network, net, jnp.concatenate([labeled, unlabeled]), dropout=dropout
    )
    return (joint[: len(labeled)], joint[len(labeled) :]), net

  def teach(teacher, student, step, labeled, unlabeled, draws):
    """The teacher's logits, and the teacher after its passes."""
    if not from_the_student:
      return passes(teacher, labeled, unlabeled, draws["teacher"])
    # Initialized anew as the student, statistics apart.
    teacher = nets.ema(teacher, student, jnp.where(step == 0, 0.0, 1.0))
    (on_labeled_,), teacher = nets.forward(
      task.network, teacher, labeled, dropout=draws["teacher_labeled"]
    )
    teacher = nets.ema(
      teacher, student, schedules.ema_decay(step, decay, decay_warmup), statistics=statistics
    )
    (on_unlabeled,), teacher = nets.forward(
      task.network, teacher, unlabeled, dropout=draws["teacher"]
    )
    return (on_labeled_, on_unlabeled), teacher

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    weak = batch["unlabeled"]["weak"]
    seen = batch["unlabeled"]["strong"][:, 0] if strong_views else weak
    student = state.nets["student"]
    (teacher_labeled, teacher_unlabeled), teacher = teach(
      state.nets["teacher"], student, state.step, labeled, weak, draws
    )
    ramp = task.unlabeled_weight(state.step) * schedules.sigmoid_rampup(
      state.step, rampup_fraction * task.total_steps
    )

    def objective(live):
      (student_labeled, student_unlabeled), net = passes(
        live["student"], labeled, seen, draws["student"]
      )
      supervised = task.criterion(student_labeled, label)
      apart = [consistency(distance, student_unlabeled, teacher_unlabeled)]
      if on_labeled:
        apart.append(consistency(distance, student_labeled, teacher_labeled))
      agreement = ramp * weight * losses.joint_mean(*apart)
      loss = supervised + agreement
      return loss, (
        {"student": net},
        {"loss": loss, "loss_supervised": supervised, "loss_consistency": agreement},
      )

    after, metrics = nets.descend(task.optimizer, {"student": student}, state.step, objective)
    if not from_the_student:
      teacher = nets.ema(
        teacher,
        after["student"],
        schedules.ema_decay(state.step, decay, decay_warmup),
        statistics=statistics,
      )
    return state.replace(step=state.step + 1, nets=after | {"teacher": teacher}), metrics

  roles = ("student", "teacher") if headline == "student" else ("teacher", "student")
  init, predictors = nets.init_student_and_teacher(task), nets.predictors(task.network, *roles)
  panels = nets.prediction_panels(task.network, "student", "teacher")
  return Method(Needs(strong_views=strong_views), init, draw, update, predictors, panels)
