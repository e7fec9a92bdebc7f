"""Decoders of image and mask files, and of their headers, to arrays."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import struct
import threading
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pseudoseg_jax import checks
from pseudoseg_jax.data.text import LFS_POINTER

# Pictures as viewers and labeling tools show them, or the pixels as stored.
EXIF_ORIENTATIONS = ("apply", "ignore")
STORED_VALUES = 2**16  # of masks, from 0 on
MOST_PIXELS = 2**30  # of a file: 3 GiB of RGB
# a file that promises more from less is damaged; PNG comes to 8256.
_MOST_PIXELS_A_BYTE, _SUSPICIOUS_PIXELS = 10_000, 2**26

_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I", "F")  # PIL's modes of more than 8 bits
_ORIENTATION_TAG = 0x0112
_ROUNDING = 1e-4  # of full brightness, by which floats may leave their range
# of floats; 8, 10, 12 bits; reflectances; 14, 16 bits.
_USUAL_MAXIMA = (1, 255, 1023, 4095, 10000, 16383, 65535)
_LOSSY_FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "AVIF": "AVIF", "HEIF": "HEIF"}  # by PIL's names
_JPEG_COMPRESSIONS, _WEBP_COMPRESSION = (6, 7, 34892), 50001  # of TIFF
_STAND_INS = (  # for files: how they begin, what they are, what to do
  (
    LFS_POINTER,
    "a Git LFS pointer in place of the file",
    "run `git lfs pull` in the data's folder",
  ),
  (
    b"/annex/objects/",
    "a git-annex pointer in place of the file",
    "run `git annex get .` in the data's folder",
  ),
  (
    b"<!doctype html",
    "an HTML page in place of the file",
    "download it anew: the server sent a page, maybe of a login",
  ),
  (
    b"<html",
    "an HTML page in place of the file",
    "download it anew: the server sent a page, maybe of a login",
  ),
)


class Unusable(Exception):
  """A file that cannot be decoded or used.

  problem: why, in the keywords of `checks.Problems.add`.
  """

  def __init__(
    self, got: str, *, allowed: str | None = None, remedy: str = "fetch it anew, or leave it out"
  ):
    self.problem = {"got": got, "allowed": allowed, "remedy": remedy}
    super().__init__("; ".join(filter(None, (got, allowed and f"allowed: {allowed}", remedy))))


class Header(NamedTuple):
  """What a file's header declares.

  size: (h, w) of the array that is read. dtype: of an image. orientation: 1..8, the file's own,
  applied or not.
  """

  size: tuple[int, int]
  dtype: type[np.generic]
  orientation: int = 1


def read_image(
  path: str | os.PathLike,
  channels: int = 3,
  *,
  exif_orientation: str = "apply",
  max_value: float = 0.0,
) -> np.ndarray:
  """Reads an image file as [h, w, C] of levels 0..255.

  The result is uint8, or float32 where the file holds more than 8 bits or `max_value` is another.
  PIL gives only the high bytes of 16-bit RGB files: store such images as .npy.

  Args:
    path: of one of PIL's formats, or a .npy array [h, w, C] or [h, w].
    channels: C. 3: every PIL mode becomes RGB (alpha is dropped); another number: files must have
      as many.
    exif_orientation: "apply" turns a picture as viewers and labeling tools do, "ignore" leaves its
      pixels as they are stored.
    max_value: the stored value that becomes 255; 0 = not given: 255 of 8 bits and of floats, 65535
      of other integers.

  Raises:
    InputError: a file that cannot be decoded; another number of channels; values that are negative,
      not finite or above max_value; where max_value is not given, values so small that the picture
      would be black.
  """
  path = pathlib.Path(path)
  pixels = _read(
    "image", path, lambda image: _channels_of(image, channels, max_value), exif_orientation
  )
  problems = checks.Problems(f"cannot use image {path}")
  levels = to_levels(pixels, channels, max_value, problems)
  problems.raise_if_any()
  return levels


def read_picture(
  image: Image.Image, channels: int = 3, *, exif_orientation: str = "apply", max_value: float = 0.0
) -> np.ndarray:
  """Reads an image that PIL has opened, as `read_image` does."""
  checks.check_name("exif_orientation", exif_orientation, EXIF_ORIENTATIONS)
  problems = checks.Problems("cannot use the image")
  try:
    pixels = _upright(
      image, lambda image: _channels_of(image, channels, max_value), exif_orientation
    )
  except Exception as error:  # as in `_read`
    problems.add("image", **explained(error).problem)
    problems.raise_if_any()
  levels = to_levels(pixels, channels, max_value, problems)
  problems.raise_if_any()
  return levels


ImageLike = np.ndarray | Image.Image | str | os.PathLike


def read_any_image(
  image: ImageLike, channels: int = 3, *, exif_orientation: str = "apply", max_value: float = 0.0
) -> np.ndarray:
  """Reads an image from a path, a PIL image or an array.

  Uses `read_image` for a path, `read_picture` for a PIL image, and `read_array` for anything that
  NumPy takes for an array.
  """
  if isinstance(image, (str, os.PathLike)):
    return read_image(image, channels, exif_orientation=exif_orientation, max_value=max_value)
  if isinstance(image, Image.Image):
    return read_picture(image, channels, exif_orientation=exif_orientation, max_value=max_value)
  return read_array(image, channels, max_value=max_value)


def read_array(image: np.ndarray, channels: int = 3, *, max_value: float = 0.0) -> np.ndarray:
  """Reads an image in memory as [h, w, C] of levels 0..255.

  The result is uint8, or float32 where its numbers are no such integers.

  Args:
    image: [h, w, C], [h, w, 1] or [h, w] of any integers or floats (NumPy's, JAX's, PyTorch's on
      the CPU), or of bool: black and white.
    channels: C; of 3, one channel is shown as gray.
    max_value: the value of full brightness; 0 = 255, whatever the type: an array's type gives
      little evidence of its range.

  Raises:
    InputError: another shape or type; values that are not on that scale, or so small that the
      picture would be black.
  """
  problems = checks.Problems("cannot use the image")
  pixels = np.asarray(image)
  if pixels.dtype.name == "bfloat16":  # JAX's, which NumPy does not know
    pixels = pixels.astype(np.float32)
  if pixels.ndim == 2:
    pixels = pixels[..., None]
  is_grey = channels == 3 and pixels.shape[-1:] == (1,)
  shaped = pixels.ndim == 3 and pixels.size and (is_grey or pixels.shape[-1] == channels)
  if pixels.dtype.kind not in "buif" or not shaped:
    if shaped or pixels.ndim != 3:
      remedy = None
    elif pixels.shape[0] in (1, channels):
      remedy = "channels come last: np.moveaxis(image, 0, -1)"
    else:
      remedy = (
        f"image[..., :{channels}] leaves out the others, such as alpha"
        if pixels.shape[-1] > channels
        else None
      )
    allowed = f"[height, width, {channels}] of numbers"
    problems.add(
      "image", got=f"{pixels.dtype} of shape {np.shape(image)}", allowed=allowed, remedy=remedy
    )
    problems.raise_if_any()
  if pixels.dtype == bool:
    levels = np.where(pixels, np.uint8(255), np.uint8(0))
  elif pixels.dtype == np.uint8 and max_value in (0, 255):
    levels = pixels
  else:
    full = max_value or 255
    flaw, found = scale_flaw(pixels, full)
    # Integers on 0..1 are a dark picture, or a mask.
    if flaw and not (flaw == "black" and (max_value or pixels.dtype.kind in "ui")):
      problems.add(
        "image",
        got=found,
        allowed=f"levels 0..{full:g}",
        remedy=_array_remedy(flaw, pixels, max_value),
      )
      problems.raise_if_any()
    if pixels.dtype.kind in "ui" and full == 255:
      levels = pixels.astype(np.uint8)
    else:
      wide = np.float64 if pixels.dtype.itemsize > 4 else np.float32
      levels = (pixels.astype(wide) / wide(full / 255)).astype(np.float32)
  return np.repeat(levels, 3, axis=-1) if is_grey else levels


def _array_remedy(flaw: str, pixels: np.ndarray, max_value: float) -> str:
  if flaw == "not finite":
    return "put a level in their place, such as 0"
  if flaw == "negative":
    return "undo the normalization: the network has its own"
  scaled = f"max_value={_next_maximum(float(pixels.max())):g}" + (
    ", one for all images" if max_value else ""
  )
  if flaw == "above":
    return f"say what full brightness is, e.g. {scaled}; or give levels, 255 * image / {_next_maximum(float(pixels.max())):g}"
  return "levels in 0..1 want 255 * image, or max_value=1; a picture as dark as that, np.rint(image).astype(np.uint8)"


def read_mask(path: str | os.PathLike, *, exif_orientation: str = "apply") -> np.ndarray:
  """Reads the numbers that a mask file stores, whatever its palette.

  [h, w] of bool or integers. A gray mask with alpha gives its gray; alpha must be opaque.

  Raises:
    InputError: a file that cannot be decoded, one of a lossy format, or one of colors or fractions.
  """
  path = pathlib.Path(path)
  mask = _read("mask", path, numbers_of, exif_orientation)
  mask = mask[..., 0] if mask.shape[2:] == (1,) else mask
  if mask.ndim != 2:
    problems = checks.Problems(f"cannot use mask {path}")
    colors = "masks drawn in colors need mask_colors (config.data.mask_colors=True and a file of classes with colors)"
    equal = mask.shape[-1] == 3 and (mask == mask[..., :1]).all()
    problems.add(
      "pixels",
      got=f"{mask.shape[-1]} channels",
      allowed="one channel of class indices (grey or palette PNG)",
      remedy=f"the channels are equal, store one of them; {colors}" if equal else colors,
    )
    problems.raise_if_any()
  return mask


def read_color_mask(path: str | os.PathLike, *, exif_orientation: str = "apply") -> np.ndarray:
  """Reads the colors of a mask file, uint8 [h, w, 3]; alpha is dropped.

  Raises:
    InputError: a file that cannot be decoded, one of a lossy format, or a .npy array of another
      form.
  """
  path = pathlib.Path(path)
  mask = _read("mask", path, lambda image: np.asarray(image.convert("RGB")), exif_orientation)
  if (
    mask.ndim != 3
    or mask.shape[-1] != 3
    or mask.dtype.kind not in "ui"
    or not 0 <= mask.min() <= mask.max() <= 255
  ):
    problems = checks.Problems(f"cannot use mask {path}")
    problems.add(
      "pixels",
      got=f"{mask.dtype} of shape {mask.shape}",
      allowed="colors, integers 0..255 [h, w, 3]",
    )
    problems.raise_if_any()
  return mask.astype(np.uint8, copy=False)


def header(
  path: str | os.PathLike,
  *,
  exif_orientation: str = "apply",
  max_value: float = 0.0,
  is_mask: bool = False,
) -> Header | Unusable:
  """Predicts what `read_image` will return for a file, or why it will fail.

  No pixel is decoded.
  """
  path = pathlib.Path(path)
  try:
    with _opened(path) as opened:
      if is_mask:
        _check_mask(opened)
      is_picture = isinstance(opened, Image.Image)
      size, orientation = (
        _size_and_orientation(opened, exif_orientation) if is_picture else (opened.shape[:2], 1)
      )
      has_8_bits = opened.mode not in _DEEP_MODES if is_picture else opened.dtype == np.uint8
  except Exception as error:  # as in `_read`
    return explained(error, path)
  return Header(size, np.uint8 if has_8_bits and max_value in (0, 255) else np.float32, orientation)


def mask_header(path: str | os.PathLike, *, exif_orientation: str = "apply") -> Header | Unusable:
  """Predicts what `read_mask` will return for a file, or why it will fail.

  The reasons include a lossy format.
  """
  return header(path, exif_orientation=exif_orientation, is_mask=True)


def check_options(exif_orientation: str, max_value: float, where: str = "") -> None:
  """Raises InputError for invalid options of `read_image`.

  Args:
    where: their group, "config.data.".
  """
  checks.check_name(f"{where}exif_orientation", exif_orientation, EXIF_ORIENTATIONS)
  if not 0 <= max_value < math.inf:
    problems = checks.Problems("unknown scale of images")
    allowed = "the stored value of full brightness, above 0; or 0, by the type of a file"
    problems.add(f"{where}max_value", got=max_value, allowed=allowed)
    problems.raise_if_any()


def raise_unreadable(what: str, path: pathlib.Path, error: Unusable):
  problems = checks.Problems(f"cannot read {what} {path}")
  problems.add("file", **error.problem)
  problems.raise_if_any()


# Values


def to_levels(
  pixels: np.ndarray, channels: int, max_value: float, problems: checks.Problems
) -> np.ndarray:
  """Converts stored values to [h, w, C] of levels 0..255, uint8 or float32.

  Stored values are [h, w, C] or [h, w]. What prevents the conversion is added to problems.
  """
  pixels = pixels[..., None] if pixels.ndim == 2 else pixels
  is_grey = pixels.shape[-1] == 1 and channels == 3
  if not is_grey and pixels.shape[-1] != channels:
    got, allowed = f"{pixels.shape[-1]} channels", f"{channels} channels"
    problems.add(
      "pixels", got=got, allowed=allowed, remedy="set the number of channels (config.data.channels)"
    )
  if pixels.dtype.kind not in "uif":
    problems.add(
      "values",
      got=f"type {pixels.dtype}",
      allowed="8 or 16 bits, or floats",
      remedy="store levels as numbers",
    )
  is_stored_as_levels = pixels.dtype == np.uint8 and max_value in (0, 255)
  if not (problems.items or is_stored_as_levels):
    _check_scale(pixels, max_value, problems)
  if problems.items:
    return pixels
  if not is_stored_as_levels:
    wide = np.float64 if pixels.dtype.itemsize > 4 else np.float32
    pixels = (
      pixels.astype(wide) / wide((max_value or _assumed_maximum(pixels.dtype)) / 255)
    ).astype(np.float32)
  return np.repeat(pixels, 3, axis=-1) if is_grey else pixels


def _assumed_maximum(dtype: np.dtype) -> int:
  return 255 if dtype == np.uint8 or dtype.kind == "f" else STORED_VALUES - 1


def _check_scale(pixels: np.ndarray, max_value: float, problems: checks.Problems) -> None:
  full = max_value or _assumed_maximum(pixels.dtype)
  allowed = f"0..{full:g}"
  flaw, found = scale_flaw(pixels, full)
  if pixels.dtype == np.uint8:
    if full > 255 or flaw == "above":
      remedy = "store all images alike, or config.data.max_value=0, which takes every file at the full range of its type"
      problems.add(
        "values",
        got=found,
        allowed=f"files whose full brightness is {full:g}, as was said",
        remedy=remedy,
      )
    return
  if flaw == "not finite":
    remedy = "store a level where nothing was measured, such as 0, or leave the image out"
    problems.add("values", got=found, allowed="finite numbers", remedy=remedy)
  elif flaw == "negative":
    remedy = "store levels from 0 on (if they were normalized, undo that)"
    problems.add("values", got=found, allowed=allowed, remedy=remedy)
  elif flaw == "above":
    allowed = allowed if max_value else "8 or 16 bits, or floats on 0..255"
    remedy = f"say which stored value is full brightness, e.g. config.data.max_value={_next_maximum(pixels.max(), farthest=2):g}"
    remedy += "; it is one for all images" if max_value else ""
    problems.add("values", got=found, allowed=allowed, remedy=remedy)
  elif flaw == "black" and not max_value:
    remedy = f"say which stored value is full brightness: config.data.max_value={_next_maximum(pixels.max()):g}, "
    remedy += f"or config.data.max_value={full:g} if the picture is as dark as that"
    problems.add(
      "values", got=found, allowed=f"{allowed}, of which that is all but black", remedy=remedy
    )


def scale_flaw(pixels: np.ndarray, full: float) -> tuple[str, str]:
  """Returns what shows that numbers are not on the scale 0..full.

  The first text is "" if nothing shows it; the second describes the numbers in words. The first is
  one of "not finite", "negative", "above", or "black": nothing reaches more than the 255th part of
  full brightness, as when 0..1 is taken for 0..255, or 8 bits for 16; all 0 is no flaw. Floats may
  be off by rounding.
  """
  lowest, highest = float(pixels.min()), float(pixels.max())
  if not (math.isfinite(lowest) and math.isfinite(highest)):
    return (
      "not finite",
      f"NaN or infinite values, {np.count_nonzero(~np.isfinite(pixels))} of {pixels.size}",
    )
  rounding = _ROUNDING * full if pixels.dtype.kind == "f" else 0
  found = f"{pixels.dtype}, {lowest:g}..{highest:g}"
  if lowest < -rounding:
    return "negative", found
  if highest > full + rounding:
    return "above", found
  return "black" if 0 < highest <= full / 255 + rounding else "", found


def _next_maximum(highest: float, farthest: float = math.inf) -> float:
  """Returns a full brightness that holds a value.

  It is a usual one up to `farthest` times as high, or the value, rounded up to three digits.
  """
  highest = float(highest)
  for usual in _USUAL_MAXIMA:
    if highest <= usual * (1 + _ROUNDING):
      if usual > farthest * highest:
        break
      return usual
  step = 10.0 ** (math.floor(math.log10(highest)) - 2)
  return math.ceil(highest / step) * step


# Files


def _read(
  what: str, path: pathlib.Path, convert: Callable[[Image.Image], np.ndarray], exif_orientation: str
) -> np.ndarray:
  """Reads a file by `convert` on its PIL image, upright if asked for.

  A .npy file gives the array that it holds.
  """
  checks.check_name("exif_orientation", exif_orientation, EXIF_ORIENTATIONS)
  try:
    with _opened(path) as opened:
      if what == "mask":
        _check_mask(opened)
      if isinstance(opened, _Array):
        return opened.read()
      return _upright(opened, convert, exif_orientation)
  # Decoders raise everything at damaged files: KeyError, struct.error, zlib.error, ...
  except Exception as error:
    raise_unreadable(what, path, explained(error, path))


@contextlib.contextmanager
def _opened(path: pathlib.Path):
  """Opens a file as PIL's image or as _Array; no pixel is read yet."""
  with open(path, "rb") as file:
    if path.suffix.lower() == ".npy":
      array = _Array(file)
      _check_size(array.shape[:2], file)
      yield array
    else:
      with opened_picture(file) as image:
        yield image


