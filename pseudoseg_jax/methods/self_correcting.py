"""Self-correcting networks: labels made from boxes are corrected in training.

A network that is shown boxes labels the images that have only boxes, and its labels are corrected
while another learns from them.

Ibrahim, Vahdat, Ranjbar & Macready, "Semi-Supervised Semantic Image Segmentation with
Self-Correcting Networks", CVPR 2020. No code was published: facts from the paper's opening and its
author's slides, whose numbers stand below; choices where they are silent are named as such.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, optim, rng
from pseudoseg_jax.contract import IGNORE_LABEL, Method, Needs, Panel, Predictor, State, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import boxes, fusion, losses, schedules
from pseudoseg_jax.options import Count, NotNegative, Positive, checked


def box_network(task: Task, *, background: bool):
  """Builds the ancillary model p_anc(y | x, b).

  It is a network whose maps are multiplied by what a box encoder makes of the boxes. [slide 17]

  Args:
    background: see `boxes.with_background`.

  Returns:
    The box encoder (contract.Head), to stand in the network's tree as "box_encoder", and run: (net,
    images, planes f32[B, H, W, K], train=bool, dropout=key) -> (logits f32[B, H, W, K], attention,
    net with its statistics moved where train=True); attention maps f32[B, h, w, C] in 0..1, the
    first that of the deepest map.
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


@checked
def ancillary(task: Task, *, background: bool = True) -> Method:
  """Trains the ancillary model on the masks of labeled images.

  The first stage: the model learns the masks from image and boxes. [slides 15-17]

  It labels the images that have only boxes in `self_correcting`. For the convolutional correction
  it is to be trained on half of the labeled images, else it is overconfident on those that train
  the correction. [the author's notes]

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
      return nets.Outcome({"supervised": task.criterion(logits, label)}, {"ancillary": net})

    return nets.descend(task.optimizer, state, objective)

  def logits(state, images):
    image, planes = jnp.split(images, [task.network.in_channels], axis=-1)
    return run(state.nets["ancillary"], image, planes, train=False)[0]

  return Method(
    Needs(unlabeled=False, weak_label="boxes"),
    init,
    draw,
    update,
    {"ancillary": Predictor(logits, weak_label="boxes")},
  )


def em_fixed_label(
  logits, planes, *, foreground_bias: float, background_bias: float, background: bool
):
  """Labels pixels by the likeliest class among those whose boxes cover them.

  Each class is raised by a bias. [Papandreou et al. 2015, Bbox-EM-Fixed]

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


def _rules(problems, task, *, correction, learn_weak, alpha_start, alpha_end, **_):
  if not learn_weak and correction != "convolutional":
    allowed = "True, except with correction 'convolutional'"
    problems.add("learn_weak", got=False, allowed=allowed, remedy="or take method 'supervised'")
  if alpha_end > alpha_start:
    problems.add(
      "alpha_start, alpha_end", got=(alpha_start, alpha_end), allowed="start >= end >= 0"
    )


