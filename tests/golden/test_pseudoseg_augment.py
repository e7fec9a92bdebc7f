"""PseudoSeg's scaling and color jitter, recorded from its released code (TensorFlow)."""

import numpy as np
import pytest
import tensorflow as tf

from pseudoseg_jax.data import geometry, photometry


@pytest.mark.golden("pseudoseg_augment", case=r"scale\d+")
def test_scaled_image_and_label(golden):
  label, size = golden["label"][..., 0], golden["out_label"].shape[:2]
  draws = geometry.Draws(
    flip=tf.constant(False),
    scale=tf.constant(golden["scale"].item(), tf.float64),
    offset=tf.constant((0, 0)),
  )
  assert tuple(geometry.scaled_size(tf.constant(label.shape), draws.scale).numpy()) == size
  view = geometry.crop(tf.constant(golden["image"]), tf.constant(label), draws, size, "tensorflow")
  np.testing.assert_allclose(view.rgb * 255, golden["out_image"], atol=2e-3)  # of 255 levels
  np.testing.assert_array_equal(view.label, golden["out_label"][..., 0])
  assert np.all(view.valid)


@pytest.mark.golden("pseudoseg_augment", case=r"jit\d+")
def test_color_jitter(golden):
  drawn = {
    "brightness": golden["brightness_delta"],
    "contrast": golden["contrast_factor"],
    "saturation": golden["saturation_factor"],
    "hue": golden["hue_delta"],
  }
  nothing = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}

  def jitter(changes):
    values = {**nothing, **changes, "order": golden["order"].astype(np.int32)}
    others = dict(jitter=True, grayscale=False, blur=False, sigma=1.0)
    draws = photometry.Draws(
      **{name: tf.constant(value) for name, value in {**values, **others}.items()}
    )
    return photometry.color_jitter(tf.constant(golden["image01"]), draws, "tensorflow")

  np.testing.assert_allclose(jitter(drawn), golden["out"], atol=2e-6)
  for name, value in drawn.items():
    np.testing.assert_allclose(
      jitter({name: value}), np.clip(golden[f"only_{name}"], 0, 1), atol=2e-6, err_msg=name
    )
  recorded = golden["only_contrast"]
  np.testing.assert_allclose(
    photometry.stretch_contrast(tf.constant(golden["image01"]), drawn["contrast"]),
    recorded,
    atol=2e-6,
  )
