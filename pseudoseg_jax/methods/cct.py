"""CCT: auxiliary decoders learn from the main one on perturbed features.

On perturbed features of unlabeled images they learn to predict what the main decoder predicts on
the clean ones.

Ouali, Hudelot & Tami, "Semi-Supervised Semantic Segmentation with Cross-Consistency Training", CVPR
2020; facts from the official code (yassouali/CCT), which is followed where the paper differs from
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pseudoseg_jax import checks, nets, rng
from pseudoseg_jax.contract import IGNORE_LABEL, Head, Method, Needs, Panel, Predictor, State, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import cam as cams, losses, perturb, resize, schedules
from pseudoseg_jax.options import Allowed, NotNegative, Positive, Share, checked

# Auxiliary decoders by the perturbation of their features, as many as the official configuration
# has.
DECODERS = {
  "vat": 2,
  "dropout": 6,
  "cutout": 6,
  "context": 2,
  "object": 2,
  "feature_drop": 6,
  "feature_noise": 6,
}
# What each perturbation draws is uniform in these bounds: VAT's first direction, which channels
# fall, where rectangles lie, the threshold, the noise. [CCT, official config]
_DRAWN = {
  "vat": (-0.5, 0.5),
  "dropout": (0.0, 1.0),
  "cutout": (0.0, 1.0),
  "feature_drop": (0.7, 0.9),
  "feature_noise": (-0.3, 0.3),
}


def consistency(distance: str, logits, target, *, min_confidence: float = 0.0):
  """Measures a decoder against the target.

  f32[], a mean over pixels and, but for confident KL, classes. [CCT, utils/losses.py]

  Args:
    distance: "mse", "kl" or "js".
    logits: f32[B, H, W, K]; target: probabilities f32[B, H, W, K], without gradient.
    min_confidence: "mse" and "kl" only: pixels whose greatest target is not above it do not count;
      0 for none such.
  """
  if distance == "mse":
    per_pixel = losses.squared_distance(jax.nn.softmax(logits), target)
    return losses.mean_over(per_pixel, jnp.max(target, axis=-1) > min_confidence)
  if distance == "js":
    return jnp.mean(losses.js_divergence(logits, target)) / logits.shape[-1]
  per_pixel = losses.kl_from_target(logits, target)
  if not min_confidence:
    return jnp.mean(per_pixel) / logits.shape[-1]
  # Official: over all pixels, kept or not, and not over classes; K times the scale of the form
  # without a threshold.
  return jnp.mean(per_pixel * (jnp.max(target, axis=-1) > min_confidence))


def pseudo_mask(
  cam,
  valid,
  *,
  background: bool = True,
  foreground_score: float = 0.30,
  background_score: float = 0.05,
):
  """Labels the pixels where class activation maps are confident.

  All others get IGNORE_LABEL. [CCT, pseudo_labels/, constants of its two thresholds]

  The official masks come from a network of their own, before training, and a dense CRF refines each
  threshold's; here there is neither.

  Args:
    cam: f32[B, h, w, K'] in 0..1, 0 for classes that are not in the image; valid: bool[B, H, W].
    background: class 0 has no map, and stands where every score is below `background_score`.
    foreground_score: above it the class of the greatest score.

  Returns:
    i32[B, H, W].
  """
  cam = resize.bilinear_align_corners(cam, valid.shape[1:])
  score = jnp.max(cam, axis=-1)
  elsewhere = jnp.where(background & (score < background_score), 0, IGNORE_LABEL)
  label = jnp.where(score > foreground_score, jnp.argmax(cam, axis=-1) + int(background), elsewhere)
  return jnp.where(valid, label, IGNORE_LABEL)


def vat_perturbation(
  decode: Callable, features, start, *, xi: float, eps: float, tiny: float = 1e-12
):
  """Finds the perturbation that changes a decoder's prediction most.

  Its length is `eps` an image, and it has no gradient. [CCT, I-VAT, official get_r_adv]

  Args:
    decode: features f32[B, h, w, C] -> scores; start: random directions [B, h, w, C].
  """
  target = jax.nn.softmax(decode(features))
  divergence = lambda change: jnp.sum(losses.kl_from_target(decode(features + change), target))
  return eps * perturb.adversarial_direction(divergence, start, xi=xi, tiny=tiny)


class Prediction(NamedTuple):
  """The parts of the main decoder's prediction that perturbations look at."""

  foreground: jax.Array  # bool[B, H, W]
  objects: perturb.Objects | None


def predicted(target, *, objects: bool = True) -> Prediction:
  """Derives the foreground and its large objects from the target.

  Args:
    objects: False leaves them out, for want of a G-Cutout.
  """
  # "Foreground" is any class but 0, even where there is no background class (as officially).
  foreground = jnp.argmax(target, axis=-1) != 0
  return Prediction(foreground, perturb.large_objects(foreground) if objects else None)


def perturbed(
  kind: str, features, drawn, prediction: Prediction, decode: Callable, *, xi: float, eps: float
):
  """Perturbs features in the way of one kind of auxiliary decoder.

  Returns features f32[B, h, w, C]. [CCT, models/decoders.py]

  Args:
    kind: one of DECODERS.
    drawn: as in _DRAWN.
    decode: features -> scores, of the decoder that will read them; VAT asks it.
  """
  match kind:
    case "vat":
      return features + vat_perturbation(
        decode, jax.lax.stop_gradient(features), drawn, xi=xi, eps=eps
      )
    case "dropout":
      return perturb.drop_channels(features, drawn >= 0.5, rate=0.5)
    case "cutout":
      assert prediction.objects is not None  # they are looked for where this decoder is there
      return perturb.keep_where(
        features, ~perturb.guided_cutout(prediction.objects, drawn, prediction.foreground.shape[1:])
      )
    case "context":
      return perturb.keep_where(features, prediction.foreground)
    case "object":
      return perturb.keep_where(features, ~prediction.foreground)
    case "feature_drop":
      return perturb.drop_features(features, drawn)
    case "feature_noise":
      return perturb.multiply_noise(features, drawn)


def _deepest_shape(network, size):
  """Returns the shape (h, w, C) of the deepest map of an image of `size`."""
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, *size, network.in_channels), jnp.float32)
  maps, _ = jax.eval_shape(
    lambda *args: network.encode(*args, train=False), params, batch_stats, image
  )
  return maps[-1].shape[1:]


