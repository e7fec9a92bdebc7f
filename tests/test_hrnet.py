import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, traverse_util

from pseudoseg_jax.models import hrnet, layers, table
from pseudoseg_jax.ops import resize


@pytest.mark.parametrize("backbone,width", [("hrnet_w18_small_v1", 16), ("hrnet_w18_small_v2", 18)])
def test_branches_double_their_channels_and_halve_their_sides_rounded_up(backbone, width):
  body, _, _ = hrnet.hrnet(5, backbone=backbone)
  images = jax.ShapeDtypeStruct((1, 75, 33, 3), jnp.float32)
  maps, _ = jax.eval_shape(
    lambda x: body.init_with_output(jax.random.key(0), x, train=False), images
  )
  sizes = [(19, 9), (10, 5), (5, 3), (3, 2)]
  assert [one.shape for one in maps] == [(1, *size, width * 2**b) for b, size in enumerate(sizes)]


@pytest.mark.parametrize("align_corners", [False, True])
def test_one_option_sets_the_convention_of_every_resize(align_corners):
  body, head, upsample = hrnet.hrnet(5, align_corners=align_corners)
  expected = resize.bilinear_align_corners if align_corners else resize.bilinear_half_pixel
  assert body.resize is head.resize is upsample is expected
  assert (
    table.make_network("hrnet", num_classes=5, align_corners=align_corners).upsample is expected
  )


def test_a_fused_branch_is_the_relu_of_the_sum_of_all():
  # Kernels of one on the diagonal, neutral norms and no blocks: a finer branch gets the coarse one
  # upsampled, and keeps itself.
  module = hrnet.Module(0, 0.9, resize.bilinear_half_pixel)
  fine, coarse = -jnp.ones((1, 4, 4, 2)), jnp.full((1, 2, 2, 4), 3.0)
  variables = module.init(jax.random.key(0), [fine, coarse], train=False)
  leaves = traverse_util.flatten_dict(variables, sep="/")
  leaves["params/fuse0_1/conv/kernel"] = jnp.eye(4, 2).reshape(1, 1, 4, 2)
  leaves["params/fuse1_0_0/conv/kernel"] = jnp.zeros((3, 3, 2, 4)).at[1, 1].set(4 * jnp.eye(2, 4))
  a, b = module.apply(traverse_util.unflatten_dict(leaves, sep="/"), [fine, coarse], train=False)
  np.testing.assert_allclose(a, 2.0, rtol=1e-4)  # -1 + 3
  # 3 - 4 below zero, 3 where the fine branch adds nothing.
  np.testing.assert_allclose(b[0, 0, 0], [0, 0, 3, 3], rtol=1e-4)


def test_momentum_reaches_every_norm():
  network, momenta = (
    table.make_network("hrnet", num_classes=3, backbone="hrnet_w18_small_v1", bn_momentum=0.5),
    [],
  )

  def watch(call, arguments, keywords, context):
    if isinstance(context.module, layers.BatchNorm):
      momenta.append(context.module.momentum)
    return call(*arguments, **keywords)

  with nn.intercept_methods(watch):
    _, stats = jax.eval_shape(network.init, jax.random.key(0))
  assert len(momenta) >= len(jax.tree.leaves(stats)) / 2 and set(momenta) == {0.5}
