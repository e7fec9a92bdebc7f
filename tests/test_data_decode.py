"""What files of pixels hold, and what is said of those that are of no use."""

import io
import math
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features

from pseudoseg_jax import checks
from pseudoseg_jax.data import decode

SIZE = (16, 24)  # blocks of 8 pixels: lossy formats keep them
TURNS = {  # EXIF orientation -> what a viewer does with the stored pixels
  1: None,
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
JPEG = {"quality": 100, "subsampling": 0}
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
needs_jpeg_2000 = pytest.mark.skipif(
  not features.check("jpg_2000"), reason="this Pillow reads no JPEG 2000"
)


def blocks(seed=0):
  grey = (
    np.random.default_rng(seed).integers(0, 2, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8)
    * 200
  )
  grey[0, 0], grey[-1, -1] = (200, 0, 0), (0, 0, 200)  # no symmetry
  return grey.repeat(8, 0).repeat(8, 1)


def exif(orientation):
  tags = Image.Exif()
  tags[0x0112] = orientation
  return tags


def turned(pixels, orientation):
  picture = Image.fromarray(pixels)
  return np.asarray(
    picture if TURNS[orientation] is None else picture.transpose(TURNS[orientation])
  )


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


# Orientation


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
  "suffix, options",
  [
    ("png", {}),
    ("jpg", JPEG),
    ("webp", {"lossless": True}),
    ("tif", {}),
    ("tif", {"compression": "tiff_lzw"}),
    ("tiff", {"compression": "tiff_adobe_deflate"}),
    pytest.param("avif", {"quality": 100}, marks=needs_avif),
  ],
)
def test_pictures_are_read_as_viewers_show_them(tmp_path, suffix, options, orientation):
  stored = blocks()[..., :1].repeat(3, -1)  # grey, as lossy formats mix colors
  path = tmp_path / f"x.{suffix}"
  Image.fromarray(stored).save(path, exif=exif(orientation), **options)
  for how, wanted in (("apply", turned(stored, orientation)), ("ignore", stored)):
    got = decode.read_image(path, exif_orientation=how)
    # of lossy formats.
    assert got.shape == wanted.shape and np.abs(got.astype(int) - wanted).max() < 24
    header = decode.header(path, exif_orientation=how)
    assert header == (got.shape[:2], np.uint8, orientation)
  assert np.array_equal(decode.read_image(path), decode.read_image(path, exif_orientation="apply"))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_masks_that_carry_an_orientation_are_turned_alike(tmp_path, suffix, orientation):
  stored = blocks()[..., 0] // 100
  picture = Image.fromarray(stored)
  if suffix == "webp":
    picture = picture.convert("RGB")
  picture.save(
    tmp_path / f"x.{suffix}",
    exif=exif(orientation),
    **({"lossless": True} if suffix == "webp" else {}),
  )
  for how, wanted in (("apply", turned(stored, orientation)), ("ignore", stored)):
    read = decode.read_color_mask if suffix == "webp" else decode.read_mask
    got = read(tmp_path / f"x.{suffix}", exif_orientation=how)
    np.testing.assert_array_equal(
      got, wanted[..., None].repeat(3, -1) if suffix == "webp" else wanted
    )
    assert decode.mask_header(tmp_path / f"x.{suffix}", exif_orientation=how).size == wanted.shape


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("values", [np.uint16, np.int32, np.float32])
def test_deep_pictures_are_turned_too(tmp_path, values, orientation):
  stored = (blocks()[..., 0].astype(values) + np.arange(SIZE[1], dtype=values)) * (
    1 if values == np.float32 else 200
  )
  Image.fromarray(stored).save(tmp_path / "x.tif", exif=exif(orientation))
  levels = stored / (1 if values == np.float32 else 257)
  np.testing.assert_allclose(
    decode.read_image(tmp_path / "x.tif", 1)[..., 0], turned(levels, orientation), rtol=1e-6
  )
  np.testing.assert_allclose(
    decode.read_image(tmp_path / "x.tif", 1, exif_orientation="ignore")[..., 0], levels, rtol=1e-6
  )


