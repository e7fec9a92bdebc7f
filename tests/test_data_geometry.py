import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.data import geometry, photometry, views
from pseudoseg_jax.data.geometry import Geometry


def place(size, scale, offset, crop_size):
  scaled = geometry.scaled_size(tf.constant(size), scale)
  return scaled, geometry.crop_origin(scaled, tf.constant(offset), crop_size)


def test_crop_at_full_size_is_a_slice():
  image = np.random.default_rng(0).integers(0, 256, (9, 11, 3)).astype(np.uint8)
  scaled, origin = place((9, 11), 1.0, (2, 3), (4, 5))
  np.testing.assert_array_equal(
    geometry.crop_image(tf.constant(image), scaled, origin, (4, 5)), image[2:6, 3:8]
  )
  np.testing.assert_array_equal(
    geometry.crop_label(tf.constant(image[..., 0]), scaled, origin, (4, 5)), image[2:6, 3:8, 0]
  )
  assert np.all(geometry.valid_mask(scaled, origin, (4, 5)))


def test_doubling_interpolates_between_pixel_centers():
  image = tf.constant(np.array([0, 100, 200], np.uint8)[None, :, None].repeat(3, 2))
  scaled, origin = place((1, 3), 2.0, (0, 0), (2, 6))
  got = geometry.crop_image(image, scaled, origin, (2, 6))[0, :, 0]
  # Centres at -1/4, 1/4, 3/4, ...; edges repeated.
  np.testing.assert_array_equal(got, [0, 25, 75, 125, 175, 200])
  label = tf.constant([[1, 2, 3]], tf.uint8)
  np.testing.assert_array_equal(
    geometry.crop_label(label, scaled, origin, (2, 6))[1], [1, 1, 2, 2, 3, 3]
  )


def test_small_image_is_padded_around_with_the_odd_pixel_after():
  image, label = (
    tf.fill([2, 3, 3], tf.constant(7, tf.uint8)),
    tf.fill([2, 3], tf.constant(4, tf.uint8)),
  )
  scaled, origin = place((2, 3), 1.0, (0, 0), (5, 5))
  expected = np.zeros((5, 5), bool)
  expected[1:3, 1:4] = True
  np.testing.assert_array_equal(geometry.valid_mask(scaled, origin, (5, 5)), expected)
  np.testing.assert_array_equal(
    geometry.crop_image(image, scaled, origin, (5, 5))[..., 0], np.where(expected, 7, 0)
  )
  np.testing.assert_array_equal(
    geometry.crop_label(label, scaled, origin, (5, 5)), np.where(expected, 4, 255)
  )


def test_last_offset_leaves_the_crop_one_pixel_short():
  scaled, origin = place((10, 10), 1.0, (5, 0), (6, 6))  # 10 - 6 + 1
  valid = geometry.valid_mask(scaled, origin, (6, 6)).numpy()
  assert valid[:5].all() and not valid[5].any()


@pytest.mark.parametrize(
  ("size", "scale", "scaled"), [((40, 50), 0.75, (30, 37)), ((3, 3), 0.1, (1, 1))]
)
def test_scaled_size_rounds_down_but_not_to_nothing(size, scale, scaled):
  assert tuple(geometry.scaled_size(tf.constant(size), scale).numpy()) == scaled


def draw_many(options, size, count=300):
  draw = tf.function(
    lambda position: geometry.draw(
      options, tf.constant(size), tf.stack([tf.constant(3, tf.int64), position])
    )
  )
  return [
    tf.nest.map_structure(lambda value: value.numpy(), draw(tf.constant(n, tf.int64)))
    for n in range(count)
  ]


def test_draws_reach_every_scale_and_offset_and_no_other():
  draws = draw_many(Geometry((4, 6), scales=(1.0, 2.0)), (6, 5))
  assert {float(draw.scale) for draw in draws} == {1.0, 2.0}
  assert 0.35 < np.mean([draw.flip for draw in draws]) < 0.65
  rows = {
    scale: {int(draw.offset[0]) for draw in draws if draw.scale == scale} for scale in (1.0, 2.0)
  }
  columns = {
    scale: {int(draw.offset[1]) for draw in draws if draw.scale == scale} for scale in (1.0, 2.0)
  }
  # 0 .. size - crop + 1, both included.
  assert rows == {1.0: set(range(0, 4)), 2.0: set(range(0, 10))}
  # an axis that is not larger than the crop starts at 0.
  assert columns == {1.0: {0}, 2.0: set(range(0, 6))}


