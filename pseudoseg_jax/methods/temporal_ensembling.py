"""Temporal ensembling per pixel: the network shall agree with the average of what it said of each
image before.

Laine & Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017; facts from the official
code (smlaine2/tempens), which classifies whole images. For pixels, what was said is kept in the
frame of the whole image (`ops.memory`) and read where it is needed.
"""

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks, nets
from pseudoseg_jax.contract import Method, Needs, Panels, State, Task
from pseudoseg_jax.ops import losses, memory, schedules


def temporal_ensembling(
  task: Task,
  *,
  weight: float = 30 / 8,
  rampup_fraction: float = 80 / 300,
  decay: float = 0.6,
  grid: tuple[int, int] = (64, 64),
  strong_views: int = 1,
  shared_batch_norm: bool = True,
) -> Method:
  """One pass; squared difference to the remembered predictions of earlier visits. [Laine & Aila,
  section 2.2]

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
    decay: of the remembered average, alpha in the paper.
    grid: rows and columns of cells over a whole image; the rows a multiple of the devices. Cells
      finer than the pixels of a view gain nothing, and lose the image's outermost half pixel.
    shared_batch_norm: labeled and unlabeled images pass as one batch, as in Mean Teacher's official
      code; False: each with batch statistics of its own.
    strong_views: 1 trains and remembers on a photometric view of the unlabeled images; 0 on the
      weak one.
  """
  problems = checks.Problems("temporal_ensembling cannot be run with these options")
  if strong_views not in (0, 1):
    problems.add("strong_views", got=strong_views, allowed="0 or 1")
  if not 0 <= decay < 1:
    problems.add("decay", got=decay, allowed="0 to below 1; 0 remembers the last visit alone")
  if not checks.is_size(grid):
    problems.add("grid", got=grid, allowed="(rows, columns), each at least 1")
  if not 0 <= rampup_fraction <= 1:
    problems.add("rampup_fraction", got=rampup_fraction, allowed="0..1")
  problems.raise_if_any()

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
    """Logits on labeled and on unlabeled images, and the net with its statistics moved."""
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

  def teach(remembered, unlabeled):
    """The remembered probabilities f32[B, H, W, K] on the crops, and known, bool[B, H, W]."""
    cells, seen = memory.unbiased(remembered)
    size = unlabeled["valid"].shape[1:]
    target, known = memory.cells_to_crop(cells, seen, unlabeled["flip"], unlabeled["window"], size)
    return target, known & unlabeled["valid"]

  def update(state, batch, draws):
    label, unlabeled = batch["labeled"]["label"], batch["unlabeled"]
    remembered = recall(state, unlabeled)
    target, known = teach(remembered, unlabeled)
    ramp = task.unlabeled_weight(state.step) * schedules.sigmoid_rampup(
      state.step, rampup_fraction * task.total_steps
    )

    def objective(live):
      labeled_logits, unlabeled_logits, net = run(live["student"], batch, draws)
      supervised = task.criterion(labeled_logits, label)
      prediction = jax.nn.softmax(unlabeled_logits)
      distance = losses.squared_distance(prediction, target) * known
      # Pixels not known count as agreement.
      consistency = ramp * weight * losses.mean_over(distance, unlabeled["valid"])
      loss = supervised + consistency
      terms = {
        "loss": loss,
        "loss_supervised": supervised,
        "loss_consistency": consistency,
        "known_fraction": losses.mean_over(known.astype(loss.dtype), unlabeled["valid"]),
      }
      return loss, ({"student": net}, terms | {"prediction": prediction})

    after, metrics = nets.descend(task.optimizer, state.nets, state.step, objective)
    prediction = metrics.pop("prediction")
    cells, seen = memory.crop_to_cells(
      prediction, unlabeled["valid"], unlabeled["flip"], unlabeled["window"], grid
    )
    remembered = memory.visited(remembered, unlabeled["id"], cells, seen, decay=decay)
    predictions = memory.write(state.memory["predictions"], unlabeled["id"], remembered)
    return State(state.step + 1, after, {"predictions": predictions}), metrics

  def show(state, batch, draws):
    _, logits, _ = run(state.nets["student"], batch, draws)
    target, known = teach(recall(state, batch["unlabeled"]), batch["unlabeled"])
    return (view(batch["unlabeled"]), jax.nn.softmax(logits), target), known

  panels = Panels(("view", "prediction", "remembered"), ("image", "classes", "classes"), show)
  needs = Needs(strong_views=strong_views, ids=True)
  predictors = nets.predictors(task.network, "student")
  return Method(needs, init, draw, update, predictors, panels, split_memory=("predictions",))
