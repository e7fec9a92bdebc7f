"""Temporal ensembling per pixel: a network agrees with its past predictions.

The network is to agree with the average of its earlier predictions on each image.

Laine & Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017; facts from the official
code (smlaine2/tempens), which classifies whole images. For pixels, the predictions are kept in the
frame of the whole image (`ops.memory`) and read where they are needed.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets
from pseudoseg_jax.contract import Method, Needs, Panel, State, Task
from pseudoseg_jax.ops import losses, memory, schedules
from pseudoseg_jax.options import Allowed, GridSize, NotNegative, Share, checked


@checked
def temporal_ensembling(
  task: Task,
  *,
  weight: NotNegative = 30 / 8,
  rampup_fraction: Share = 80 / 300,
  decay: Annotated[float, Allowed(least=0, below=1)] = 0.6,
  grid: GridSize = (64, 64),
  strong_views: Literal[0, 1] = 1,
  shared_batch_norm: bool = True,
) -> Method:
  """Trains one network to agree with its remembered predictions.

  There is one pass; its term is the squared difference to the remembered predictions of earlier
  visits. [Laine & Aila, section 2.2]

  The paper remembers labeled items too; here unlabeled images alone have a place in the memory (a
  list of unlabeled images may hold the labeled ones again). What is remembered is the training pass
  itself, with its view and dropout. The code updates after each epoch, here after each visit, which
  is the same where an epoch visits every image once; its weight is 0 in the first epoch, here where
  nothing is remembered.

  The memory takes 2 gh gw N K bytes (`ops.memory.num_bytes`), over all devices together and in
  every checkpoint: at the default grid 1.7 GiB for VOC (10 582 images, 21 classes), 0.43 GiB for
  Cityscapes (2 975, 19).

  Args:
    weight: of the consistency term. The code's is 30 times the labeled share of the images, that is
      3.75 for one eighth (CIFAR-10 and SVHN; 100 times on CIFAR-100).
    rampup_fraction: part of the training over which the weight rises as exp(-5 (1 - t)^2); the
      code's 80 of 300 epochs.
    decay: of the remembered average, alpha in the paper; 0 remembers the last visit alone.
    grid: rows and columns of cells over a whole image; the rows a multiple of the devices. Cells
      finer than the pixels of a view gain nothing, and lose the image's outermost half pixel.
    shared_batch_norm: labeled and unlabeled images pass as one batch, as in Mean Teacher's official
      code; False: each with batch statistics of its own.
    strong_views: 1 trains and remembers on a photometric view of the unlabeled images; 0 on the
      weak one.
  """

  def init(key):
    predictions = memory.empty(task.num_unlabeled, task.num_classes, grid)
    return State(
      jnp.zeros([], jnp.int32), {"student": nets.create(task, key)}, {"predictions": predictions}
    )

  def draw(key, batch):
    return nets.dropout_keys(key, "student")

  def view(unlabeled):
    return unlabeled["strong"][:, 0] if strong_views else unlabeled["weak"]

  def run(net, batch, draws):
    """Computes logits on labeled and on unlabeled images.

    Returns both, and the net with its statistics moved.
    """
    labeled, unlabeled = batch["labeled"]["image"], view(batch["unlabeled"])
    if not shared_batch_norm:
      logits, net = nets.forward(task.network, net, labeled, unlabeled, dropout=draws["student"])
      return *logits, net
    (logits,), net = nets.forward(
      task.network, net, jnp.concatenate([labeled, unlabeled]), dropout=draws["student"]
    )
    return logits[: len(labeled)], logits[len(labeled) :], net

  def recall(state, unlabeled):
    return memory.read(state.memory["predictions"], unlabeled["id"], task.num_classes)

  def remembered_target(remembered, unlabeled):
    """Reads the remembered probabilities on the crops.

    Returns probabilities f32[B, H, W, K], and known, bool[B, H, W].
    """
    cells, seen = memory.unbiased(remembered)
    size = unlabeled["valid"].shape[1:]
    target, known = memory.cells_to_crop(cells, seen, unlabeled["flip"], unlabeled["window"], size)
    return target, known & unlabeled["valid"]

  def remember(state, remembered, unlabeled, prediction):
    """Updates the memory after a visit of the images.

    The visit's predictions are f32[B, H, W, K].
    """
    cells, seen = memory.crop_to_cells(
      jax.lax.stop_gradient(prediction),
      unlabeled["valid"],
      unlabeled["flip"],
      unlabeled["window"],
      grid,
    )
    remembered = memory.visited(remembered, unlabeled["id"], cells, seen, decay=decay)
    return memory.write(state.memory["predictions"], unlabeled["id"], remembered)

  def update(state, batch, draws):
    label, unlabeled = batch["labeled"]["label"], batch["unlabeled"]
    remembered = recall(state, unlabeled)
    target, known = remembered_target(remembered, unlabeled)
    ramp = task.unlabeled_weight(state.step) * schedules.sigmoid_rampup(
      state.step, rampup_fraction * task.total_steps
    )

    def objective(live):
      logits_labeled, logits_unlabeled, net = run(live["student"], batch, draws)
      supervised_loss = task.criterion(logits_labeled, label)
      prediction = jax.nn.softmax(logits_unlabeled)
      distance = losses.squared_distance(prediction, target) * known
      # Pixels not known count as agreement.
      consistency_loss = ramp * weight * losses.mean_over(distance, unlabeled["valid"])
      return nets.Outcome(
        {"supervised": supervised_loss, "consistency": consistency_loss},
        {"student": net},
        {"known_fraction": losses.mean_over(known.astype(prediction.dtype), unlabeled["valid"])},
        {"predictions": remember(state, remembered, unlabeled, prediction)},
      )

    return nets.descend(task.optimizer, state, objective)

  def show(state, batch, draws):
    _, logits, _ = run(state.nets["student"], batch, draws)
    target, known = remembered_target(recall(state, batch["unlabeled"]), batch["unlabeled"])
    panels = [
      Panel("view", "image", view(batch["unlabeled"])),
      Panel("prediction", "classes", jax.nn.softmax(logits)),
      Panel("remembered", "classes", target),
    ]
    return panels, known

  return Method(
    Needs(strong_views=strong_views, ids=True),
    init,
    draw,
    update,
    nets.predictors(task.network, "student"),
    show,
    split_memory=("predictions",),
  )
