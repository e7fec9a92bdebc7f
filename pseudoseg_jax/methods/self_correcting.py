"""Self-correcting networks: a network that is shown boxes labels the images that have only boxes,
and is corrected on the way.

Ibrahim, Vahdat, Ranjbar & Macready, "Semi-Supervised Semantic Image Segmentation with
Self-Correcting Networks", CVPR 2020. No code was published: facts from the paper's opening and its
author's slides, whose numbers stand below; choices where they are silent are named as such.
"""

import functools

import jax
import jax.numpy as jnp

from pseudoseg_jax import checks, nets, optim, rng
from pseudoseg_jax.contract import IGNORE_LABEL, Method, Needs, Panels, State, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import boxes, fusion, losses, schedules

CORRECTIONS = ("none", "linear", "convolutional", "em_fixed")


def box_network(task: Task, *, background: bool):
  """The ancillary model p_anc(y | x, b): a network whose maps are multiplied by what a box encoder
  makes of the boxes. [slide 17]

  Args:
    background: see `boxes.with_background`.

  Returns:
    The box encoder (contract.Head), to stand in the network's tree as "box_encoder", and run: (net,
    images, planes f32[B, H, W, K], train=bool, dropout=key) -> (logits f32[B, H, W, K], attention,
    net with its
      statistics moved where train=True); attention maps f32[B, h, w, C] in 0..1, the first that of
      the deepest map.
  """
  network = task.network
  channels = nets.map_channels(network)
  # Slides: the encoder's output and the low-level map (re-implementations take the first behind the
  # ASPP). Here both are the backbone's, which every network has; like there, pretrained weights
  # stay usable. A head that reads the deepest map alone (PSPNet) feels one scale.
  deepest = len(channels) - 1
  scales = (deepest, 0) if deepest else (0,)
  encoder = heads.box_encoder(
    task.num_classes + (not background), [channels[scale] for scale in scales]
  )

  def run(net, images, planes, *, train, dropout=None):
    maps, stats = network.encode(net.params, net.batch_stats, images, train=train, dropout=dropout)
    sizes = [maps[scale].shape[1:3] for scale in scales]
    planes = boxes.with_background(planes, background=background)
    attention, _ = encoder.apply(net.params["box_encoder"], {}, planes, sizes, train=train)
    of_scale = dict(zip(scales, attention, strict=True))
    maps = tuple(
      x * of_scale[scale].astype(x.dtype) if scale in of_scale else x
      for scale, x in enumerate(maps)
    )
    scores, stats = network.decode(net.params, stats, maps, train=train, dropout=dropout)
    return network.upsample(scores, images.shape[1:3]), attention, net.replace(batch_stats=stats)

  return encoder, run


