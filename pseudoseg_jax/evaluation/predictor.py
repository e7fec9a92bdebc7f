"""A trained network for use: any image in, class ids out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.data import decode
from pseudoseg_jax.data.decode import ImageLike
from pseudoseg_jax.evaluation import display, inference, pictures
from pseudoseg_jax.evaluation.display import ClassMap, Picture
from pseudoseg_jax.evaluation.inference import Protocol

if TYPE_CHECKING:
  from pseudoseg_jax.data.classes import Classes


class Predictor:
  """A network that segments images of any size.

  It compiles once per canvas (see `inference`).

  Args:
    predict: images f32[B, H, W, C], normalized -> logits f32[B, H, W, K].
    classes: names and colors of the K classes.
    protocol: how an image is shown to the network; with "center_crop", which leaves the rest of an
      image out, the whole image.
    mean, std: of C channels in [0, 1].
    name: which predictor this is, for people ("teacher").
    exif_orientation, max_value: how images are read, see `data.decode.read_any_image`.
    checkpoint, step: where the network is from, for people: "best" or "last" of a run, and its
      step.
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
      "protocol": protocol,
      "mean": mean,
      "std": std,
      "name": name,
      "exif_orientation": exif_orientation,
      "max_value": max_value,
      "checkpoint": checkpoint,
      "step": step,
    }
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
    """Returns the same network with other keywords of the constructor.

    For example, another `protocol`.
    """
    return Predictor(self._predict, self.classes, **self._options | options)

  def __repr__(self) -> str:
    return display.aligned(f"Predictor '{self.name}' of {len(self.classes)} classes", self._facts())

  def _repr_html_(self) -> str:
    return display.facts_html(f"Predictor '{self.name}'", self._facts()) + display.legend_html(
      self.classes
    )

  def _facts(self) -> dict[str, str]:
    return {
      "classes": ", ".join(self.classes.names),
      "network": f"{self.checkpoint or 'exported'}, step {self.step}",
      "images": f"{self.channels} channels, shown as {inference.describe(self.protocol)}",
      "use": "predict(image), overlay(image), probabilities(image); an image is a path, a PIL image or an array",
    }

  def predict(self, image: ImageLike) -> ClassMap:
    """Predicts the class ids uint8[h, w] of an image.

    The image is a file's path, a PIL image, or an array [h, w, C] of levels 0..255 of any type.

    The ids are an array, which a notebook shows in the classes' colors. Ids of files and PIL images
    that carry an EXIF orientation lie on the upright picture, as viewers show it; see the class.

    Raises:
      InputError: no such file, no readable image, or an array of another shape or scale.
    """
    return ClassMap(self.ids(self.read(image)), self.classes)

  def probabilities(self, image: ImageLike) -> np.ndarray:
    """Computes the class probabilities f32[h, w, K] of an image.

    They are the mean over windows, flips and scales, or the softmax of the mean logits.
    """
    return self._run(self._probabilities, self.read(image))

  def overlay(self, image: ImageLike) -> Picture:
    """Tints every pixel of the image by its class: uint8[h, w, 3].

    The result is an array, which a notebook shows as a picture.
    """
    levels = self.read(image)
    return Picture(pictures.overlay(levels, self.ids(levels), self.classes))

  def read(self, image: ImageLike) -> np.ndarray:
    """Reads the levels [h, w, C] of an image.

    They are uint8 or float32 on the scale 0..255, as `predict` shows them to the network.
    """
    return decode.read_any_image(
      image, self.channels, exif_orientation=self.exif_orientation, max_value=self.max_value
    )

  def ids(self, levels: np.ndarray) -> np.ndarray:
    """Predicts the class ids uint8[h, w] of what `read` returns."""
    return self._run(self._ids, levels)

  def _run(self, compiled, pixels):
    height, width = pixels.shape[:2]
    canvas = np.zeros(
      (1, *inference.canvas_size((height, width), self.protocol), self.channels), pixels.dtype
    )
    canvas[0, :height, :width] = pixels
    try:
      return np.asarray(compiled(canvas, np.asarray([[height, width]], np.int32)))[
        0, :height, :width
      ]
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      problems = checks.Problems("the device has too little memory for the image")
      remedy = "show it in windows (config.evaluation.style=slide, config.evaluation.window_pixels), or shrink it"
      problems.add(
        "image",
        got=f"height x width {height} x {width}, shown as {inference.describe(self.protocol)}",
        remedy=remedy,
      )
      problems.raise_if_any()


def _jit_by_form(fn: Callable) -> Callable:
  """Jits a function of one result, with the arrays in it as arguments.

  These are the arrays that it closes over (a network's weights). jax.jit alone would write them
  into the program as constants: some hundred megabytes to compile, anew for every image size.
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
