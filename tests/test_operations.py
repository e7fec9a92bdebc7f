"""Learning Pseudo Labels' operations on stored images and masks."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from pseudoseg_jax import checks
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import geometry, operations, pipeline, synthetic
from pseudoseg_jax.data.geometry import Geometry

BORDER = (123, 116, 103)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 3), np.uint8)
LABEL = RNG.integers(0, 3, (6, 8)).astype(np.uint8)
SCENES = synthetic.SyntheticScenes(5, (32, 40))


def images():
  return Image.fromarray(PIXELS), Image.fromarray(LABEL)


@pytest.mark.parametrize(
  ("name", "amount", "by_hand"),
  [
    ("autocontrast", 0.25, lambda image: Image.blend(ImageOps.autocontrast(image), image, 0.25)),
    ("brightness", 1.4, lambda image: ImageEnhance.Brightness(image).enhance(1.4)),
    ("color", 0.6, lambda image: ImageEnhance.Color(image).enhance(0.6)),
    ("contrast", 0.7, lambda image: ImageEnhance.Contrast(image).enhance(0.7)),
    ("equalize", 1.3, lambda image: Image.blend(ImageOps.equalize(image), image, 1.3)),
    ("invert", 0.0, lambda image: Image.fromarray(255 - np.asarray(image))),
    ("posterize", 1.9, lambda image: Image.fromarray(np.asarray(image) // 128 * 128)),  # 1 bit
    ("posterize", 8.9, lambda image: image),
    ("sharpness", 0.2, lambda image: ImageEnhance.Sharpness(image).enhance(0.2)),
    (
      "solarize",
      100.5,
      lambda image: Image.fromarray(
        np.where(np.asarray(image) > 100, 255 - np.asarray(image), image)
      ),
    ),
  ],
)
def test_color_operations_are_those_of_pil(name, amount, by_hand):
  image = Image.fromarray(PIXELS)
  least, greatest, operation = operations.COLOR_OPERATIONS[name]
  assert least <= amount <= greatest
  np.testing.assert_array_equal(operation(image, amount), by_hand(image))


def test_a_quarter_turn_about_the_middle_is_numpy_s():
  square = Image.fromarray(PIXELS[:, :6]), Image.fromarray(LABEL[:, :6])
  # The middle of n pixels is their number n / 2, as in the code, hence half a pixel beyond: the
  # turned image lies a row lower.
  image, label = operations.warp(*square, operations.rotation_matrix((6, 6), 90), BORDER)
  np.testing.assert_array_equal(np.asarray(label)[1:], np.rot90(LABEL[:, :6])[:-1])
  # PIL cuts fractions off.
  np.testing.assert_allclose(np.int32(image)[1:], np.rot90(PIXELS[:, :6])[:-1], atol=1)
  assert np.all(np.asarray(label)[0] == 255) and np.all(np.asarray(image)[0] == BORDER)


def test_shear_moves_rows_by_their_distance_from_half_the_width():
  matrix = operations.shear_matrix((8, 6), 0.25, 0.0)
  np.testing.assert_allclose(matrix @ (3, 4, 1), (3, 4))
  np.testing.assert_allclose(matrix @ (3, 0, 1), (2, 0))
  image, label = operations.warp(*images(), matrix, BORDER)
  np.testing.assert_array_equal(np.asarray(label)[4], LABEL[4])
  np.testing.assert_array_equal(np.asarray(label)[0], [*LABEL[0, 1:], 255])  # one pixel to the left
  assert np.all(np.asarray(image)[0, -1] == BORDER)
  np.testing.assert_array_equal(np.asarray(image)[4], PIXELS[4])


def test_scaling_rounds_the_sides_and_keeps_a_mask_s_values():
  image, label = operations.scale(*images(), 0.7)
  assert image.size == label.size == (6, 4)  # of 5.6 x 4.2
  doubled = operations.scale(*images(), 2.0)[1]
  np.testing.assert_array_equal(doubled, LABEL.repeat(2, 0).repeat(2, 1))


def test_augmenting_is_a_function_of_the_generator_and_adds_nothing_but_255_to_a_mask():
  sizes, seen, unchanged = set(), set(), 0
  for position in range(60):
    twice = [
      operations.augment(PIXELS, LABEL, 2, np.random.default_rng([7, position]), BORDER)
      for _ in range(2)
    ]
    for first, second in zip(*twice, strict=True):
      np.testing.assert_array_equal(first, second)
    image, label = twice[0]
    assert image.dtype == label.dtype == np.uint8 and image.shape == (*label.shape, 3)
    assert set(np.unique(label)) <= {*np.unique(LABEL), 255}
    sizes.add(label.shape)
    seen.add(image.tobytes())
    unchanged += label.tobytes() == LABEL.tobytes()
  # Two color operations leave a mask as it is: 1/3, and more.
  assert len(sizes) > 5 and len(seen) > 50 and 10 < unchanged < 50


def test_no_operation_leaves_everything_as_it_is():
  image, label = operations.augment(PIXELS, LABEL, 0, np.random.default_rng(0), BORDER)
  np.testing.assert_array_equal(image, PIXELS)
  np.testing.assert_array_equal(label, LABEL)


def spec(**changes):
  options = dict(
    labeled=SCENES,
    unlabeled=SCENES,
    batch_size_labeled_global=4,
    batch_size_unlabeled_global=2,
    geometry=Geometry((36, 36), scales=(1.0,), flip=False, convention="lpl"),
    labeled_operations=2,
    seed=3,
  )
  return pipeline.PipelineSpec(**options | changes)


def take(count, options, **where):
  return list(itertools.islice(pipeline.train_batches(options, **where), count))


@pytest.mark.parametrize(
  "changes",
  [{}, {"labeled_photometry": True, "labeled_operations": 0}],
  ids=["operations", "photometry"],
)
def test_what_labeled_images_get_is_the_same_after_a_restart_and_leaves_the_unlabeled_ones_alone(
  changes,
):
  batches = take(4, spec(**changes))
  again = take(2, spec(**changes), start_step=2)
  plain = take(4, spec(labeled_operations=0))
  for batch, other in zip(batches[2:], again, strict=True):
    for name, value in batch["labeled"].items():
      np.testing.assert_array_equal(value, other["labeled"][name])
  assert np.any(batches[0]["labeled"]["image"] != plain[0]["labeled"]["image"])
  for batch, other in zip(batches, plain, strict=True):
    np.testing.assert_array_equal(batch["unlabeled"]["weak"], other["unlabeled"]["weak"])
    if changes:  # colors alone: the masks stay, and padding is 0
      np.testing.assert_array_equal(batch["labeled"]["label"], other["labeled"]["label"])
      padding = ~batch["labeled"]["valid"]
      assert padding.any() and np.all(batch["labeled"]["image"][padding] == 0)


def test_image_labels_are_those_of_the_mask_before_operations_and_crop():
  needs = Needs(weak_label="image")
  options = spec(
    needs=needs,
    unlabeled_image_labels=np.zeros((5, 7), np.float32),
    geometry=Geometry((8, 8), convention="lpl"),
  )
  known = {tuple(np.isin(np.arange(7), SCENES.label(row)).astype(float)) for row in range(5)}
  for batch in take(3, options):
    for of_image, label in zip(
      batch["labeled"]["image_label"], batch["labeled"]["label"], strict=True
    ):
      assert tuple(of_image) in known and set(np.unique(label)) - {255} <= set(
        np.flatnonzero(of_image)
      )


class _Gray:
  """SCENES in grey of more than 8 bits."""

  channels, dtype, ids, has_labels, size, label = (
    1,
    np.float32,
    SCENES.ids,
    True,
    SCENES.size,
    SCENES.label,
  )

  def __len__(self):
    return len(self.ids)


def test_operations_that_cannot_be_applied_are_told_before_training():
  with pytest.raises(checks.InputError) as error:
    spec(
      labeled=_Gray(),
      unlabeled=None,
      needs=Needs(unlabeled=False, weak_label="boxes"),
      mean=(0.5,),
      std=(0.5,),
    )
  assert "images of 1 channels, float32; allowed: RGB of 8 bits" in str(
    error.value
  ) and "needs boxes" in str(error.value)
  with pytest.raises(checks.InputError, match="labeled_operations.*got -1"):
    spec(labeled_operations=-1)


def test_lpl_geometry_crops_anywhere_and_places_small_images_anywhere():
  options = Geometry((8, 8), scales=(1.0,), flip=False, convention="lpl")
  offsets = [
    geometry.from_uniform(options, np.array((10, 5)), np.array([0.9, 0.0, row, column]))
    .offset.numpy()
    .tolist()
    for row, column in [(0.0, 0.0), (0.999, 0.999), (0.5, 0.5)]
  ]
  # Rows 0..2 of a larger image, 0..3 columns of padding before a smaller one.
  assert offsets == [[0, 0], [2, -3], [1, -2]]
  image = np.arange(50, dtype=np.uint8).reshape(10, 5)
  draws = geometry.from_uniform(options, np.array((10, 5)), np.array([0.9, 0.0, 0.999, 0.999]))
  view = geometry.crop(image[..., None].repeat(3, 2), image, draws, (8, 8), "lpl")
  expected = np.full((8, 8), 255)
  expected[:, 3:] = image[2:]
  np.testing.assert_array_equal(view.label, expected)
  np.testing.assert_array_equal(view.valid, expected != 255)
  np.testing.assert_allclose(
    view.rgb[..., 0], np.where(expected == 255, 0, expected / 255), atol=1e-6
  )
  np.testing.assert_allclose(view.window, [0.2, -0.6, 0.8, 1.6], rtol=1e-6)
