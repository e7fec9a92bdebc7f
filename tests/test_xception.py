import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax.models import xception
from pseudoseg_jax.models.tf_names import tf_name
from pseudoseg_jax.models.xception import Unit, Xception65, strides_and_dilations


def uniform(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def drawn_variables(module, x):
  """Normal draws, variances their absolute values."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
  rng = np.random.default_rng(0)

  def value(path, leaf):
    n = rng.standard_normal(leaf.shape).astype(np.float32)
    return abs(n) if path[-1].key == "var" else n

  return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.mark.parametrize(
  "output_stride,plan",
  [
    (8, [(2, 1), (2, 1), (1, 1), (1, 2), (1, 2), (1, 4)]),
    (16, [(2, 1), (2, 1), (2, 1), (1, 1), (1, 1), (1, 2)]),
    (32, [(2, 1), (2, 1), (2, 1), (1, 1), (2, 1), (1, 1)]),
  ],
)
def test_a_stride_too_many_dilates_the_blocks_after_its_own(output_stride, plan):
  assert strides_and_dilations(output_stride) == plan


@pytest.mark.parametrize("output_stride,deepest", [(8, (9, 8)), (16, (5, 4)), (32, (3, 2))])
def test_maps_are_the_image_over_the_stride_rounded_up(output_stride, deepest):
  x = jax.ShapeDtypeStruct((2, 65, 64, 3), jnp.float32)
  module = Xception65(output_stride, jnp.bfloat16)
  maps, variables = jax.eval_shape(
    lambda x: module.init_with_output(jax.random.key(0), x, train=False), x
  )
  entry3 = max(deepest, (5, 4))  # stride 16 at most
  sizes = [(17, 16), (17, 16), (9, 8), entry3, entry3, deepest, deepest]
  channels = [256, 128, 256, 728, 728, 1024, 2048]
  assert [y.shape for y in maps] == [
    (2, *size, count) for size, count in zip(sizes, channels, strict=True)
  ]
  assert {y.dtype for y in maps} == {jnp.dtype(jnp.bfloat16)}
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_a_unit_with_silent_convolutions_passes_its_input_on_negative_values_too():
  x = uniform(0, 1, 4, 3, 6)
  unit = Unit((5, 5, 6), stride=1, dilation=2)
  # Kernels are 0 before they are drawn.
  y, _ = unit.apply(unit.init(jax.random.key(0), x, train=False), x, train=False)
  np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("residual", [True, False])
def test_only_the_last_unit_rectifies_what_its_convolutions_give(residual):
  x = uniform(1, 2, 5, 4, 6)
  unit = Unit((5, 5, 7), stride=2, dilation=1, residual=residual)
  outputs = unit.apply(drawn_variables(unit, x), x, train=False)
  assert [y.shape for y in outputs] == [(2, 3, 2, 7), (2, 5, 4, 5)]
  for y in outputs:
    assert y.max() > 0 and (y.min() < 0 if residual else y.min() == 0)


@pytest.mark.parametrize("residual", [True, False])
def test_every_parameter_of_a_unit_gets_a_finite_gradient(residual):
  x, weight = uniform(2, 3, 5, 4, 6), uniform(3, 3, 3, 2, 7)
  unit = Unit((5, 5, 7), stride=2, dilation=2, residual=residual)
  variables = drawn_variables(unit, x)

  @jax.jit
  @jax.grad
  def gradient(params):
    (y, _), _ = unit.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
    return jnp.sum(weight * y)  # a plain sum hardly depends on what a batch norm follows

  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
    assert jnp.isfinite(leaf).all() and (leaf != 0).any(), jax.tree_util.keystr(path)


def test_groups_do_not_see_each_other(monkeypatch):
  # Few channels and units compile in seconds.
  features = [(4, 4, 4), (5, 5, 5), (6, 6, 6), (6, 6, 6), (6, 7, 7), (8, 8, 9)]
  strides = [stride for _, _, stride in xception.BLOCKS.values()]
  monkeypatch.setattr(
    xception,
    "BLOCKS",
    {name: (1, f, s) for name, f, s in zip(xception.BLOCKS, features, strides, strict=True)},
  )
  x, module = uniform(4, 4, 33, 24, 3), Xception65()
  variables = drawn_variables(module, x)
  run = jax.jit(
    lambda x: module.apply(variables, x, train=True, groups=2, mutable=["batch_stats"])[0]
  )
  # Rows 1 and 3 are one group.
  for before, after in zip(run(x), run(x.at[1].add(1.0)), strict=True):
    np.testing.assert_array_equal(after[0::2], before[0::2])
    assert (after[3] != before[3]).any()


@pytest.mark.parametrize(
  "path,name",
  [
    ("conv2/conv/kernel", "entry_flow/conv1_2/weights"),
    (
      "entry2_0/shortcut/bn/bias",
      "entry_flow/block2/unit_1/xception_module/shortcut/BatchNorm/beta",
    ),
    (
      "middle1_15/separable3_depthwise/conv/depthwise",
      "middle_flow/block1/unit_16/xception_module/separable_conv3_depthwise/depthwise_weights",
    ),
  ],
)
def test_names_count_units_from_one(path, name):
  assert tf_name(f"backbone/{path}", variant="xception65") == f"xception_65/{name}"


@pytest.mark.parametrize(
  "path",
  ["backbone/layer1_0/unit1/conv/kernel", "head/unit3/conv/kernel", "backbone/conv1/conv/bias"],
)
def test_paths_of_other_networks_have_no_name(path):
  assert tf_name(path, variant="xception65") is None
