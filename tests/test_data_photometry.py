import numpy as np
import pytest
import tensorflow as tf

from pseudoseg_jax import checks
from pseudoseg_jax.data import photometry
from pseudoseg_jax.data.photometry import Photometry

LUMA = np.float32([0.299, 0.587, 0.114])


def image(size=(5, 7)):
  return np.random.default_rng(1).random((*size, 3), np.float32)


def draws(**changes):
  values = dict(
    jitter=True,
    order=[0, 1, 2, 3],
    brightness=1.0,
    contrast=1.0,
    saturation=1.0,
    hue=0.0,
    grayscale=False,
    blur=False,
    sigma=1.0,
  )
  return photometry.Draws(
    **{name: tf.constant(value) for name, value in {**values, **changes}.items()}
  )


def test_single_changes_by_hand():
  rgb = image()
  gray = (rgb @ LUMA)[..., None]
  np.testing.assert_allclose(
    photometry.adjust_brightness(rgb, 1.5), np.clip(rgb * 1.5, 0, 1), rtol=1e-6
  )
  np.testing.assert_allclose(
    photometry.adjust_contrast(rgb, 1.4),
    np.clip(1.4 * rgb - 0.4 * gray.mean(), 0, 1),
    rtol=1e-4,
    atol=1e-6,
  )
  np.testing.assert_allclose(
    photometry.adjust_saturation(rgb, 0.25), 0.25 * rgb + 0.75 * gray, rtol=1e-5
  )
  np.testing.assert_allclose(photometry.grayscale(rgb), np.repeat(gray, 3, -1), rtol=1e-5)


@pytest.mark.parametrize("convention", ["opencv", "tensorflow"])
def test_contrast_leaves_a_large_even_image_as_it_is(convention):
  even = tf.fill([400, 400, 3], 0.456)  # single precision would sum it up to another mean
  brightness = 1.0 if convention == "opencv" else 0.0
  got = photometry.color_jitter(even, draws(brightness=brightness, contrast=0.5), convention)
  np.testing.assert_allclose(got, even, atol=1e-6)


def test_hue_goes_around_the_circle():
  red = tf.constant([[[0.8, 0.2, 0.2]]])
  np.testing.assert_allclose(
    tf.squeeze(photometry.color_jitter(red, draws(hue=1 / 3))), [0.2, 0.8, 0.2], atol=1e-6
  )
  np.testing.assert_allclose(
    tf.squeeze(photometry.color_jitter(red, draws(hue=-1 / 3))), [0.2, 0.2, 0.8], atol=1e-6
  )


def test_jitter_takes_its_turns_in_the_order_drawn():
  rgb = tf.constant(image())
  first = photometry.color_jitter(rgb, draws(order=[0, 1, 2, 3], brightness=1.5, contrast=0.5))
  np.testing.assert_allclose(
    first, photometry.adjust_contrast(photometry.adjust_brightness(rgb, 1.5), 0.5), atol=1e-5
  )
  second = photometry.color_jitter(rgb, draws(order=[3, 1, 2, 0], brightness=1.5, contrast=0.5))
  np.testing.assert_allclose(
    second, photometry.adjust_brightness(photometry.adjust_contrast(rgb, 0.5), 1.5), atol=1e-5
  )
  assert np.abs(first - second).max() > 0.01  # clipping makes the order matter


def test_blur_spreads_a_point_as_a_gaussian_and_keeps_edges():
  point = np.zeros((15, 17, 3), np.float32)
  point[7, 8] = (1.0, 2.0, 0.0)
  got = photometry.gaussian_blur(tf.constant(point), tf.constant(1.5), 2.0).numpy()
  taps = np.exp(-0.5 * (np.arange(-6, 7) / 1.5) ** 2)
  taps /= taps.sum()
  np.testing.assert_allclose(got[1:14, 2:15, 1], 2 * np.outer(taps, taps), atol=1e-6)
  assert np.all(got[..., 2] == 0)  # channels do not mix
  flat = tf.fill([3, 4, 3], 0.25)  # smaller than the kernel
  np.testing.assert_allclose(photometry.gaussian_blur(flat, tf.constant(2.0), 2.0), flat, rtol=1e-5)


def test_strong_view_applies_only_what_was_drawn():
  rgb = tf.constant(image())
  nothing = draws(jitter=False, brightness=0.1)
  np.testing.assert_array_equal(photometry.strong_view(rgb, nothing, 2.0), rgb)
  grayed = photometry.strong_view(rgb, draws(jitter=False, grayscale=True), 2.0)
  np.testing.assert_array_equal(grayed, photometry.grayscale(rgb))
  both = photometry.strong_view(rgb, draws(jitter=False, grayscale=True, blur=True), 2.0)
  np.testing.assert_allclose(
    both, photometry.gaussian_blur(grayed, tf.constant(1.0), 2.0), atol=1e-6
  )


def test_draws_keep_to_their_ranges_and_probabilities():
  options = Photometry(hue=0.1, brightness=0.3, blur_sigma_pixels=(0.5, 1.0))
  drawn = photometry.draw(options, 500, tf.constant([3, 4], tf.int64))
  table = {
    name: np.array([getattr(one, name).numpy() for one in drawn])
    for name in photometry.Draws._fields
  }
  ranges = dict(
    brightness=(0.7, 1.3),
    contrast=(0.5, 1.5),
    saturation=(0.5, 1.5),
    hue=(-0.1, 0.1),
    sigma=(0.5, 1.0),
  )
  for name, (low, high) in ranges.items():
    assert (
      low <= table[name].min() < low + 0.02 * (high - low)
      and high - 0.02 * (high - low) < table[name].max() <= high
    )
  np.testing.assert_allclose(
    [table[name].mean() for name in ("jitter", "grayscale", "blur")], [0.8, 0.2, 0.5], atol=0.06
  )
  assert len({tuple(order) for order in table["order"]}) == 24  # every order of four turns