@contextlib.contextmanager
def opened_picture(file: BinaryIO):
  """Opens a file's content as PIL's image, not decoded yet.

  The image may be larger than Pillow's limit. Unusable for one that is too large.
  """
  with _pillow_unlimited(), Image.open(file) as image:
    _check_size((image.height, image.width), file)
    yield image


def _check_size(size: tuple[int, int], file: BinaryIO) -> None:
  pixels, place = math.prod(size), file.tell()
  num_bytes = file.seek(0, os.SEEK_END)
  file.seek(place)
  got = f"height x width {size[0]} x {size[1]}"
  if pixels > max(_SUSPICIOUS_PIXELS, _MOST_PIXELS_A_BYTE * num_bytes):
    raise Unusable(f"{got} in {num_bytes} bytes: the file is damaged")
  if pixels > MOST_PIXELS:
    got, allowed = (
      f"{got}, {pixels / 1e6:.0f} megapixels",
      f"up to {MOST_PIXELS / 1e6:.0f} megapixels",
    )
    raise Unusable(got, allowed=allowed, remedy="cut it into tiles, or shrink it")


_pillow_lock = threading.Lock()
_pillow = {"readers": 0, "limit": None}


@contextlib.contextmanager
def _pillow_unlimited():
  """Lifts Pillow's limit on pixels, above which it warns.

  The files of a data set are no attack, and have a limit of this module's own. Pillow's limit is
  one of the whole process, which may have other uses of Pillow: it is there again when no file is
  being read.
  """
  with _pillow_lock:
    if not _pillow["readers"]:
      _pillow["limit"], Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    _pillow["readers"] += 1
  try:
    yield
  finally:
    with _pillow_lock:
      _pillow["readers"] -= 1
      if not _pillow["readers"]:
        Image.MAX_IMAGE_PIXELS = _pillow["limit"]


