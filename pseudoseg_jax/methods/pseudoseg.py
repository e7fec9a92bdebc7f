"""PseudoSeg: one network labels its unlabeled images with its decoder and its class activation
maps, fused.

Zou et al., "PseudoSeg: Designing Pseudo Labels for Semantic Segmentation", ICLR 2021; facts from
the official code (googleinterns/wss), which is followed where the paper says otherwise.
"""

import jax
import jax.numpy as jnp
import optax

from pseudoseg_jax import checks, nets, rng
from pseudoseg_jax.contract import Method, Needs, Panels, Task
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import cam as cams, fusion, losses, mixing, resize


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
  """What the strong view shall say, from two opinions on the weak one. [PseudoSeg, calibrated
  fusion]

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
    opinion = jax.nn.softmax(sgc_logits)
  else:
    opinion = fusion.calibrated_fusion(decoder_logits, sgc_logits, calibrate=calibrate)
  opinion = jax.lax.stop_gradient(fusion.sharpen(opinion, temperature) if soft else opinion)
  target = opinion if soft else jax.nn.one_hot(jnp.argmax(opinion, axis=-1), opinion.shape[-1])
  return target, jnp.max(opinion, axis=-1) >= min_confidence


def pseudoseg(
  task: Task,
  *,
  image_labels: bool = False,
  weight: float = 1.0,
  attention_weight: float = 1.0,
  classification_weight: float = 1.0,
  source: str = "fused",
  calibrate: bool = True,
  temperature: float = 0.5,
  soft: bool = True,
  min_confidence: float = 0.0,
  attention_dim: int = 128,
  attention_maps: tuple[int, ...] = (-1, -2),
  background: bool = True,
  cutout_fraction: float = 100 / 513,
) -> Method:
  """One stage, one network, no teacher, no ramp-up. [PseudoSeg, section 3]

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
  problems = checks.Problems("pseudoseg cannot be run with these options")
  if source not in ("fused", "attention"):
    problems.add("source", got=repr(source), allowed="'fused' or 'attention'")
  if not attention_maps or not all(-len(channels) <= index < 0 for index in attention_maps):
    problems.add(
      "attention_maps",
      got=attention_maps,
      allowed=f"some of -1..-{len(channels)}, from the deepest map",
    )
  if not temperature > 0:
    problems.add("temperature", got=temperature, allowed="above 0")
  for name, value in (("min_confidence", min_confidence), ("cutout_fraction", cutout_fraction)):
    if not 0 <= value <= 1:
      problems.add(name, got=value, allowed="0..1")
  problems.raise_if_any()
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
    """Weak view, strong view after CutOut, and valid without the box: the attention on the weak
    view leaves it out too.
    """
    unlabeled = batch["unlabeled"]
    weak, strong, valid = unlabeled["weak"], unlabeled["strong"][:, 0], unlabeled["valid"]
    size = valid.shape[1:]
    box = mixing.cutout_masks(draws["cutout_centre"], size, round(cutout_fraction * min(size) / 2))
    return weak, jnp.where(box[..., None], 0.0, strong), valid & ~box

  def class_logits(net, maps):
    return classifier.apply(net.params["classifier"], {}, maps[-1], train=True)[0]

  def self_attention_cam(net, maps, image_label, valid):
    """CAM f32[B, h, w, K'], SGC logits f32[B, h, w, K], and the net; of its parameters only the
    attention's get a gradient.
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
    """The pseudo label on the decoder's grid with all that it is made of, and the net with its
    statistics moved.
    """
    weak, strong, valid = views(batch, draws)
    (maps,), moved = nets.encode(network, net, weak)
    (decoder,), moved = nets.decode(network, moved, maps, dropout=draws["dropout"]["teacher"])
    valid = resize.nearest(valid, decoder.shape[1:3])

    maps = nets.infer_maps(network, net, weak)
    present = (
      batch["unlabeled"]["image_label"][:, first:] if image_labels else class_logits(net, maps) >= 0
    )
    cam, sgc, moved = self_attention_cam(moved, maps, present, valid)
    sgc = resize.bilinear_align_corners(sgc, decoder.shape[1:3])
    target, kept = pseudo_label(
      decoder,
      sgc,
      source=source,
      calibrate=calibrate,
      temperature=temperature,
      soft=soft,
      min_confidence=min_confidence,
    )
    return {
      "strong": strong,
      "valid": valid,
      "decoder": decoder,
      "cam": cam,
      "sgc": sgc,
      "target": target,
      "kept": kept,
    }, moved

  def update(state, batch, draws):
    labeled, label = batch["labeled"]["image"], batch["labeled"]["label"]
    taught, student = teach(state.nets["student"], batch, draws)

    def objective(live):
      net = live["student"]
      (strong_maps, labeled_maps), net = nets.encode(network, net, taught["strong"], labeled)
      (strong, decoder), net = nets.decode(
        network, net, strong_maps, labeled_maps, dropout=draws["dropout"]["student"]
      )
      present = cams.image_labels(label, num_classes)[:, first:]
      valid = resize.nearest(batch["labeled"]["valid"], decoder.shape[1:3])
      _, sgc, net = self_attention_cam(net, labeled_maps, present, valid)
      classified_maps = labeled_maps
      if image_labels:
        (classified_maps,), net = nets.encode(network, net, batch["unlabeled"]["weak"])
        present = batch["unlabeled"]["image_label"][:, first:]

      full = lambda scores: network.upsample(scores, label.shape[1:])
      supervised = task.criterion(full(decoder), label)
      refined = attention_weight * losses.cross_entropy_mean(full(sgc), label)
      per_class = optax.sigmoid_binary_cross_entropy(class_logits(net, classified_maps), present)
      classified = classification_weight * jnp.mean(per_class)
      per_pixel = losses.soft_cross_entropy(strong, taught["target"]) * taught["kept"]
      consistency = (
        task.unlabeled_weight(state.step) * weight * losses.mean_over(per_pixel, taught["valid"])
      )

      loss = supervised + refined + classified + consistency
      terms = {
        "loss": loss,
        "loss_supervised": supervised,
        "loss_attention": refined,
        "loss_classification": classified,
        "loss_consistency": consistency,
        "kept_fraction": losses.mean_over(taught["kept"].astype(loss.dtype), taught["valid"]),
      }
      return loss, ({"student": net}, terms)

    after, metrics = nets.descend(task.optimizer, {"student": student}, state.step, objective)
    return state.replace(step=state.step + 1, nets=after), metrics

  def show(state, batch, draws):
    taught, _ = teach(state.nets["student"], batch, draws)
    cam = cams.with_uncertain_background(taught["cam"]) if background else taught["cam"]
    decoder, sgc = jax.nn.softmax(taught["decoder"]), jax.nn.softmax(taught["sgc"])
    shown = batch["unlabeled"]["weak"], taught["strong"], decoder, cam, sgc, taught["target"]
    return shown, taught["kept"] & taught["valid"]

  names = ("weak view", "strong view", "decoder", "CAM", "SGC", "pseudo label")
  panels = Panels(names, ("image", "image", "classes", "classes", "classes", "classes"), show)
  needs = Needs(strong_views=1, weak_label="image" if image_labels else None)
  init = nets.init_student(task, classifier=classifier, attention=attention)
  return Method(needs, init, draw, update, nets.predictors(network, "student"), panels)
