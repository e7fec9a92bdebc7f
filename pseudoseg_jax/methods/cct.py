"""CCT: auxiliary decoders must say on perturbed features of unlabeled images what the main decoder
says on the clean ones.

Ouali, Hudelot & Tami, "Semi-Supervised Semantic Segmentation with Cross-Consistency Training", CVPR
2020; facts from the official code (yassouali/CCT), which is followed where the paper says
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pseudoseg_jax import checks, nets, rng
from pseudoseg_jax.contract import IGNORE_LABEL, Head, Method, Needs, Panels, State, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import cam as cams, losses, perturb, resize, schedules

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
  """How far a decoder is from the target: f32[], a mean over pixels and, but for confident KL,
  classes. [CCT, utils/losses.py]

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
  """What class activation maps are sure of; IGNORE_LABEL elsewhere. [CCT, pseudo_labels/, constants
  of its two thresholds]

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
  """The perturbation of length `eps` an image that a decoder feels most, without gradient. [CCT,
  I-VAT, official get_r_adv]

  Args:
    decode: features f32[B, h, w, C] -> scores; start: random directions [B, h, w, C].
  """
  target = jax.nn.softmax(decode(features))
  divergence = lambda change: jnp.sum(losses.kl_from_target(decode(features + change), target))
  return eps * perturb.adversarial_direction(divergence, start, xi=xi, tiny=tiny)


class Prediction(NamedTuple):
  """What perturbations look at in the main decoder's prediction."""

  foreground: jax.Array  # bool[B, H, W]
  objects: perturb.Objects | None


def predicted(target, *, objects: bool = True) -> Prediction:
  """objects: False leaves them out, for want of a G-Cutout."""
  # "Foreground" is any class but 0, even where there is no background class (as officially).
  foreground = jnp.argmax(target, axis=-1) != 0
  return Prediction(foreground, perturb.large_objects(foreground) if objects else None)