def test_continuous_scales_fill_the_range_and_flip_can_be_off():
  draws = draw_many(
    Geometry((4, 4), scales=(0.5, 2.0), continuous=True, flip=False), (6, 6), count=100
  )
  scales = np.array([draw.scale for draw in draws])
  assert scales.min() >= 0.5 and scales.max() <= 2.0 and scales.min() < 0.6 and scales.max() > 1.9
  assert not any(draw.flip for draw in draws)


@pytest.mark.parametrize("convention", geometry.CONVENTIONS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("scale", "offset"), [(2.0, (7, 14)), (0.5, (0, 0)), (1.0, (1, 2))])
def test_window_and_flip_put_a_marker_back(flip, scale, offset, convention):
  image = np.zeros((20, 30, 3), np.uint8)
  image[8:10, 16:18] = 255  # its centre: (9, 17) of 20 x 30
  crop_size = (16, 24)
  draws = geometry.Draws(tf.constant(flip), tf.constant(scale, tf.float64), tf.constant(offset))
  view = views.unlabeled_views(
    tf.constant(image),
    draws=draws,
    crop_size=crop_size,
    photometry=None,
    photometry_draws=[],
    mean=(0, 0, 0),
    std=(1, 1, 1),
    convention=convention,
  )
  crop = view["weak"].numpy()[..., 0]
  assert crop.sum() > 0
  if bool(view["flip"]):
    crop = crop[:, ::-1]
  rows, columns = np.mgrid[: crop_size[0], : crop_size[1]] + 0.5
  top, left, height, width = view["window"].numpy()
  row = (top + height * (rows * crop).sum() / crop.sum() / crop_size[0]) * 20
  column = (left + width * (columns * crop).sum() / crop.sum() / crop_size[1]) * 30
  np.testing.assert_allclose((row, column), (9, 17), atol=0.05)


def test_bad_geometry_is_told_at_once():
  with pytest.raises(checks.InputError) as error:
    Geometry((0, 4), scales=(), convention="tensorflaw")
  assert all(
    part in str(error.value)
    for part in ("crop_size", "scales", "convention", "did you mean 'tensorflow'?")
  )


def test_tensorflow_label_keeps_corners_on_corners_and_rounds_halves_up():
  label = tf.constant([[10, 11, 12, 13]], tf.uint8)
  scaled = tf.constant((1, 7))
  got = geometry.crop_label(label, scaled, tf.constant((0, 0)), (1, 7), "tensorflow")
  # at 0, 1/2, 1, 3/2, ... of 0..3.
  np.testing.assert_array_equal(got[0], [10, 11, 11, 12, 12, 13, 13])
  single = geometry.crop_label(
    label, tf.constant((1, 1)), tf.constant((0, 0)), (1, 2), "tensorflow"
  )
  np.testing.assert_array_equal(single, [[10, 255]])


def test_tensorflow_halving_weighs_four_pixels():
  image = tf.constant(np.array([0, 0, 8, 0, 0, 0, 0, 0], np.uint8)[None, :, None].repeat(3, 2))
  got = geometry.crop_image(image, tf.constant((1, 4)), tf.constant((0, 0)), (1, 4), "tensorflow")[
    0, :, 0
  ]
  # 3/4 3/4 1/4, and 1/4 3/4 3/4 1/4 inside.
  np.testing.assert_allclose(got, [8 * 0.25 / 1.75, 8 * 0.75 / 2, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 1.75])
def test_tensorflow_crop_is_a_slice_of_the_whole_resized_image(scale):
  image = tf.constant(np.random.default_rng(0).integers(0, 256, (23, 30, 3)).astype(np.uint8))
  scaled, crop_size = geometry.scaled_size(tf.constant((23, 30)), scale), (8, 9)
  whole = tf.image.resize(image, scaled, antialias=True)
  got = geometry.crop_image(image, scaled, tf.constant((3, 5)), crop_size, "tensorflow")
  np.testing.assert_allclose(got, whole[3:11, 5:14], atol=1e-3)