def ancillary(task: Task, *, background: bool = True) -> Method:
  """The first stage: the ancillary model learns the masks of labeled images from image and boxes.
  [slides 15-17]

  It labels the images that have only boxes in `self_correcting`. For the convolutional correction
  it is to be trained on half of the labeled images, else it is too sure on those that train the
  correction. [the author's notes]

  Args:
    background: class 0 is what no box covers, as in VOC; False where every class has boxes
      (Cityscapes).
  """
  encoder, run = box_network(task, background=background)

  def init(key):
    return State(
      step=jnp.zeros([], jnp.int32), nets={"ancillary": nets.create(task, key, box_encoder=encoder)}
    )

  def draw(key, batch):
    return nets.dropout_keys(key, "ancillary")

  def update(state, batch, draws):
    image, label = batch["labeled"]["image"], batch["labeled"]["label"]
    planes = boxes.box_planes(batch["labeled"]["boxes"], label.shape[1:], task.num_classes)

    def objective(live):
      logits, _, net = run(live["ancillary"], image, planes, train=True, dropout=draws["ancillary"])
      loss = task.criterion(logits, label)
      return loss, ({"ancillary": net}, {"loss": loss})

    after, metrics = nets.descend(task.optimizer, state.nets, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  def predict(state, images):
    image, planes = jnp.split(images, [task.network.in_channels], axis=-1)
    return run(state.nets["ancillary"], image, planes, train=False)[0]

  needs, hints = Needs(unlabeled=False, weak_label="boxes"), {"ancillary": "boxes"}
  return Method(needs, init, draw, update, {"ancillary": predict}, predictor_hints=hints)


def em_fixed_label(
  logits, planes, *, foreground_bias: float, background_bias: float, background: bool
):
  """The likeliest class among those whose boxes cover the pixel, each raised by a bias. [Papandreou
  et al. 2015, Bbox-EM-Fixed]

  Args:
    logits: f32[B, H, W, K]; planes: f32[B, H, W, K] of 0 and 1.
    foreground_bias, background_bias: added to log-probabilities in nats.
    background: class 0 needs no box. Else pixels that no box covers get IGNORE_LABEL.

  Returns:
    i32[B, H, W], without gradient.
  """
  is_background = background & (jnp.arange(logits.shape[-1]) == 0)
  possible = (planes > 0) | is_background
  score = jax.nn.log_softmax(logits) + jnp.where(is_background, background_bias, foreground_bias)
  label = jnp.argmax(jnp.where(possible, score, -jnp.inf), axis=-1)
  return jnp.where(jnp.any(possible, axis=-1), label, IGNORE_LABEL)


def self_correcting(
  task: Task,
  *,
  correction: str = "linear",
  learn_weak: bool = True,
  weight: float = 1.0,
  background: bool = True,
  alpha_start: float = 30.0,
  alpha_end: float = 0.5,
  alpha_decay: float = 6.0,
  hidden: int = 128,
  correction_learning_rate: float = 1e-3,
  detach_primary: bool = True,
  foreground_bias: float = 5.0,
  background_bias: float = 3.0,
) -> Method:
  """The primary model learns masks, and on images with boxes a soft label q that grows better with
  it. [slides 18-25]

  Labeled and weakly labeled images pass as one batch with common statistics: on the slides one
  batch holds both. The ancillary model answers in the step, with running statistics, on the crop
  and its boxes; the author stores its logits, which for VOC would be hundreds of gigabytes. Both
  answers are of full size. Weakly labeled pixels all count alike, but for padding. The parts about
  statistics and padding are choices: the sources are silent.

  Args:
    correction: "none": q is the ancillary model's softmax. "linear": q minimizes KL(q || p) + alpha
      KL(q || p_anc). "convolutional": a small network reads both logits; it learns from masks only.
      "em_fixed", a baseline without an ancillary model: q is the label of `em_fixed_label` from the
      primary model.
    learn_weak: False is the second stage of "convolutional": masks alone, for primary model and
      correction net together; True is its third, which goes on with both nets of the second.
    weight: of the term on weakly labeled images.
    background: see `ancillary`, which must have been trained with the same.
    alpha_start, alpha_end, alpha_decay: alpha = max(end, start exp(-decay step / total_steps)).
      [read off slide 22's curve]
    hidden, detach_primary: "convolutional" only: width of the correction net, and whether its loss
      stops short of the primary model. Not in the sources: re-implementations differ.
    correction_learning_rate: "convolutional" only: of the correction net's Adam; falls to 0 as (1 -
      t)^0.9. Chosen here: logits have no fixed scale, and a net on them diverges at the rates that
      suit a backbone.
    foreground_bias, background_bias: "em_fixed" only; those of Papandreou et al.
  """
  _check(
    correction, learn_weak, alpha_start, alpha_end, alpha_decay, hidden, correction_learning_rate
  )
  network, num_classes = task.network, task.num_classes
  convolutional, guided = correction == "convolutional", correction != "em_fixed"
  encoder, run = box_network(task, background=background) if guided else (None, None)
  combine = heads.correction_net(num_classes, hidden=hidden)
  rate = functools.partial(
    schedules.poly, base=correction_learning_rate, total_steps=task.total_steps
  )
  optimizers = {"primary": task.optimizer, "correction": optim.adamw(rate)}

  def init(key):
    networks = {"primary": nets.create(task, rng.stream(key, "primary"))}
    if guided:
      networks["ancillary"] = nets.frozen(
        nets.create(task, rng.stream(key, "ancillary"), box_encoder=encoder)
      )
    if convolutional:
      networks["correction"] = nets.create_from_head(
        combine, rng.stream(key, "correction"), optimizers["correction"]
      )
    return State(step=jnp.zeros([], jnp.int32), nets=networks)

  def draw(key, batch):
    return nets.dropout_keys(key, "primary")

  def planes_of(part, image):
    return boxes.box_planes(part["boxes"], image.shape[1:3], num_classes)

  def opinion(state, image, planes):
    """The ancillary model's logits and attention maps; none for EM-Fixed."""
    return run(state.nets["ancillary"], image, planes, train=False)[:2] if guided else (None, None)

  def corrected(net, primary_logits, ancillary_logits):
    return combine.apply(net.params, net.batch_stats, primary_logits, ancillary_logits, train=True)[
      0
    ]

  def alpha(step):
    return schedules.exp_decay(
      step, start=alpha_start, end=alpha_end, rate=alpha_decay, total_steps=task.total_steps
    )

  def weak_target(state, primary_logits, ancillary_logits, planes):
    """q f32[B, H, W, K], 0 in all classes where nothing is known; no gradient passes."""
    match correction:
      case "none":
        logits = ancillary_logits
      case "linear":
        logits = fusion.self_corrected(primary_logits, ancillary_logits, alpha(state.step))
      case "convolutional":
        logits = corrected(state.nets["correction"], primary_logits, ancillary_logits)
      case "em_fixed":
        biases = dict(
          foreground_bias=foreground_bias, background_bias=background_bias, background=background
        )
        return jax.nn.one_hot(em_fixed_label(primary_logits, planes, **biases), num_classes)
    return jax.lax.stop_gradient(jax.nn.softmax(logits))

  def update(state, batch, draws):
    labeled = batch["labeled"]
    images, label, count = labeled["image"], labeled["label"], len(labeled["image"])
    if convolutional:
      on_labeled, _ = opinion(state, images, planes_of(labeled, images))
    if learn_weak:
      weak, valid = batch["unlabeled"]["weak"], batch["unlabeled"]["valid"]
      planes = planes_of(batch["unlabeled"], weak)
      on_weak, _ = opinion(state, weak, planes)
      images = jnp.concatenate([images, weak])

    def objective(live):
      (logits,), primary = nets.forward(network, live["primary"], images, dropout=draws["primary"])
      terms = {"loss_supervised": task.criterion(logits[:count], label)}
      if learn_weak:
        target = weak_target(state, logits[count:], on_weak, planes)
        kept = valid & jnp.any(target > 0, axis=-1)
        weak_loss = losses.mean_over(losses.soft_cross_entropy(logits[count:], target), kept)
        terms["loss_weak"] = task.unlabeled_weight(state.step) * weight * weak_loss
      if convolutional:
        seen = jax.lax.stop_gradient(logits[:count]) if detach_primary else logits[:count]
        terms["loss_correction"] = task.criterion(
          corrected(live["correction"], seen, on_labeled), label
        )
      loss = sum(terms.values())
      told = {"loss": loss} | terms
      if learn_weak and correction in ("linear", "convolutional"):
        # Where the label is no longer the ancillary model's.
        other = jnp.argmax(target, axis=-1) != jnp.argmax(on_weak, axis=-1)
        told["corrected_fraction"] = losses.mean_over(other.astype(loss.dtype), valid)
      return loss, (live | {"primary": primary}, told)

    learning = {role: state.nets[role] for role in optimizers if role in state.nets}
    after, metrics = nets.descend(optimizers, learning, state.step, objective)
    if correction == "linear":
      metrics["alpha"] = alpha(state.step)
    return state.replace(step=state.step + 1, nets=state.nets | after), metrics

  def show(state, batch, draws):
    weak = batch["unlabeled"]["weak"]
    planes = planes_of(batch["unlabeled"], weak)
    primary_logits = nets.infer(network, state.nets["primary"], weak)
    ancillary_logits, attention = opinion(state, weak, planes)
    target = weak_target(state, primary_logits, ancillary_logits, planes)
    covered = jnp.max(planes[..., int(background) :], axis=-1)
    guide = (_contrast(attention[0]), jax.nn.softmax(ancillary_logits)) if guided else ()
    shown = (weak, covered, *guide, jax.nn.softmax(primary_logits), target)
    return shown, batch["unlabeled"]["valid"] & jnp.any(target > 0, axis=-1)

  guide = (("box attention", "heat"), ("ancillary", "classes")) if guided else ()
  pictures = (
    ("weak view", "image"),
    ("boxes", "heat"),
    *guide,
    ("primary", "classes"),
    ("pseudo label", "classes"),
  )
  names, kinds = zip(*pictures, strict=True)
  panels = Panels(names, kinds, show) if learn_weak else None
  given = (("ancillary",) if guided else ()) + (
    ("primary", "correction") if convolutional and learn_weak else ()
  )
  needs = Needs(unlabeled=learn_weak, weak_label="boxes")
  return Method(
    needs, init, draw, update, nets.predictors(network, "primary"), panels, given_nets=given
  )


def _contrast(attention):
  """How far the attention at each place is from its mean over the image, scaled to 0..1: f32[B, h,
  w, C] -> f32[B, h, w].
  """
  distance = jnp.mean(jnp.abs(attention - jnp.mean(attention, axis=(1, 2), keepdims=True)), axis=-1)
  return distance / jnp.maximum(jnp.max(distance, axis=(1, 2), keepdims=True), 1e-6)


def _check(
  correction, learn_weak, alpha_start, alpha_end, alpha_decay, hidden, correction_learning_rate
):
  problems = checks.Problems("self_correcting cannot be run with these options")
  if correction not in CORRECTIONS:
    remedy = checks.nearest(correction, CORRECTIONS)
    problems.add(
      "correction", got=repr(correction), allowed=checks.choices(CORRECTIONS), remedy=remedy
    )
  if not learn_weak and correction != "convolutional":
    allowed = "True, except with correction 'convolutional'"
    problems.add("learn_weak", got=False, allowed=allowed, remedy="or take method 'supervised'")
  if not 0 <= alpha_end <= alpha_start:
    problems.add(
      "alpha_start, alpha_end", got=(alpha_start, alpha_end), allowed="start >= end >= 0"
    )
  if alpha_decay < 0:
    problems.add("alpha_decay", got=alpha_decay, allowed="0 or more")
  if not correction_learning_rate > 0:
    problems.add("correction_learning_rate", got=correction_learning_rate, allowed="above 0")
  if hidden < 1:
    problems.add("hidden", got=hidden, allowed="1 or more")
  problems.raise_if_any()