def perturbed(
  kind: str, features, drawn, prediction: Prediction, decode: Callable, *, xi: float, eps: float
):
  """Features f32[B, h, w, C] under the perturbation `kind` of DECODERS; `drawn` as in _DRAWN. [CCT,
  models/decoders.py]

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
  """Shape (h, w, C) of the deepest map of an image of `size`."""
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, *size, network.in_channels), jnp.float32)
  maps, _ = jax.eval_shape(
    lambda *args: network.encode(*args, train=False), params, batch_stats, image
  )
  return maps[-1].shape[1:]


def _features(maps):
  """The encoder's output: its deepest map, in float32 whatever the network's type."""
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
  """The decoders of one domain and what they do; the encoder is everyone's.

  Domain 0 has the network's own head as its main decoder, the others one of the auxiliary decoders'
  kind.
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
    """Of the domain's streams, heads and metrics: "", "_1", "_2", ..."""
    return f"_{self.number}" if self.number else ""

  @property
  def counts(self) -> dict[str, int]:
    return {
      kind: self.settings.decoders[kind] for kind in DECODERS if self.settings.decoders.get(kind, 0)
    }

  @property
  def heads(self) -> dict[str, Head]:
    """What the domain adds to the network's tree."""
    parts = {f"auxiliary{self.suffix}": heads.many(self.decoder, self.counts)}
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
    """The main decoder's scores on each of the maps, and the net with its statistics moved."""
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
    """Mean over the auxiliary decoders of read(logits f32[B, H, W, K]); one decoder's logits are
    alive at a time.
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
    """Class activation maps of the unlabeled images, and the classifier's loss; neither has a
    gradient for the encoder.
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
    """The domain's loss f32[], the net with its statistics moved, and metrics; the loss is the sum
    of those named `loss*`.
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

    terms = {
      "loss_supervised": self.supervised(self.upsample(on_labeled, label.shape[1:]), label, step)
    }
    mask = None
    if settings.image_labels:
      cam, classification = self.class_maps(net, features, unlabeled)
      mask = pseudo_mask(cam, unlabeled["valid"], background=settings.background)
      terms["loss_classification"] = settings.classification_weight * classification
      terms["labeled_by_maps_fraction"] = jnp.mean(mask != IGNORE_LABEL, dtype=jnp.float32)

    def read(logits):
      distance = consistency(
        settings.distance, logits, target, min_confidence=settings.min_confidence
      )
      return {"consistency": distance} | (
        {} if mask is None else {"weak": losses.cross_entropy_mean(logits, mask)}
      )

    weights = {"consistency": settings.weight, "weak": settings.weak_weight}
    for name, value in self.auxiliary(net, features, target, draws, read).items():
      terms[f"loss_{name}"] = weights[name] * ramp * value
    terms["kept_fraction"] = jnp.mean(
      jnp.max(target, axis=-1) > settings.min_confidence, dtype=jnp.float32
    )
    terms["foreground_fraction"] = jnp.mean(jnp.argmax(target, axis=-1) != 0, dtype=jnp.float32)
    return sum(value for name, value in terms.items() if name.startswith("loss")), net, terms

  def predict(self, net, images):
    if self.number == 0:
      return nets.infer(self.task.network, net, images)
    maps = nets.infer_maps(self.task.network, net, images)
    (scores,), _ = self.main(net, maps, dropout=None)
    return self.upsample(scores, images.shape[1:3])

  def show(self, net, unlabeled, draws):
    """Panels by name, and where the target is learnt from."""
    weak = unlabeled["weak"]
    maps, net = nets.encode(self.task.network, net, weak)
    (scores,), net = self.main(net, *maps, dropout=draws["dropout_keys"]["main"])
    features, target = _features(maps[0]), jax.nn.softmax(self.upsample(scores, weak.shape[1:3]))
    prediction = predicted(target, objects="cutout" in self.counts)
    shown = {"weak view": weak, "foreground": prediction.foreground.astype(jnp.float32)}
    if "cutout" in self.counts:
      box = perturb.guided_cutout(prediction.objects, draws["cutout"][0], weak.shape[1:3])
      shown["G-Cutout"] = box.astype(jnp.float32)
    if self.classifier:
      cam, _ = self.class_maps(net, features, unlabeled)
      shown["CAM"] = cams.with_uncertain_background(cam) if self.settings.background else cam
    shown["auxiliary decoders"] = self.auxiliary(net, features, target, draws, jax.nn.softmax)
    return shown | {"main decoder": target}, jnp.max(target, axis=-1) > self.settings.min_confidence


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


def _check(settings: _Settings) -> None:
  problems = checks.Problems("CCT cannot be run with these options")
  for kind, count in settings.decoders.items():
    if kind not in DECODERS:
      problems.add(
        f"decoders.{kind}", allowed=checks.choices(DECODERS), remedy=checks.nearest(kind, DECODERS)
      )
    elif count < 0:
      problems.add(f"decoders.{kind}", got=count, allowed="0 or more")
  if not any(settings.decoders.get(kind, 0) > 0 for kind in DECODERS):
    problems.add("decoders", got="none", allowed="at least one auxiliary decoder")
  if settings.distance not in ("mse", "kl", "js"):
    problems.add("distance", got=repr(settings.distance), allowed="'mse', 'kl' or 'js'")
  if settings.rampup not in schedules.RAMPUPS:
    problems.add("rampup", got=repr(settings.rampup), allowed=checks.choices(schedules.RAMPUPS))
  if not 0 <= settings.min_confidence < 1:
    problems.add("min_confidence", got=settings.min_confidence, allowed="0 up to, but not, 1")
  elif settings.min_confidence and settings.distance == "js":
    problems.add(
      "min_confidence",
      got=f"{settings.min_confidence} with distance 'js'",
      allowed="0, or 'mse' or 'kl'",
    )
  for name in ("rampup_start_fraction", "rampup_fraction"):
    if not 0 <= getattr(settings, name) <= 1:
      problems.add(name, got=getattr(settings, name), allowed="0..1")
  for name in ("xi", "eps"):
    if not getattr(settings, name) > 0:
      problems.add(name, got=getattr(settings, name), allowed="above 0")
  problems.raise_if_any()


def _method(task: Task, settings: _Settings, needs: Needs) -> Method:
  """The sum of all domains' losses, on one network whose backbone they share."""
  _check(settings)
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
      net, terms = live["main"], {"loss": 0.0}
      for domain in domains:
        labeled, unlabeled = (
          batch[f"{stream}{domain.suffix}"] for stream in ("labeled", "unlabeled")
        )
        loss, net, own = domain.loss(
          net, labeled, unlabeled, draws[f"unlabeled{domain.suffix}"], state.step
        )
        terms["loss"] += loss
        terms |= {f"{name}{domain.suffix}": value for name, value in own.items()}
      return terms["loss"], ({"main": net}, terms)

    after, metrics = nets.descend(task.optimizer, state.nets, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  def compute(state, batch, draws):
    shown, kept = domains[0].show(state.nets["main"], batch["unlabeled"], draws["unlabeled"])
    return tuple(shown[name] for name in kinds), kept

  kinds = {"weak view": "image", "foreground": "heat"} | (
    {"G-Cutout": "heat"} if "cutout" in domains[0].counts else {}
  )
  kinds |= ({"CAM": "classes"} if settings.image_labels else {}) | {
    "auxiliary decoders": "classes",
    "main decoder": "classes",
  }

  def predictor(domain):
    return lambda state, images: domain.predict(state.nets["main"], images)

  predictors = {f"main{domain.suffix}": predictor(domain) for domain in domains}
  predictor_domains = {f"main{domain.suffix}": number for number, domain in enumerate(domains)}
  panels = Panels(tuple(kinds), tuple(kinds.values()), compute)
  return Method(needs, init, draw, update, predictors, panels, predictor_domains)


def cct(
  task: Task,
  *,
  weight: float = 30.0,
  decoders: Mapping[str, int] = DECODERS,
  distance: str = "mse",
  min_confidence: float = 0.0,
  rampup: str = "sigmoid",
  rampup_start_fraction: float = 0.0,
  rampup_fraction: float = 0.1,
  bootstrapped: bool = False,
  xi: float = 0.1,
  eps: float = 2.0,
  image_labels: bool = False,
  weak_weight: float = 0.4,
  classification_weight: float = 1.0,
  background: bool = True,
) -> Method:
  """A main decoder that learns from labels, auxiliary ones that learn from it, an encoder that
  learns from all. [CCT, section 3]

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
    decoders,
    weight,
    distance,
    min_confidence,
    rampup,
    rampup_start_fraction,
    rampup_fraction,
    bootstrapped,
    xi,
    eps,
    image_labels,
    weak_weight,
    classification_weight,
    background,
  )
  return _method(
    task, settings, Needs(weak_label="image" if image_labels else None, criterion=not bootstrapped)
  )


def cct_domains(
  task: Task,
  *,
  weight: float = 30.0,
  decoders: Mapping[str, int] = DECODERS,
  distance: str = "mse",
  min_confidence: float = 0.0,
  rampup: str = "sigmoid",
  rampup_start_fraction: float = 0.0,
  rampup_fraction: float = 0.1,
  bootstrapped: bool = False,
  xi: float = 0.1,
  eps: float = 2.0,
) -> Method:
  """CCT on several data sets with classes of their own: one encoder for all, decoders for each.
  [CCT, 3.5]

  Every step takes labeled and unlabeled images of each domain and sums the domains' losses (the
  author reports that alternating between them works as well). This part of the official code was
  not published.

  Args:
    weight, decoders, distance, min_confidence, bootstrapped, xi, eps: as in `cct`.
    rampup, rampup_start_fraction, rampup_fraction: as in `cct`.
  """
  settings = _Settings(
    decoders,
    weight,
    distance,
    min_confidence,
    rampup,
    rampup_start_fraction,
    rampup_fraction,
    bootstrapped,
    xi,
    eps,
  )
  return _method(task, settings, Needs(domains=True, criterion=not bootstrapped))