@pytest.mark.parametrize("flip", [False, True])
def test_tensorflow_pads_below_and_on_the_right_before_it_mirrors(flip):
  image = np.arange(6, dtype=np.uint8).reshape(2, 3)
  draws = geometry.Draws(tf.constant(flip), tf.constant(1.0, tf.float64), tf.constant((0, 0)))
  view = geometry.crop(
    tf.constant(image[..., None].repeat(3, 2)), tf.constant(image), draws, (3, 5), "tensorflow"
  )
  expected = np.full((3, 5), 255)
  expected[:2, :3] = image
  if flip:
    expected = expected[:, ::-1]  # padding on the left
  np.testing.assert_array_equal(view.label, expected)
  np.testing.assert_array_equal(view.valid, expected != 255)
  np.testing.assert_allclose(
    view.rgb[..., 0], np.where(expected == 255, 0, expected / 255), atol=1e-6
  )


def test_tensorflow_offsets_reach_the_last_crop_inside_and_no_further():
  draws = draw_many(Geometry((4, 6), scales=(1.0, 2.0), convention="tensorflow"), (6, 5))
  rows = {
    scale: {int(draw.offset[0]) for draw in draws if draw.scale == scale} for scale in (1.0, 2.0)
  }
  columns = {
    scale: {int(draw.offset[1]) for draw in draws if draw.scale == scale} for scale in (1.0, 2.0)
  }
  assert rows == {1.0: set(range(0, 3)), 2.0: set(range(0, 9))}  # 0 .. size - crop
  assert columns == {1.0: {0}, 2.0: set(range(0, 5))}


@pytest.mark.parametrize("convention", geometry.CONVENTIONS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
  ("scale", "offset"), [(2.0, (7, 14)), (0.5, (0, 0)), (1.0, (4, 9)), (1.3, (0, 11))]
)
def test_boxes_move_as_masks_do(flip, scale, offset, convention):
  label = np.zeros((20, 30), np.uint8)
  label[5:17, 9:24] = 1
  boxes = tf.constant([[1, 5 / 20, 9 / 30, 17 / 20, 24 / 30], [-1, 0, 0, 1, 1]], tf.float32)
  draws = geometry.Draws(tf.constant(flip), tf.constant(scale, tf.float64), tf.constant(offset))
  options = dict(
    draws=draws, crop_size=(16, 24), mean=(0,) * 3, std=(1,) * 3, convention=convention
  )
  view = views.labeled_view(
    tf.constant(label[..., None].repeat(3, -1)), tf.constant(label), boxes=boxes, **options
  )
  rows, columns = np.nonzero(view["label"].numpy() == 1)
  extent = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
  np.testing.assert_allclose(view["boxes"][0, 1:] * [16, 24, 16, 24], extent, atol=1.0)
  np.testing.assert_array_equal(view["boxes"][:, 0], [1, -1])


def test_boxes_that_leave_the_view_are_no_boxes():
  window = tf.constant([0.5, 0.0, 0.5, 0.5])  # the quarter below on the left
  boxes = [
    [2, 0.0, 0.0, 1.0, 1.0],
    [3, 0.6, 0.1, 0.7, 0.2],
    [4, 0.0, 0.0, 0.5, 0.4],
    [5, 0.6, 0.49, 0.9, 0.8],
  ]
  # One lies above the view; of the other a fifth of a pixel's width is left.
  nothing = [-1, 0, 0, 0, 0]
  expected = [[2, 0, 0, 1, 1], [3, 0.2, 0.2, 0.4, 0.4], nothing, nothing]
  np.testing.assert_allclose(
    geometry.crop_boxes(tf.constant(boxes), window, tf.constant(False), (10, 10)),
    expected,
    atol=1e-6,
  )
  mirrored = geometry.crop_boxes(tf.constant(boxes), window, tf.constant(True), (10, 10))
  np.testing.assert_allclose(mirrored[1], [3, 0.2, 0.6, 0.4, 0.8], atol=1e-6)


def test_only_images_of_8_bits_are_rounded_and_any_channels_are_cropped():
  stored = np.random.default_rng(0).uniform(0, 255, (9, 11, 5)).astype(np.float32)
  scaled, origin = place((9, 11), 2.0, (2, 3), (6, 7))
  got = geometry.crop_image(tf.constant(stored), scaled, origin, (6, 7)).numpy()
  np.testing.assert_allclose(
    got, geometry.crop_image(tf.constant(stored), scaled, origin, (6, 7), "tensorflow"), atol=1e-3
  )
  assert np.abs(got - np.round(got)).max() > 0.3
  levels = geometry.crop_image(tf.constant(stored.astype(np.uint8)), scaled, origin, (6, 7)).numpy()
  np.testing.assert_array_equal(levels, np.round(levels))