def test_an_orientation_behind_the_pixels_counts(tmp_path):
  """PNG allows metadata at the end, where some tools append them."""
  stored = blocks()
  content = io.BytesIO()
  Image.fromarray(stored).save(content, "PNG", exif=exif(6))
  content = content.getvalue()
  start = content.index(b"eXIf") - 4
  chunk = content[start : start + 12 + struct.unpack(">I", content[start : start + 4])[0]]
  (tmp_path / "x.png").write_bytes(
    content.replace(chunk, b"").replace(content[-12:], chunk + content[-12:])
  )
  np.testing.assert_array_equal(decode.read_image(tmp_path / "x.png"), turned(stored, 6))
  assert decode.header(tmp_path / "x.png") == (SIZE[::-1], np.uint8, 6)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "zero", "nine"])
def test_malformed_exif_stops_no_picture(tmp_path, suffix, damage):
  tags = {"zero": exif(0), "nine": exif(9)}.get(damage, exif(6)).tobytes()
  tags = {
    "garbage": b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage",
    "empty": b"Exif\0\0",
    "cut": tags[:-9],
  }.get(damage, tags)
  stored = blocks()
  if suffix == "tif":
    if damage not in ("zero", "nine"):
      return  # tags are what a TIFF file is made of
    tags = exif({"zero": 0, "nine": 9}[damage])
  Image.fromarray(stored).save(
    tmp_path / f"x.{suffix}", exif=tags, **(JPEG if suffix == "jpg" else {})
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    header = decode.header(tmp_path / f"x.{suffix}")
    assert (
      header.orientation == 1
      and decode.read_image(tmp_path / f"x.{suffix}").shape[:2] == header.size == SIZE
    )


def test_only_known_options_are_taken(tmp_path):
  Image.new("L", (3, 2)).save(tmp_path / "x.png")
  text = message(lambda: decode.read_image(tmp_path / "x.png", exif_orientation="aply"))
  assert "'aply'" in text and "did you mean 'apply'" in text
  for max_value in (-1.0, math.nan, math.inf):
    assert "config.data.max_value" in message(
      lambda: decode.check_options("apply", max_value, "config.data.")
    )
  decode.check_options("ignore", 4095.0)


# Masks


def encoded(pixels, format, **options):
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, format, **options)
  return content.getvalue()


LOSSY = {
  "jpg": ("JPEG", {}, "JPEG"),
  "jpeg": ("JPEG", {"quality": 100, "subsampling": 0}, "JPEG"),
  "mpo": ("MPO", {}, "JPEG"),
  "webp": ("WEBP", {"quality": 100}, "lossy WebP"),
  "tif": ("TIFF", {"compression": "jpeg"}, "TIFF with JPEG compression"),
  "jp2": ("JPEG2000", {"irreversible": True}, "JPEG 2000"),
  "j2k": ("JPEG2000", {"irreversible": True, "no_jp2": True}, "JPEG 2000"),
  "avif": ("AVIF", {"quality": 100}, "AVIF"),
}
LOSSLESS = {
  "png": ("PNG", {}),
  "bmp": ("BMP", {}),
  "gif": ("GIF", {}),
  "webp": ("WEBP", {"lossless": True}),
  "tif": ("TIFF", {}),
  "tiff": ("TIFF", {"compression": "tiff_lzw"}),
  "jp2": ("JPEG2000", {"irreversible": False}),
  "j2k": ("JPEG2000", {"irreversible": False, "no_jp2": True}),
}
NEEDED = {"jp2": "jpg_2000", "j2k": "jpg_2000", "avif": "avif"}