def test_normalize_by_hand():
  np.testing.assert_allclose(
    photometry.normalize(np.float32([0.485, 0.68, 0.0])), [0.0, 1.0, -0.406 / 0.225], atol=1e-3
  )


def test_bad_photometry_is_told_at_once():
  with pytest.raises(checks.InputError) as error:
    Photometry(jitter_probability=2.0, hue=0.7, blur_sigma_pixels=(2.0, 0.1), convention="pil")
  assert all(
    part in str(error.value)
    for part in ("jitter_probability", "hue", "blur_sigma_pixels", "convention: got 'pil'")
  )


def test_tensorflow_brightness_and_contrast_by_hand():
  rgb = image()
  brighter = photometry.color_jitter(tf.constant(rgb), draws(brightness=0.4), "tensorflow")
  np.testing.assert_allclose(brighter, np.clip(rgb + 0.4, 0, 1), atol=2e-6)
  mean = rgb.mean(axis=(0, 1))  # of each channel for itself
  stretched = photometry.color_jitter(
    tf.constant(rgb), draws(brightness=0.0, contrast=1.5), "tensorflow"
  )
  np.testing.assert_allclose(stretched, np.clip(mean + 1.5 * (rgb - mean), 0, 1), atol=2e-6)
  both = photometry.color_jitter(
    tf.constant(rgb), draws(brightness=0.4, contrast=0.5), "tensorflow"
  )
  clipped = np.clip(rgb + 0.4, 0, 1)  # between the changes, too
  np.testing.assert_allclose(both, 0.5 * clipped + 0.5 * clipped.mean(axis=(0, 1)), atol=2e-6)


def test_tensorflow_contrast_takes_its_mean_inside_the_image():
  rgb, valid = image(), np.ones((5, 7), bool)
  valid[3:], valid[:, 5:] = False, False
  got = photometry.stretch_contrast(tf.constant(rgb), tf.constant(0.5), tf.constant(valid))
  mean = rgb[:3, :5].mean(axis=(0, 1))
  np.testing.assert_allclose(got, mean + 0.5 * (rgb - mean), atol=1e-6)
  # What is in the padding does not matter.
  other = np.where(valid[..., None], rgb, 0.9).astype(np.float32)
  np.testing.assert_allclose(
    photometry.stretch_contrast(tf.constant(other), tf.constant(0.5), tf.constant(valid))[:3, :5],
    got[:3, :5],
    atol=1e-6,
  )


def test_tensorflow_saturation_moves_hsv_alone():
  pixel = tf.constant([[[0.8, 0.4, 0.2]]])  # value 0.8, saturation 3/4
  got = photometry.color_jitter(pixel, draws(brightness=0.0, saturation=0.5), "tensorflow")
  np.testing.assert_allclose(
    tf.squeeze(got), 0.8 - 0.5 * (0.8 - np.array([0.8, 0.4, 0.2])), atol=1e-6
  )
  full = photometry.color_jitter(pixel, draws(brightness=0.0, saturation=2.0), "tensorflow")
  # Saturation ends at 1.
  np.testing.assert_allclose(tf.squeeze(full), [0.8, 0.8 / 3, 0.0], atol=1e-6)


def test_tensorflow_brightness_is_drawn_as_a_summand():
  drawn = photometry.draw(
    Photometry(brightness=0.3, convention="tensorflow"), 300, tf.constant([3, 4], tf.int64)
  )
  table = {
    name: np.array([getattr(one, name).numpy() for one in drawn])
    for name in ("brightness", "contrast", "saturation")
  }
  for name, (low, high) in dict(
    brightness=(-0.3, 0.3), contrast=(0.5, 1.5), saturation=(0.5, 1.5)
  ).items():
    assert low <= table[name].min() < low + 0.05 and high - 0.05 < table[name].max() <= high


@pytest.mark.parametrize("convention", ["opencv", "tensorflow"])
@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels_are_spared_what_means_color(channels, convention):
  planes = tf.constant(np.random.default_rng(2).random((5, 7, channels), np.float32))
  color = dict(
    brightness=1.0 if convention == "opencv" else 0.0, saturation=0.1, hue=0.3, grayscale=True
  )
  np.testing.assert_allclose(
    photometry.strong_view(planes, draws(**color), 2.0, convention), planes, atol=1e-6
  )
  mean = planes.numpy().mean(axis=(0, 1))
  contrast = photometry.strong_view(planes, draws(**color | {"contrast": 0.5}), 2.0, convention)
  np.testing.assert_allclose(contrast, 0.5 * planes + 0.5 * mean, atol=1e-6)
  assert (
    photometry.strong_view(planes, draws(**color, blur=True), 2.0, convention).shape == planes.shape
  )


def test_hue_and_saturation_are_those_of_tensorflow_also_for_greys_and_ties():
  rgb = image((8, 9))
  rgb[0] = rgb[0, :, :1]  # greys
  rgb[1, :, 0] = rgb[1, :, 1]  # two channels alike
  rgb[2], rgb[3] = np.round(rgb[2]), 0.0  # full colors, black
  for shift in (-0.5, -0.2, 0.0, 1 / 3, 0.5):
    np.testing.assert_allclose(
      photometry.adjust_hue(rgb, shift), tf.image.adjust_hue(rgb, shift), atol=2e-6
    )
  for factor in (0.0, 0.5, 1.0, 1.5, 3.0):
    expected = np.clip(tf.image.adjust_saturation(rgb, factor), 0, 1)
    np.testing.assert_allclose(photometry.scale_saturation(rgb, factor), expected, atol=2e-6)