class _Array:
  """A .npy file of numbers [h, w] or [h, w, C], complete by its header.

  It holds what its header declares, and never pickled objects.
  """

  def __init__(self, file: BinaryIO):
    version = np.lib.format.read_magic(file)
    read_header = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
    )
    self.shape, _, self.dtype = read_header(file)
    self._file = file
    sides = [type(side) is int and side > 0 for side in self.shape]
    if self.dtype.kind not in "buif" or len(sides) not in (2, 3) or not all(sides):
      got = f"an array of {self.dtype}, shape {self.shape}"
      raise Unusable(
        got, allowed="numbers [h, w] or [h, w, C]", remedy="store it so, or leave it out"
      )
    wanted, there = (
      math.prod(self.shape) * self.dtype.itemsize,
      os.fstat(file.fileno()).st_size - file.tell(),
    )
    if wanted > there:
      raise Unusable(f"{there} bytes of pixels where its header says {wanted}: the file is cut off")

  def read(self) -> np.ndarray:
    self._file.seek(0)
    return np.lib.format.read_array(self._file, allow_pickle=False)


def explained(error: Exception, path: pathlib.Path | None = None) -> Unusable:
  """Explains what is wrong with a file at which a decoder raised an error."""
  if isinstance(error, Unusable):
    return error
  beginning = b""
  if path is not None and not isinstance(
    error, (FileNotFoundError, IsADirectoryError, PermissionError)
  ):
    with contextlib.suppress(OSError), open(path, "rb") as file:
      beginning = file.read(200)
      if not beginning:
        return Unusable("an empty file, 0 bytes")
  for start, got, remedy in _STAND_INS:
    if beginning.lstrip().lower().startswith(start):
      return Unusable(got, remedy=remedy)
  if isinstance(error, UnidentifiedImageError):
    return Unusable("no readable image: of none of the formats known")
  reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
  return Unusable(f"no readable image ({reason})")


