import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax.models import initial, pspnet, resnet


def test_adaptive_pooling_cuts_a_side_into_cells_that_overlap_where_they_must():
  x = jnp.arange(5.0).reshape(1, 5, 1, 1)
  # Two cells of five rows: 0..2 and 2..4, both with the middle row.
  np.testing.assert_allclose(pspnet.adaptive_average_pool(x, 2)[0, :, 0, 0], [1, 3], rtol=1e-6)
  # More cells than rows: each reads the row, or the two rows, that it touches.
  x = jnp.array([0.0, 6.0]).reshape(1, 1, 2, 1)
  np.testing.assert_allclose(pspnet.adaptive_average_pool(x, 3)[0, 0, :, 0], [0, 3, 6], rtol=1e-6)


def test_adaptive_pooling_of_bfloat16_counts_in_float32():
  x = jnp.full((1, 64, 64, 1), 257 / 256, jnp.bfloat16) + jnp.zeros(
    (1, 64, 64, 1), jnp.bfloat16
  ).at[0, 0].set(1)
  pooled = pspnet.adaptive_average_pool(x, 1)
  assert pooled.dtype == jnp.float32
  np.testing.assert_allclose(pooled.ravel(), np.mean(np.asarray(x, np.float32)), rtol=1e-6)


def test_channels_become_pixels_row_by_row():
  x = jnp.arange(8).reshape(1, 1, 1, 8)
  np.testing.assert_array_equal(pspnet.pixel_shuffle(x)[0, :, :, 0], [[0, 1], [2, 3]])
  np.testing.assert_array_equal(pspnet.pixel_shuffle(x)[0, :, :, 1], [[4, 5], [6, 7]])


def test_four_pixels_of_a_class_begin_with_one_kernel_and_biases_of_their_own():
  shapes = {
    "subpixel1": {
      "kernel": jax.ShapeDtypeStruct((1, 1, 3, 8), jnp.float32),
      "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
  }
  values = initial.initial_values(jax.random.key(0), shapes)["subpixel1"]
  kernel = values["kernel"].reshape(3, 2, 4)  # [Cin, class, pixel]
  assert (kernel == kernel[..., :1]).all() and (kernel[:, 0] != kernel[:, 1]).all()
  assert len(set(values["bias"].tolist())) == 8


@pytest.mark.parametrize("factory,size", [(pspnet.pspnet, 5), (pspnet.pspnet_pixelssl, 3)])
def test_the_backbone_ends_with_the_pyramid_beside_the_parts_of_a_resnet(factory, size):
  backbone, head = factory(7, backbone="resnet18")
  images = jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.float32)
  maps, variables = jax.eval_shape(
    lambda x: backbone.init_with_output(jax.random.key(0), x, train=False), images
  )
  assert [one.shape[-1] for one in maps] == [64, 128, 256, 512, 128]
  assert maps[-1].shape == (2, size, size, 128)
  plain = resnet.ResNet("resnet18", backbone.body.stem)
  alone = jax.eval_shape(lambda x: plain.init(jax.random.key(0), x, train=False), images)
  assert set(variables["params"]) == set(alone["params"]) | {"psp"}
  scores, _ = jax.eval_shape(
    lambda maps: head.init_with_output(jax.random.key(0), maps, train=False), maps
  )
  assert (scores.shape, scores.dtype) == ((2, 8 * size, 8 * size, 7), jnp.float32)