@pytest.mark.parametrize("values", ["one class", "classes", "colors"])
@pytest.mark.parametrize("suffix", LOSSY)
def test_masks_of_lossy_formats_are_refused_whatever_they_hold(tmp_path, suffix, values):
  if not features.check(NEEDED.get(suffix, "jpg")):
    pytest.skip("this Pillow lacks the format")
  format, options, name = LOSSY[suffix]
  mask = np.zeros(SIZE, np.uint8) if values == "one class" else blocks()[..., 0] // 100
  if suffix in ("webp", "avif") or values == "colors":
    mask = mask[..., None].repeat(3, -1)
  path = tmp_path / f"mask.{suffix}"
  path.write_bytes(encoded(mask, format, **options))
  for call in (lambda: decode.read_mask(path), lambda: decode.read_color_mask(path)):
    text = message(call)
    for part in (
      str(path),
      f"got {name}",
      "a lossy format",
      "allowed: PNG",
      "another class",
      "export the masks as PNG",
    ):
      assert part in text
  header = decode.mask_header(path)  # told before any training
  assert (
    isinstance(header, decode.Unusable)
    and name in str(header)
    and "PNG" in header.problem["remedy"]
  )
  # Fine for images.
  assert (
    isinstance(decode.header(path), decode.Header) and decode.read_image(path).shape[:2] == SIZE
  )


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_masks_of_lossless_formats_keep_their_values(tmp_path, suffix):
  if not features.check(NEEDED.get(suffix, "jpg")):
    pytest.skip("this Pillow lacks the format")
  format, options = LOSSLESS[suffix]
  mask = np.random.default_rng(0).integers(0, 21, SIZE, dtype=np.uint8)
  colors = suffix == "webp"  # which knows no grey
  path = tmp_path / f"mask.{suffix}"
  path.write_bytes(encoded(mask[..., None].repeat(3, -1) if colors else mask, format, **options))
  assert decode.mask_header(path).size == SIZE
  got = decode.read_color_mask(path)[..., 0] if colors else decode.read_mask(path)
  np.testing.assert_array_equal(got, mask)


def test_webp_containers_are_told_apart_by_what_they_hold(tmp_path):
  """With metadata, and with several frames, the coding stands deeper in the file."""
  mask = blocks() // 100
  for lossless in (True, False):
    for extra in (
      {"exif": exif(1)},
      {"save_all": True, "append_images": [Image.fromarray(mask[::-1])]},
    ):
      (tmp_path / "mask.webp").write_bytes(encoded(mask, "WEBP", lossless=lossless, **extra))
      assert isinstance(
        decode.mask_header(tmp_path / "mask.webp"), decode.Header if lossless else decode.Unusable
      )


def test_fractions_are_no_masks(tmp_path):
  Image.fromarray(blocks()[..., 0] / np.float32(100)).save(tmp_path / "mask.tif")
  np.save(tmp_path / "mask.npy", blocks()[..., 0] / 100)
  for name in ("mask.tif", "mask.npy"):
    assert "integers" in message(lambda name=name: decode.read_mask(tmp_path / name))
    assert "integers" in str(decode.mask_header(tmp_path / name))
    assert isinstance(decode.header(tmp_path / name), decode.Header)


