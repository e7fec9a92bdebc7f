import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# The reference's own constants, not recorded in the file.
from pseudoseg_jax.data.photometry import IMAGENET_MEAN, IMAGENET_STD
from pseudoseg_jax.evaluation import inference


def recorded_network(golden):
  """conv1x1(tanh(conv5x5(x) + sum over channels of the window's mean)): the mean makes every pixel
  of a window matter.
  """
  first, second = (jnp.asarray(golden[name]) for name in ("conv5x5_w", "conv1x1_w"))
  convolve = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=("NHWC", "OIHW", "NHWC")
  )

  def predict(images):
    mean = images.mean((1, 2), keepdims=True).sum(-1, keepdims=True)
    return convolve(
      jnp.tanh(convolve(images, first, padding=((2, 2), (2, 2))) + mean), second, padding="VALID"
    )

  return predict


@pytest.mark.parametrize("pad_multiple", [1, 48])  # a larger canvas must not matter
@pytest.mark.golden("cps_sliding_eval", case=r"case\d+")
def test_sliding_windows_equal_torchsemiseg(golden, pad_multiple):
  image = golden["image_rgb"]
  crop = int(golden["crop"])
  protocol = inference.Protocol(
    style="slide",
    window_pixels=(crop, crop),
    stride_fraction=float(golden["stride_rate"]),
    scales=tuple(golden["scales"].tolist()),
    flip=bool(golden["flip"]),
    pad_multiple=pad_multiple,
  )
  height, width = image.shape[:2]
  # What lies outside must not matter.
  canvas = np.full((1, *inference.canvas_size((height, width), protocol), 3), 77, np.uint8)
  canvas[0, :height, :width] = image
  infer = functools.partial(
    inference.infer,
    recorded_network(golden),
    protocol=protocol,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
  )
  scores, _ = jax.jit(infer)(canvas, jnp.asarray([[height, width]]))
  scores = np.asarray(scores[0, :height, :width])
  np.testing.assert_allclose(scores[::2, ::2], golden["score_sum"], rtol=0, atol=1e-4)
  top, second = np.moveaxis(np.sort(scores, axis=-1)[..., -2:][..., ::-1], -1, 0)
  # The tolerance of the scores: below it, the recorded class may be either.
  clear = top - second > 1e-4
  assert clear.mean() > 0.99
  np.testing.assert_array_equal(scores.argmax(-1)[clear], golden["pred"][clear])
