"""PseudoSeg's class activation maps, attention, losses, CutOut and learning rate against the
official functions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.models import heads
from pseudoseg_jax.ops import attention, cam as cams, losses, mixing, resize, schedules


def close(got, want, atol, rtol=0.0):
  np.testing.assert_allclose(np.asarray(got), want, atol=atol, rtol=rtol)


@pytest.mark.golden("pseudoseg_grad_cam", case=r"case\d+")
def test_grad_cam(golden):
  features, params = (
    jnp.asarray(golden["features"]),
    {"kernel": golden["cls_weight"], "bias": golden["cls_bias"]},
  )
  classifier = heads.image_classifier(*golden["cls_weight"].shape)
  logits, _ = classifier.apply(params, {}, features, train=True)
  close(logits, golden["cls_logits"], 2e-6)
  predicted = logits >= 0
  np.testing.assert_array_equal(predicted, golden["predicted_labels"])
  for name, present in (("labels", golden["image_labels"]), ("predicted", predicted)):
    cam = cams.class_activation_maps(features, params["kernel"], present)
    close(cams.with_background(cam), golden[f"cam_with_{name}"], 2e-6)


@pytest.mark.golden("pseudoseg_self_attention", case=r"case\d+")
def test_self_attention_head(golden):
  names = {
    "key": "hyper_column.key.weights",
    "query": "hyper_column.query.weights",
    "mix": "pixel_normalization.weights",
    "bn": "pixel_normalization.BatchNorm.beta",
  }
  read = lambda prefix: {
    ours: np.squeeze(golden[f"{prefix}__{theirs}"]) for ours, theirs in names.items()
  }
  as_params = lambda arrays: {
    name: {"bias": value} if name == "bn" else value for name, value in arrays.items()
  }
  features = jnp.concatenate([golden["feat_stride16"], golden["feat_stride15"]], axis=-1)
  cam, valid = jnp.asarray(golden["cam"]), golden["valid"][..., 0] > 0
  label = jnp.asarray(golden["labels"].astype(np.int32))
  num_classes = golden["out_logits"].shape[-1]
  head = heads.self_attention(
    features.shape[-1], num_classes, attention_dim=int(golden["attention_dim"])
  )
  params, stats = head.init(jax.random.key(0))
  recorded = as_params(read("var"))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, recorded)

  def loss(params):
    logits, moved = head.apply(params, stats, features, cam, valid, train=True)
    full = resize.bilinear_align_corners(logits, label.shape[1:])
    return losses.cross_entropy_mean(full, label), (logits, moved)

  (value, (logits, moved)), gradient = jax.value_and_grad(loss, has_aux=True)(
    jax.tree.map(jnp.asarray, recorded)
  )
  close(logits, golden["out_logits"], 5e-6)
  close(value, golden["loss"], 1e-6)
  jax.tree.map(lambda got, want: close(got, want, 1e-6), gradient, as_params(read("grad")))
  for ours, theirs in {"mean": "moving_mean", "var": "moving_variance"}.items():
    close(moved["bn"][ours], golden[f"after__pixel_normalization.BatchNorm.{theirs}"], 1e-6)


@pytest.mark.golden("pseudoseg_self_attention", case=r"case\d+")
def test_attention_of_the_first_and_last_position(golden):
  features = np.concatenate([golden["feat_stride16"], golden["feat_stride15"]], axis=-1)
  key, query = (
    features @ np.squeeze(golden[f"var__hyper_column.{name}.weights"]) for name in ("key", "query")
  )
  batch, height, width, _ = features.shape
  # Spreading the identity writes out the attention matrix.
  identity = jnp.broadcast_to(
    jnp.eye(height * width).reshape(1, height, width, -1), (batch, height, width, height * width)
  )
  rows = attention.propagate(
    jnp.asarray(key), jnp.asarray(query), identity, golden["valid"][..., 0] > 0
  )
  close(rows[:, 0, 0], golden["attention_row0"], 1e-6)
  close(rows[:, -1, -1], golden["attention_rowlast"], 1e-6)


@pytest.mark.golden("pseudoseg_seg_loss", case=r"case\d+")
def test_supervised_cross_entropy_on_upsampled_logits(golden):
  label = jnp.asarray(golden["labels"].astype(np.int32))

  def loss(logits):
    full = resize.bilinear_align_corners(logits, label.shape[1:])
    return losses.cross_entropy_mean(full, label), full

  (value, full), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(golden["logits"]))
  close(value, golden["loss"], 2e-6)
  close(gradient, golden["grad"], 2e-6)
  close(full[:, ::3, ::3], golden["upsampled_sub3"], 2e-6)


@pytest.mark.golden("pseudoseg_augment", case=r"cut\d+")
def test_cutout(golden):
  valid, image, label = golden["valid"][..., 0] > 0, golden["image"], golden["label"][..., 0]
  box = np.asarray(
    mixing.cutout_masks(
      jnp.asarray(golden["centre_yx"])[None], valid.shape, int(golden["pad_size"])
    )[0]
  )
  assert box.any()
  fill = golden["out_image"][box][0]  # what the recording calls the mean pixel
  np.testing.assert_array_equal(np.where(box[..., None], fill, image), golden["out_image"])
  np.testing.assert_array_equal(np.where(box, IGNORE_LABEL, label), golden["out_label"][..., 0])
  np.testing.assert_array_equal(valid & ~box, golden["out_valid"][..., 0] > 0)


@pytest.mark.golden("pseudoseg_poly_lr", case=r"case\d+")
def test_poly_learning_rate_after_a_slow_start(golden):
  rate = schedules.poly_after_slow_start(
    jnp.asarray(golden["steps"].astype(np.int32)),
    base=golden["base_lr"].item(),
    total_steps=int(golden["total_steps"]),
    power=golden["power"].item(),
    slow_steps=int(golden["slow_start_steps"]),
    slow_rate=golden["slow_start_lr"].item(),
    end_rate=golden["end_lr"].item(),
  )
  # Of the base: 1 - step / total, which the recording rounds to float32, has no more digits near
  # the end.
  close(rate, golden["lr"], 2e-6 * golden["base_lr"].item())