@pytest.mark.parametrize("flip", [False, True])
def test_crop_of_a_mirrored_image_is_that_of_the_whole_resized_one(flip):
  image = np.random.default_rng(0).integers(0, 256, (13, 17, 3)).astype(np.uint8)
  draws = geometry.Draws(tf.constant(flip), tf.constant(1.7, tf.float64), tf.constant((3, 5)))
  got = geometry.crop(tf.constant(image), tf.constant(image[..., 0]), draws, (12, 15))
  mirrored = image[:, ::-1] if flip else image
  whole = tf.image.resize(
    mirrored, geometry.scaled_size(tf.constant((13, 17)), draws.scale)
  ).numpy()
  np.testing.assert_allclose(got.rgb * 255, whole[3:15, 5:20], atol=0.51)  # half a level
  rows, columns = (
    np.arange(start, start + size) * stored // int(stored * 1.7)
    for start, size, stored in ((3, 12, 13), (5, 15, 17))
  )
  np.testing.assert_array_equal(got.label, mirrored[rows][:, columns, 0])


@pytest.mark.parametrize("convention", geometry.CONVENTIONS)
def test_draws_are_a_function_of_the_seed_and_crops_lie_inside(convention):
  size, crop_size = (40, 50), (16, 20)
  options = Geometry(crop_size, scales=(0.5, 1.0, 1.5), convention=convention)
  first, again = (draw_many(options, size, count=60) for _ in range(2))
  tf.nest.map_structure(np.testing.assert_array_equal, first, again)
  assert len({tuple(draw.offset) for draw in first}) > 20
  for draw in first:
    assert 0.5 <= draw.scale <= 1.5 and np.all(draw.offset >= 0)
    if convention == "cutmix_seg":
      whole, part = size, geometry.cut_size(crop_size, draw.scale)
    else:
      whole, part = geometry.scaled_size(tf.constant(size), draw.scale, convention), crop_size
    spare = 1 if convention == "opencv" else 0
    assert np.all(draw.offset <= np.maximum(np.array(whole) - np.array(part), 0) + spare)


def test_pillow_draws_every_length_of_the_longer_side():
  draws = draw_many(Geometry((4, 4), scales=(0.5, 1.5), convention="pillow"), (5, 6))
  sizes = {
    tuple(geometry.scaled_size(tf.constant((5, 6)), draw.scale, "pillow").numpy()) for draw in draws
  }
  assert sizes == {(3, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)}  # 5/6 of it, halves up


def test_ael_shrinks_as_often_as_it_grows():
  scales = np.array(
    [
      draw.scale
      for draw in draw_many(Geometry((4, 4), scales=(0.5, 2.0), convention="ael"), (6, 6))
    ]
  )
  assert 0.4 < np.mean(scales < 1) < 0.6 and scales.min() < 0.55 and scales.max() > 1.9
  assert 0.4 < np.mean(scales[scales > 1] < 1.5) < 0.6
  with pytest.raises(checks.InputError, match="below 1 to above it"):
    Geometry((4, 4), scales=(1.5, 2.0), convention="ael")


@pytest.mark.parametrize(
  ("convention", "kernel"), [("pillow", Image.BILINEAR), ("cct", Image.BICUBIC)]
)
@pytest.mark.parametrize("scale", [0.5, 0.8, 1.0, 1.7])
def test_pillow_resizes_as_pillow(convention, kernel, scale):
  # PIL clips between its two passes.
  image = np.random.default_rng(0).integers(90, 166, (23, 31, 3)).astype(np.uint8)
  size = tuple(geometry.scaled_size(tf.constant((23, 31)), scale, convention).numpy().tolist())
  draws = geometry.Draws(tf.constant(False), tf.constant(scale, tf.float64), tf.constant((0, 0)))
  got = geometry.crop(tf.constant(image), tf.constant(image[..., 0]), draws, size, convention)
  whole = np.asarray(Image.fromarray(image).resize(size[::-1], kernel), np.float32)
  np.testing.assert_allclose(got.rgb * 255, whole, atol=1.001)  # it also rounds there
  nearest = np.asarray(Image.fromarray(image[..., 0]).resize(size[::-1], Image.NEAREST))
  np.testing.assert_array_equal(got.label, nearest)


