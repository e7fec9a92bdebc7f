"""PseudoSeg: one network labels its unlabeled images by fused predictions.

The predictions are those of its decoder and its class activation maps.

Zou et al., "PseudoSeg: Designing Pseudo Labels for Semantic Segmentation", ICLR 2021; facts from
the official code (googleinterns/wss), which is followed where the paper differs from it.
"""

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pseudoseg_jax import nets, rng
from pseudoseg_jax.contract import Array, Method, Needs, Panel, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import cam as cams, fusion, losses, mixing, resize
from pseudoseg_jax.options import Allowed, Count, NotNegative, Positive, Share, checked


def pseudo_label(
  decoder_logits,
  sgc_logits,
  *,
  source="fused",
  calibrate=True,
  temperature=0.5,
  soft=True,
  min_confidence=0.0,
):
  """Labels the strong view by two predictions on the weak one.

  [PseudoSeg, calibrated fusion]

  Args:
    decoder_logits, sgc_logits: f32[B, h, w, K].
    source: "fused", or "attention" for the softmax of the SGC logits alone.
    calibrate: see `fusion.calibrated_fusion`.
    temperature: of the sharpening; soft labels only.
    soft: False makes it the one-hot argmax, and the confidence that of the unsharpened
      distribution.
    min_confidence: pixels below it are not kept.

  Returns:
    The target f32[B, h, w, K], and kept, bool[B, h, w]; no gradient passes.
  """
  if source == "attention":
    fused = jax.nn.softmax(sgc_logits)
  else:
    fused = fusion.calibrated_fusion(decoder_logits, sgc_logits, calibrate=calibrate)
  fused = jax.lax.stop_gradient(fusion.sharpen(fused, temperature) if soft else fused)
  target = fused if soft else jax.nn.one_hot(jnp.argmax(fused, axis=-1), fused.shape[-1])
  return target, jnp.max(fused, axis=-1) >= min_confidence


class Teaching(NamedTuple):
  """The pseudo label on the decoder's grid, with all that it is made of."""

  strong: Array  # f32[B, H, W, C], after CutOut
  valid: Array  # bool[B, h, w]
  decoder_logits: Array  # f32[B, h, w, K], of the weak view
  cam: Array  # f32[B, h', w', K']
  sgc_logits: Array  # f32[B, h, w, K]
  target: Array  # f32[B, h, w, K]
  kept: Array  # bool[B, h, w]


def _rules(problems, task, *, attention_maps, **_):
  count = len(nets.map_channels(task.network))
  if not attention_maps or min(attention_maps) < -count:
    problems.add(
      "attention_maps", got=attention_maps, allowed=f"some of -1..-{count}, from the deepest map"
    )


