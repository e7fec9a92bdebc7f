"""UniMatch and its FixMatch: a weak view supervises strong views.

The confident prediction on a weak view supervises strong views of the same crop.

Yang et al., "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation", CVPR
2023; facts from the official code (LiheYoung/UniMatch, version 1).
"""

import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, rng
from pseudoseg_jax.contract import Array, Method, Needs, Panel, Task
from pseudoseg_jax.ops import losses, mixing, perturb, targets
from pseudoseg_jax.options import Allowed, NotNegative, Share, checked


class PseudoLabel(NamedTuple):
  """The pseudo label that the strong views learn.

  label i32[B, H, W], confidence f32[B, H, W], valid bool[B, H, W]; no gradient passes.
  """

  label: Array
  confidence: Array
  valid: Array


def pseudo_label(logits, valid) -> PseudoLabel:
  """Labels each pixel by its likeliest class.

  The logits are f32[B, H, W, K]; the confidence is the probability of the class.
  """
  return PseudoLabel(*targets.hard_label(logits), valid)


def consistency(logits, target: PseudoLabel, *, min_confidence):
  """Computes the cross entropy with the confident part of the pseudo label.

  f32[], of the pixels where the confidence is at least `min_confidence`. The mean is over all valid
  pixels, confident or not, as in the official code.

  Args:
    logits: f32[B, H, W, K].
  """
  kept = target.confidence >= min_confidence
  return losses.mean_over(losses.cross_entropy(logits, target.label) * kept, target.valid)


def kept_fraction(target: PseudoLabel, *, min_confidence):
  """Computes the share of the valid pixels that are confident.

  f32[]; their confidence is at least `min_confidence`.
  """
  kept = (target.confidence >= min_confidence).astype(target.confidence.dtype)
  return losses.mean_over(kept, target.valid)


def strong_consistency(
  logits, target: PseudoLabel, partner_target: PseudoLabel, box, *, min_confidence
):
  """Computes the mean over the S strong views of `consistency`.

  f32[]. The two pseudo labels are mixed as the images are.

  Args:
    logits: f32[B * S, H, W, K], the views of an image in a row.
    box: bool[B, S, H, W], True where the partner is seen.
  """
  mixed = jax.tree.map(
    lambda own, partner: mixing.mix(box, own[:, None], partner[:, None]), target, partner_target
  )
  by_view = logits.reshape(*box.shape, -1)
  per_view = functools.partial(consistency, min_confidence=min_confidence)
  return jnp.mean(jax.vmap(per_view, in_axes=1)(by_view, mixed))


def _draw_boxes(key, batch, probability):
  """Draws a box for each strong view of each image, or none.

  bool[B, S, H, W].
  """
  num_images, num_views, height, width, _ = batch["unlabeled"]["strong"].shape
  edges = mixing.draw_fitting_boxes(
    key, num_images * num_views, (height, width), probability=probability
  )
  return mixing.edge_masks(edges, (height, width)).reshape(num_images, num_views, height, width)


def _cutmix(batch, box):
  """Pastes the partner's strong views into the boxes of the strong views.

  Returns one batch f32[B * S, H, W, C].
  """
  mixed = mixing.mix(box, batch["unlabeled"]["strong"], batch["partner"]["strong"])
  return mixed.reshape(-1, *mixed.shape[2:])


