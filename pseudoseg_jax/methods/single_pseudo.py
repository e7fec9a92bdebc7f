"""Single-network pseudo supervision (SPS): a network learns its own labels.

The labels are hard ones, with or without CutMix.

The comparison of Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo
Supervision", CVPR 2021, whose code leaves it out: everything that the paper does not state is as in
`cps`. The form with a weak and a strong view and a confidence threshold is FixMatch:
`unimatch.fixmatch`.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets
from pseudoseg_jax.contract import Method, Needs, Panel, Task
from pseudoseg_jax.ops import losses, mixing
from pseudoseg_jax.options import Count, NotNegative, ShareRange, checked


def self_supervision(*logits):
  """Computes the cross entropy of logits with their own argmax.

  f32[], one mean over the pixels of all logits f32[B, H, W, K]; no threshold.
  """
  return losses.joint_mean(
    *(losses.cross_entropy(each, jnp.argmax(each, axis=-1)) for each in logits)
  )


@checked
def single_pseudo(task: Task, *, weight: NotNegative = 1.5, on_labeled: bool = True) -> Method:
  """Trains one network on its own hard labels.

  The network's argmax on an image supervises the same prediction, which makes it more confident.
  [CPS, ablations]

  Labeled and unlabeled images pass separately, each with batch statistics of their own, as in
  `cps`.

  Args:
    weight: of the pseudo label's term. Its value is not stated anywhere; CPS has 1.5 on VOC, 6 on
      Cityscapes.
    on_labeled: whether labeled images enter it too: one mean over the pixels of both, ignored ones
      included.
  """

  def draw(key, batch):
    return nets.dropout_keys(key, "student")

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]

    def objective(live):
      (logits_labeled, logits_unlabeled), net = nets.forward(
        task.network, live["student"], labeled, batch["unlabeled"]["weak"], dropout=draws["student"]
      )
      supervised_loss = task.criterion(logits_labeled, label)
      learned = (logits_labeled, logits_unlabeled) if on_labeled else (logits_unlabeled,)
      pseudo_loss = task.unlabeled_weight(state.step) * weight * self_supervision(*learned)
      return nets.Outcome({"supervised": supervised_loss, "pseudo": pseudo_loss}, {"student": net})

    return nets.descend(task.optimizer, state, objective)

  return Method(
    Needs(),
    nets.init_student(task),
    draw,
    update,
    nets.predictors(task.network, "student"),
    nets.show_predictions(task.network, "student"),
  )


@checked
def single_pseudo_cutmix(
  task: Task,
  *,
  weight: NotNegative = 1.0,
  on_labeled: bool = False,
  boxes: Count = 3,
  area_range: ShareRange = (0.25, 0.5),
) -> Method:
  """Trains one network on its own hard labels of CutMix images.

  The hard labels of two unlabeled images, mixed as the images are, supervise the mixed image;
  `cps_cutmix` with one network.

  Pseudo labels come from training-mode passes (batch statistics, running ones moved).

  Args:
    weight: of the pseudo label's term. Its value is not stated anywhere; CPS with CutMix has 1 on
      VOC, 5 on Cityscapes.
    on_labeled: adds the labeled images to it, with their own argmax.
    boxes, area_range: boxes of a mask, and the share of the image they cover together.
  """

  def draw(key, batch):
    num_masks, height, width, _ = batch["unlabeled"]["weak"].shape
    mask = mixing.box_masks(
      mixing.draw_boxes(key, num_masks, boxes=boxes), (height, width), area_range=area_range
    )
    return {"mask": mask} | nets.dropout_keys(key, "labels", "student")

  def mix_pair(net, batch, draws):
    """Mixes two unlabeled images and the logits on them.

    Returns mixed images f32[B, H, W, C], mixed logits of the originals f32[B, H, W, K], and the net
    with its statistics moved.
    """
    mask, pair = draws["mask"], (batch["unlabeled"]["weak"], batch["partner"]["weak"])
    logits, net = nets.forward(task.network, net, *pair, dropout=draws["labels"])
    return mixing.mix(mask, *pair), mixing.mix(mask, *logits), net

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    mixed, teacher_logits, student = mix_pair(state.nets["student"], batch, draws)
    pseudo_label = jnp.argmax(teacher_logits, axis=-1)

    def objective(live):
      (logits_mixed, logits_labeled), net = nets.forward(
        task.network, live["student"], mixed, labeled, dropout=draws["student"]
      )
      supervised_loss = task.criterion(logits_labeled, label)
      values = [losses.cross_entropy(logits_mixed, pseudo_label)]
      if on_labeled:
        values.append(losses.cross_entropy(logits_labeled, jnp.argmax(logits_labeled, axis=-1)))
      pseudo_loss = task.unlabeled_weight(state.step) * weight * losses.joint_mean(*values)
      return nets.Outcome({"supervised": supervised_loss, "pseudo": pseudo_loss}, {"student": net})

    return nets.descend(task.optimizer, state.with_nets(student=student), objective)

  def show(state, batch, draws):
    mixed, _, _ = mix_pair(state.nets["student"], batch, draws)
    first, second = batch["unlabeled"]["weak"], batch["partner"]["weak"]
    # The pseudo label as it is before mixing: it is compared with the truth of the first image.
    prediction = jax.nn.softmax(nets.infer(task.network, state.nets["student"], first))
    panels = [
      Panel("first image", "image", first),
      Panel("second image", "image", second),
      Panel("mask", "heat", draws["mask"].astype(first.dtype)),
      Panel("mixed", "image", mixed),
      Panel("student on the first", "classes", prediction),
    ]
    return panels, batch["unlabeled"]["valid"]

  return Method(
    Needs(partner=True),
    nets.init_student(task),
    draw,
    update,
    nets.predictors(task.network, "student"),
    show,
  )
