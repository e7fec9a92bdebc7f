"""Cross pseudo supervision (CPS): two networks supervise each other.

The networks are initialized independently.

Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021; facts
from the official code.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets
from pseudoseg_jax.contract import Method, Needs, Panel, Task
from pseudoseg_jax.ops import losses, mixing
from pseudoseg_jax.options import Count, NotNegative, ShareRange, checked


def cross_supervision(*views):
  """Computes L_cps, the cross entropy with each other's pseudo label.

  It is one mean over the pixels of all views, for each network.

  Args:
    views: tuples (logits_a f32[B, H, W, K], logits_b, pseudo_label_a i32[B, H, W], pseudo_label_b);
      pseudo labels carry no gradient and no void.

  Returns:
    CE(a, pseudo_label_b) + CE(b, pseudo_label_a), f32[].
  """
  a_by_b = losses.joint_mean(
    *(losses.cross_entropy(logits_a, pseudo_label_b) for logits_a, _, _, pseudo_label_b in views)
  )
  b_by_a = losses.joint_mean(
    *(losses.cross_entropy(logits_b, pseudo_label_a) for _, logits_b, pseudo_label_a, _ in views)
  )
  return a_by_b + b_by_a


def _with_pseudo_labels(logits_a, logits_b):
  return logits_a, logits_b, jnp.argmax(logits_a, axis=-1), jnp.argmax(logits_b, axis=-1)


@checked
def cps(task: Task, *, weight: NotNegative = 1.5, on_labeled: bool = True) -> Method:
  """Trains two networks, each on the other's argmax on the same images.

  There is no threshold and no ramp-up. [CPS, section 3]

  Labeled and unlabeled images pass separately, each with batch statistics of their own. The paper
  predicts with "a" alone.

  Args:
    weight: of the cross term; 1.5 on VOC, 6 on Cityscapes.
    on_labeled: whether labeled images enter the cross term too: one mean over the pixels of both,
      ignored ones included (the pseudo label has no void). The paper's ablation has both versions;
      the official code and the main tables have it on.
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

      views = [_with_pseudo_labels(unlabeled_a, unlabeled_b)]
      if on_labeled:
        views.append(_with_pseudo_labels(labeled_a, labeled_b))
      cross = task.unlabeled_weight(state.step) * weight * cross_supervision(*views)

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


@checked
def cps_cutmix(
  task: Task,
  *,
  weight: NotNegative = 1.0,
  on_labeled: bool = False,
  boxes: Count = 3,
  area_range: ShareRange = (0.25, 0.5),
) -> Method:
  """Trains two networks by CPS on CutMix images.

  The labels of two unlabeled images are mixed with the boxes that mix the images. [CPS, section 4]

  Pseudo labels come from training-mode passes (batch statistics, running ones moved), as in the
  official code. There the two unlabeled images of a pair are one image under two augmentations, and
  workers repeat each other's boxes, both by accident of its samplers; here images and boxes are
  drawn independently.

  Args:
    weight: of the cross term; 1 on VOC, 5 on Cityscapes.
    on_labeled: adds the labeled images to the cross term, as the paper says; the official code
      leaves them out.
    boxes, area_range: boxes of a mask, and the share of the image they cover together.
  """

  def draw(key, batch):
    num_masks, height, width, _ = batch["unlabeled"]["weak"].shape
    mask = mixing.box_masks(
      mixing.draw_boxes(key, num_masks, boxes=boxes), (height, width), area_range=area_range
    )
    return {"mask": mask} | nets.dropout_keys(key, "a_labels", "b_labels", "a", "b")

  def update(state, batch, draws):
    mask = draws["mask"]
    first, second = batch["unlabeled"]["weak"], batch["partner"]["weak"]
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    mixed = mixing.mix(mask, first, second)

    def pseudo_label(net, dropout):
      logits, net = nets.forward(task.network, net, first, second, dropout=dropout)
      return jnp.argmax(mixing.mix(mask, *logits), axis=-1), net

    pseudo_label_a, net_a = pseudo_label(state.nets["a"], draws["a_labels"])
    pseudo_label_b, net_b = pseudo_label(state.nets["b"], draws["b_labels"])

    def objective(live):
      (mixed_a, labeled_a), net_a = nets.forward(
        task.network, live["a"], mixed, labeled, dropout=draws["a"]
      )
      (mixed_b, labeled_b), net_b = nets.forward(
        task.network, live["b"], mixed, labeled, dropout=draws["b"]
      )
      supervised_a = task.criterion(labeled_a, label)
      supervised_b = task.criterion(labeled_b, label)

      views = [(mixed_a, mixed_b, pseudo_label_a, pseudo_label_b)]
      if on_labeled:
        views.append(_with_pseudo_labels(labeled_a, labeled_b))
      cross = task.unlabeled_weight(state.step) * weight * cross_supervision(*views)

      return nets.Outcome(
        {"supervised_a": supervised_a, "supervised_b": supervised_b, "cross": cross},
        {"a": net_a, "b": net_b},
      )

    return nets.descend(task.optimizer, state.with_nets(a=net_a, b=net_b), objective)

  def show(state, batch, draws):
    first, second = batch["unlabeled"]["weak"], batch["partner"]["weak"]
    mask, mixed = draws["mask"].astype(first.dtype), mixing.mix(draws["mask"], first, second)
    # The pseudo label as it is before mixing: it is compared with the truth of the first image.
    prediction_a, prediction_b = (
      jax.nn.softmax(nets.infer(task.network, state.nets[role], first)) for role in ("a", "b")
    )
    panels = [
      Panel("first image", "image", first),
      Panel("second image", "image", second),
      Panel("mask", "heat", mask),
      Panel("mixed", "image", mixed),
      Panel("a on the first", "classes", prediction_a),
      Panel("b on the first", "classes", prediction_b),
    ]
    return panels, batch["unlabeled"]["valid"]

  return Method(
    Needs(partner=True),
    nets.init_two(task),
    draw,
    update,
    nets.predictors(task.network, "a", "b"),
    show,
  )