@checked
def unimatch(
  task: Task,
  *,
  weight: NotNegative = 1.0,
  min_confidence: Share = 0.95,
  drop_rate: Annotated[float, Allowed(least=0, below=1)] = 0.5,
  box_probability: Share = 0.5,
) -> Method:
  """Trains one network on strong views and perturbed features.

  Two strong views and a perturbation of features learn from one weak view; no teacher, no ramp-up.
  [UniMatch, sections 3.2, 3.3]

  The partner is labeled with running statistics, the image itself by the training-mode pass that it
  learns in. Labeled and weak images share batch statistics, in the head with their perturbed copies
  too; the strong views share theirs. In the official code the partner is, by accident of its
  samplers, the same image in another crop; here it is drawn independently.

  Args:
    weight: of the unlabeled terms, of which the strong views are one half and the perturbed
      features the other. The sum with the supervised loss is halved, so the plain baseline learns
      at twice the rate.
    min_confidence: pixels below it teach nothing, yet count in the mean; 0.95 on VOC, 0 on
      Cityscapes.
    drop_rate: share of the channels of the backbone's maps that the perturbation drops, in each map
      of its own; 0 keeps all.
    box_probability: with which a strong view shows its partner in a box.
  """
  network = task.network
  channels = nets.map_channels(network)

  def draw(key, batch):
    rows = len(batch["labeled"]["image"]) + len(batch["unlabeled"]["weak"])
    keys = [rng.stream(key, f"channels/{index}") for index in range(len(channels))]
    kept = tuple(
      jax.random.bernoulli(each, 1 - drop_rate, (rows, count))
      for each, count in zip(keys, channels, strict=True)
    )
    return {
      "box": _draw_boxes(rng.stream(key, "boxes"), batch, box_probability),
      "kept_channels": kept,
      "dropout": nets.dropout_keys(key, "weak", "strong"),
    }

  def perturbed_pass(net, batch, draws):
    """Computes logits from clean and from perturbed maps.

    Returns logits of the labeled and of the weak images, logits of the weak ones from perturbed
    maps, and the net.
    """
    labeled, weak = batch["labeled"]["image"], batch["unlabeled"]["weak"]
    (maps,), net = nets.encode(network, net, jnp.concatenate([labeled, weak]))
    # The labeled images are perturbed along, for their share in the head's batch statistics.
    perturbed = jax.tree.map(
      lambda x, kept: perturb.drop_channels(x, kept, rate=drop_rate), maps, draws["kept_channels"]
    )
    both = jax.tree.map(lambda *copies: jnp.concatenate(copies), maps, perturbed)
    (scores,), net = nets.decode(network, net, both, dropout=draws["dropout"]["weak"])
    first, clean = len(labeled), len(labeled) + len(weak)
    parts = scores[:first], scores[first:clean], scores[clean + first :]
    return [network.upsample(part, weak.shape[1:3]) for part in parts], net

  def update(state, batch, draws):
    partner, box = batch["partner"], draws["box"]
    partner_target = pseudo_label(
      nets.infer(network, state.nets["student"], partner["weak"]), partner["valid"]
    )
    strong = _cutmix(batch, box)
    unlabeled_weight = task.unlabeled_weight(state.step) * weight

    def objective(live):
      (logits_labeled, logits_weak, logits_perturbed), net = perturbed_pass(
        live["student"], batch, draws
      )
      (logits_strong,), net = nets.forward(network, net, strong, dropout=draws["dropout"]["strong"])
      target = pseudo_label(logits_weak, batch["unlabeled"]["valid"])

      supervised_loss = task.criterion(logits_labeled, batch["labeled"]["label"])
      strong_loss = strong_consistency(
        logits_strong, target, partner_target, box, min_confidence=min_confidence
      )
      features_loss = consistency(logits_perturbed, target, min_confidence=min_confidence)
      return nets.Outcome(
        {
          "supervised": supervised_loss / 2,
          "strong": unlabeled_weight / 4 * strong_loss,
          "features": unlabeled_weight / 4 * features_loss,
        },
        {"student": net},
        {"kept_fraction": kept_fraction(target, min_confidence=min_confidence)},
      )

    return nets.descend(task.optimizer, state, objective)

  def show(state, batch, draws):
    (_, logits_weak, logits_perturbed), _ = perturbed_pass(state.nets["student"], batch, draws)
    target = pseudo_label(logits_weak, batch["unlabeled"]["valid"])
    views = _cutmix(batch, draws["box"]).reshape(batch["unlabeled"]["strong"].shape)
    panels = [
      Panel("weak view", "image", batch["unlabeled"]["weak"]),
      Panel("strong view 1", "image", views[:, 0]),
      Panel("strong view 2", "image", views[:, 1]),
      Panel("perturbed features", "classes", jax.nn.softmax(logits_perturbed)),
      Panel("confidence", "heat", target.confidence),
      Panel("pseudo label", "classes", jax.nn.softmax(logits_weak)),
    ]
    return panels, (target.confidence >= min_confidence) & target.valid

  return Method(
    Needs(partner=True, strong_views=2),
    nets.init_student(task),
    draw,
    update,
    nets.predictors(network, "student"),
    show,
  )


@checked
def fixmatch(
  task: Task,
  *,
  weight: NotNegative = 1.0,
  min_confidence: Share = 0.95,
  box_probability: Share = 0.5,
) -> Method:
  """Trains one network on a strong view, with the labels of the weak one.

  There is one strong view; all else is as in `unimatch`. [UniMatch, section 3.1; Sohn et al. 2020]

  Args:
    weight: of the unlabeled term; its sum with the supervised loss is halved.
    min_confidence, box_probability: see `unimatch`; without boxes (0) this is FixMatch itself, one
      threshold for each pixel.
  """
  network = task.network

  def draw(key, batch):
    box = _draw_boxes(rng.stream(key, "boxes"), batch, box_probability)
    return {"box": box, "dropout": nets.dropout_keys(key, "weak", "strong")}

  def weak_pass(net, batch, draws):
    """Computes logits of the labeled and of the weak images.

    The two share batch statistics. Returns the logits and the net.
    """
    labeled, weak = batch["labeled"]["image"], batch["unlabeled"]["weak"]
    (joint,), net = nets.forward(
      network, net, jnp.concatenate([labeled, weak]), dropout=draws["dropout"]["weak"]
    )
    return jnp.split(joint, [len(labeled)]), net

  def update(state, batch, draws):
    partner, box = batch["partner"], draws["box"]
    partner_target = pseudo_label(
      nets.infer(network, state.nets["student"], partner["weak"]), partner["valid"]
    )
    strong = _cutmix(batch, box)
    unlabeled_weight = task.unlabeled_weight(state.step) * weight

    def objective(live):
      (logits_labeled, logits_weak), net = weak_pass(live["student"], batch, draws)
      (logits_strong,), net = nets.forward(network, net, strong, dropout=draws["dropout"]["strong"])
      target = pseudo_label(logits_weak, batch["unlabeled"]["valid"])

      supervised_loss = task.criterion(logits_labeled, batch["labeled"]["label"])
      strong_loss = strong_consistency(
        logits_strong, target, partner_target, box, min_confidence=min_confidence
      )
      return nets.Outcome(
        {"supervised": supervised_loss / 2, "strong": unlabeled_weight / 2 * strong_loss},
        {"student": net},
        {"kept_fraction": kept_fraction(target, min_confidence=min_confidence)},
      )

    return nets.descend(task.optimizer, state, objective)

  def show(state, batch, draws):
    (_, logits_weak), _ = weak_pass(state.nets["student"], batch, draws)
    target = pseudo_label(logits_weak, batch["unlabeled"]["valid"])
    panels = [
      Panel("weak view", "image", batch["unlabeled"]["weak"]),
      Panel("strong view", "image", _cutmix(batch, draws["box"])),
      Panel("confidence", "heat", target.confidence),
      Panel("pseudo label", "classes", jax.nn.softmax(logits_weak)),
    ]
    return panels, (target.confidence >= min_confidence) & target.valid

  return Method(
    Needs(partner=True, strong_views=1),
    nets.init_student(task),
    draw,
    update,
    nets.predictors(network, "student"),
    show,
  )
