"""Pi-model per pixel: one network sees every image twice and shall say the same both times.

Laine & Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017; facts from the official
code (smlaine2/tempens), which classifies whole images. Views of an image share their geometry here,
so that pixels correspond.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks, nets
from pseudoseg_jax.contract import Method, Needs, Panels, Task
from pseudoseg_jax.ops import losses, schedules


def pi_model(
  task: Task, *, weight: float = 100 / 8, rampup_fraction: float = 80 / 300, strong_views: int = 2
) -> Method:
  """Squared difference of two stochastic passes, with a gradient through both. [Laine & Aila,
  section 2.1]

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
  problems = checks.Problems("pi_model cannot be run with these options")
  if strong_views not in (1, 2):
    problems.add("strong_views", got=strong_views, allowed="1 or 2")
  if not 0 <= rampup_fraction <= 1:
    problems.add("rampup_fraction", got=rampup_fraction, allowed="0..1")
  problems.raise_if_any()

  def draw(key, batch):
    return nets.dropout_keys(key, "passes")

  def views(batch):
    weak, strong = batch["unlabeled"]["weak"], batch["unlabeled"]["strong"]
    return (strong[:, 0], strong[:, 1]) if strong_views == 2 else (weak, strong[:, 0])

  def passes(net, batch, draws):
    """Logits f32[Bl + Bu, H, W, K] of the first and of the second pass, and the net with its
    statistics moved.
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
      (first, second), net = passes(live["student"], batch, draws)
      supervised = task.criterion(first[: len(label)], label)
      distance = losses.squared_distance(jax.nn.softmax(first), jax.nn.softmax(second))
      consistency = ramp * weight * losses.mean_over(distance, valid)
      loss = supervised + consistency
      same = (jnp.argmax(first, axis=-1) == jnp.argmax(second, axis=-1)).astype(loss.dtype)
      terms = {
        "loss": loss,
        "loss_supervised": supervised,
        "loss_consistency": consistency,
        "agreement_fraction": losses.mean_over(same, valid),
      }
      return loss, ({"student": net}, terms)

    after, metrics = nets.descend(task.optimizer, state.nets, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  def show(state, batch, draws):
    (first, second), _ = passes(state.nets["student"], batch, draws)
    first, second = (
      jax.nn.softmax(logits[len(batch["labeled"]["image"]) :]) for logits in (first, second)
    )
    difference = jnp.sum(jnp.abs(first - second), axis=-1) / 2
    return (*views(batch), first, difference, second), batch["unlabeled"]["valid"]

  names = ("first view", "second view", "first pass", "difference", "second pass")
  panels = Panels(names, ("image", "image", "classes", "heat", "classes"), show)
  init, predictors = nets.init_student(task), nets.predictors(task.network, "student")
  return Method(Needs(strong_views=strong_views), init, draw, update, predictors, panels)
