"""Random scaling and cropping of CutMix-Seg (OpenCV) and of AEL (PyTorch), recorded from their
official code.
"""

import numpy as np
import pytest
import tensorflow as tf

from pseudoseg_jax.data import geometry, photometry, views


@pytest.mark.golden("cutmix_crop_scale", case=r"c\d+")
def test_cutmix_seg_cuts_and_scales(golden):
  crop_size, size = tuple(golden["crop"].tolist()), golden["labels"].shape
  options = geometry.Geometry(
    crop_size, tuple(0.5 + k / 10 for k in range(11)), flip=False, convention="cutmix_seg"
  )
  row, column = np.round(golden["u"].astype(np.float64), 6)
  uniform = tf.constant([0.0, (golden["scale_index"] + 0.5) / 11, row, column], tf.float64)
  place = dict(
    draws=geometry.from_uniform(options, tf.constant(size), uniform),
    crop_size=crop_size,
    convention="cutmix_seg",
  )
  image, labels = tf.constant(golden["image"]), tf.constant(golden["labels"])
  view = views.labeled_view(
    image, labels, **place, mean=photometry.IMAGENET_MEAN, std=photometry.IMAGENET_STD
  )
  # A level of red, green or blue and one of opacity: OpenCV's resize works in fixed point.
  np.testing.assert_allclose(view["image"], golden["out_image"].transpose(1, 2, 0), atol=0.02)
  np.testing.assert_array_equal(view["label"], golden["out_labels"])
  opacity = geometry.crop(image, None, **place).opacity
  np.testing.assert_allclose(opacity, golden["out_valid"], atol=0.005)
  np.testing.assert_array_equal(view["valid"], opacity.numpy() > 0.5)


@pytest.mark.golden("ael_resize_crop", case=r"c\d+")
def test_ael_resizes_and_crops(golden):
  crop_size, size = tuple(golden["crop"].tolist()), golden["label"].shape[2:]
  options = geometry.Geometry(crop_size, (0.5, 2.0), flip=False, convention="ael")
  branch, within = np.round(golden["two_uniforms"].astype(np.float64), 6)
  # One number for both.
  uniform = tf.constant([0.0, (float(branch >= 0.5) + within) / 2, 0.0, 0.0], tf.float64)
  offset = tf.constant(golden["offsets_used"], tf.int32)
  draws = geometry.from_uniform(options, tf.constant(size), uniform)._replace(offset=offset)
  np.testing.assert_array_equal(
    geometry.scaled_size(tf.constant(size), draws.scale, "ael"), golden["resized_hw"]
  )
  image = tf.constant(golden["image"][0].transpose(1, 2, 0))  # any levels do: scaling is linear
  view = geometry.crop(image, tf.constant(golden["label"][0, 0]), draws, crop_size, "ael")
  np.testing.assert_allclose(
    view.rgb * 255, golden["out_image"][0].transpose(1, 2, 0), rtol=1e-6, atol=1e-5
  )
  assert np.all(view.label.numpy()[~view.valid.numpy()] == 255)
  # The official label of padding is 0; see the line in geometry.py.
  np.testing.assert_array_equal(np.where(view.valid, view.label, 0), golden["out_label"][0, 0])