# Pictures


def _channels_of(image: Image.Image, channels: int, max_value: float) -> np.ndarray:
  is_halved = _high_bytes_only(image)
  if image.mode not in _DEEP_MODES and (channels == 3 or image.mode in ("1", "P")):
    image = image.convert("RGB" if channels == 3 else "L")
  pixels = np.asarray(image)
  if not is_halved:
    return pixels
  # All but black, as 8 bits stored in 16 are.
  if max_value not in (0, STORED_VALUES - 1) or pixels.max() <= 1:
    got = f"16 bits in several channels, of which Pillow gives the high bytes, {pixels.min()}..{pixels.max()}"
    raise Unusable(
      got, allowed="images of the full range, 0..65535", remedy="store such images as .npy"
    )
  return pixels.astype(np.uint16) * 257 if max_value else pixels


def numbers_of(image: Image.Image) -> np.ndarray:
  """Returns the numbers of a mask, [h, w]; [h, w, C] of one in colors.

  Unusable where they cannot be had.
  """
  is_halved = _high_bytes_only(image)
  numbers = np.asarray(image)
  if image.mode not in ("LA", "PA", "RGBA") or not (numbers[..., :-1] == numbers[..., :1]).all():
    return numbers
  if is_halved:
    remedy = "save the masks without the alpha channel, as grey PNG"
    raise Unusable(
      "16 bits and an alpha channel, of which Pillow gives the high bytes", remedy=remedy
    )
  if not (numbers[..., -1] == 255).all():
    raise Unusable(
      "an alpha channel that is not opaque everywhere",
      allowed="one channel of class indices (grey or palette PNG)",
      remedy="save the masks without the alpha channel, with the value of config.data.ignore_index where nothing is labeled",
    )
  return numbers[..., 0]


