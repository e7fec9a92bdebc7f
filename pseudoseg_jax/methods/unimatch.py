"""UniMatch and its FixMatch: what a network says of a weak view, where it is sure, supervises
strong views of the same crop.

Yang et al., "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation", CVPR
2023; facts from the official code (LiheYoung/UniMatch, version 1).
"""

import functools

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks, nets, rng
from pseudoseg_jax.contract import Method, Needs, Panels, Task
from pseudoseg_jax.ops import losses, mixing, perturb, targets


def opinion(logits, valid):
  """What is taught: (label i32[B, H, W], confidence f32[B, H, W], valid bool[B, H, W]), without
  gradient.
  """
  return (*targets.hard_label(logits), valid)


def agreement(logits, taught, *, min_confidence):
  """Cross entropy with an opinion where it is at least `min_confidence` sure, f32[].

  The mean is over all valid pixels, sure or not, as in the official code.

  Args:
    logits: f32[B, H, W, K]; taught: see `opinion`.
  """
  label, confidence, valid = taught
  kept = confidence >= min_confidence
  return losses.mean_over(losses.cross_entropy(logits, label) * kept, valid)


def kept_fraction(taught, *, min_confidence):
  """Share of the valid pixels that are at least `min_confidence` sure, f32[]."""
  _, confidence, valid = taught
  return losses.mean_over((confidence >= min_confidence).astype(confidence.dtype), valid)


def strong_agreement(logits, taught, partner_taught, box, *, min_confidence):
  """Mean over the S strong views of `agreement` with two opinions, mixed as the images are, f32[].

  Args:
    logits: f32[B * S, H, W, K], the views of an image in a row; box: bool[B, S, H, W], True where
      the partner is seen.
  """
  mixed = jax.tree.map(
    lambda ours, theirs: mixing.mix(box, ours[:, None], theirs[:, None]), taught, partner_taught
  )
  by_view = logits.reshape(*box.shape, -1)
  return jnp.mean(
    jax.vmap(functools.partial(agreement, min_confidence=min_confidence), in_axes=1)(by_view, mixed)
  )


def _check(name, *, min_confidence, box_probability, drop_rate=0.0):
  problems = checks.Problems(f"{name} cannot be run with these options")
  for option, value in (("min_confidence", min_confidence), ("box_probability", box_probability)):
    if not 0 <= value <= 1:
      problems.add(option, got=value, allowed="0..1")
  if not 0 <= drop_rate < 1:
    problems.add("drop_rate", got=drop_rate, allowed="0 (all channels are kept) up to below 1")
  problems.raise_if_any()


def _draw_boxes(key, batch, probability):
  """bool[B, S, H, W]: a box for each strong view of each image, or none."""
  num_images, num_views, height, width, _ = batch["unlabeled"]["strong"].shape
  edges = mixing.draw_fitting_boxes(
    key, num_images * num_views, (height, width), probability=probability
  )
  return mixing.edge_masks(edges, (height, width)).reshape(num_images, num_views, height, width)


def _cutmix(batch, box):
  """The strong views with the partner's in their boxes, as one batch f32[B * S, H, W, C]."""
  mixed = mixing.mix(box, batch["unlabeled"]["strong"], batch["partner"]["strong"])
  return mixed.reshape(-1, *mixed.shape[2:])


