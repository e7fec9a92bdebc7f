"""A whole unlabeled sample of UniMatch V1, recorded from its official code (Pillow): geometry,
strong views, boxes, padding.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from pseudoseg_jax.data import geometry, photometry, views
from pseudoseg_jax.ops import mixing

MEAN, STD = photometry.IMAGENET_MEAN, photometry.IMAGENET_STD


def geometry_draws(golden):
  return geometry.Draws(
    flip=tf.constant(bool(golden["draw_flip"] < 0.5)),
    scale=tf.constant(golden["draw_long_side"] / max(golden["label"].shape), tf.float64),
    offset=tf.constant([golden["draw_crop_y"], golden["draw_crop_x"]], tf.int32),
  )


def photometry_draws(recorded):
  """Of one view; what is not recorded was not done."""
  jitter, blur = bool(recorded["draw_jitter"] < 0.8), bool(recorded["draw_blur"] < 0.5)
  factors = recorded.get("jitter_factors", np.zeros(4)).astype(np.float32)
  return photometry.Draws(
    jitter=tf.constant(jitter),
    order=tf.constant(recorded.get("jitter_order", np.arange(4)), tf.int32),
    **{
      name: tf.constant(value)
      for name, value in zip(("brightness", "contrast", "saturation", "hue"), factors)
    },
    grayscale=tf.constant(bool(recorded["draw_grey"] < 0.2)),
    blur=tf.constant(blur),
    sigma=tf.constant(recorded.get("blur_sigma", 1.0), tf.float32),
  )


@pytest.fixture
def made(golden):
  size = golden["crop_size"].item()
  return views.unlabeled_views(
    tf.constant(golden["image"]),
    truth=tf.constant(golden["label"]),
    draws=geometry_draws(golden),
    crop_size=(size, size),
    photometry=photometry.Photometry(convention="pillow"),
    photometry_draws=[photometry_draws(golden.under(f"{view}_")) for view in ("s1", "s2")],
    mean=MEAN,
    std=STD,
    convention="pillow",
  )


def levels(normalized):
  return (np.asarray(normalized) * np.float32(STD) + np.float32(MEAN)) * 255


def whole_positions(golden):
  """bool [H, W], pixels whose nearest stored one is told by rounding errors of PIL's own sum
  (unimatch.md, trap 10).
  """
  draws, (height, width) = geometry_draws(golden), golden["label_after_geometry"].shape
  stored = golden["label"].shape
  scaled = geometry.scaled_size(tf.constant(stored), draws.scale, "pillow").numpy()
  row, column = (
    (2 * (np.arange(crop) + offset) + 1) * stored[axis] % (2 * scaled[axis]) == 0
    for axis, (crop, offset) in enumerate(zip((height, width), draws.offset.numpy()))
  )
  return row[:, None] | (column[::-1] if draws.flip else column)


@pytest.mark.golden("unimatch_views", case=r"view\d+")
def test_weak_view_label_and_padding(golden, made):
  # PIL rounds after each of two passes.
  np.testing.assert_allclose(levels(made["weak"]), golden["out_w_uint8"], atol=1.001)
  padding = golden["label_after_geometry"] == 254
  np.testing.assert_array_equal(~made["valid"].numpy(), padding)
  np.testing.assert_array_equal(padding, golden["ignore_mask"] == 255)
  np.testing.assert_allclose(levels(made["weak"])[padding], 0, atol=1e-4)  # black
  told = ~whole_positions(golden)
  expected = np.where(padding, 255, golden["label_after_geometry"])
  np.testing.assert_array_equal(made["truth"].numpy()[told], expected[told])


@pytest.mark.golden("unimatch_views", case=r"view\d+")
def test_normalization(golden):
  for view in ("w", "s1"):
    normalized = photometry.normalize(golden[f"out_{view}_uint8"].astype(np.float32) / 255)
    np.testing.assert_allclose(
      normalized[::7, ::7], golden[f"out_{view}_chw_sub7"].transpose(1, 2, 0), atol=2e-6
    )


@pytest.mark.golden("unimatch_views", case=r"view\d+")
def test_strong_views(golden, made):
  for number, view in enumerate(("s1", "s2")):
    difference = np.abs(levels(made["strong"][number]) - golden[f"out_{view}_uint8"])
    # of 255: 8-bit hue, and PIL's box approximation of the blur.
    assert difference.max() < 12 and difference.mean() < 2, view


@pytest.mark.golden("unimatch_views", case=r"view\d+")
def test_cutmix_boxes(golden):
  size = golden["crop_size"].item()
  for number in (1, 2):
    recorded = golden.under(f"s{number}_")
    expected = golden[f"cutmix_box{number}"] > 0
    if recorded["draw_cutmix"] > 0.5:
      assert not expected.any()
      continue
    tries = jnp.asarray(recorded["cutmix_tries"])[None]
    area = jnp.asarray(recorded["cutmix_area_draw"])[None]
    edges = mixing.fitting_boxes(
      area, tries[..., 0], tries[..., :0:-1].astype(jnp.int32), (size, size)
    )
    np.testing.assert_array_equal(mixing.edge_masks(edges, (size, size))[0], expected)
