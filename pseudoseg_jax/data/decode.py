"""Files of pixels -> arrays: images, masks, and what their headers say."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from pseudoseg_jax import checks

STORED_VALUES = 2**16  # of masks, from 0 on
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I", "F")  # PIL's modes of more than 8 bits
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # how PIL and NumPy report bad files


def read_image(path: str | pathlib.Path, channels: int = 3) -> np.ndarray:
  """An image file as [h, w, C]: uint8, or float32 where it holds more than 8 bits.

  16-bit integers become float32 on the scale 0..255 (value / 257), not rounded; floats are taken to be on that scale. PIL gives
  only the high bytes of 16-bit RGB files: store such images as .npy.

  Args:
    path: of one of PIL's formats, or a .npy array [h, w, C] or [h, w].
    channels: C. 3: every PIL mode becomes RGB (alpha is dropped); another number: files must have as many.

  Raises:
    InputError: a file that cannot be decoded, or one of other channels.
  """

  def expanded(image: Image.Image) -> np.ndarray:
    if image.mode not in _DEEP_MODES and (channels == 3 or image.mode in ("1", "P")):
      image = image.convert("RGB" if channels == 3 else "L")
    return np.asarray(image)

  pixels = decode(pathlib.Path(path), "image", expanded)
  if pixels.ndim == 2:
    pixels = np.repeat(pixels[..., None], channels if channels == 3 else 1, axis=-1)
  problems = checks.Problems(f"cannot use image {path}")
  if pixels.ndim != 3 or pixels.shape[-1] != channels:
    got = f"{pixels.shape[-1]} channels" if pixels.ndim == 3 else f"an array of shape {pixels.shape}"
    problems.add("pixels", got=got, allowed=f"{channels} channels", remedy="set the number of channels (config.data.channels)")
  if pixels.dtype == np.uint8 or np.issubdtype(pixels.dtype, np.floating):
    problems.raise_if_any()
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)
  if not np.issubdtype(pixels.dtype, np.integer) or pixels.size and not 0 <= pixels.min() <= pixels.max() < STORED_VALUES:
    problems.add("values", got=f"{pixels.dtype}, {pixels.min()}..{pixels.max()}", allowed="8 or 16 bits, or floats on 0..255")
  problems.raise_if_any()
  return pixels.astype(np.float32) / np.float32(257)


def read_mask(path: str | pathlib.Path) -> np.ndarray:
  """The numbers that a mask file stores, [h, w] of bool or integers, whatever its palette.

  Raises:
    InputError: a file that cannot be decoded, or one of colours or fractions.
  """
  mask = decode(pathlib.Path(path), "mask", np.asarray)
  problems = checks.Problems(f"cannot use mask {path}")
  if mask.dtype.kind not in "bui":
    problems.add("pixels", got=f"values of type {mask.dtype}", allowed="integers")
  if mask.ndim != 2:
    problems.add(
      "pixels",
      got=f"{mask.shape[-1]} channels",
      allowed="one channel of class indices (grey or palette PNG)",
      remedy="masks drawn in colours need mask_colors (config.data.mask_colors=True and a file of classes with colours)",
    )
  problems.raise_if_any()
  return mask


def decode(path: pathlib.Path, what: str, convert) -> np.ndarray:
  """The pixels of a file; `convert` makes an array of a PIL image."""
  try:
    if path.suffix.lower() == ".npy":
      return np.load(path, allow_pickle=False)
    with Image.open(path) as image:
      return np.asarray(convert(image))
  except _UNREADABLE as error:
    raise_unreadable(what, path, error)


def raise_unreadable(what: str, path: pathlib.Path, error: Exception):
  problems = checks.Problems(f"cannot read {what} {path}")
  problems.add("file", got=f"{type(error).__name__}: {error}", remedy="fetch the file anew, or take its id off the list")
  problems.raise_if_any()


class Header(NamedTuple):
  size: tuple[int, int]
  dtype: type[np.generic]  # of images, see Source


def header(path: pathlib.Path) -> Header | Exception:
  try:
    if path.suffix.lower() == ".npy":
      array = np.load(path, mmap_mode="r", allow_pickle=False)
      return Header(array.shape[:2], np.uint8 if array.dtype == np.uint8 else np.float32)
    with Image.open(path) as image:
      return Header((image.height, image.width), np.float32 if image.mode in _DEEP_MODES else np.uint8)
  except _UNREADABLE as error:
    return error
