"""A trained network for use: any image in, class ids out."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pseudoseg_jax import checks
from pseudoseg_jax.data import decode
from pseudoseg_jax.evaluation import inference, pictures
from pseudoseg_jax.evaluation.inference import Protocol

if TYPE_CHECKING:
  from pseudoseg_jax.data.classes import Classes

ImageLike = np.ndarray | Image.Image | str | os.PathLike


class Predictor:
  """Segments images of any size; compiles once per canvas (see `inference`).

  Args:
    predict: images f32[B, H, W, C], normalised -> logits f32[B, H, W, K].
    classes: names and colours of the K classes.
    protocol: how an image is shown to the network; of "center_crop", which leaves the rest of an image out, the whole image.
    mean, std: of C channels in [0, 1].
    name: which predictor this is, for people ("teacher").
  """

  def __init__(
    self,
    predict: Callable[[jax.Array], jax.Array],
    classes: Classes,
    *,
    protocol: Protocol,
    mean: Sequence[float],
    std: Sequence[float],
    name: str = "",
  ):
    inference.check_protocol(protocol)
    if protocol.style == "center_crop":
      protocol = protocol._replace(style="whole")
    self.classes = classes
    self.protocol = protocol
    self.channels = len(mean)
    self.name = name
    self._predict, self._mean, self._std = predict, mean, std
    infer = functools.partial(inference.infer, predict, protocol=protocol, mean=mean, std=std)

    def ids(image, size):
      return jnp.argmax(infer(image, size)[0], axis=-1).astype(jnp.uint8)

    def probabilities(image, size):
      scores, passes = infer(image, size)
      means = scores / jnp.maximum(passes, 1)
      return means if protocol.summed == "probabilities" else jax.nn.softmax(means, axis=-1)

    # Apart: few want the K planes of probabilities, which dwarf the ids.
    self._ids, self._probabilities = _jit_by_shape(ids), _jit_by_shape(probabilities)

  def with_protocol(self, protocol: Protocol) -> Predictor:
    """The same network, shown images in another way."""
    return Predictor(self._predict, self.classes, protocol=protocol, mean=self._mean, std=self._std, name=self.name)

  def predict(self, image: ImageLike) -> np.ndarray:
    """Class ids uint8[h, w] of an image: uint8 or float32 [h, w, C] of levels 0..255, a PIL image, or a file's path.

    Raises:
      InputError: no such file, no readable image, or an array of another shape or type.
    """
    return self._run(self._ids, read_image(image, self.channels))

  def probabilities(self, image: ImageLike) -> np.ndarray:
    """Class probabilities f32[h, w, K]: their mean over windows, flips and scales, or the softmax of the mean logits."""
    return self._run(self._probabilities, read_image(image, self.channels))

  def overlay(self, image: ImageLike) -> np.ndarray:
    """The image with every pixel tinted by its class, uint8[h, w, 3]."""
    pixels = read_image(image, self.channels)
    return pictures.overlay(pixels, self.predict(pixels), self.classes)

  def _run(self, compiled, pixels):
    height, width = pixels.shape[:2]
    canvas = np.zeros((1, *inference.canvas_size((height, width), self.protocol), self.channels), pixels.dtype)
    canvas[0, :height, :width] = pixels
    return np.asarray(compiled(canvas, np.asarray([[height, width]], np.int32)))[0, :height, :width]


def _jit_by_shape(fn: Callable) -> Callable:
  """jax.jit of a function with one result, with the arrays it closes over (a network's weights) as arguments.

  jax.jit alone would write them into the program as constants: some hundred megabytes to compile, anew for every image size.
  """
  compiled = {}

  def call(*args):
    shapes = tuple(arg.shape for arg in args)
    if shapes not in compiled:
      closed = jax.make_jaxpr(fn)(*args)
      compiled[shapes] = jax.jit(functools.partial(jax.core.eval_jaxpr, closed.jaxpr)), closed.consts
    run, weights = compiled[shapes]
    (result,) = run(weights, *args)
    return result

  return call


def read_image(image: ImageLike, channels: int = 3) -> np.ndarray:
  """An image as [h, w, C], uint8 or, where it has more than 8 bits, float32 on the scale 0..255; see `data.decode.read_image`.

  An EXIF orientation is not applied (ids lie on the stored pixels).

  Raises:
    InputError: with the file's path where there is one.
  """
  if isinstance(image, (str, os.PathLike)):
    return decode.read_image(image, channels)
  if isinstance(image, Image.Image) and channels == 3:
    image = image.convert("RGB")
  pixels = np.asarray(image)
  if isinstance(image, Image.Image) and pixels.ndim == 2:
    pixels = pixels[..., None]
  if pixels.dtype not in (np.uint8, np.float32) or pixels.ndim != 3 or pixels.shape[-1] != channels or not pixels.size:
    problems = checks.Problems("cannot segment the image")
    problems.add(
      "image", got=f"{pixels.dtype} of shape {pixels.shape}",
      allowed=f"uint8 [height, width, {channels}] of levels 0..255, or float32 on that scale",
      remedy="levels in 0..1 want 255 * image",
    )  # fmt: skip
    problems.raise_if_any()
  return pixels
