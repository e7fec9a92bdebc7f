"""Mean Teacher per pixel: a student agrees with the average of itself.

The student learns from labels, and also to agree with its running average.

Tarvainen & Valpola, "Mean teachers are better role models", NIPS 2017. Three published codes differ
in what the paper leaves open; every difference is an option here and CONVENTIONS names the three
sets.
"""

from typing import Annotated, Literal

import jax.numpy as jnp

from pseudoseg_jax import nets
from pseudoseg_jax.contract import Method, Needs, Task
from pseudoseg_jax.ops import distances, losses, schedules
from pseudoseg_jax.options import Allowed, NotNegative, Share, checked

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


DISTANCES = {"softmax_mse": "mse", "logit_mse": "logit_mse", "softmax_kl": "kl"}


@checked
def mean_teacher(
  task: Task,
  *,
  distance: Annotated[str, Allowed(one_of=tuple(DISTANCES))] = "softmax_mse",
  weight: NotNegative = 100.0,
  rampup_fraction: NotNegative = 0.0,
  on_labeled: bool = True,
  decay: Share = 0.99,
  decay_warmup: Literal["none", "from_half", "from_copy"] = "none",
  average_when: Literal["after_descent", "between_passes"] = "between_passes",
  statistics: Literal["own", "average"] = "own",
  shared_batch_norm: bool = False,
  strong_views: Literal[0, 1] = 0,
  headline: Literal["student", "teacher"] = "student",
) -> Method:
  """Trains a student by gradient and a teacher by average.

  Both run in training mode. Defaults: CONVENTIONS["torchsemiseg"].

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
  from_the_student = average_when == "between_passes"

  def draw(key, batch):
    return nets.dropout_keys(key, "teacher_labeled", "teacher", "student")

  def passes(net, labeled, unlabeled, dropout):
    """Computes logits on labeled and unlabeled images.

    The batch statistics are common or separate.
    """
    if not shared_batch_norm:
      return nets.forward(task.network, net, labeled, unlabeled, dropout=dropout)
    (joint,), net = nets.forward(
      task.network, net, jnp.concatenate([labeled, unlabeled]), dropout=dropout
    )
    return (joint[: len(labeled)], joint[len(labeled) :]), net

  def teacher_passes(teacher, student, step, labeled, unlabeled, draws):
    """Computes the teacher's logits on labeled and on unlabeled images.

    Returns both, and the teacher after its passes.
    """
    if not from_the_student:
      return passes(teacher, labeled, unlabeled, draws["teacher"])
    # Initialized anew as the student, but with statistics of its own.
    teacher = nets.ema(teacher, student, jnp.where(step == 0, 0.0, 1.0))
    (logits_labeled,), teacher = nets.forward(
      task.network, teacher, labeled, dropout=draws["teacher_labeled"]
    )
    teacher = nets.ema(
      teacher, student, schedules.ema_decay(step, decay, decay_warmup), statistics=statistics
    )
    (logits_unlabeled,), teacher = nets.forward(
      task.network, teacher, unlabeled, dropout=draws["teacher"]
    )
    return (logits_labeled, logits_unlabeled), teacher

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    weak = batch["unlabeled"]["weak"]
    student_view = batch["unlabeled"]["strong"][:, 0] if strong_views else weak
    (teacher_labeled, teacher_unlabeled), teacher = teacher_passes(
      state.nets["teacher"], state.nets["student"], state.step, labeled, weak, draws
    )
    ramp = task.unlabeled_weight(state.step) * schedules.sigmoid_rampup(
      state.step, rampup_fraction * task.total_steps
    )

    def objective(live):
      (student_labeled, student_unlabeled), student = passes(
        live["student"], labeled, student_view, draws["student"]
      )
      supervised_loss = task.criterion(student_labeled, label)
      pairs = [(student_unlabeled, teacher_unlabeled)]
      if on_labeled:
        pairs.append((student_labeled, teacher_labeled))
      values = (distances.per_pixel(DISTANCES[distance], *pair) for pair in pairs)
      consistency_loss = ramp * weight * losses.joint_mean(*values)
      return nets.Outcome(
        {"supervised": supervised_loss, "consistency": consistency_loss}, {"student": student}
      )

    after, metrics = nets.descend(task.optimizer, state, objective, learning=["student"])
    if not from_the_student:
      teacher = nets.ema(
        teacher,
        after.nets["student"],
        schedules.ema_decay(state.step, decay, decay_warmup),
        statistics=statistics,
      )
    return after.with_nets(teacher=teacher), metrics

  roles = ("student", "teacher") if headline == "student" else ("teacher", "student")
  return Method(
    Needs(strong_views=strong_views),
    nets.init_student_and_teacher(task),
    draw,
    update,
    nets.predictors(task.network, *roles),
    nets.show_predictions(task.network, "student", "teacher"),
  )