@checked(rules=_rules)
def pseudoseg(
  task: Task,
  *,
  image_labels: bool = False,
  weight: NotNegative = 1.0,
  attention_weight: NotNegative = 1.0,
  classification_weight: NotNegative = 1.0,
  source: Literal["fused", "attention"] = "fused",
  calibrate: bool = True,
  temperature: Positive = 0.5,
  soft: bool = True,
  min_confidence: Share = 0.0,
  attention_dim: Count = 128,
  attention_maps: Annotated[tuple[int, ...], Allowed(most=-1, whole=True)] = (-1, -2),
  background: bool = True,
  cutout_fraction: Share = 100 / 513,
) -> Method:
  """Trains one network on its own fused pseudo labels.

  There is one stage, no teacher and no ramp-up. [PseudoSeg, section 3]

  Labeled, weak and strong images pass with batch statistics of their own; the class activation maps
  of the weak ones come from a pass with running statistics. Here statistics, the fusion's norm and
  all denominators are of the global batch; the official run has 16 groups of 4 images, each with
  its own. The labeled images' one pass through the backbone, which the official graph makes twice,
  moves the running statistics once. Image-level labels are of whole images; the official ones are
  read off the masks of the crops. Xception's classifier has no dropout before it.

  Args:
    image_labels: the unlabeled images come with image-level labels
      (batch["unlabeled"]["image_label"]): they say which classes have a map, and the classifier
      learns from them. Else the classifier's own prediction says, and it learns from the masks of
      the labeled images.
    weight, attention_weight, classification_weight: of the consistency, SGC and classification
      losses.
    source, calibrate, temperature, soft, min_confidence: see `pseudo_label`. Pixels that are not
      kept stay in the denominator.
    attention_dim: channels of key and query.
    attention_maps: backbone maps whose concatenation the attention compares, counted from the
      deepest, -1.
    background: class 0 is what no other class claims, as in VOC and COCO; False where every class
      is a thing or stuff of its own.
    cutout_fraction: side of the box that CutOut takes from the strong view, by the shorter side of
      the crop; 0 for none. The official 100 pixels of 513.
  """
  network, num_classes = task.network, task.num_classes
  channels = nets.map_channels(network)
  first = 1 if background else 0  # of the classes that have a map
  classifier = heads.image_classifier(channels[-1], num_classes - first)
  attention = heads.self_attention(
    sum(channels[index] for index in attention_maps),
    num_classes,
    attention_dim=attention_dim,
    background=background,
  )

  def draw(key, batch):
    num_images, height, width, _ = batch["unlabeled"]["weak"].shape
    centre = jax.random.randint(
      rng.stream(key, "cutout"), (num_images, 2), 0, jnp.array([height, width])
    )
    return {"cutout_centre": centre, "dropout": nets.dropout_keys(key, "teacher", "student")}

  def views(batch, draws):
    """Takes the weak view and cuts a box out of the strong one.

    Returns the weak view, the strong view after CutOut, and valid without the box: the attention on
    the weak view leaves it out too.
    """
    unlabeled = batch["unlabeled"]
    weak, strong, valid = unlabeled["weak"], unlabeled["strong"][:, 0], unlabeled["valid"]
    size = valid.shape[1:]
    box = mixing.cutout_masks(draws["cutout_centre"], size, round(cutout_fraction * min(size) / 2))
    return weak, jnp.where(box[..., None], 0.0, strong), valid & ~box

  def class_logits(net, maps):
    return classifier.apply(net.params["classifier"], {}, maps[-1], train=True)[0]

  def self_attention_cam(net, maps, image_label, valid):
    """Computes class activation maps and their refinement by attention.

    Returns CAM f32[B, h, w, K'], SGC logits f32[B, h, w, K], and the net. Among its parameters only
    the attention's get a gradient.
    """
    maps = jax.lax.stop_gradient(maps)
    kernel = jax.lax.stop_gradient(net.params["classifier"]["kernel"])
    size = maps[-1].shape[1:3]
    cam = cams.class_activation_maps(maps[-1], kernel, image_label)
    hypercolumn = jnp.concatenate(
      [resize.bilinear_align_corners(maps[index], size) for index in attention_maps], axis=-1
    )
    inputs = hypercolumn, cam, resize.nearest(valid, size)
    sgc, stats = attention.apply(
      net.params["attention"], net.batch_stats["attention"], *inputs, train=True
    )
    return cam, sgc, net.replace(batch_stats=net.batch_stats | {"attention": stats})

  def teach(net, batch, draws):
    """Computes the pseudo label with all that it is made of.

    Returns it, and the net with its statistics moved.
    """
    weak, strong, valid = views(batch, draws)
    (maps,), moved = nets.encode(network, net, weak)
    (decoder_logits,), moved = nets.decode(
      network, moved, maps, dropout=draws["dropout"]["teacher"]
    )
    size = decoder_logits.shape[1:3]
    valid = resize.nearest(valid, size)

    maps = nets.infer_maps(network, net, weak)
    present = (
      batch["unlabeled"]["image_label"][:, first:] if image_labels else class_logits(net, maps) >= 0
    )
    cam, sgc_logits, moved = self_attention_cam(moved, maps, present, valid)
    sgc_logits = resize.bilinear_align_corners(sgc_logits, size)
    target, kept = pseudo_label(
      decoder_logits,
      sgc_logits,
      source=source,
      calibrate=calibrate,
      temperature=temperature,
      soft=soft,
      min_confidence=min_confidence,
    )
    return Teaching(strong, valid, decoder_logits, cam, sgc_logits, target, kept), moved

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    teaching, student = teach(state.nets["student"], batch, draws)

    def objective(live):
      net = live["student"]
      (strong_maps, labeled_maps), net = nets.encode(network, net, teaching.strong, labeled)
      (logits_strong, logits_labeled), net = nets.decode(
        network, net, strong_maps, labeled_maps, dropout=draws["dropout"]["student"]
      )
      present = cams.image_labels(label, num_classes)[:, first:]
      valid = resize.nearest(batch["labeled"]["valid"], logits_labeled.shape[1:3])
      _, sgc_logits, net = self_attention_cam(net, labeled_maps, present, valid)
      classified_maps = labeled_maps
      if image_labels:
        (classified_maps,), net = nets.encode(network, net, batch["unlabeled"]["weak"])
        present = batch["unlabeled"]["image_label"][:, first:]

      full = lambda scores: network.upsample(scores, label.shape[1:])
      supervised_loss = task.criterion(full(logits_labeled), label)
      attention_loss = losses.cross_entropy_mean(full(sgc_logits), label)
      classification_loss = jnp.mean(
        optax.sigmoid_binary_cross_entropy(class_logits(net, classified_maps), present)
      )
      per_pixel = losses.soft_cross_entropy(logits_strong, teaching.target) * teaching.kept
      consistency_loss = losses.mean_over(per_pixel, teaching.valid)
      kept_fraction = losses.mean_over(teaching.kept.astype(per_pixel.dtype), teaching.valid)
      return nets.Outcome(
        {
          "supervised": supervised_loss,
          "attention": attention_weight * attention_loss,
          "classification": classification_weight * classification_loss,
          "consistency": task.unlabeled_weight(state.step) * weight * consistency_loss,
        },
        {"student": net},
        {"kept_fraction": kept_fraction},
      )

    return nets.descend(task.optimizer, state.with_nets(student=student), objective)

  def show(state, batch, draws):
    teaching, _ = teach(state.nets["student"], batch, draws)
    cam = cams.with_uncertain_background(teaching.cam) if background else teaching.cam
    panels = [
      Panel("weak view", "image", batch["unlabeled"]["weak"]),
      Panel("strong view", "image", teaching.strong),
      Panel("decoder", "classes", jax.nn.softmax(teaching.decoder_logits)),
      Panel("CAM", "classes", cam),
      Panel("SGC", "classes", jax.nn.softmax(teaching.sgc_logits)),
      Panel("pseudo label", "classes", teaching.target),
    ]
    return panels, teaching.kept & teaching.valid

  return Method(
    Needs(strong_views=1, weak_label="image" if image_labels else None),
    nets.init_student(task, classifier=classifier, attention=attention),
    draw,
    update,
    nets.predictors(network, "student"),
    show,
  )
