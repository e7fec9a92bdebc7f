"""Cross probability consistency (CPC): two independently initialized networks agree on
probabilities instead of hard labels.

The comparison of Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo
Supervision", CVPR 2021, whose code leaves it out: everything that the paper does not say is as in
`cps`.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks, nets
from pseudoseg_jax.contract import Method, Needs, Task
from pseudoseg_jax.ops import losses


def consistency(logits, other_logits, *, distance):
  """How far a network's probabilities are from the other's, which get no gradient, per pixel: [...,
  K] x [..., K] -> [...].

  distance: "l2", the squared Euclidean distance, summed over classes (0..2); "kl", KL(other || own)
    in nats. In the sum of both networks' terms the order within KL does not change the value.
  """
  other_logits = jax.lax.stop_gradient(other_logits)
  if distance == "kl":
    return losses.kl_divergence(logits, other_logits)
  return jnp.sum(jnp.square(jax.nn.softmax(logits) - jax.nn.softmax(other_logits)), axis=-1)


def cross_consistency(*views, distance):
  """L_cpc, f32[]: both networks' distances from each other, one mean over the pixels of all views,
  (logits_a, logits_b) each.
  """
  a_from_b = losses.joint_mean(
    *(consistency(logits_a, logits_b, distance=distance) for logits_a, logits_b in views)
  )
  b_from_a = losses.joint_mean(
    *(consistency(logits_b, logits_a, distance=distance) for logits_a, logits_b in views)
  )
  return a_from_b + b_from_a


def cross_prob(
  task: Task, *, weight: float = 1.5, distance: str = "l2", on_labeled: bool = True
) -> Method:
  """Each network learns the other's probabilities on the same images. [CPS, comparison with cross
  probability consistency]

  Labeled and unlabeled images pass separately, each with batch statistics of their own; "a" alone
  predicts, as in `cps`.

  Args:
    weight: of the consistency. Neither it nor what the distance is divided by is stated anywhere;
      here classes are summed, pixels averaged, and the weight is that of CPS: 1.5 on VOC, 6 on
      Cityscapes.
    distance: "l2" or "kl", see `consistency`.
    on_labeled: whether labeled images enter the consistency too: one mean over the pixels of both,
      ignored ones included.
  """
  checks.check_name("option distance", distance, ("l2", "kl"))

  def draw(key, batch):
    return nets.dropout_keys(key, "a", "b")

  def update(state, batch, draws):
    images = batch["labeled"]["image"], batch["unlabeled"]["weak"]
    label = batch["labeled"]["label"]

    def objective(live):
      (labeled_a, unlabeled_a), net_a = nets.forward(
        task.network, live["a"], *images, dropout=draws["a"]
      )
      (labeled_b, unlabeled_b), net_b = nets.forward(
        task.network, live["b"], *images, dropout=draws["b"]
      )
      supervised_a = task.criterion(labeled_a, label)
      supervised_b = task.criterion(labeled_b, label)

      views = [(unlabeled_a, unlabeled_b)]
      if on_labeled:
        views.append((labeled_a, labeled_b))
      cross = (
        task.unlabeled_weight(state.step) * weight * cross_consistency(*views, distance=distance)
      )

      loss = supervised_a + supervised_b + cross
      terms = {
        "loss": loss,
        "loss_supervised_a": supervised_a,
        "loss_supervised_b": supervised_b,
        "loss_cross": cross,
      }
      return loss, ({"a": net_a, "b": net_b}, terms)

    after, metrics = nets.descend(task.optimizer, state.nets, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  panels = nets.prediction_panels(task.network, "a", "b")
  return Method(
    Needs(), nets.init_two(task), draw, update, nets.predictors(task.network, "a", "b"), panels
  )
