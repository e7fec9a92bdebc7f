"""Synthetic scenes: endless labeled images.

They are for a first run, for tests and for comparisons that need no download.
"""

from __future__ import annotations

import functools

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.data.classes import Classes

_SHAPES = ("disc", "cross")
_TEXTURES = ("striped", "checked", "speckled")

CLASSES = Classes(
  names=("background", *(f"{texture}_{shape}" for shape in _SHAPES for texture in _TEXTURES)),
  palette=(
    (0, 0, 0),
    (230, 60, 60),
    (250, 170, 150),
    (240, 200, 40),
    (60, 180, 75),
    (60, 90, 230),
    (150, 200, 250),
  ),
)

_CACHE_BYTES = 256 * 2**20


class SyntheticScenes:
  """A source of scenes of textured objects on textured grounds.

  Scene i is a pure function of (seed, i), whatever num_scenes is.

  A class is a shape together with a texture: two shapes, three textures, six classes, so that
  neither decides alone. Colors carry no information: an object's two colors, the ground and the
  light are drawn afresh for each scene. Some objects are plain and belong to no class, and grounds
  may have the textures as well. Objects hide each other; gradients, shadows, color casts and sensor
  noise vary. A small network needs about a thousand labels to learn this; with a few dozen it
  learns them by heart.

  Args:
    num_scenes: length of the source. Another seed gives other scenes, e.g. for validation.
    size: (height, width) in pixels, each at least 32.
    seed: 0 or more.
  """

  has_labels = True
  channels = 3
  dtype = np.uint8

  def __init__(self, num_scenes: int, size: tuple[int, int] = (64, 64), seed: int = 0):
    problems = checks.Problems("synthetic scenes cannot be made")
    if num_scenes < 1:
      problems.add("num_scenes", got=num_scenes, allowed="1 or more")
    if not checks.is_size(size) or min(size) < 32:
      problems.add("size", got=size, allowed="(height, width), each at least 32 pixels")
    if seed < 0:
      problems.add("seed", got=seed, allowed="0 or more")
    problems.raise_if_any()
    self.ids = tuple(f"scene_{row:06d}" for row in range(num_scenes))
    self._size = tuple(size)
    self._scene = functools.lru_cache(maxsize=max(1, _CACHE_BYTES // (4 * size[0] * size[1])))(
      functools.partial(draw_scene, size=self._size, seed=seed)
    )

  def __len__(self) -> int:
    return len(self.ids)

  def size(self, row: int) -> tuple[int, int]:
    return self._size

  def image(self, row: int) -> np.ndarray:
    return self._scene(row)[0]

  def label(self, row: int) -> np.ndarray:
    return self._scene(row)[1]


def draw_scene(row: int, *, size: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws scene `row` of a seed.

  Returns image uint8 [h, w, 3] and label uint8 [h, w].
  """
  rng = np.random.default_rng([seed, row])
  height, width = size
  side = min(size)
  y, x = np.mgrid[:height, :width].astype(np.float32)
  image = _ground(rng, y, x, side)
  label = np.zeros(size, np.uint8)
  for _ in range(rng.integers(2, 4)):
    _add_object(rng, image, label, y, x, side)
  image = _light(rng, image, y, x)
  image = image.astype(np.uint8)
  image.setflags(write=False)  # the cache hands out the same arrays again
  label.setflags(write=False)
  return image, label


def _colors(rng) -> np.ndarray:
  """Draws two distinguishable colors in [0, 1], f32 [2, 3]."""
  while True:
    colors = rng.random((2, 3), np.float32)
    if np.abs(colors[0] - colors[1]).sum() > 1.0:
      return colors


def _smooth(rng, height: int, width: int, cells: int) -> np.ndarray:
  """Draws a smooth random field in about 0..1, f32 [height, width].

  Random knots are interpolated.
  """
  knots = rng.random((cells + 1, cells + 1), np.float32)

  def weights(length):
    at = np.linspace(0, cells, length, endpoint=False, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells + 1, dtype=np.float32)))

  return weights(height) @ knots @ weights(width).T


def _pattern(rng, kind: str, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
  """Computes the share of the second color in a pattern, f32 like u.

  The pattern is bars along one axis, squares along both, or pixels at random.
  """
  phase = rng.random(2) * 6.28
  frequency = 2 * np.pi / period
  if kind == "speckled":
    return (rng.random(u.shape, np.float32) < 0.5).astype(np.float32)
  wave = np.sin(frequency * u + phase[0])
  if kind == "checked":
    wave = wave * np.sin(frequency * v + phase[1])
  return np.clip(0.5 + wave * 3.0, 0, 1)


def _rotate(rng, y, x):
  angle = rng.random() * 6.2832
  sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
  return cosine * x + sine * y, cosine * y - sine * x


def _ground(rng, y, x, side):
  height, width = y.shape
  colors = _colors(rng)
  share = _smooth(rng, height, width, int(rng.integers(1, 6)))
  if rng.random() < 0.35:
    u, v = _rotate(rng, y, x)
    pattern = _pattern(rng, _TEXTURES[rng.integers(3)], u, v, rng.uniform(0.08, 0.35) * side)
    share = 0.6 * share + rng.uniform(0.1, 0.3) * pattern
  return colors[0] + share[..., None] * (colors[1] - colors[0])


def _add_object(rng, image, label, y, x, side):
  height, width = label.shape
  radius = rng.uniform(0.22, 0.36) * side
  center_y, center_x = rng.uniform(0.1, 0.9, 2) * (height, width)
  reach = int(1.35 * radius) + 1  # the longest half-axis below
  rows = slice(max(0, int(center_y) - reach), int(center_y) + reach + 1)
  columns = slice(max(0, int(center_x) - reach), int(center_x) + reach + 1)
  u, v = _rotate(
    rng, y[rows, columns] - np.float32(center_y), x[rows, columns] - np.float32(center_x)
  )
  aspect = rng.uniform(0.8, 1.25)
  shape = int(rng.integers(len(_SHAPES)))
  inside = _inside(
    _SHAPES[shape], u * np.float32(aspect / radius), v * np.float32(1 / (aspect * radius))
  )

  colors = _colors(rng)
  if rng.random() < 0.9:
    texture = int(rng.integers(len(_TEXTURES)))
    share = _pattern(rng, _TEXTURES[texture], *_rotate(rng, u, v), radius * rng.uniform(0.45, 0.75))
    class_index = 1 + shape * len(_TEXTURES) + texture
  else:  # a plain shape is of no class
    share, class_index = np.zeros_like(u), 0
  painted = colors[0] + share[..., None] * (colors[1] - colors[0])
  image[rows, columns][inside] = painted[inside]
  label[rows, columns][inside] = class_index


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Tells whether points lie in the shape.

  Points are in units of the object's radius.
  """
  if shape == "disc":
    return u * u + v * v < 0.8
  a, b = np.abs(u), np.abs(v)
  return (np.minimum(a, b) < 0.33) & (np.maximum(a, b) < 1.0)


def _light(rng, image, y, x):
  """Applies gain, gradient, shadow, color cast and noise.

  The result is in levels 0..255.
  """
  height, width = y.shape
  u, _ = _rotate(rng, y / height - 0.5, x / width - 0.5)
  light = rng.uniform(0.65, 1.15) + rng.uniform(0, 0.6) * u
  if rng.random() < 0.4:  # a soft-edged shadow over part of the scene
    u, _ = _rotate(rng, y / height - 0.5, x / width - 0.5)
    light = light * (1 - rng.uniform(0.3, 0.5) * np.clip((u - rng.uniform(-0.3, 0.3)) * 12, 0, 1))
  cast = rng.uniform(0.75, 1.2, 3).astype(np.float32)
  noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.0, 0.05))
  return np.clip((image * light[..., None] * cast + noise) * 255, 0, 255)
