"""PseudoSeg's own update against the official graph, with networks that say what was recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from pseudoseg_jax import optim
from pseudoseg_jax.contract import Head, Network, Task
from pseudoseg_jax.methods import pseudoseg
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import cam as cams, losses, resize

LABELED, WEAK, STRONG = range(3)


def picture(stream, num_images, size):
  """Images that carry the number of their stream and their row: what the stand-in networks go
  by.
  """
  rows = jnp.arange(num_images, dtype=jnp.float32)
  numbers = jnp.stack(
    [jnp.full(num_images, stream, jnp.float32), rows, jnp.ones(num_images)], axis=-1
  )
  return jnp.broadcast_to(numbers[:, None, None], (num_images, *size, 3))


def chosen(table, features):
  """The recorded rows, table [3, N, ...], that the images behind `features` stand for."""
  number = features[:, 0, 0]
  return table[number[:, 0].astype(int), number[:, 1].astype(int)]


def stand_in(grid, num_images, num_classes):
  """A network whose decoder scores are its parameters, [3 streams, N, h, w, K]."""

  def encode(params, stats, images, *, train, groups=1, dropout=None):
    return (jnp.broadcast_to(images[:, :1, :1], (len(images), *grid, 3)),), stats

  def decode(params, stats, maps, *, train, groups=1, dropout=None):
    return chosen(params["scores"], maps[0]), stats

  scores = jnp.zeros((3, num_images, *grid, num_classes))
  return Network(
    lambda key: ({"scores": scores}, {}), None, encode, decode, resize.bilinear_align_corners
  )


def stand_in_heads(monkeypatch, golden, seen):
  by_stream = lambda weak, labeled: jnp.stack([labeled, weak, jnp.zeros_like(weak)])
  classes = by_stream(golden["cls_logits_weak"], golden["cls_logits_seg"])
  sgc = by_stream(golden["logits_sgc"], golden["logits_sgc_seg"])

  def classifier(channels, num_classes):
    # A kernel that gives every class the same positive map, so that the map shows which classes
    # were asked for.
    params = {"kernel": jnp.ones((channels, num_classes)), "bias": jnp.zeros(num_classes)}
    return Head(
      lambda key: (params, {}),
      lambda params, stats, features, train: (chosen(classes, features), stats),
    )

  def attention(channels, num_classes, **options):
    def apply(params, stats, features, cam, valid, train):
      jax.debug.callback(
        lambda stream, classes: seen.update({int(stream): classes}),
        features[0, 0, 0, 0],
        cam.max((1, 2)) > 0,
      )
      return chosen(sgc, features), stats

    return Head(lambda key: ({}, {}), apply)

  monkeypatch.setattr(heads, "image_classifier", classifier)
  monkeypatch.setattr(heads, "self_attention", attention)
  # The recording gives the image labels of the labeled images apart from their masks.
  monkeypatch.setattr(
    cams, "image_labels", lambda label, num_classes: with_background(golden["image_label_seg"])
  )


def with_background(image_label):
  return jnp.pad(image_label, ((0, 0), (1, 0)), constant_values=1.0)


@pytest.mark.golden("pseudoseg_calibrated_fusion", case=r"case\d+")
def test_a_step(golden, monkeypatch):
  num_images, *grid, num_classes = golden["logits_weak"].shape
  size = golden["labels_seg"].shape[1:]
  optimizer = toy.recording(optim.sgd(lambda step: jnp.asarray(0.0), momentum=0.0))
  network = stand_in(tuple(grid), num_images, num_classes)
  task = Task(num_classes, 1, network, optimizer, losses.cross_entropy_mean)
  with_image_labels = bool(golden["weakly"])
  options = dict(
    source={"avg": "fused", "att": "attention"}[golden["source"].item()],
    calibrate=bool(golden["logit_norm"]),
    temperature=golden["temperature"].item(),
    soft=bool(golden["soft"]),
    min_confidence=golden["threshold"].item(),
  )
  seen = {}
  stand_in_heads(monkeypatch, golden, seen)
  method = pseudoseg.pseudoseg(
    task,
    **options,
    weight=golden["unlabeled_weight"].item(),
    image_labels=with_image_labels,
    cutout_fraction=0.0,
    attention_maps=(-1,),
  )
  batch = {
    "labeled": {
      "image": picture(LABELED, num_images, size),
      "label": jnp.asarray(golden["labels_seg"].astype(np.int32)),
      "valid": jnp.ones((num_images, *size), bool),
    },
    "unlabeled": {
      "weak": picture(WEAK, num_images, size),
      "strong": picture(STRONG, num_images, size)[:, None],
      "valid": jnp.asarray(golden["valid_full"][..., 0] > 0),
      "image_label": with_background(golden["image_label"]),
    },
  }
  state = method.init(jax.random.key(0))
  scores = jnp.stack([golden[f"logits_{name}"] for name in ("seg", "weak", "strong")])
  student = state.nets["student"]
  state.nets["student"] = student.replace(params=student.params | {"scores": scores})
  draws = method.draw(jax.random.key(1), batch)
  after, metrics = jax.jit(method.update)(state, batch, draws)
  shown, kept = jax.jit(method.show)(state, batch, draws)
  jax.effects_barrier()

  named = golden.under("out_loss_named__")
  recorded = {
    "loss_supervised": named["semantic_merged_logits.mul_1"],
    "loss_attention": named["self-attention_self-attention_logits.mul_1"],
    "loss_classification": named["loss_cls"],
    "loss_consistency": named["loss_consistency"],
  }
  for name, value in recorded.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(metrics["loss"], sum(recorded.values()), rtol=1e-6)
  np.testing.assert_allclose(
    recorded["loss_consistency"], golden["out_loss_consistency"], rtol=1e-6
  )
  gradient = after.nets["student"].opt_state[0]["scores"]
  np.testing.assert_allclose(gradient[STRONG], golden["out_grad_strong"], rtol=0, atol=1e-8)
  np.testing.assert_array_equal(gradient[WEAK], 0)

  np.testing.assert_array_equal(seen[WEAK], golden["out_cls_label_used"] > 0)
  np.testing.assert_array_equal(seen[LABELED], golden["image_label_seg"] > 0)
  np.testing.assert_array_equal(kept, golden["out_valid_mask"][..., 0] > 0)
  if "out_pseudo_prob" in golden:
    np.testing.assert_allclose(shown[-1].values, golden["out_pseudo_prob"], rtol=0, atol=1e-6)
  unsharpened = options | {"temperature": 1.0, "soft": True}
  target, _ = pseudoseg.pseudo_label(
    jnp.asarray(golden["logits_weak"]), jnp.asarray(golden["logits_sgc"]), **unsharpened
  )
  np.testing.assert_allclose(
    target.max(-1), golden["out_prob_mean_before_sharpening_max"], rtol=0, atol=1e-6
  )
