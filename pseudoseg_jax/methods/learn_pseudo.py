"""Learning pseudo labels, first stage: two networks teach each other.

The two label images of which only the classes are known.

Wang et al., "Learning Pseudo Labels for Semi-and-Weakly Supervised Semantic Segmentation", Pattern
Recognition 2022; facts from the official code (YudeWang/Learning-Pseudo-Label). In the second stage
another network learns from the labels of this one.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from pseudoseg_jax import nets
from pseudoseg_jax.contract import IGNORE_LABEL, Method, Needs, Panel, State, Task
from pseudoseg_jax.ops import class_aware, losses
from pseudoseg_jax.options import Allowed, NotNegative, checked


def pseudo_label(logits, image_label, label):
  """Labels pixels by the likeliest of the classes of their image.

  Images that have labels get these instead.

  Args:
    logits: f32[B, H, W, K]; image_label: [B, K].
    label: i32[B, H, W], IGNORE_LABEL throughout for images without labels.

  Returns:
    i32[B, H, W]; of images with labels IGNORE_LABEL stays where it is. No gradient passes.
  """
  labeled = jnp.any(label != IGNORE_LABEL, axis=(1, 2), keepdims=True)
  return jnp.where(labeled, label, class_aware.best_class(logits, image_label))


def greatest_logits(logits):
  """Returns the greatest logit of each class anywhere in an image.

  f32[B, H, W, K] -> f32[B, K].
  """
  pixels = logits.reshape(len(logits), -1, logits.shape[-1])
  first = jnp.argmax(pixels, axis=1, keepdims=True) == jnp.arange(pixels.shape[1])[:, None]
  # Of equal ones the first has all of the gradient, as in the official code's max pooling; jnp.max
  # would divide it among them.
  return jnp.sum(jnp.where(first, pixels, 0), axis=1)


def evaluated(memory, label, predicted, momentum):
  """Updates the running counts of pixels by class after a labeled batch.

  The counts are of the truth, of the prediction, and of both at once. The prediction is counted
  where there is no label too, padding among it, as in the official code: such pixels look wrong.

  Args:
    memory: {"count_truth", "count_predicted", "count_hit"}, f32[K] each.
    label, predicted: i32[B, H, W].
    momentum: what the counts keep in a step.
  """
  is_class = lambda ids: ids[..., None] == jnp.arange(memory["count_truth"].size)
  truth, prediction = is_class(label), is_class(predicted)
  found = {"count_truth": truth, "count_predicted": prediction, "count_hit": truth & prediction}
  return {
    name: momentum * memory[name] + jnp.sum(pixels, axis=(0, 1, 2))
    for name, pixels in found.items()
  }


def running_iou(memory):
  """Computes the intersection over union of each class by running counts.

  f32[K]; 0 where nothing was counted.
  """
  union = memory["count_truth"] + memory["count_predicted"] - memory["count_hit"]
  return memory["count_hit"] / jnp.maximum(union, jnp.finfo(union.dtype).tiny)


def sample_weight(iou, image_label, *, power=8.0, trust_unseen=True):
  """Computes the weight of each image from the IoU of its classes.

  v_i = (least IoU of the classes in the image)^power: f32[K], [B, K] -> f32[B]. Background counts
  as a class.

  Args:
    trust_unseen: a class whose IoU is 0, as it was never met or never hit so far, counts as IoU 1.
  """
  counts = (image_label > 0) & (iou > 0) if trust_unseen else image_label > 0
  return jnp.min(jnp.where(counts, iou, 1.0), axis=-1) ** power


def _rules(problems, task, *, decay_pseudo_rate, **_):
  rate = task.optimizer.learning_rate
  if not decay_pseudo_rate and rate(0) == 0 < rate(1):
    remedy = "set optimizer.warmup_steps=0, or method.decay_pseudo_rate=True"
    problems.add(
      "decay_pseudo_rate", got="False with a learning rate that rises from 0", remedy=remedy
    )


@checked(rules=_rules)
def learn_pseudo(
  task: Task,
  *,
  weight: NotNegative = 1.0,
  classification_weight: NotNegative = 1.0,
  score_power: NotNegative = 8.0,
  score_momentum: Annotated[float, Allowed(least=0, below=1)] = 0.99,
  trust_unseen: bool = True,
  decay_pseudo_rate: bool = False,
  background: bool = True,
) -> Method:
  """Trains two networks that label images of which only classes are known.

  The network "hybrid" teaches "pseudo". It learns from labels and, by image as far as it is to be
  trusted, from "pseudo".

  All images come with image-level labels, background among them, and all cross entropies are among
  the classes of their image. The unlabeled images are all images: those that have labels are
  learned from by these. Labeled and unlabeled images pass as one batch with common batch
  statistics. The trust is the IoU of "pseudo" on the labeled images. Padding of unlabeled images is
  learned from like any pixel, as in the official code. The task's criterion is not used.

  The official networks start with the same pretrained backbone; here all else is drawn for each on
  its own.

  Args:
    weight: of progressive cross training, what "hybrid" learns from "pseudo".
    classification_weight: of the image-level loss on the greatest logit of each class; "hybrid"
      only.
    score_power: an image is trusted by its classes' least IoU to this power, see `sample_weight`:
      IoU 0.5 becomes 0.004, 0.8 becomes 0.17, 0.9 becomes 0.43.
    score_momentum: what the counts of pixels behind the IoU keep in a step, see `evaluated`.
    trust_unseen: a class that was never met or never hit so far counts as IoU 1, as in the official
      code; False learns nothing from images with such a class.
    decay_pseudo_rate: the learning rate of "pseudo" follows the schedule too; officially it stays
      what it is at the first step.
    background: class 0 is in nearly every image and has no image-level loss; False where it is a
      class like the others.
  """
  network = task.network
  first_rate = lambda step: task.optimizer.learning_rate(0)
  pseudo_optimizer = (
    task.optimizer if decay_pseudo_rate else task.optimizer._replace(learning_rate=first_rate)
  )
  optimizers = {"hybrid": task.optimizer, "pseudo": pseudo_optimizer}
  first = 1 if background else 0  # of the classes with an image-level loss

  def init(key):
    key_hybrid, key_pseudo = jax.random.split(key)
    pair = {"hybrid": nets.create(task, key_hybrid), "pseudo": nets.create(task, key_pseudo)}
    counts = {name: jnp.zeros(task.num_classes) for name in ("count_predicted", "count_hit")}
    return State(
      jnp.zeros([], jnp.int32), pair, {"count_truth": jnp.ones(task.num_classes)} | counts
    )

  def draw(key, batch):
    return nets.dropout_keys(key, "hybrid", "pseudo")

  def run(net, batch, dropout):
    """Computes logits on labeled and on unlabeled images.

    Returns both, and the net with its statistics moved.
    """
    labeled, unlabeled = batch["labeled"]["image"], batch["unlabeled"]["weak"]
    (logits,), net = nets.forward(
      network, net, jnp.concatenate([labeled, unlabeled]), dropout=dropout
    )
    return logits[: len(labeled)], logits[len(labeled) :], net

  def cross_entropy_mean(logits, image_label, label):
    # Officially NaN where no pixel has a label.
    return losses.mean_over(
      class_aware.cross_entropy(logits, image_label, label), label != IGNORE_LABEL
    )

  def classification(logits, image_label):
    """Computes the image-level loss on the greatest logit of each class.

    f32[B, K'], in nats: how well the logit predicts that the class is in the image.
    """
    return optax.sigmoid_binary_cross_entropy(
      greatest_logits(logits)[:, first:], image_label[:, first:]
    )

  def trust(memory, image_label):
    return sample_weight(
      running_iou(memory), image_label, power=score_power, trust_unseen=trust_unseen
    )

  def update(state, batch, draws):
    label, labeled_classes = batch["labeled"]["label"], batch["labeled"]["image_label"]
    known_label, classes = batch["unlabeled"]["label"], batch["unlabeled"]["image_label"]

    def objective(live):
      hybrid_labeled, hybrid_unlabeled, hybrid = run(live["hybrid"], batch, draws["hybrid"])
      pseudo_labeled, pseudo_unlabeled, pseudo = run(live["pseudo"], batch, draws["pseudo"])
      label_by_hybrid = pseudo_label(hybrid_unlabeled, classes, known_label)
      label_by_pseudo = pseudo_label(pseudo_unlabeled, classes, known_label)
      memory = evaluated(
        state.memory, label, class_aware.best_class(pseudo_labeled, labeled_classes), score_momentum
      )
      weights = trust(memory, classes)

      per_class = (
        classification(hybrid_labeled, labeled_classes),
        classification(hybrid_unlabeled, classes),
      )
      classification_loss = classification_weight * losses.joint_mean(*per_class)
      supervised_loss = cross_entropy_mean(hybrid_labeled, labeled_classes, label)
      pseudo_loss = cross_entropy_mean(pseudo_unlabeled, classes, label_by_hybrid)
      per_pixel = class_aware.cross_entropy(hybrid_unlabeled, classes, label_by_pseudo)
      # Over all pixels, ignored ones of labeled images among them.
      progressive_loss = jnp.mean(per_pixel * weights[:, None, None])

      # 1 is what a class never seen starts from.
      iou, seen = running_iou(memory), memory["count_truth"] > 1
      metrics = {
        "sample_weight": jnp.mean(weights),
        "running_iou": losses.mean_over(iou, seen),
        "running_iou_least": jnp.min(jnp.where(seen, iou, 1.0)),
      }
      return nets.Outcome(
        {
          "supervised": supervised_loss,
          "pseudo": pseudo_loss,
          "classification": classification_loss,
          "progressive": task.unlabeled_weight(state.step) * weight * progressive_loss,
        },
        {"hybrid": hybrid, "pseudo": pseudo},
        metrics,
        memory,
      )

    return nets.descend(optimizers, state, objective)

  def show(state, batch, draws):
    classes = batch["unlabeled"]["image_label"]
    _, by_pseudo, _ = run(state.nets["pseudo"], batch, draws["pseudo"])
    _, by_hybrid, _ = run(state.nets["hybrid"], batch, draws["hybrid"])
    iou = running_iou(state.memory)[class_aware.best_class(by_pseudo, classes)]
    weights = jnp.broadcast_to(trust(state.memory, classes)[:, None, None], iou.shape)
    panels = [
      Panel("weak view", "image", batch["unlabeled"]["weak"]),
      Panel("pseudo", "classes", class_aware.softmax(by_pseudo, classes)),
      Panel("IoU of its class", "heat", iou),
      Panel("sample weight", "heat", weights),
      Panel("hybrid", "classes", class_aware.softmax(by_hybrid, classes)),
    ]
    return panels, batch["unlabeled"]["valid"]

  return Method(
    Needs(weak_label="image", labeled_too=True, criterion=False),
    init,
    draw,
    update,
    nets.predictors(network, "hybrid", "pseudo"),
    show,
  )
