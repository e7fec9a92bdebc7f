"""Single-network pseudo supervision (SPS): one network learns its own hard labels, with or without
CutMix.

The comparison of Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo
Supervision", CVPR 2021, whose code leaves it out: everything that the paper does not say is as in
`cps`. The form with a weak and a strong view and a confidence threshold is FixMatch:
`unimatch.fixmatch`.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets
from pseudoseg_jax.contract import Method, Needs, Panels, Task
from pseudoseg_jax.ops import losses, mixing


def self_supervision(*logits):
  """Cross entropy with the argmax of the same logits f32[B, H, W, K], one mean over the pixels of
  all; no threshold, f32[].
  """
  return losses.joint_mean(
    *(losses.cross_entropy(each, jnp.argmax(each, axis=-1)) for each in logits)
  )


def single_pseudo(task: Task, *, weight: float = 1.5, on_labeled: bool = True) -> Method:
  """The network's argmax on an image supervises the same prediction, which makes it surer of what
  it says. [CPS, ablations]

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
      logits, net = nets.forward(
        task.network, live["student"], labeled, batch["unlabeled"]["weak"], dropout=draws["student"]
      )
      on_labeled_, on_unlabeled = logits
      supervised = task.criterion(on_labeled_, label)
      pseudo = (
        task.unlabeled_weight(state.step)
        * weight
        * self_supervision(*(logits if on_labeled else (on_unlabeled,)))
      )
      loss = supervised + pseudo
      return loss, (
        {"student": net},
        {"loss": loss, "loss_supervised": supervised, "loss_pseudo": pseudo},
      )

    after, metrics = nets.descend(task.optimizer, state.nets, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  panels = nets.prediction_panels(task.network, "student")
  return Method(
    Needs(), nets.init_student(task), draw, update, nets.predictors(task.network, "student"), panels
  )


def single_pseudo_cutmix(
  task: Task,
  *,
  weight: float = 1.0,
  on_labeled: bool = False,
  boxes: int = 3,
  area_range: tuple[float, float] = (0.25, 0.5),
) -> Method:
  """The hard labels of two unlabeled images, mixed as the images are, supervise the mixed image;
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

  def teach(net, batch, draws):
    """Mixed images f32[B, H, W, C], mixed logits of the originals f32[B, H, W, K], and the net with
    its statistics moved.
    """
    first, second = batch["unlabeled"]["weak"], batch["partner"]["weak"]
    (on_first, on_second), net = nets.forward(
      task.network, net, first, second, dropout=draws["labels"]
    )
    return (
      mixing.mix(draws["mask"], first, second),
      mixing.mix(draws["mask"], on_first, on_second),
      net,
    )

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    mixed, taught, student = teach(state.nets["student"], batch, draws)
    pseudo_label = jnp.argmax(taught, axis=-1)

    def objective(live):
      (on_mixed, on_labeled_), net = nets.forward(
        task.network, live["student"], mixed, labeled, dropout=draws["student"]
      )
      supervised = task.criterion(on_labeled_, label)
      values = [losses.cross_entropy(on_mixed, pseudo_label)]
      if on_labeled:
        values.append(losses.cross_entropy(on_labeled_, jnp.argmax(on_labeled_, axis=-1)))
      pseudo = task.unlabeled_weight(state.step) * weight * losses.joint_mean(*values)
      loss = supervised + pseudo
      return loss, (
        {"student": net},
        {"loss": loss, "loss_supervised": supervised, "loss_pseudo": pseudo},
      )

    after, metrics = nets.descend(task.optimizer, {"student": student}, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  def show(state, batch, draws):
    mixed, _, _ = teach(state.nets["student"], batch, draws)
    first, second = batch["unlabeled"]["weak"], batch["partner"]["weak"]
    said = jax.nn.softmax(nets.infer(task.network, state.nets["student"], first))
    return (first, second, draws["mask"].astype(first.dtype), mixed, said), batch["unlabeled"][
      "valid"
    ]

  # The pseudo label as it is before mixing: it is compared with the truth of the first image.
  names = ("first image", "second image", "mask", "mixed", "student on the first")
  panels = Panels(names, ("image", "image", "heat", "image", "classes"), show)
  return Method(
    Needs(partner=True),
    nets.init_student(task),
    draw,
    update,
    nets.predictors(task.network, "student"),
    panels,
  )