@pytest.mark.parametrize("flip", [False, True])
def test_pillow_padding_is_black_in_weak_and_strong_views(flip):
  even = tf.fill([3, 4, 3], tf.constant(200, tf.uint8))
  draws = geometry.Draws(tf.constant(flip), tf.constant(1.0, tf.float64), tf.constant((0, 0)))
  nothing = dict(
    grayscale=False, blur=False, sigma=1.0, saturation=1.0, hue=0.0, order=[0, 1, 2, 3]
  )
  look = {
    name: tf.constant(value)
    for name, value in dict(nothing, jitter=True, brightness=0.5, contrast=0.5).items()
  }
  view = views.unlabeled_views(
    even,
    draws=draws,
    crop_size=(4, 6),
    photometry=photometry.Photometry(),
    photometry_draws=[photometry.Draws(**look)],
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    convention="pillow",
  )
  inside = np.zeros((4, 6), bool)
  inside[:3, :4] = True
  inside = inside[:, ::-1] if flip else inside
  np.testing.assert_array_equal(view["valid"], inside)
  np.testing.assert_allclose(
    view["weak"][..., 0], (np.where(inside, 200 / 255, 0) - 0.5) / 0.25, atol=1e-6
  )
  # Contrast mixes in half of the mean grey, to which padding belongs: half of the pixels.
  gray = 0.5 * 0.5 * 100 / 255
  np.testing.assert_allclose(
    view["strong"][0, ..., 0], (np.where(inside, 50 / 255, 0) + gray - 0.5) / 0.25, atol=1e-5
  )


def test_ael_keeps_fractions_of_levels_and_finds_labels_in_single_precision():
  image = tf.constant(np.array([0, 101], np.uint8)[None, :, None].repeat(3, 2))
  scaled, crop_size = tf.constant((1, 4)), (1, 4)
  got = geometry.crop_image(image, scaled, tf.constant((0, 0)), crop_size, "ael")[0, :, 0]
  np.testing.assert_allclose(got, [0, 25.25, 75.75, 101], atol=1e-5)
  label = tf.constant(np.arange(26, dtype=np.uint8)[None])
  got = geometry.crop_label(label, tf.constant((1, 22)), tf.constant((0, 0)), (1, 22), "ael")[0]
  # 11 * 26 / 22 is 13, but not in single precision.
  np.testing.assert_array_equal(got[10:13], [11, 12, 14])


def test_cutmix_seg_cuts_a_window_and_repeats_its_edges():
  row = tf.constant(np.array([0, 0, 100, 200, 50, 50], np.uint8)[None, :, None].repeat(3, 2))
  draws = geometry.Draws(tf.constant(False), tf.constant(2.0, tf.float64), tf.constant((0, 2)))
  got = geometry.crop(row, row[..., 0], draws, (2, 4), "cutmix_seg")
  # Neither the 0 before nor the 50 after.
  np.testing.assert_allclose(got.rgb[0, :, 0] * 255, [100, 125, 175, 200], atol=1e-4)
  np.testing.assert_array_equal(got.label[0], [100, 100, 200, 200])
  np.testing.assert_allclose(got.window, [0, 2 / 6, 1, 2 / 6], rtol=1e-6)


def test_cutmix_seg_padding_blends_with_the_mean_color():
  even = tf.fill([4, 4, 3], tf.constant(153, tf.uint8))  # 0.6
  draws = geometry.Draws(tf.constant(False), tf.constant(4 / 6, tf.float64), tf.constant((0, 0)))
  place = dict(draws=draws, crop_size=(4, 4), convention="cutmix_seg")
  # a window of 6 pixels, one of them padding on each side.
  crop = geometry.crop(even, None, **place)
  opacity = np.array([0.25, 1, 1, 0.25])  # at 0.25 between pixels 0 and 1, then at 1.75, 3.25, 4.75
  np.testing.assert_allclose(crop.opacity, np.outer(opacity, opacity), atol=0.51 / 255)
  np.testing.assert_allclose(crop.rgb, 0.6, atol=0.05)
  np.testing.assert_array_equal(crop.valid, np.outer(opacity, opacity) > 0.5)
  view = views.labeled_view(
    even, tf.fill([4, 4], tf.constant(7, tf.uint8)), **place, mean=(0.5,) * 3, std=(0.1,) * 3
  )
  np.testing.assert_allclose(view["image"][..., 0], np.outer(opacity, opacity), atol=0.05)