def _high_bytes_only(image: Image.Image) -> bool:
  """Tells whether PIL gives only the high bytes of an image.

  PIL gives 8 bits of it; the file, which is not decoded yet, has more.
  """
  arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
  stored = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
  return image.mode not in _DEEP_MODES and ";16" in str(stored)


def _upright(
  image: Image.Image, convert: Callable[[Image.Image], np.ndarray], exif_orientation: str
) -> np.ndarray:
  # Of TIFF files Pillow applies an orientation while it decodes; newer ones then take it off, and
  # know it from XMP too.
  is_tiff = image.format == "TIFF"
  stated = _orientation(image) if is_tiff else 1
  is_applied = is_tiff and _ORIENTATION_TAG in image.tag_v2
  pixels = convert(image)
  left = 1 if is_applied else _orientation(image)
  if exif_orientation == "apply":
    return _turned(pixels, left)
  applied = stated if left == 1 else 1
  return _turned(pixels, {6: 8, 8: 6}.get(applied, applied))  # the others undo themselves


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Turns stored pixels [h, w, ...] as their EXIF orientation, 1..8, requires.

  The result is as they are to be shown.
  """
  turn = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
  }[orientation]
  return np.ascontiguousarray(turn(pixels))


def _orientation(image: Image.Image) -> int:
  """Returns the EXIF (or TIFF, or XMP) orientation of an image, 1..8.

  1 where it has none that can be read.
  """
  getexif = Image.Image.getexif  # the method of PNG would decode the image
  try:
    value = getexif(image).get(_ORIENTATION_TAG)
  # PIL raises everything at malformed EXIF, which is no reason to refuse a good picture.
  except Exception:
    return 1
  return int(value) if value in range(1, 9) else 1


def _size_and_orientation(image: Image.Image, exif_orientation: str) -> tuple[tuple[int, int], int]:
  if image.format == "PNG" and _has_late_metadata(image.fp):
    image.load()
  orientation = _orientation(image)
  height, width = image.height, image.width
  if image.format == "TIFF":  # PIL's size may have the orientation applied
    width, height = image.tag_v2[256], image.tag_v2[257]
  is_turned = exif_orientation == "apply" and orientation >= 5
  return (width, height) if is_turned else (height, width), orientation


def _has_late_metadata(file: BinaryIO, tail: int = 2**16) -> bool:
  """Tells whether a PNG file may have an orientation behind its pixels.

  Some tools write it there.
  """
  place = file.tell()
  file.seek(max(0, file.seek(0, os.SEEK_END) - tail))
  end = file.read()
  file.seek(place)
  return any(chunk in end for chunk in (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif"))


def _check_mask(opened: Image.Image | _Array) -> None:
  """Raises Unusable for files without class indices and without colors.

  Their values do not matter.
  """
  is_picture = isinstance(opened, Image.Image)
  if opened.mode == "F" if is_picture else opened.dtype.kind == "f":
    raise Unusable("floats", allowed="integers", remedy="store class indices, as integers")
  if is_picture:
    check_lossless(opened)


def check_lossless(image: Image.Image) -> None:
  """Raises Unusable for a mask of a lossy format."""
  lossy = _lossy_format(image)
  if lossy:
    raise Unusable(
      f"{lossy}, a lossy format",
      allowed="PNG, BMP, GIF, .npy, or lossless TIFF and WebP",
      remedy="it changes the numbers, so that about a tenth of the pixels get another class: export the masks as PNG from the "
      "labeling tool; converting these files does not bring the classes back",
    )


def _lossy_format(image: Image.Image) -> str:
  """Returns the name of the lossy format of a file that PIL has opened.

  Such a format has changed the values of the file; "" if none has.
  """
  if image.format in _LOSSY_FORMATS:
    return _LOSSY_FORMATS[image.format]
  place = image.fp.tell()
  try:
    if image.format == "WEBP" and _is_lossy_webp(image.fp, 0):
      return "lossy WebP"
    if image.format == "JPEG2000" and _is_lossy_jpeg_2000(image.fp):
      return "JPEG 2000 of the irreversible wavelet"
    if image.format == "TIFF":
      compression = image.tag_v2.get(259)
      if compression in _JPEG_COMPRESSIONS:
        return "TIFF with JPEG compression"
      starts = image.tag_v2.get(273) or image.tag_v2.get(324)  # of strips or tiles
      if compression == _WEBP_COMPRESSION and _is_lossy_webp(image.fp, starts[0]):
        return "TIFF with lossy WebP compression"
  finally:
    image.fp.seek(place)
  return ""


def _is_lossy_webp(file: BinaryIO, start: int) -> bool:
  """Tells whether the first picture of a WebP container is lossy.

  A lossy one is coded in VP8, rather than in the lossless VP8L.
  """
  file.seek(start + 12)  # "RIFF", size, "WEBP"
  while len(chunk := file.read(8)) == 8:
    name, size = struct.unpack("<4sI", chunk)
    if name in (b"VP8 ", b"VP8L"):
      return name == b"VP8 "
    # a frame has a head of its own, then chunks.
    file.seek(16 if name == b"ANMF" else size + size % 2, os.SEEK_CUR)
  return False


def _is_lossy_jpeg_2000(file: BinaryIO) -> bool:
  """Tells whether a JPEG 2000 file is lossy.

  A lossy one uses the irreversible 9-7 wavelet, by the default coding style in its main header.
  """
  file.seek(0)
  if file.read(2) != b"\xff\x4f":  # boxes, of which one holds the codestream
    file.seek(0)
    while len(box := file.read(8)) == 8:
      size, name = struct.unpack(">I4s", box)
      size = struct.unpack(">Q", file.read(8))[0] - 8 if size == 1 else size
      if name == b"jp2c":
        file.seek(2, os.SEEK_CUR)
        break
      if size < 8:
        return False
      file.seek(size - 8, os.SEEK_CUR)
  while len(segment := file.read(4)) == 4:
    marker, size = struct.unpack(">HH", segment)
    # COD: style, progression, layers (2), color transform, levels, code block (3), wavelet.
    if marker == 0xFF52:
      return file.read(10)[9:] == b"\x00"
    file.seek(size - 2, os.SEEK_CUR)
  return False
