"""Pi-model per pixel: two passes of one network agree.

The network sees every image twice and is to give the same prediction both times.

Laine & Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017; facts from the official
code (smlaine2/tempens), which classifies whole images. Views of an image share their geometry here,
so that pixels correspond.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets
from pseudoseg_jax.contract import Method, Needs, Panel, Task
from pseudoseg_jax.ops import losses, schedules
from pseudoseg_jax.options import NotNegative, Share, checked


@checked
def pi_model(
  task: Task,
  *,
  weight: NotNegative = 100 / 8,
  rampup_fraction: Share = 80 / 300,
  strong_views: Literal[1, 2] = 2,
) -> Method:
  """Trains one network to give the same prediction in two passes.

  Its term is the squared difference of two stochastic passes, with a gradient through both. [Laine
  & Aila, section 2.1]

  A pass is labeled and unlabeled images as one batch with common batch statistics, as in Mean
  Teacher's official code; the two passes have statistics of their own. The supervised loss is of
  the first.

  Args:
    weight: of the consistency term. The code's is 100 times the labeled share of the images, that
      is 12.5 for one eighth.
    rampup_fraction: part of the training over which the weight rises as exp(-5 (1 - t)^2); the
      code's 80 of 300 epochs.
    strong_views: 2 shows two independent photometric views of the unlabeled images, as the paper; 1
      the weak one and a photometric.
  """

  def draw(key, batch):
    return nets.dropout_keys(key, "passes")

  def views(batch):
    weak, strong = batch["unlabeled"]["weak"], batch["unlabeled"]["strong"]
    return (strong[:, 0], strong[:, 1]) if strong_views == 2 else (weak, strong[:, 0])

  def passes(net, batch, draws):
    """Computes the logits of the first and of the second pass.

    Returns logits f32[Bl + Bu, H, W, K] of each, and the net with its statistics moved.
    """
    # Labeled images come in one view: their two passes differ by dropout and batch statistics
    # alone. They take part all the same, as in the paper, and keep the statistics of both passes
    # alike.
    labeled = batch["labeled"]["image"]
    joint = (jnp.concatenate([labeled, view]) for view in views(batch))
    return nets.forward(task.network, net, *joint, dropout=draws["passes"])

  def update(state, batch, draws):
    label = batch["labeled"]["label"]
    valid = jnp.concatenate([batch["labeled"]["valid"], batch["unlabeled"]["valid"]])
    ramp = task.unlabeled_weight(state.step) * schedules.sigmoid_rampup(
      state.step, rampup_fraction * task.total_steps
    )

    def objective(live):
      (logits_first, logits_second), net = passes(live["student"], batch, draws)
      supervised_loss = task.criterion(logits_first[: len(label)], label)
      first, second = jax.nn.softmax(logits_first), jax.nn.softmax(logits_second)
      distance = losses.squared_distance(first, second)
      consistency_loss = ramp * weight * losses.mean_over(distance, valid)

      same = jnp.argmax(first, axis=-1) == jnp.argmax(second, axis=-1)
      return nets.Outcome(
        {"supervised": supervised_loss, "consistency": consistency_loss},
        {"student": net},
        {"agreement_fraction": losses.mean_over(same.astype(first.dtype), valid)},
      )

    return nets.descend(task.optimizer, state, objective)

  def show(state, batch, draws):
    (first, second), _ = passes(state.nets["student"], batch, draws)
    first, second = (
      jax.nn.softmax(logits[len(batch["labeled"]["image"]) :]) for logits in (first, second)
    )
    first_view, second_view = views(batch)
    panels = [
      Panel("first view", "image", first_view),
      Panel("second view", "image", second_view),
      Panel("first pass", "classes", first),
      Panel("difference", "heat", jnp.sum(jnp.abs(first - second), axis=-1) / 2),
      Panel("second pass", "classes", second),
    ]
    return panels, batch["unlabeled"]["valid"]

  return Method(
    Needs(strong_views=strong_views),
    nets.init_student(task),
    draw,
    update,
    nets.predictors(task.network, "student"),
    show,
  )
