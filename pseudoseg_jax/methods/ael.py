"""Adaptive equalization learning (AEL): more training on weak classes.

Classes of low confidence are pasted, mixed in and learned from more often.

Hu et al., "Semi-Supervised Semantic Segmentation via Adaptive Equalization Learning", NeurIPS 2021;
facts from the official code (hzhupku/SemiSeg-AEL), which is followed where the paper differs from
it.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from pseudoseg_jax import nets, rng
from pseudoseg_jax.contract import IGNORE_LABEL, Array, Method, Needs, Panel, State, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import balance, components, mixing, schedules, targets
from pseudoseg_jax.options import Allowed, Count, NotNegative, Share, checked


def choose_partner(priority, preferred=False):
  """Chooses another image of the batch for each one, preferred ones first.

  i32[N]: among the preferred ones where there are any.

  Args:
    priority: f32[N, N] in [0, 1); of those it may be, image i gets the j of greatest priority[i,
      j]. A lone image gets itself.
    preferred: bool[N, N].
  """
  rank = jnp.where(preferred, 1 + priority, priority)
  return jnp.argmax(jnp.where(jnp.eye(len(priority), dtype=bool), -1.0, rank), axis=-1)


def drawn_classes(bank, gumbel, candidates=(), *, power=1.0):
  """Draws a class for each row of Gumbel noise.

  i32[N], drawn by `balance.class_probabilities`; gumbel is f32[N, K], standard Gumbel noise.
  """
  return jnp.argmax(
    jnp.log(balance.class_probabilities(bank, candidates, power=power)) + gumbel, axis=-1
  )


class Source(NamedTuple):
  """The images, labels and classes that are pasted into labeled images.

  image f32[B, H, W, C], label i32[B, H, W], classes bool[K].
  """

  image: Array
  label: Array
  classes: Array


def choose_source(image, label, bank, draws, *, probability, candidates, power) -> Source:
  """Chooses another labeled image for each, and the classes to paste.

  Where an image gets none, its source's label is IGNORE_LABEL. The classes are the same for all
  images.
  """
  classes = drawn_classes(bank, draws["classes"], candidates, power=power)
  rows = choose_partner(draws["source"])
  used = draws["used"] < probability
  chosen = jnp.any(classes[:, None] == jnp.arange(bank.size), axis=0)
  return Source(image[rows], jnp.where(used[:, None, None], label[rows], IGNORE_LABEL), chosen)


def copy_paste(image, label, source: Source):
  """Pastes the source's pixels of the chosen classes on images and labels.

  [AEL, adaptive Copy-Paste]
  """
  mask = mixing.class_masks(
    source.label, jnp.broadcast_to(source.classes, (len(label), source.classes.size))
  )
  return mixing.mix(mask, image, source.image), mixing.mix(mask, label, source.label)


def region_boxes(label, classes, priority, *, min_area):
  """Finds the bounding box of one large region of a class in each image.

  [AEL, adaptive CutMix]

  Args:
    label: i32[N, H, W].
    classes: i32[N], the class whose regions count; pixels that touch at a corner hang together.
    priority: f32[N, H, W]; of the regions larger than the share `min_area` of the image, that with
      the greatest priority at its last pixel is taken: with uniform numbers each is as likely.

  Returns:
    bool[N, H, W], True inside; bool[N], False where no region is large enough.
  """
  regions = components.regions(components.connected(label == classes[:, None, None]))
  large = regions.area > min_area * label[0].size
  root = jnp.argmax(jnp.where(large, priority.reshape(large.shape), -jnp.inf), axis=1)[:, None]
  edges = [
    jnp.take_along_axis(edge, root, axis=1)
    for edge in (regions.top, regions.left, regions.bottom, regions.right)
  ]
  return mixing.edge_masks(jnp.concatenate(edges, axis=1), label.shape[1:]), jnp.any(large, axis=1)


class Mix(NamedTuple):
  """M mixed images: rows of the unlabeled batch and a box.

  base, source: i32[M], the image outside the box and the one inside; box: bool[M, H, W].
  by_class: bool[M], whether the box holds a region of the drawn class; else it is a random one.
  """

  base: Array
  source: Array
  box: Array
  by_class: Array

  def mixed(self, images):
    return mixing.mix(self.box, images[self.base], images[self.source])


def choose_mix(label, bank, draws, *, region_area, presence_area) -> Mix:
  """Chooses a class, a second image and the box of a region for each image.

  The second image is another one that has the class, and the box is that of one of its regions
  there. [AEL, adaptive CutMix]

  Args:
    label: i32[N, H, W], the teacher's labels of the unlabeled images.
  """
  classes = drawn_classes(bank, draws["classes"])
  holds = balance.presence(label, bank.size, presence_area)[:, classes].T
  source = choose_partner(draws["source"], holds)
  region, by_class = region_boxes(label[source], classes, draws["region"], min_area=region_area)
  anywhere = mixing.box_masks(draws["box"], label.shape[1:], area_range=(0.5, 0.5))
  return Mix(
    jnp.arange(len(label)), source, jnp.where(by_class[:, None, None], region, anywhere), by_class
  )


def ignore_unconfident(label, confidence, min_confidence):
  """Ignores labels whose confidence is below the least that counts.

  i32[...], f32[...] -> i32[...], with IGNORE_LABEL where the confidence is below.
  """
  return jnp.where(confidence < min_confidence, IGNORE_LABEL, label)


def _rules(problems, task, *, paste_classes, **_):
  if max(paste_classes, default=0) >= task.num_classes:
    allowed = f"some of 0..{task.num_classes - 1}, or () for all"
    problems.add("paste_classes", got=paste_classes, allowed=allowed)
  if len(nets.map_channels(task.network)) < 2:
    allowed = "a network whose backbone gives two maps or more"
    problems.add("network", got="one map", allowed=allowed)


@checked(rules=_rules)
def ael(
  task: Task,
  *,
  weight: NotNegative = 1.0,
  on_labeled: bool = True,
  min_confidence: Share = 0.7,
  gamma: NotNegative = 2.0,
  beta: NotNegative = 1.0,
  bank_momentum: Share = 0.999,
  paste_probability: Share = 0.5,
  paste_draws: Count = 3,
  paste_classes: Annotated[tuple[int, ...], Allowed(least=0, whole=True)] = (),
  paste_power: NotNegative = 0.5,
  region_area: Share = 0.03,
  presence_area: Share = 0.03,
  auxiliary_weight: NotNegative = 0.4,
  decay: Share = 0.99,
) -> Method:
  """Trains a student by gradient and its teacher by average, led by a bank.

  The bank of class confidences steers pasting, mixing and sampling. [AEL, section 3]

  The bank starts at random, as in the official code. Pasting and mixing follow the bank as it was
  before the step's labeled batch, sampling the one after it. All passes are in training mode:
  labeled, mixed and the teacher's unlabeled images have batch statistics of their own. Padding of
  unlabeled images is learned from like any pixel.

  The official code looks other images up in the data set. A labeled image gets one of all labeled
  images, scaled by 0.1 to 2. An unlabeled one gets, freshly augmented, one of all unlabeled images
  in which the teacher saw the drawn class when they last came up (a bank of classes by images). A
  coin throws away one of each two unlabeled images that were loaded. Here all come from the batch:
  the pasted image is another labeled one in its view, the mixed one another unlabeled one in which
  the teacher sees the class now. Every unlabeled image is the base of one mixed image; one pass of
  the teacher serves all.

  Args:
    weight: of the consistency terms.
    on_labeled: labeled images, after pasting, are learned from the teacher's labels too; in the
      code, not in the paper.
    min_confidence: pseudo labels below it are ignored; 0.7 on VOC, 0 (none) in the paper and on
      Cityscapes.
    gamma: pixels count by their confidence to this power; 0 lets all kept ones count alike.
    beta: pixels of a class are learned from the more often, the less sure the class is; 0 learns
      from all, see `balance.sampling_rate`.
    bank_momentum: what the bank keeps in a step.
    paste_probability: of pasting, image by image.
    paste_draws: classes drawn for pasting in a step, with replacement (paste_probability 0 pastes
      none); the paper has 3, the code on VOC 1.
    paste_classes: classes that may be pasted; () for all. On Cityscapes all but road, sidewalk,
      building, vegetation, sky.
    paste_power: classes are drawn by their lack of confidence to this power, see
      `balance.class_probabilities`; 0.5 in the code, 1 in the paper.
    region_area: share of the image above which a region is mixed in; 0.005 on Cityscapes.
    presence_area: share of the image from which on it is said to have a class; 0.01 on Cityscapes.
    auxiliary_weight: of the supervised loss on a second head, on the last but one map of the
      backbone; not in the paper.
    decay: of the average, see `schedules.ema_decay` with "from_copy".
  """
  network, num_classes = task.network, task.num_classes
  channels = nets.map_channels(network)
  auxiliary = heads.auxiliary(channels[-2], num_classes)
  pasting = {
    "probability": paste_probability,
    "candidates": tuple(paste_classes),
    "power": paste_power,
  }
  regions = {"region_area": region_area, "presence_area": presence_area}

  def init(key):
    student = nets.create(task, key, auxiliary=auxiliary)
    bank = jax.random.uniform(rng.stream(key, "bank"), (num_classes,))
    pair = {"student": student, "teacher": nets.teacher_of(student)}
    return State(step=jnp.zeros([], jnp.int32), nets=pair, memory={"confidence": bank})

  def draw(key, batch):
    num_labeled, num_unlabeled = len(batch["labeled"]["label"]), len(batch["unlabeled"]["weak"])
    size = batch["unlabeled"]["weak"].shape[1:3]

    def uniform(name, *shape):
      return jax.random.uniform(rng.stream(key, name), shape)

    def gumbel(name, rows):
      return jax.random.gumbel(rng.stream(key, name), (rows, num_classes))

    return {
      "paste": {
        "classes": gumbel("paste/classes", paste_draws),
        "source": uniform("paste/source", num_labeled, num_labeled),
        "used": uniform("paste/used", num_labeled),
      },
      "mix": {
        "classes": gumbel("mix/classes", num_unlabeled),
        "source": uniform("mix/source", num_unlabeled, num_unlabeled),
        "region": uniform("mix/region", num_unlabeled, *size),
        "box": mixing.draw_boxes(rng.stream(key, "mix/box"), num_unlabeled, boxes=1),
      },
      "sample": {
        name: uniform(f"sample/{name}", num_classes, *size) for name in ("labeled", "unlabeled")
      },
      "dropout": nets.dropout_keys(key, "teacher", "student", "auxiliary"),
    }

  def teach(teacher, images, dropout):
    """Predicts each of the named batches with the teacher.

    Returns the teacher's labels and confidences of each batch, and the teacher with its statistics
    moved.
    """
    logits, teacher = nets.forward(network, teacher, *images.values(), dropout=dropout)
    return {
      name: targets.hard_label(one) for name, one in zip(images, logits, strict=True)
    }, teacher

  def consistency(logits, pseudo_label, confidence, rate, uniform):
    """Computes the loss of a batch with the teacher's labels.

    Returns the loss, and the pixels that are learned from.
    """
    pseudo_label = ignore_unconfident(pseudo_label, confidence, min_confidence)
    kept = balance.sampled(jnp.argmax(logits, axis=-1), rate, uniform)
    loss = balance.reweighted_loss(logits, pseudo_label, confidence, kept, gamma)
    return loss, kept & (pseudo_label != IGNORE_LABEL)

  def student_logits(net, labeled, mixed, dropout):
    """Computes the student's logits with both of its heads.

    Returns logits of the labeled images, of the mixed ones and of the labeled ones by the second
    head; and the net with its statistics moved.
    """
    maps, net = nets.encode(network, net, labeled, mixed)
    scores, net = nets.decode(network, net, *maps, dropout=dropout["student"])
    params, stats = net.params["auxiliary"], net.batch_stats["auxiliary"]
    second, stats = auxiliary.apply(
      params, stats, maps[0][-2], train=True, dropout=dropout["auxiliary"]
    )
    net = net.replace(batch_stats=net.batch_stats | {"auxiliary": stats})
    return tuple(network.upsample(one, labeled.shape[1:3]) for one in (*scores, second)), net

  def update(state, batch, draws):
    bank, weak = state.memory["confidence"], batch["unlabeled"]["weak"]
    image, label = batch["labeled"]["image"], batch["labeled"]["label"]
    image, label = copy_paste(
      image, label, choose_source(image, label, bank, draws["paste"], **pasting)
    )
    images = ({"labeled": image} if on_labeled else {}) | {"unlabeled": weak}
    teachings, teacher = teach(state.nets["teacher"], images, draws["dropout"]["teacher"])
    mix = choose_mix(teachings["unlabeled"][0], bank, draws["mix"], **regions)
    # The class of mixed logits is the mixed class, and likewise their confidence.
    teachings["unlabeled"] = tuple(mix.mixed(one) for one in teachings["unlabeled"])

    def objective(live):
      (logits_labeled, logits_mixed, logits_second), net = student_logits(
        live["student"], image, mix.mixed(weak), draws["dropout"]
      )
      supervised_loss = task.criterion(logits_labeled, label)
      supervised_loss += auxiliary_weight * task.criterion(logits_second, label)
      moved_bank = balance.moved_bank(bank, logits_labeled, label, bank_momentum)
      rate = balance.sampling_rate(moved_bank, beta)

      logits, terms, kept = {"labeled": logits_labeled, "unlabeled": logits_mixed}, {}, {}
      for name, teaching in teachings.items():
        loss, kept[name] = consistency(logits[name], *teaching, rate, draws["sample"][name])
        terms[name] = task.unlabeled_weight(state.step) * weight * loss
      metrics = {
        "kept_fraction": jnp.mean(kept["unlabeled"]),
        "region_fraction": jnp.mean(mix.by_class),
        "class_confidence_mean": jnp.mean(moved_bank),
        "class_confidence_least": jnp.min(moved_bank),
      }
      return nets.Outcome(
        {"supervised": supervised_loss} | terms,
        {"student": net},
        metrics,
        {"confidence": moved_bank},
      )

    after, metrics = nets.descend(task.optimizer, state, objective, learning=["student"])
    teacher = nets.ema(
      teacher, after.nets["student"], schedules.ema_decay(state.step, decay, "from_copy")
    )
    return after.with_nets(teacher=teacher), metrics

  def show(state, batch, draws):
    bank, weak = state.memory["confidence"], batch["unlabeled"]["weak"]
    (logits,), _ = nets.forward(
      network, state.nets["teacher"], weak, dropout=draws["dropout"]["teacher"]
    )
    label, confidence = targets.hard_label(logits)
    mix = choose_mix(label, bank, draws["mix"], **regions)
    (logits_mixed,), _ = nets.forward(
      network, state.nets["student"], mix.mixed(weak), dropout=draws["dropout"]["student"]
    )
    rate = balance.sampling_rate(bank, beta)
    _, kept = consistency(
      logits_mixed, mix.mixed(label), mix.mixed(confidence), rate, draws["sample"]["unlabeled"]
    )
    panels = [
      Panel("weak view", "image", weak),
      Panel("second image", "image", weak[mix.source]),
      Panel("region", "heat", mix.box.astype(weak.dtype)),
      Panel("mixed", "image", mix.mixed(weak)),
      Panel("pseudo label", "classes", jax.nn.softmax(logits)),
    ]
    # The truth that a pseudo label is held against is the first image's: what is learned inside the
    # box is the second's.
    return panels, kept & ~mix.box

  return Method(Needs(), init, draw, update, nets.predictors(network, "teacher", "student"), show)
