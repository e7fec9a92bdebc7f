import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.evaluation import evaluator, inference


def recorded_network(golden):
  """conv1x1(tanh(conv5x5(x) + sum over channels of the window's mean)): the mean makes every pixel
  of a window matter.
  """
  first, second = (jnp.asarray(golden[name]) for name in ("w5", "w1"))
  convolve = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=("NHWC", "OIHW", "NHWC")
  )

  def predict(state, images):
    mean = images.mean((1, 2), keepdims=True).sum(-1, keepdims=True)
    return convolve(
      jnp.tanh(convolve(images, first, padding=((2, 2), (2, 2))) + mean), second, padding="VALID"
    )

  return predict


class RecordedImages:
  """The recorded images are normalized floats; mean 0 and std 1/255 show them to the network as
  they are.
  """

  has_labels, channels, dtype = True, 3, np.float32

  def __init__(self, golden):
    self.ids = tuple(sorted(golden.under("image")))
    self.image = lambda row: golden[f"image{self.ids[row]}"].transpose(1, 2, 0)
    self.label = lambda row: golden[f"label{self.ids[row]}"]
    self.size = lambda row: golden[f"label{self.ids[row]}"].shape

  def __len__(self):
    return len(self.ids)


def check(golden, protocol):
  """The evaluator's predictions and scores are the recorded ones."""
  source, num_classes = RecordedImages(golden), int(golden["num_classes"])
  classes = Classes(tuple(map(str, range(num_classes))), ((0, 0, 0),) * num_classes)
  evaluate = evaluator.make_evaluator(
    {"x": recorded_network(golden)},
    source,
    classes,
    protocol=protocol,
    mean=(0, 0, 0),
    std=(1 / 255,) * 3,
    batch_size=2,
  )
  rows = range(len(source))
  for row, ids in zip(rows, evaluate.predictions(None, rows)["x"], strict=True):
    np.testing.assert_array_equal(ids, golden[f"pred{source.ids[row]}"])
  scores = evaluate(None)["x"]
  np.testing.assert_allclose(
    100 * np.nan_to_num(scores.iou), golden["iou_class"], rtol=0, atol=1e-9
  )
  np.testing.assert_allclose(100 * scores.miou, golden["miou"], rtol=0, atol=1e-9)


@pytest.mark.golden("unimatch_v1_eval", case=r"case\d+")
def test_scores_equal_unimatch(golden):
  crop = (int(golden["crop_size"]),) * 2
  if golden["mode"] == "sliding_window":
    check(golden, inference.PRESETS["unimatch_cityscapes"]._replace(window_pixels=crop))
  elif golden["mode"] == "center_crop":
    check(
      golden, inference.PRESETS["unimatch_voc"]._replace(style="center_crop", window_pixels=crop)
    )
  else:
    check(golden, inference.PRESETS["unimatch_voc"])


@pytest.mark.golden("unimatch_v2_eval", case=r"case\d+")
def test_scores_equal_unimatch_v2(golden):
  if golden["mode"] == "sliding_window":
    crop = (int(golden["crop_size"]),) * 2
    check(golden, inference.PRESETS["unimatch_v2_cityscapes"]._replace(window_pixels=crop))
  else:
    check(
      golden,
      inference.PRESETS["unimatch_v2_voc"]._replace(
        multiple_pixels=max(int(golden["multiplier"]), 1)
      ),
    )
