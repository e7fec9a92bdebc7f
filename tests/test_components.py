"""Connected regions on the device against SciPy's on the host."""

import jax
import numpy as np
import pytest
import scipy.ndimage

from pseudoseg_jax.ops import components


@jax.jit
def found(masks):
  names = components.connected(masks)
  return names, components.regions(names)


def spiral(side):
  """One path, a pixel wide, from the corner to the middle: the longest way that a name can have to
  go.
  """
  mask = np.zeros((side, side), bool)
  row, column, step = 0, 0, (0, 1)
  mask[0, 0] = True

  def free(row, column):
    return 0 <= row < side and 0 <= column < side and not mask[row, column]

  while True:
    ahead, beyond = [(row + times * step[0], column + times * step[1]) for times in (1, 2)]
    if free(*ahead) and (free(*beyond) or not (0 <= beyond[0] < side and 0 <= beyond[1] < side)):
      row, column = ahead
      mask[row, column] = True
      continue
    step = step[1], -step[0]  # turn right
    ahead, beyond = [(row + times * step[0], column + times * step[1]) for times in (1, 2)]
    if not (free(*ahead) and free(*beyond)):
      return mask


def comb(side):
  mask = np.zeros((side, side), bool)
  mask[:, ::2] = True
  mask[0] = True
  return mask


NOISE = np.random.default_rng(0).random((4, 24, 24))
MASKS = {
  "nothing": np.zeros((24, 24), bool),
  "everything": np.ones((24, 24), bool),
  "spiral": spiral(24),
  "what a spiral leaves": ~spiral(24),
  "comb": comb(24),
  "comb, teeth up": comb(24)[::-1],
  "diagonals, which touch at corners": np.indices((24, 24)).sum(0) % 4 == 0,
  "chess board": np.indices((24, 24)).sum(0) % 2 == 0,
  "single pixels": np.pad(np.ones((1, 1), bool), 1)[
    np.indices((24, 24))[0] % 3, np.indices((24, 24))[1] % 3
  ],
  "frame": ~np.pad(np.ones((22, 22), bool), 1),
} | {
  f"noise, {density} dense": noise < density
  for density, noise in zip((0.1, 0.3, 0.4, 0.7), NOISE, strict=True)
}


@pytest.mark.parametrize("name", MASKS)
def test_regions_are_those_of_scipy(name):
  mask = MASKS[name]
  want, count = scipy.ndimage.label(mask, np.ones((3, 3)))
  # A batch: the others' regions, which take other numbers of rounds, change nothing.
  names, regions = jax.device_get(found(np.stack([mask, MASKS["spiral"], MASKS["nothing"]])))
  names, regions = names[0], [part[0] for part in regions]
  np.testing.assert_array_equal(names >= 0, mask)
  roots = np.flatnonzero(regions[0])
  assert len(roots) == count
  for index, place in enumerate(scipy.ndimage.find_objects(want), start=1):
    pixels = np.flatnonzero(want == index)
    root = pixels[-1]
    assert (names.reshape(-1)[pixels] == root).all()
    box = [part[root] for part in regions]
    assert box == [len(pixels), place[0].start, place[1].start, place[0].stop, place[1].stop]


def test_images_that_are_not_square():
  mask = np.zeros((1, 2, 5), bool)
  mask[0, 0, 1] = mask[0, 1, 2] = mask[0, 0, 4] = True
  names, regions = found(mask)
  np.testing.assert_array_equal(names[0], [[-1, 7, -1, -1, 4], [-1, -1, 7, -1, -1]])
  assert [int(part[0, 7]) for part in regions] == [2, 0, 1, 2, 3]
  assert [int(part[0, 4]) for part in regions] == [1, 0, 4, 1, 5]
  assert regions.area.sum() == 3
