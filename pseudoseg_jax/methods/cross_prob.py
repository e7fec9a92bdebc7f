"""Cross probability consistency (CPC): two networks agree on probabilities.

Two independently initialized networks agree on probabilities instead of hard labels.

The comparison of Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo
Supervision", CVPR 2021, whose code leaves it out: everything that the paper does not state is as in
`cps`.
"""

from typing import Annotated

from pseudoseg_jax import nets
from pseudoseg_jax.contract import Method, Needs, Task
from pseudoseg_jax.ops import distances, losses
from pseudoseg_jax.options import Allowed, NotNegative, checked

# "l2": the squared Euclidean distance, summed over classes (0..2). In the sum of both networks'
# terms the order within KL does not change the value.
DISTANCES = {"l2": "sse", "kl": "kl"}


def cross_consistency(*views, distance):
  """Computes L_cpc, both networks' distances from each other.

  f32[], one mean over the pixels of all views, (logits_a, logits_b) each.
  """
  name = DISTANCES[distance]
  a_from_b = losses.joint_mean(*(distances.per_pixel(name, a, b) for a, b in views))
  b_from_a = losses.joint_mean(*(distances.per_pixel(name, b, a) for a, b in views))
  return a_from_b + b_from_a


@checked
def cross_prob(
  task: Task,
  *,
  weight: NotNegative = 1.5,
  distance: Annotated[str, Allowed(one_of=tuple(DISTANCES))] = "l2",
  on_labeled: bool = True,
) -> Method:
  """Trains two networks, each on the other's probabilities.

  Both see the same images. [CPS, comparison with cross probability consistency]

  Labeled and unlabeled images pass separately, each with batch statistics of their own; "a" alone
  predicts, as in `cps`.

  Args:
    weight: of the consistency. Neither it nor what the distance is divided by is stated anywhere;
      here classes are summed, pixels averaged, and the weight is that of CPS: 1.5 on VOC, 6 on
      Cityscapes.
    distance: "l2" or "kl", see DISTANCES.
    on_labeled: whether labeled images enter the consistency too: one mean over the pixels of both,
      ignored ones included.
  """

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

      return nets.Outcome(
        {"supervised_a": supervised_a, "supervised_b": supervised_b, "cross": cross},
        {"a": net_a, "b": net_b},
      )

    return nets.descend(task.optimizer, state, objective)

  return Method(
    Needs(),
    nets.init_two(task),
    draw,
    update,
    nets.predictors(task.network, "a", "b"),
    nets.show_predictions(task.network, "a", "b"),
  )
