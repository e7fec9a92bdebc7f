"""Color jitter of a batch of RGB images on the device.

Images are f32[B, H, W, 3] in [0, 1], before and after.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class JitterDraws(NamedTuple):
  """Uniform draws in [0, 1) behind the jitter of B images."""

  order: jax.Array  # [4], whose ranking is the order of the four changes, the same for all images
  brightness: jax.Array  # [B], likewise the next three
  contrast: jax.Array
  saturation: jax.Array
  hue: jax.Array


def draw_jitter(key: jax.Array, num_images: int) -> JitterDraws:
  keys = jax.random.split(key, len(JitterDraws._fields))
  return JitterDraws(
    jax.random.uniform(keys[0], (4,)), *(jax.random.uniform(key, (num_images,)) for key in keys[1:])
  )


def color_jitter(rgb: jax.Array, draws: JitterDraws, *, strength: float = 0.25) -> jax.Array:
  """Changes brightness, contrast, saturation and hue in random order.

  [ClassMix, transformsgpu.py, by kornia 0.3.0's ColorJitter]

  Args:
    strength: brightness is a summand in -+ this, contrast and saturation are factors in 1 -+ this,
      hue turns by -+ this fraction of the color circle.
  """
  change = lambda uniform: strength * (2 * uniform - 1)
  changes = (
    lambda rgb: add_brightness(rgb, change(draws.brightness)),
    # In kornia 0.3.0, which ClassMix pins, contrast blends with black, not with the mean grey.
    lambda rgb: multiply(rgb, 1 + change(draws.contrast)),
    lambda rgb: scale_saturation(rgb, 1 + change(draws.saturation)),
    lambda rgb: turn_hue(rgb, change(draws.hue)),
  )
  order = jnp.argsort(draws.order)
  return jax.lax.fori_loop(0, 4, lambda turn, rgb: jax.lax.switch(order[turn], changes, rgb), rgb)


def _by_image(values: jax.Array) -> jax.Array:
  return values[:, None, None, None]


def add_brightness(rgb: jax.Array, summand: jax.Array) -> jax.Array:
  """Computes rgb + summand [B], clipped to [0, 1]."""
  return jnp.clip(rgb + _by_image(summand), 0, 1)


def multiply(rgb: jax.Array, factor: jax.Array) -> jax.Array:
  """Computes rgb * factor [B], clipped to [0, 1]."""
  return jnp.clip(rgb * _by_image(factor), 0, 1)


def scale_saturation(rgb: jax.Array, factor: jax.Array) -> jax.Array:
  """Scales the S of HSV by factor [B], up to 1.

  The greatest channel stays, the others keep their proportions.
  """
  value = jnp.max(rgb, axis=-1, keepdims=True)
  chroma = value - jnp.min(rgb, axis=-1, keepdims=True)
  most = value / jnp.where(chroma > 0, chroma, 1)
  return value - (value - rgb) * jnp.minimum(_by_image(factor), most)


def turn_hue(rgb: jax.Array, turn: jax.Array) -> jax.Array:
  """Turns the H of HSV by turn [B], a fraction of the color circle.

  A turn of 1/3 makes red green.
  """
  red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
  value, least = jnp.max(rgb, axis=-1), jnp.min(rgb, axis=-1)
  chroma = value - least
  per_chroma = 1 / jnp.where(chroma > 0, chroma, 1)
  hue = jnp.where(value == green, 2 + (blue - red) * per_chroma, 4 + (red - green) * per_chroma)
  hue = jnp.where(value == red, (green - blue) * per_chroma, hue)
  hue = (hue + 6 * turn[:, None, None]) % 6  # in sixths of the circle
  # How much of the chroma each channel has. kornia 0.3.0 fills the channels in place, which by
  # accident darkens the red of some pixels whose red is 1; not done here.
  shares = jnp.stack([jnp.abs(hue - 3) - 1, 2 - jnp.abs(hue - 2), 2 - jnp.abs(hue - 4)], axis=-1)
  return least[..., None] + chroma[..., None] * jnp.clip(shares, 0, 1)