def unimatch(
  task: Task,
  *,
  weight: float = 1.0,
  min_confidence: float = 0.95,
  drop_rate: float = 0.5,
  box_probability: float = 0.5,
) -> Method:
  """Two strong views and a perturbation of features learn from one weak view; no teacher, no
  ramp-up. [UniMatch, sections 3.2, 3.3]

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
      of its own.
    box_probability: with which a strong view shows its partner in a box.
  """
  _check(
    "unimatch", min_confidence=min_confidence, drop_rate=drop_rate, box_probability=box_probability
  )
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
    """Logits of the labeled and of the weak images, logits of the weak ones from perturbed maps,
    and the net.
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
    partner, student, box = batch["partner"], state.nets["student"], draws["box"]
    partner_taught = opinion(nets.infer(network, student, partner["weak"]), partner["valid"])
    strong = _cutmix(batch, box)

    share = task.unlabeled_weight(state.step) * weight

    def objective(live):
      (on_labeled, on_weak, on_perturbed), net = perturbed_pass(live["student"], batch, draws)
      (on_strong,), net = nets.forward(network, net, strong, dropout=draws["dropout"]["strong"])
      taught = opinion(on_weak, batch["unlabeled"]["valid"])

      supervised = task.criterion(on_labeled, batch["labeled"]["label"]) / 2
      by_views = (
        share
        / 4
        * strong_agreement(on_strong, taught, partner_taught, box, min_confidence=min_confidence)
      )
      by_features = share / 4 * agreement(on_perturbed, taught, min_confidence=min_confidence)
      loss = supervised + by_views + by_features
      terms = {
        "loss": loss,
        "loss_supervised": supervised,
        "loss_strong": by_views,
        "loss_features": by_features,
        "kept_fraction": kept_fraction(taught, min_confidence=min_confidence),
      }
      return loss, ({"student": net}, terms)

    after, metrics = nets.descend(task.optimizer, {"student": student}, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  def show(state, batch, draws):
    (_, on_weak, on_perturbed), _ = perturbed_pass(state.nets["student"], batch, draws)
    _, confidence, valid = opinion(on_weak, batch["unlabeled"]["valid"])
    views = _cutmix(batch, draws["box"]).reshape(batch["unlabeled"]["strong"].shape)
    weak, by_features, label = (
      batch["unlabeled"]["weak"],
      jax.nn.softmax(on_perturbed),
      jax.nn.softmax(on_weak),
    )
    return (weak, views[:, 0], views[:, 1], by_features, confidence, label), (
      confidence >= min_confidence
    ) & valid

  names = (
    "weak view",
    "strong view 1",
    "strong view 2",
    "perturbed features",
    "confidence",
    "pseudo label",
  )
  panels = Panels(names, ("image", "image", "image", "classes", "heat", "classes"), show)
  needs = Needs(partner=True, strong_views=2)
  return Method(
    needs, nets.init_student(task), draw, update, nets.predictors(network, "student"), panels
  )


def fixmatch(
  task: Task, *, weight: float = 1.0, min_confidence: float = 0.95, box_probability: float = 0.5
) -> Method:
  """One strong view learns from the weak one; as `unimatch` in all else. [UniMatch, section 3.1;
  Sohn et al. 2020]

  Args:
    weight: of the unlabeled term; its sum with the supervised loss is halved.
    min_confidence, box_probability: see `unimatch`; without boxes (0) this is FixMatch itself, one
      threshold for each pixel.
  """
  _check("fixmatch", min_confidence=min_confidence, box_probability=box_probability)
  network = task.network

  def draw(key, batch):
    box = _draw_boxes(rng.stream(key, "boxes"), batch, box_probability)
    return {"box": box, "dropout": nets.dropout_keys(key, "weak", "strong")}

  def weak_pass(net, batch, draws):
    """Logits of the labeled and of the weak images, which share batch statistics, and the net."""
    labeled, weak = batch["labeled"]["image"], batch["unlabeled"]["weak"]
    (joint,), net = nets.forward(
      network, net, jnp.concatenate([labeled, weak]), dropout=draws["dropout"]["weak"]
    )
    return jnp.split(joint, [len(labeled)]), net

  def update(state, batch, draws):
    partner, student, box = batch["partner"], state.nets["student"], draws["box"]
    partner_taught = opinion(nets.infer(network, student, partner["weak"]), partner["valid"])
    strong = _cutmix(batch, box)

    share = task.unlabeled_weight(state.step) * weight

    def objective(live):
      (on_labeled, on_weak), net = weak_pass(live["student"], batch, draws)
      (on_strong,), net = nets.forward(network, net, strong, dropout=draws["dropout"]["strong"])
      taught = opinion(on_weak, batch["unlabeled"]["valid"])

      supervised = task.criterion(on_labeled, batch["labeled"]["label"]) / 2
      by_view = (
        share
        / 2
        * strong_agreement(on_strong, taught, partner_taught, box, min_confidence=min_confidence)
      )
      loss = supervised + by_view
      terms = {
        "loss": loss,
        "loss_supervised": supervised,
        "loss_strong": by_view,
        "kept_fraction": kept_fraction(taught, min_confidence=min_confidence),
      }
      return loss, ({"student": net}, terms)

    after, metrics = nets.descend(task.optimizer, {"student": student}, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  def show(state, batch, draws):
    (_, on_weak), _ = weak_pass(state.nets["student"], batch, draws)
    _, confidence, valid = opinion(on_weak, batch["unlabeled"]["valid"])
    shown = (
      batch["unlabeled"]["weak"],
      _cutmix(batch, draws["box"]),
      confidence,
      jax.nn.softmax(on_weak),
    )
    return shown, (confidence >= min_confidence) & valid

  panels = Panels(
    ("weak view", "strong view", "confidence", "pseudo label"),
    ("image", "image", "heat", "classes"),
    show,
  )
  needs = Needs(partner=True, strong_views=1)
  return Method(
    needs, nets.init_student(task), draw, update, nets.predictors(network, "student"), panels
  )