def _features(maps):
  """Returns the encoder's output: its deepest map.

  It is in float32 whatever the network's type.
  """
  return maps[-1].astype(jnp.float32)


class _Settings(NamedTuple):
  """Options of the factories below, under their names."""

  decoders: Mapping[str, int]
  weight: float
  distance: str
  min_confidence: float
  rampup: str
  rampup_start_fraction: float
  rampup_fraction: float
  bootstrapped: bool
  xi: float
  eps: float
  image_labels: bool = False
  weak_weight: float = 0.0
  classification_weight: float = 0.0
  background: bool = True


class _Domain(NamedTuple):
  """The decoders of one domain and what they do.

  All domains share the encoder. Domain 0 has the network's own head as its main decoder, the others
  one of the auxiliary decoders' kind.
  """

  task: Task
  settings: _Settings
  number: int
  num_classes: int
  channels: int  # of the encoder's output
  decoder: Head
  classifier: Head | None  # of whole images, where they come with labels

  @property
  def suffix(self) -> str:
    """Returns the suffix of the domain's streams, heads and metrics.

    It is "", "_1", "_2", ...
    """
    return f"_{self.number}" if self.number else ""

  @property
  def counts(self) -> dict[str, int]:
    return {
      kind: self.settings.decoders[kind] for kind in DECODERS if self.settings.decoders.get(kind, 0)
    }

  @property
  def heads(self) -> dict[str, Head]:
    """Builds the heads that the domain adds to the network's tree."""
    parts = {f"auxiliary{self.suffix}": heads.stack_heads(self.decoder, self.counts)}
    parts |= {f"head{self.suffix}": self.decoder} if self.number else {}
    return parts | ({"classifier": self.classifier} if self.classifier else {})

  def draw(self, key, unlabeled):
    num_images, height, width, _ = unlabeled["weak"].shape
    grid = _deepest_shape(self.task.network, (height, width))
    shapes = {
      "vat": (num_images, *grid),
      "dropout": (num_images, self.channels),
      "cutout": (num_images, height * width, 2),
      "feature_drop": (),
      "feature_noise": grid,
    }
    drawn = {}
    for kind, (low, high) in _DRAWN.items():
      if kind in self.counts:
        shape = self.counts[kind], *shapes[kind]
        drawn[kind] = jax.random.uniform(rng.stream(key, kind), shape, minval=low, maxval=high)
    return drawn | {"dropout_keys": nets.dropout_keys(key, "main")}

  def main(self, net, *maps, dropout):
    """Computes the main decoder's scores on each of the maps.

    Returns the scores, and the net with its statistics moved.
    """
    if self.number == 0:
      return nets.decode(self.task.network, net, *maps, dropout=dropout)
    params = net.params[f"head{self.suffix}"]
    return tuple(
      self.decoder.apply(params, {}, _features(each), train=True)[0] for each in maps
    ), net

  def upsample(self, scores, size):
    return (
      resize.bilinear_align_corners(scores, size)
      if self.number
      else self.task.network.upsample(scores, size)
    )

  def auxiliary(self, net, features, target, draws, read):
    """Averages a reading of the logits over the auxiliary decoders.

    Returns the mean of read(logits f32[B, H, W, K]); one decoder's logits are alive at a time.
    """
    prediction = predicted(target, objects="cutout" in self.counts)

    def one(kind, own, drawn):
      decode = lambda own, features: self.decoder.apply(own, {}, features, train=True)[0]
      asked = lambda features: decode(jax.lax.stop_gradient(own), features)
      seen = perturbed(
        kind, features, drawn, prediction, asked, xi=self.settings.xi, eps=self.settings.eps
      )
      return read(resize.bilinear_align_corners(decode(own, seen), target.shape[1:3]))

    def of_kind(kind, params):
      # Recomputed on the way back: thirty decoders' logits of ten 320x320 images on 21 classes are
      # 2.6 GB.
      body = jax.checkpoint(lambda decoder: one(kind, *decoder), prevent_cse=False)
      return jax.tree.map(
        lambda values: jnp.sum(values, axis=0), jax.lax.map(body, (params, draws.get(kind)))
      )

    sums = [of_kind(kind, params) for kind, params in net.params[f"auxiliary{self.suffix}"].items()]
    return jax.tree.map(lambda *values: sum(values) / sum(self.counts.values()), *sums)

  def supervised(self, logits, label, step):
    if not self.settings.bootstrapped:
      return self.task.criterion(logits, label)
    length_steps = 0.4 * self.task.total_steps
    threshold = schedules.annealed_threshold(
      step, start=1 / self.num_classes, end=0.9, length_steps=length_steps
    )
    return losses.bootstrapped_cross_entropy(logits, label, threshold=threshold)

  def class_maps(self, net, features, unlabeled):
    """Computes class activation maps of the unlabeled images.

    Returns the maps, and the classifier's loss; neither has a gradient for the encoder.
    """
    # Officially the maps are those of a network of its own: the encoder learns nothing from the
    # classifier here either.
    features, present = (
      jax.lax.stop_gradient(features),
      unlabeled["image_label"][:, int(self.settings.background) :],
    )
    params = net.params["classifier"]
    logits = self.classifier.apply(params, {}, features, train=True)[0]
    cam = cams.class_activation_maps(features, jax.lax.stop_gradient(params["kernel"]), present)
    return cam, jnp.mean(optax.sigmoid_binary_cross_entropy(logits, present))

  def loss(self, net, labeled, unlabeled, draws, step):
    """Computes the domain's loss terms.

    Returns the terms, the net with its statistics moved, and metrics.
    """
    settings, total_steps, label = self.settings, self.task.total_steps, labeled["label"]
    maps, net = nets.encode(self.task.network, net, labeled["image"], unlabeled["weak"])
    (on_labeled, on_unlabeled), net = self.main(net, *maps, dropout=draws["dropout_keys"]["main"])
    features = _features(maps[1])
    target = jax.lax.stop_gradient(
      jax.nn.softmax(self.upsample(on_unlabeled, unlabeled["weak"].shape[1:3]))
    )
    ramp = self.task.unlabeled_weight(step) * schedules.rampup(
      step,
      shape=settings.rampup,
      start_steps=settings.rampup_start_fraction * total_steps,
      length_steps=settings.rampup_fraction * total_steps,
    )

    terms = {"supervised": self.supervised(self.upsample(on_labeled, label.shape[1:]), label, step)}
    metrics = {
      "kept_fraction": jnp.mean(
        jnp.max(target, axis=-1) > settings.min_confidence, dtype=jnp.float32
      ),
      "foreground_fraction": jnp.mean(jnp.argmax(target, axis=-1) != 0, dtype=jnp.float32),
    }
    mask = None
    if settings.image_labels:
      cam, classification_loss = self.class_maps(net, features, unlabeled)
      mask = pseudo_mask(cam, unlabeled["valid"], background=settings.background)
      terms["classification"] = settings.classification_weight * classification_loss
      metrics["labeled_by_maps_fraction"] = jnp.mean(mask != IGNORE_LABEL, dtype=jnp.float32)

    def read(logits):
      distance = consistency(
        settings.distance, logits, target, min_confidence=settings.min_confidence
      )
      return {"consistency": distance} | (
        {} if mask is None else {"weak": losses.cross_entropy_mean(logits, mask)}
      )

    weights = {"consistency": settings.weight, "weak": settings.weak_weight}
    for name, value in self.auxiliary(net, features, target, draws, read).items():
      terms[name] = weights[name] * ramp * value
    return terms, net, metrics

  def predict(self, net, images):
    if self.number == 0:
      return nets.infer(self.task.network, net, images)
    maps = nets.infer_maps(self.task.network, net, images)
    (scores,), _ = self.main(net, maps, dropout=None)
    return self.upsample(scores, images.shape[1:3])

  def show(self, net, unlabeled, draws):
    """Shows what the domain's decoders predict on unlabeled images.

    Returns panels, and where the target is learned from.
    """
    weak = unlabeled["weak"]
    maps, net = nets.encode(self.task.network, net, weak)
    (scores,), net = self.main(net, *maps, dropout=draws["dropout_keys"]["main"])
    features, target = _features(maps[0]), jax.nn.softmax(self.upsample(scores, weak.shape[1:3]))
    prediction = predicted(target, objects="cutout" in self.counts)
    panels = [
      Panel("weak view", "image", weak),
      Panel("foreground", "heat", prediction.foreground.astype(jnp.float32)),
    ]
    if "cutout" in self.counts:
      box = perturb.guided_cutout(prediction.objects, draws["cutout"][0], weak.shape[1:3])
      panels.append(Panel("G-Cutout", "heat", box.astype(jnp.float32)))
    if self.classifier:
      cam, _ = self.class_maps(net, features, unlabeled)
      cam = cams.with_uncertain_background(cam) if self.settings.background else cam
      panels.append(Panel("CAM", "classes", cam))
    by_auxiliary = self.auxiliary(net, features, target, draws, jax.nn.softmax)
    panels += [
      Panel("auxiliary decoders", "classes", by_auxiliary),
      Panel("main decoder", "classes", target),
    ]
    return panels, jnp.max(target, axis=-1) > self.settings.min_confidence


