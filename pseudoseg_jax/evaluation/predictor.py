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

_SCALE_REMEDIES = {
  "not finite": "put a level in their place, such as 0",
  "negative": "undo the normalization: the predictor has its own",
  "above": "give 255 * image / m, where m is the value of full brightness",
  "black": "levels in 0..1 want 255 * image; a picture as dark as that, np.rint(image).astype(np.uint8)",
}  # by decode.scale_flaw

ImageLike = np.ndarray | Image.Image | str | os.PathLike


class Predictor:
  """Segments images of any size; compiles once per canvas (see `inference`).

  Args:
    predict: images f32[B, H, W, C], normalised -> logits f32[B, H, W, K].
    classes: names and colours of the K classes.
    protocol: how an image is shown to the network; of "center_crop", which leaves the rest of an image out, the whole image.
    mean, std: of C channels in [0, 1].
    name: which predictor this is, for people ("teacher").
    exif_orientation, max_value: how files and PIL images are read, see `data.decode.read_image`.
    checkpoint, step: where the network is from, for people: "best" or "last" of a run, and its step.
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
    exif_orientation: str = "apply",
    max_value: float = 0.0,
    checkpoint: str = "",
    step: int = 0,
  ):
    inference.check_protocol(protocol)
    decode.check_options(exif_orientation, max_value)
    self._options = {
      "protocol": protocol, "mean": mean, "std": std, "name": name,
      "exif_orientation": exif_orientation, "max_value": max_value, "checkpoint": checkpoint, "step": step,
    }  # fmt: skip
    if protocol.style == "center_crop":
      protocol = protocol._replace(style="whole")
    self.classes = classes
    self.protocol = protocol
    self.channels = len(mean)
    self.name = name
    self.exif_orientation, self.max_value = exif_orientation, max_value
    self.checkpoint, self.step = checkpoint, step
    self._predict = predict
    infer = functools.partial(inference.infer, predict, protocol=protocol, mean=mean, std=std)

    def ids(image, size):
      return jnp.argmax(infer(image, size)[0], axis=-1).astype(jnp.uint8)

    def probabilities(image, size):
      scores, passes = infer(image, size)
      means = scores / jnp.maximum(passes, 1)
      return means if protocol.summed == "probabilities" else jax.nn.softmax(means, axis=-1)

    # Apart: few want the K planes of probabilities, which dwarf the ids.
    self._ids, self._probabilities = _jit_by_form(ids), _jit_by_form(probabilities)

  def with_options(self, **options) -> Predictor:
    """The same network with other keywords of the constructor, such as another `protocol`."""
    return Predictor(self._predict, self.classes, **self._options | options)

  def predict(self, image: ImageLike) -> np.ndarray:
    """Class ids uint8[h, w] of an image: uint8 or float32 [h, w, C] of levels 0..255, a PIL image, or a file's path.

    Ids of files and PIL images that carry an EXIF orientation lie on the upright picture, as viewers show it; see the class.

    Raises:
      InputError: no such file, no readable image, or an array of another shape, type or scale.
    """
    return self.ids(self.read(image))

  def probabilities(self, image: ImageLike) -> np.ndarray:
    """Class probabilities f32[h, w, K]: their mean over windows, flips and scales, or the softmax of the mean logits."""
    return self._run(self._probabilities, self.read(image))

  def overlay(self, image: ImageLike) -> np.ndarray:
    """The image with every pixel tinted by its class, uint8[h, w, 3]."""
    levels = self.read(image)
    return pictures.overlay(levels, self.ids(levels), self.classes)

  def read(self, image: ImageLike) -> np.ndarray:
    """The levels [h, w, C] of an image, uint8 or float32 on the scale 0..255, as `predict` shows them to the network."""
    return read_image(image, self.channels, exif_orientation=self.exif_orientation, max_value=self.max_value)

  def ids(self, levels: np.ndarray) -> np.ndarray:
    """Class ids uint8[h, w] of what `read` gives."""
    return self._run(self._ids, levels)

  def _run(self, compiled, pixels):
    height, width = pixels.shape[:2]
    canvas = np.zeros((1, *inference.canvas_size((height, width), self.protocol), self.channels), pixels.dtype)
    canvas[0, :height, :width] = pixels
    try:
      return np.asarray(compiled(canvas, np.asarray([[height, width]], np.int32)))[0, :height, :width]
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      problems = checks.Problems("the device has too little memory for the image")
      remedy = "show it in windows (config.evaluation.style=slide, config.evaluation.window_pixels), or shrink it"
      problems.add("image", got=f"height x width {height} x {width}, shown as {inference.describe(self.protocol)}", remedy=remedy)
      problems.raise_if_any()


def _jit_by_form(fn: Callable) -> Callable:
  """jax.jit of a function with one result, with the arrays it closes over (a network's weights) as arguments.

  jax.jit alone would write them into the program as constants: some hundred megabytes to compile, anew for every image size.
  """
  compiled = {}

  def call(*args):
    forms = tuple((arg.shape, arg.dtype) for arg in args)
    if forms not in compiled:
      closed = jax.make_jaxpr(fn)(*args)
      compiled[forms] = jax.jit(functools.partial(jax.core.eval_jaxpr, closed.jaxpr)), closed.consts
    run, weights = compiled[forms]
    (result,) = run(weights, *args)
    return result

  return call


def read_image(
  image: ImageLike, channels: int = 3, *, exif_orientation: str = "apply", max_value: float = 0.0
) -> np.ndarray:
  """An image as [h, w, C], uint8 or, where it has more than 8 bits, float32 on the scale 0..255.

  Args:
    image: see `Predictor.predict`; arrays are levels already.
    channels, exif_orientation, max_value: of files and PIL images, see `data.decode.read_image`.

  Raises:
    InputError: with the file's path where there is one.
  """
  if isinstance(image, (str, os.PathLike)):
    return decode.read_image(image, channels, exif_orientation=exif_orientation, max_value=max_value)
  if isinstance(image, Image.Image):
    return decode.read_picture(image, channels, exif_orientation=exif_orientation, max_value=max_value)
  levels = np.asarray(image)
  problems = checks.Problems("cannot segment the image")
  if levels.dtype not in (np.uint8, np.float32) or levels.ndim != 3 or levels.shape[-1] != channels or not levels.size:
    problems.add(
      "image", got=f"{levels.dtype} of shape {levels.shape}",
      allowed=f"uint8 [height, width, {channels}] of levels 0..255, or float32 on that scale",
      remedy="levels in 0..1 want 255 * image",
    )  # fmt: skip
  elif levels.dtype == np.float32:
    flaw, found = decode.scale_flaw(levels, 255)
    if flaw:
      problems.add("image", got=found, allowed="float32 of levels 0..255", remedy=_SCALE_REMEDIES[flaw])
  problems.raise_if_any()
  return levels