@checked(rules=_rules)
def self_correcting(
  task: Task,
  *,
  correction: Literal["none", "linear", "convolutional", "em_fixed"] = "linear",
  learn_weak: bool = True,
  weight: NotNegative = 1.0,
  background: bool = True,
  alpha_start: NotNegative = 30.0,
  alpha_end: NotNegative = 0.5,
  alpha_decay: NotNegative = 6.0,
  hidden: Count = 128,
  correction_learning_rate: Positive = 1e-3,
  detach_primary: bool = True,
  foreground_bias: float = 5.0,
  background_bias: float = 3.0,
) -> Method:
  """Trains the primary model on masks and on soft labels of boxes.

  It learns masks, and on images with boxes a soft label q that grows better with it. [slides 18-25]

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

  def ancillary_logits_of(state, image, planes):
    """Computes the ancillary model's logits and attention maps.

    There are none for EM-Fixed.
    """
    return run(state.nets["ancillary"], image, planes, train=False)[:2] if guided else (None, None)

  def combined_logits(net, primary_logits, ancillary_logits):
    return combine.apply(net.params, net.batch_stats, primary_logits, ancillary_logits, train=True)[
      0
    ]

  def alpha(step):
    return schedules.exp_decay(
      step, start=alpha_start, end=alpha_end, rate=alpha_decay, total_steps=task.total_steps
    )

  def weak_target(state, primary_logits, ancillary_logits, planes):
    """Computes the soft label q of weakly labeled images.

    f32[B, H, W, K], 0 in all classes where nothing is known; no gradient passes.
    """
    match correction:
      case "none":
        logits = ancillary_logits
      case "linear":
        logits = fusion.self_corrected(primary_logits, ancillary_logits, alpha(state.step))
      case "convolutional":
        logits = combined_logits(state.nets["correction"], primary_logits, ancillary_logits)
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
      ancillary_labeled, _ = ancillary_logits_of(state, images, planes_of(labeled, images))
    if learn_weak:
      weak, valid = batch["unlabeled"]["weak"], batch["unlabeled"]["valid"]
      planes = planes_of(batch["unlabeled"], weak)
      ancillary_weak, _ = ancillary_logits_of(state, weak, planes)
      images = jnp.concatenate([images, weak])

    def objective(live):
      (logits,), primary = nets.forward(network, live["primary"], images, dropout=draws["primary"])
      logits_labeled, logits_weak = logits[:count], logits[count:]
      terms, metrics = {"supervised": task.criterion(logits_labeled, label)}, {}
      if learn_weak:
        target = weak_target(state, logits_weak, ancillary_weak, planes)
        kept = valid & jnp.any(target > 0, axis=-1)
        weak_loss = losses.mean_over(losses.soft_cross_entropy(logits_weak, target), kept)
        terms["weak"] = task.unlabeled_weight(state.step) * weight * weak_loss
        if correction in ("linear", "convolutional"):
          # Where the label is no longer the ancillary model's.
          corrected = jnp.argmax(target, axis=-1) != jnp.argmax(ancillary_weak, axis=-1)
          metrics["corrected_fraction"] = losses.mean_over(corrected.astype(logits.dtype), valid)
      if convolutional:
        read = jax.lax.stop_gradient(logits_labeled) if detach_primary else logits_labeled
        combined = combined_logits(live["correction"], read, ancillary_labeled)
        terms["correction"] = task.criterion(combined, label)
      if correction == "linear":
        metrics["alpha"] = alpha(state.step)
      return nets.Outcome(terms, live | {"primary": primary}, metrics)

    return nets.descend(optimizers, state, objective)

  def show(state, batch, draws):
    weak = batch["unlabeled"]["weak"]
    planes = planes_of(batch["unlabeled"], weak)
    primary_logits = nets.infer(network, state.nets["primary"], weak)
    ancillary_logits, attention = ancillary_logits_of(state, weak, planes)
    target = weak_target(state, primary_logits, ancillary_logits, planes)
    covered = jnp.max(planes[..., int(background) :], axis=-1)
    panels = [Panel("weak view", "image", weak), Panel("boxes", "heat", covered)]
    if guided:
      panels += [
        Panel("box attention", "heat", _contrast(attention[0])),
        Panel("ancillary", "classes", jax.nn.softmax(ancillary_logits)),
      ]
    panels += [
      Panel("primary", "classes", jax.nn.softmax(primary_logits)),
      Panel("pseudo label", "classes", target),
    ]
    return panels, batch["unlabeled"]["valid"] & jnp.any(target > 0, axis=-1)

  given = (("ancillary",) if guided else ()) + (
    ("primary", "correction") if convolutional and learn_weak else ()
  )
  return Method(
    Needs(unlabeled=learn_weak, weak_label="boxes"),
    init,
    draw,
    update,
    nets.predictors(network, "primary"),
    show if learn_weak else None,
    given_nets=given,
  )


def _contrast(attention):
  """Measures how far the attention at each place is from its mean.

  f32[B, h, w, C] -> f32[B, h, w]: the mean is over the image, the distance scaled to 0..1.
  """
  distance = jnp.mean(jnp.abs(attention - jnp.mean(attention, axis=(1, 2), keepdims=True)), axis=-1)
  return distance / jnp.maximum(jnp.max(distance, axis=(1, 2), keepdims=True), 1e-6)