def _domain(task: Task, settings: _Settings, number: int, num_classes: int) -> _Domain:
  side, _, channels = _deepest_shape(task.network, (64, 64))
  # As many doublings as lead from the deepest map back to the image.
  decoder = heads.subpixel_decoder(channels, num_classes, doublings=(64 // side - 1).bit_length())
  classifier = (
    heads.image_classifier(channels, num_classes - int(settings.background))
    if settings.image_labels
    else None
  )
  return _Domain(task, settings, number, num_classes, channels, decoder, classifier)


def _rules(problems, task, *, decoders, distance, min_confidence, **_):
  for kind, count in decoders.items():
    if kind not in DECODERS:
      problems.add(
        f"decoders.{kind}", allowed=checks.choices(DECODERS), remedy=checks.nearest(kind, DECODERS)
      )
    elif count < 0:
      problems.add(f"decoders.{kind}", got=count, allowed="0 or more")
  if not any(decoders.get(kind, 0) > 0 for kind in DECODERS):
    problems.add("decoders", got="none", allowed="at least one auxiliary decoder")
  if min_confidence and distance == "js":
    problems.add(
      "min_confidence", got=f"{min_confidence} with distance 'js'", allowed="0, or 'mse' or 'kl'"
    )


def _method(task: Task, settings: _Settings, needs: Needs) -> Method:
  """Builds the method that minimizes the sum of all domains' losses.

  The domains share the backbone of one network.
  """
  class_counts = [task.num_classes, *(task.other_classes if needs.domains else ())]
  domains = [
    _domain(task, settings, number, num_classes) for number, num_classes in enumerate(class_counts)
  ]

  def init(key):
    parts = {name: head for domain in domains for name, head in domain.heads.items()}
    return State(step=jnp.zeros([], jnp.int32), nets={"main": nets.create(task, key, **parts)})

  def draw(key, batch):
    streams = [f"unlabeled{domain.suffix}" for domain in domains]
    return {
      name: domain.draw(rng.stream(key, name), batch[name])
      for name, domain in zip(streams, domains, strict=True)
    }

  def update(state, batch, draws):
    def objective(live):
      net, terms, metrics = live["main"], {}, {}
      for domain in domains:
        suffix = domain.suffix
        labeled, unlabeled = batch[f"labeled{suffix}"], batch[f"unlabeled{suffix}"]
        own_terms, net, own_metrics = domain.loss(
          net, labeled, unlabeled, draws[f"unlabeled{suffix}"], state.step
        )
        terms |= {f"{name}{suffix}": value for name, value in own_terms.items()}
        metrics |= {f"{name}{suffix}": value for name, value in own_metrics.items()}
      return nets.Outcome(terms, {"main": net}, metrics)

    return nets.descend(task.optimizer, state, objective)

  def show(state, batch, draws):
    return domains[0].show(state.nets["main"], batch["unlabeled"], draws["unlabeled"])

  def predictor(domain):
    return Predictor(
      lambda state, images: domain.predict(state.nets["main"], images), domain=domain.number
    )

  predictors = {f"main{domain.suffix}": predictor(domain) for domain in domains}
  return Method(needs, init, draw, update, predictors, show)


@checked(rules=_rules)
def cct(
  task: Task,
  *,
  weight: NotNegative = 30.0,
  decoders: Mapping[str, int] = DECODERS,
  distance: Literal["mse", "kl", "js"] = "mse",
  min_confidence: Annotated[float, Allowed(least=0, below=1)] = 0.0,
  rampup: Annotated[str, Allowed(one_of=tuple(schedules.RAMPUPS))] = "sigmoid",
  rampup_start_fraction: Share = 0.0,
  rampup_fraction: Share = 0.1,
  bootstrapped: bool = False,
  xi: Positive = 0.1,
  eps: Positive = 2.0,
  image_labels: bool = False,
  weak_weight: NotNegative = 0.4,
  classification_weight: NotNegative = 1.0,
  background: bool = True,
) -> Method:
  """Trains auxiliary decoders to agree with a main one on perturbed features.

  The main decoder learns from labels, the auxiliary ones from the main one, and the encoder from
  all. [CCT, section 3]

  The encoder's output is the deepest map of the backbone. Labeled and unlabeled images pass with
  batch statistics of their own. The consistency is a mean over all pixels, padding among them
  (official). Only the main decoder predicts.

  Args:
    weight: of the consistency, after the ramp; large, since "mse" is a mean over classes too.
    decoders: how many auxiliary decoders of each kind in DECODERS; kinds that are not named have
      none.
    distance, min_confidence: see `consistency`; the published runs keep all pixels.
    rampup, rampup_start_fraction, rampup_fraction: shape (schedules.RAMPUPS), start and length of
      the ramp, by the run's steps. "sigmoid" starts at exp(-5), not at 0.
    bootstrapped: the supervised loss of the paper's runs with few labels, in place of the task's
      criterion: cross entropy of the pixels whose true class has a probability below a threshold,
      which rises from 1/K towards 0.9 in the first 40% of the steps. Early on it takes the worst
      pixels only, in the end all but the confident ones. The official configuration has it off.
    xi, eps: VAT's trial step and the length of its perturbation. With the official configuration's
      xi, 1e-6, the length comes out at about 0.01 instead of 2: the direction drowns in rounding.
      0.1 is the default of the official class.
    image_labels: the unlabeled images come with image-level labels: the auxiliary decoders also
      learn pseudo masks, see `pseudo_mask`. Image-level labels are of whole images. Their maps come
      from a classifier on the encoder's output.
    weak_weight, classification_weight: of the pseudo masks, ramped like the consistency, and of the
      classifier's loss.
    background: class 0 is what no class activation map claims; False where every class has a map.
  """
  settings = _Settings(
    decoders=decoders,
    weight=weight,
    distance=distance,
    min_confidence=min_confidence,
    rampup=rampup,
    rampup_start_fraction=rampup_start_fraction,
    rampup_fraction=rampup_fraction,
    bootstrapped=bootstrapped,
    xi=xi,
    eps=eps,
    image_labels=image_labels,
    weak_weight=weak_weight,
    classification_weight=classification_weight,
    background=background,
  )
  return _method(
    task, settings, Needs(weak_label="image" if image_labels else None, criterion=not bootstrapped)
  )


@checked(rules=_rules)
def cct_domains(
  task: Task,
  *,
  weight: NotNegative = 30.0,
  decoders: Mapping[str, int] = DECODERS,
  distance: Literal["mse", "kl", "js"] = "mse",
  min_confidence: Annotated[float, Allowed(least=0, below=1)] = 0.0,
  rampup: Annotated[str, Allowed(one_of=tuple(schedules.RAMPUPS))] = "sigmoid",
  rampup_start_fraction: Share = 0.0,
  rampup_fraction: Share = 0.1,
  bootstrapped: bool = False,
  xi: Positive = 0.1,
  eps: Positive = 2.0,
) -> Method:
  """Trains CCT on several data sets with classes of their own.

  There is one encoder for all, and decoders for each. [CCT, 3.5]

  Every step takes labeled and unlabeled images of each domain and sums the domains' losses (the
  author reports that alternating between them works as well). This part of the official code was
  not published.

  Args:
    weight, decoders, distance, min_confidence, bootstrapped, xi, eps: as in `cct`.
    rampup, rampup_start_fraction, rampup_fraction: as in `cct`.
  """
  settings = _Settings(
    decoders=decoders,
    weight=weight,
    distance=distance,
    min_confidence=min_confidence,
    rampup=rampup,
    rampup_start_fraction=rampup_start_fraction,
    rampup_fraction=rampup_fraction,
    bootstrapped=bootstrapped,
    xi=xi,
    eps=eps,
  )
  return _method(task, settings, Needs(domains=True, criterion=not bootstrapped))
