"""CPS's training preprocessing, recorded from its released code and OpenCV."""

import numpy as np
import pytest
import tensorflow as tf

from pseudoseg_jax.data import geometry, photometry, views


@pytest.mark.golden("cps_preprocess", case=r"case\d+")
def test_labeled_view_is_the_released_preprocessing(golden):
  draws = geometry.Draws(
    flip=tf.constant(bool(golden["mirror"])),
    scale=tf.constant(golden["scale"], tf.float64),
    offset=tf.constant(golden["crop_pos"], tf.int32),
  )
  view = views.labeled_view(
    tf.constant(golden["image_rgb"]),
    tf.constant(golden["label"]),
    draws=draws,
    crop_size=tuple(golden["crop_size"].tolist()),
    mean=photometry.IMAGENET_MEAN,
    std=photometry.IMAGENET_STD,
  )
  # One grey level: OpenCV's resize works in fixed point. Labels are exact.
  np.testing.assert_allclose(view["image"], golden["out_image_chw"].transpose(1, 2, 0), atol=0.02)
  np.testing.assert_array_equal(view["label"], golden["out_label"])
