"""Color jitter and blur on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from pseudoseg_jax.data import photometry
from pseudoseg_jax.ops import color, gaussian

# Greys and black among them.
IMAGES = jax.random.uniform(jax.random.key(0), (3, 9, 7, 3)).at[0, 0].set(0.5).at[0, 1].set(0.0)
VALUES = jnp.array([-0.25, 0.1, 0.2])


@pytest.mark.parametrize(
  ("change", "one_image", "values"),
  [
    (color.add_brightness, photometry.add_brightness, VALUES),
    (color.multiply, photometry.adjust_brightness, 1 + VALUES),
    (color.scale_saturation, photometry.scale_saturation, 1 + 4 * VALUES),
    (color.turn_hue, photometry.adjust_hue, VALUES),
  ],
)
def test_every_change_is_that_of_the_input_pipeline_with_a_value_of_each_image(
  change, one_image, values
):
  want = [
    one_image(np.asarray(image), np.float32(value))
    for image, value in zip(IMAGES, values, strict=True)
  ]
  np.testing.assert_allclose(change(IMAGES, values), want, atol=2e-6)


def test_a_third_of_the_circle_makes_red_green():
  red, orange = jnp.array([1.0, 0, 0]), jnp.array([1.0, 0.5, 0])
  turned = color.turn_hue(jnp.stack([red, orange])[None, None], jnp.array([1 / 3]))
  np.testing.assert_allclose(turned[0, 0], [[0, 1, 0], [0, 1, 0.5]], atol=1e-6)


def draws(order, brightness=0.5, contrast=0.5):
  """All four changes in the order given; the others change nothing."""
  values = (jnp.full(3, value) for value in (brightness, contrast, 0.5, 0.5))
  return color.JitterDraws(jnp.argsort(jnp.array(order)).astype(float), *values)


def test_jitter_takes_turns_in_the_order_drawn():
  jitter = jax.jit(lambda draws: color.color_jitter(IMAGES, draws))
  np.testing.assert_allclose(jitter(draws((0, 1, 2, 3))), IMAGES, atol=2e-6)
  add_first = jitter(draws((0, 2, 1, 3), brightness=1.0, contrast=0.0))
  add_last = jitter(draws((3, 1, 2, 0), brightness=1.0, contrast=0.0))
  np.testing.assert_allclose(add_first, jnp.minimum(IMAGES + 0.25, 1) * 0.75, atol=2e-6)
  np.testing.assert_allclose(add_last, IMAGES * 0.75 + 0.25, atol=2e-6)


def test_draws_cover_every_order_and_differ_by_image():
  drawn = [color.draw_jitter(jax.random.key(seed), 4) for seed in range(200)]
  assert len({tuple(np.argsort(one.order)) for one in drawn}) == 24
  assert len(set(np.asarray(drawn[0].hue))) == 4


def test_blur_is_scipys_with_a_sigma_of_each_image_and_borders_mirrored_with_their_edge():
  x, sigmas = np.random.default_rng(0).normal(size=(2, 13, 40, 1)).astype(np.float32), (0.7, 5.0)
  got = gaussian.blur(x, jnp.array(sigmas), radius=(20, 20), truncate=4.0, border="symmetric")
  for image, sigma, one in zip(x[..., 0], sigmas, got[..., 0], strict=True):
    np.testing.assert_allclose(
      one, scipy.ndimage.gaussian_filter(image, sigma, truncate=4.0), atol=2e-6
    )


def test_blur_of_one_sigma_keeps_even_images_and_mirrors_without_the_edge():
  np.testing.assert_allclose(
    gaussian.blur(jnp.full((2, 5, 6, 3), 0.3), jnp.ones(1), radius=(2, 2)), 0.3, atol=1e-6
  )
  row = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 4, 1)
  tap = np.exp(-0.5)
  # Left of the first pixel lies the second: the first pixel counts once.
  np.testing.assert_allclose(
    gaussian.blur(row, jnp.ones(1), radius=(0, 1)).ravel(),
    np.array([1, tap, 0, 0]) / (1 + 2 * tap),
    atol=1e-6,
  )


def test_kernels_are_odd_and_end_at_one_pixel():
  assert gaussian.kernel_size((512, 1024)) == (51, 103)
  assert gaussian.kernel_size((1, 20)) == (1, 1)