@pytest.mark.parametrize("where", [273, 324], ids=["strips", "tiles"])
def test_webp_in_tiff_is_told_apart_too(tmp_path, where):
  for lossless in (True, False):
    picture = encoded(blocks() // 100, "WEBP", lossless=lossless)
    tags = {
      256: SIZE[1],
      257: SIZE[0],
      258: 8,
      259: 50001,
      262: 2,
      where: 8,
      277: 3,
      279: len(picture),
    }
    tags |= {322: SIZE[1], 323: SIZE[0], 325: len(picture)} if where == 324 else {278: SIZE[0]}
    entries = b"".join(
      struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "mask.tif").write_bytes(
      b"II*\0" + struct.pack("<I", 8 + len(picture)) + picture + directory
    )
    header = decode.mask_header(tmp_path / "mask.tif")
    assert isinstance(header, decode.Header) if lossless else "TIFF with lossy WebP" in str(header)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_grey_masks_with_an_opaque_alpha_channel_are_indices(tmp_path, mode):
  mask = np.random.default_rng(0).integers(0, 21, SIZE, dtype=np.uint8)
  alpha = np.full(SIZE, 255, np.uint8)
  bands = [mask] * (len(mode) - 1)
  path = tmp_path / "mask.png"
  Image.fromarray(np.stack([*bands, alpha], -1), mode).save(path)
  np.testing.assert_array_equal(decode.read_mask(path), mask)
  alpha[3, 4] = 254
  Image.fromarray(np.stack([*bands, alpha], -1), mode).save(path)
  text = message(lambda: decode.read_mask(path))
  assert "alpha channel" in text and "mask_colors" not in text and "ignore_index" in text
  Image.open(path).getchannel(0).save(path)  # the remedy: without alpha
  np.testing.assert_array_equal(decode.read_mask(path), mask)


def test_masks_in_colors_and_of_three_equal_channels_are_told_what_they_are(tmp_path):
  mask = blocks()
  Image.fromarray(mask).save(tmp_path / "mask.png")
  text = message(lambda: decode.read_mask(tmp_path / "mask.png"))
  assert "3 channels" in text and "mask_colors" in text and "equal" not in text
  Image.fromarray(np.dstack([mask, np.full(SIZE, 255, np.uint8)]), "RGBA").save(
    tmp_path / "mask.png"
  )
  assert "mask_colors" in message(lambda: decode.read_mask(tmp_path / "mask.png"))
  Image.fromarray(mask[..., :1].repeat(3, -1)).save(tmp_path / "mask.png")
  assert "the channels are equal, store one of them" in message(
    lambda: decode.read_mask(tmp_path / "mask.png")
  )


def png(rows, color_type, *, side=2, depth=16):
  """A PNG of side x side pixels as Pillow does not write it. rows: each with its filter."""
  chunk = lambda name, data: (
    struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  )
  header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color_type, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_grey_with_alpha_is_no_mask_as_pillow_halves_it(tmp_path):
  """A PNG of bit depth 16 and color type 4, which Pillow reads as 8 bits: class 3 would be class
  0.
  """
  row = b"\0" + struct.pack(">HH", 3, 65535) * 2
  (tmp_path / "mask.png").write_bytes(png(2 * row, color_type=4))
  assert "alpha" in message(lambda: decode.read_mask(tmp_path / "mask.png"))


def test_other_masks_stay_the_numbers_that_are_stored(tmp_path):
  mask = np.random.default_rng(0).integers(0, 21, SIZE, dtype=np.uint8)
  palette = Image.fromarray(mask)
  palette.putpalette([255 - value // 3 for value in range(768)])
  palette.save(tmp_path / "palette.png", transparency=3)
  Image.fromarray(mask.astype(np.uint16) * 300).save(tmp_path / "deep.png")
  Image.fromarray(mask > 3).save(tmp_path / "bit.png")
  np.save(tmp_path / "array.npy", np.asfortranarray(mask.astype(np.int64)))
  np.save(tmp_path / "deep.npy", mask[..., None])
  for name, wanted in (
    ("palette.png", mask),
    ("deep.png", mask * 300.0),
    ("bit.png", mask > 3),
    ("array.npy", mask),
    ("deep.npy", mask),
  ):
    np.testing.assert_array_equal(decode.read_mask(tmp_path / name), wanted)
  np.save(tmp_path / "colors.npy", blocks().astype(np.int64))
  np.testing.assert_array_equal(decode.read_color_mask(tmp_path / "colors.npy"), blocks())
  for array in (blocks()[..., 0], blocks() / 2, blocks() + np.uint16(300)):
    np.save(tmp_path / "colors.npy", array)
    assert "colors.npy" in message(lambda: decode.read_color_mask(tmp_path / "colors.npy"))


# Scales


def levels_of(path, **options):
  """The levels of a file, and what its header promised of their type."""
  got = decode.read_image(path, **options)
  assert decode.header(path, **options).dtype == got.dtype
  return got


PICTURE = np.linspace(0, 1, SIZE[0] * SIZE[1] * 3).reshape(*SIZE, 3)


@pytest.mark.parametrize(
  "full, dtype, suffix",
  [
    (1, np.float32, "npy"),
    (1, np.float16, "npy"),
    (1, np.float64, "npy"),
    (1, np.float32, "tif"),
    (255, np.int64, "npy"),
    (255, np.uint16, "npy"),
    (255, np.uint16, "png"),
    (255, np.int32, "npy"),
    (255, np.uint16, "tif"),
  ],
)
def test_pictures_that_would_be_black_are_refused_until_their_scale_is_said(
  tmp_path, full, dtype, suffix
):
  stored = (PICTURE * full).round(0 if full > 1 else 6).astype(dtype)
  path = tmp_path / f"x.{suffix}"
  if suffix == "npy":
    np.save(path, stored)
  else:
    stored = stored[..., 0]
    Image.fromarray(stored).save(path)
  text = message(lambda: decode.read_image(path))
  assert str(path) in text and "all but black" in text
  remedies = re.findall(r"config\.data\.max_value=(\d+)", text)
  assert len(remedies) == 2 and float(remedies[0]) == full
  bright, dark = (levels_of(path, max_value=float(remedy)) for remedy in remedies)
  wanted = np.broadcast_to(stored.astype(float).reshape(*SIZE, -1) * 255 / full, bright.shape)
  np.testing.assert_allclose(bright, wanted, rtol=1e-3, atol=1e-4)
  assert dark.dtype == np.float32 and dark.max() <= 1 + 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_black_pictures_and_such_as_are_dark_are_no_reason_to_stop(tmp_path, dtype):
  np.save(tmp_path / "black.npy", np.zeros((4, 5, 3), dtype))
  assert not levels_of(tmp_path / "black.npy").any()
  np.save(tmp_path / "dark.npy", np.full((4, 5, 3), 2 if dtype == np.float32 else 514, dtype))
  np.testing.assert_allclose(levels_of(tmp_path / "dark.npy"), 2)
  np.save(tmp_path / "dark.npy", np.full((4, 5, 3), 0.25 if dtype == np.float32 else 1, dtype))
  full = 1.0 if dtype == np.float32 else 4095.0
  np.testing.assert_allclose(
    levels_of(tmp_path / "dark.npy", max_value=full), 255 / (4 if full == 1 else 4095), rtol=1e-6
  )


def test_the_value_of_full_brightness_becomes_255(tmp_path):
  np.save(tmp_path / "x.npy", np.array([[0, 4095, 1024]], np.uint16))
  np.testing.assert_allclose(
    levels_of(tmp_path / "x.npy", max_value=4095.0)[0, :, 0], [0, 255, 1024 * 255 / 4095], rtol=1e-6
  )
  np.testing.assert_allclose(
    levels_of(tmp_path / "x.npy")[0, :, 0], [0, 4095 / 257, 1024 / 257], rtol=1e-6
  )
  np.testing.assert_array_equal(
    levels_of(tmp_path / "x.npy", max_value=65535.0), levels_of(tmp_path / "x.npy")
  )
  Image.fromarray(np.array([[0, 100, 255]], np.uint8)).save(tmp_path / "x.png")
  for max_value, wanted in ((0.0, [0, 100, 255]), (255.0, [0, 100, 255])):
    got = levels_of(tmp_path / "x.png", max_value=max_value)
    assert got.dtype == np.uint8 and got[0, :, 0].tolist() == wanted
  Image.fromarray(np.array([[0, 100, 127]], np.uint8)).save(tmp_path / "x.png")
  np.testing.assert_allclose(
    levels_of(tmp_path / "x.png", max_value=127.0)[0, :, 0], [0, 100 * 255 / 127, 255], rtol=1e-6
  )


@pytest.mark.parametrize(
  "values, options, said",
  [
    ([0, 1.5], {"max_value": 1.0}, "0..1.5"),
    ([0, 4095.0], {}, "0..4095"),
    ([0, 70000], {}, "0..70000"),
    ([0, 5000], {"max_value": 4095.0}, "0..5000"),
  ],
)
def test_brighter_than_full_brightness_is_refused_and_the_remedy_holds(
  tmp_path, values, options, said
):
  np.save(tmp_path / "x.npy", np.array([values]))
  text = message(lambda: decode.read_image(tmp_path / "x.npy", **options))
  assert "x.npy" in text and said in text
  (remedy,) = re.findall(r"config\.data\.max_value=([\d.e+]+)", text)
  got = levels_of(tmp_path / "x.npy", max_value=float(remedy))
  np.testing.assert_allclose(got[0, 1], values[1] * 255 / float(remedy), rtol=1e-5)
  assert 100 < got.max() <= 255.001


def test_rounding_is_no_other_scale(tmp_path):
  np.save(tmp_path / "x.npy", np.array([[-1e-6, 1 + 1e-6, 0.5]], np.float32))
  np.testing.assert_allclose(
    levels_of(tmp_path / "x.npy", max_value=1.0)[0, :, 0], [0, 255, 127.5], atol=1e-3
  )


def test_eight_bits_cannot_reach_a_larger_maximum(tmp_path):
  """In a set of 12 bits a JPEG would be black, without a word."""
  Image.fromarray(blocks()).save(tmp_path / "x.jpg")
  text = message(lambda: decode.read_image(tmp_path / "x.jpg", max_value=4095.0))
  assert "uint8" in text and "config.data.max_value=0" in text
  assert levels_of(tmp_path / "x.jpg", max_value=0.0).dtype == np.uint8


@pytest.mark.parametrize(
  "value, said",
  [(-0.1, "-0.1"), (-300.0, "-300"), (np.nan, "NaN"), (np.inf, "NaN or inf"), (-np.inf, "inf")],
)
@pytest.mark.parametrize("suffix", ["npy", "tif"])
@pytest.mark.parametrize("max_value", [0.0, 1.0])
def test_values_that_are_no_levels_are_traced_to_their_file(
  tmp_path, value, said, suffix, max_value
):
  pixels = np.full((4, 5), 0.5 if max_value else 90, np.float32)
  pixels[1, 2] = value
  path = tmp_path / f"x.{suffix}"
  np.save(path, pixels) if suffix == "npy" else Image.fromarray(pixels).save(path)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    text = message(lambda: decode.read_image(path, max_value=max_value))
  assert str(path) in text and said in text
  if not np.isfinite(value):
    assert "1 of 20" in text


def test_sixteen_bits_of_several_channels_have_no_scale_of_their_own(tmp_path):
  """Pillow gives their high bytes: right for 16 bits, black for 12."""
  row = b"\0" + struct.pack(">HHH", 257 * 200, 0, 65535) * 2
  (tmp_path / "x.png").write_bytes(png(2 * row, color_type=2))
  for max_value in (0.0, 65535.0):
    np.testing.assert_array_equal(
      levels_of(tmp_path / "x.png", max_value=max_value)[0, 0], [200, 0, 255]
    )
  for max_value in (255.0, 4095.0):
    assert ".npy" in message(
      lambda max_value=max_value: decode.read_image(tmp_path / "x.png", max_value=max_value)
    )
  row = b"\0" + struct.pack(">HHH", 200, 0, 255) * 2  # 8 bits in 16
  (tmp_path / "x.png").write_bytes(png(2 * row, color_type=2))
  assert "0..0" in message(lambda: decode.read_image(tmp_path / "x.png"))
  np.save(tmp_path / "x.npy", np.array([[[200, 0, 255]]], np.uint16))  # the remedy
  np.testing.assert_allclose(levels_of(tmp_path / "x.npy", max_value=255.0)[0, 0], [200, 0, 255])


# Files that are none


@pytest.mark.parametrize("suffix", ["png", "jpg", "npy"])
@pytest.mark.parametrize(
  "content, parts",
  [
    (b"", ("empty file, 0 bytes",)),
    (
      b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 3\n",
      ("Git LFS pointer", "git lfs pull"),
    ),
    (b"/annex/objects/SHA256E-s31390--f50d.jpg\n", ("git-annex pointer", "git annex get")),
    (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", ("HTML page", "download it anew")),
    (b"\n<HTML><head>", ("HTML page", "download it anew")),
    (b"no image at all", ("no readable image",)),
  ],
)
def test_what_stands_in_place_of_a_picture_is_named(tmp_path, suffix, content, parts):
  path = tmp_path / f"x.{suffix}"
  path.write_bytes(content)
  for call in (
    lambda: decode.read_image(path),
    lambda: decode.read_mask(path),
    lambda: decode.read_color_mask(path),
  ):
    assert all(part in message(call) for part in (str(path), *parts))
  for header in (decode.header(path), decode.mask_header(path)):
    assert isinstance(header, decode.Unusable) and all(part in str(header) for part in parts)


def test_absent_files_and_folders_are_named(tmp_path):
  assert "No such file" in message(lambda: decode.read_image(tmp_path / "x.png"))
  assert "directory" in message(lambda: decode.read_mask(tmp_path))
  assert isinstance(decode.header(tmp_path / "x.npy"), decode.Unusable)


@pytest.mark.parametrize(
  "array",
  [
    np.zeros((2, 3), [("a", int)]),
    np.array([[{}]]),
    np.zeros((2, 3, 3), complex),
    np.zeros((2, 3), "M8[s]"),
    np.zeros((2, 3), "U3"),
    np.array(3),
    np.arange(3),
    np.zeros((2, 3, 3, 1), np.uint8),
    np.zeros((0, 3, 3), np.uint8),
    np.zeros((2, 0), np.uint8),
    np.zeros((2, 3, 0), np.uint8),
  ],
  ids=lambda array: f"{array.dtype.kind}{array.ndim}{array.size}",
)
def test_arrays_that_are_no_pictures_are_refused(tmp_path, array):
  np.save(tmp_path / "x.npy", array, allow_pickle=True)
  for call in (decode.read_image, decode.read_mask, decode.read_color_mask):
    assert "x.npy" in message(lambda: call(tmp_path / "x.npy"))
  assert isinstance(decode.header(tmp_path / "x.npy"), decode.Unusable)


@pytest.mark.parametrize(
  "shape", [(10**9, 10**9), (2**62, 4, 3), (-1, 3), (True, 2), (10**6, 10**6, 3), (2, 3.0)]
)
def test_headers_that_promise_more_than_there_is_take_no_memory(tmp_path, shape):
  header = (
    repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
  )
  (tmp_path / "x.npy").write_bytes(
    b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
  )
  assert "x.npy" in message(lambda: decode.read_image(tmp_path / "x.npy"))
  assert isinstance(decode.header(tmp_path / "x.npy"), decode.Unusable)


def test_arrays_of_any_order_of_axes_and_bytes_are_read(tmp_path):
  stored = (PICTURE * 65535).round()
  for dtype in ("<u2", ">u2", ">i4", "<f8"):
    np.save(tmp_path / "x.npy", np.asfortranarray(stored.astype(dtype)))
    np.testing.assert_allclose(
      levels_of(tmp_path / "x.npy", max_value=65535.0), PICTURE * 255, atol=0.01
    )


def test_large_images_are_read_without_a_warning_up_to_a_limit(tmp_path, monkeypatch):
  Image.new("L", (100, 50), 7).save(tmp_path / "x.png")
  # Pillow warns above it, and raises above twice as many.
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert decode.header(tmp_path / "x.png").size == (50, 100)
    assert decode.read_image(tmp_path / "x.png").shape == (50, 100, 3)
    assert decode.read_mask(tmp_path / "x.png").shape == (50, 100)
    monkeypatch.setattr(decode, "MOST_PIXELS", 4000)
    text = message(lambda: decode.read_image(tmp_path / "x.png"))
    assert "50 x 100" in text and "tiles" in text
    assert "tiles" in str(decode.header(tmp_path / "x.png"))
  assert Image.MAX_IMAGE_PIXELS == 1000  # that of other users of Pillow, back again
  with pytest.raises(Image.DecompressionBombError):
    Image.open(tmp_path / "x.png")


def test_a_small_file_that_promises_a_huge_picture_is_damaged(tmp_path):
  (tmp_path / "x.png").write_bytes(png(b"", color_type=0, side=20_000, depth=8))
  for said in (
    message(lambda: decode.read_image(tmp_path / "x.png")),
    str(decode.mask_header(tmp_path / "x.png")),
  ):
    assert "20000 x 20000 in" in said and "damaged" in said


def samples():
  """Small files of every format, with metadata."""
  color, grey = blocks(), blocks()[..., 0] // 100
  maker = exif(6)
  maker[0x010F] = "maker"
  contents = {
    "png": [encoded(color, "PNG", exif=maker), encoded(grey.astype(np.uint16), "PNG")],
    "jpg": [encoded(color, "JPEG", exif=maker)],
    "tif": [
      encoded(color, "TIFF", exif=maker),
      encoded(grey, "TIFF", compression="tiff_lzw"),
      encoded(grey / np.float32(3), "TIFF"),
    ],
    "webp": [encoded(color, "WEBP", exif=maker), encoded(color, "WEBP", lossless=True)],
    "bmp": [encoded(color, "BMP"), encoded(grey, "BMP")],
    "gif": [encoded(grey, "GIF")],
    "npy": [],
  }
  for array in (
    color,
    grey.astype(np.int64),
    PICTURE,
    np.asfortranarray(color.astype(">u2") * 256),
  ):
    content = io.BytesIO()
    np.save(content, array)
    contents["npy"].append(content.getvalue())
  return contents


def damaged(content, rng):
  content = bytearray(content)
  kind = rng.integers(5)
  place = rng.integers(min(len(content), 200))
  if kind == 0:
    for place in rng.integers(len(content), size=rng.integers(1, 6)):
      content[place] ^= 1 << rng.integers(8)
  elif kind == 1:
    del content[rng.integers(len(content)) :]
  elif kind == 2:
    content[: rng.integers(1, 64)] = rng.bytes(64)
  elif kind == 3:
    content[place : place + 8] = rng.bytes(rng.integers(1, 16))
  else:
    content[place : place + 4] = b"\xff\xff\xff\x7f" if rng.integers(2) else bytes(4)
  return bytes(content)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is odd in metadata
@pytest.mark.parametrize("suffix", samples())
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, suffix):
  rng = np.random.default_rng(1)
  originals = samples()[suffix]
  path = tmp_path / f"x.{suffix}"
  refused = 0
  for number in range(60 * len(originals)):
    path.write_bytes(damaged(originals[number % len(originals)], rng))
    for read, header in (
      (decode.read_image, decode.header(path)),
      (decode.read_mask, decode.mask_header(path)),
      (decode.read_color_mask, decode.mask_header(path)),
    ):
      assert isinstance(header, (decode.Header, decode.Unusable))
      try:
        pixels = read(path)
      except checks.InputError as error:
        assert str(path) in str(error)
        refused += 1
      else:
        assert pixels.shape[:2] == header.size
  assert refused
