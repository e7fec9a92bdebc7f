import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from pseudoseg_jax import checks, optim
from pseudoseg_jax.models import deeplab_tf, heads, initial, layers, resnet, table, tf_names


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# --- depthwise convolution and pooling


def plain_depthwise(x, kernel, stride, dilation, same=False):
  """The textbook sum, padded symmetrically or as TensorFlow's documentation says of "SAME"."""
  reach = dilation * (kernel.shape[0] // 2)
  totals = [
    max((-(-size // stride) - 1) * stride + 2 * reach + 1 - size, 0) if same else 2 * reach
    for size in x.shape[1:3]
  ]
  padded = np.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)))
  height, width = ((size - 1) // stride + 1 for size in x.shape[1:3])
  y = np.zeros((x.shape[0], height, width, x.shape[-1]))
  for i in range(kernel.shape[0]):
    for j in range(kernel.shape[1]):
      rows, columns = (d * dilation + stride * np.arange(n) for d, n in ((i, height), (j, width)))
      y += padded[:, rows][:, :, columns] * np.asarray(kernel[i, j, 0])
  return y


def _gradients_by_taps(x, kernel, stride, dilation, same):
  y = layers._depthwise_by_taps(x, kernel, stride, dilation, same)
  return y, lambda gradient: layers._depthwise_gradients_by_taps(
    x, kernel, gradient, stride, dilation, same
  )


def _gradients_of(form):
  return lambda x, kernel, *options: jax.vjp(lambda x, kernel: form(x, kernel, *options), x, kernel)


# This platform's way, and both ways by name: only one of them runs on a platform. With the last
# sizes some taps see nothing.
@pytest.mark.slow
@pytest.mark.parametrize(
  "form",
  [
    _gradients_of(layers.convolve_depthwise),
    _gradients_by_taps,
    _gradients_of(layers._depthwise_grouped),
  ],
  ids=["platform", "taps", "grouped"],
)
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(
  "size,k,stride,dilation",
  [
    ((6, 7), 3, 1, 1),
    ((6, 7), 3, 2, 1),
    ((8, 6), 5, 2, 1),
    ((7, 5), 5, 1, 1),
    ((9, 8), 3, 1, 2),
    ((4, 7), 3, 1, 6),
    ((1, 2), 5, 2, 1),
  ],
)
def test_depthwise_convolution_is_the_textbook_sum_and_its_gradient_the_adjoint(
  form, size, k, stride, dilation, same
):
  x, kernel = normal(0, 2, *size, 3), normal(1, k, k, 1, 3)
  y, pull = form(x, kernel, stride, dilation, same)
  textbook = functools.partial(plain_depthwise, stride=stride, dilation=dilation, same=same)
  np.testing.assert_allclose(y, textbook(np.asarray(x), kernel), atol=1e-5)
  # <g, conv(u)> = <pull(g), u> for every u, because convolution is linear in the map and in the
  # kernel.
  g, u, v = normal(2, *y.shape), normal(3, *x.shape), normal(4, *kernel.shape)
  by_x, by_kernel = pull(g)
  along_u, along_v = textbook(np.asarray(u), kernel), textbook(np.asarray(x), v)
  np.testing.assert_allclose((by_x * u).sum(), (g * along_u).sum(), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose((by_kernel * v).sum(), (g * along_v).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(6, 8), (7, 6), (5, 9), (2, 1)])
def test_max_pool_same_and_its_gradient_are_those_of_tensorflows_windows(size):
  x = normal(5, 2, *size, 3)
  reference = functools.partial(
    jax.lax.reduce_window,
    init_value=-jnp.inf,
    computation=jax.lax.max,
    window_dimensions=(1, 3, 3, 1),
    window_strides=(1, 2, 2, 1),
    padding="SAME",
  )
  y, pull = jax.vjp(layers.max_pool_same, x)
  expected, expected_pull = jax.vjp(reference, x)
  np.testing.assert_array_equal(y, expected)
  g = normal(6, *y.shape)
  np.testing.assert_allclose(pull(g)[0], expected_pull(g)[0], atol=1e-6)


# --- backbone


def test_the_last_block_strides_and_stages_after_it_dilate():
  plan = resnet.beta_strides_and_dilations((3, 4, 6, 3), 16, (1, 2, 4))
  assert plan[0] == [(1, 1), (1, 1), (2, 1)]
  assert plan[1] == [(1, 1)] * 3 + [(2, 1)]
  assert plan[2] == [(1, 1)] * 6
  assert plan[3] == [(1, 2), (1, 4), (1, 8)]


def test_at_output_stride_8_the_third_stage_dilates_as_a_whole():
  plan = resnet.beta_strides_and_dilations((3, 4, 6, 3), 8, (1, 1, 1))
  assert plan[0][-1] == (2, 1) and plan[1] == [(1, 1)] * 4
  assert plan[2] == [(1, 2)] * 6 and plan[3] == [(1, 4)] * 3


def test_a_strided_shortcut_without_change_of_channels_picks_every_second_pixel():
  block = resnet.BlockBeta(width=2, stride=2, dilation=1, momentum=0.95)
  x = normal(7, 1, 5, 6, 8)
  # Kernels of zeros.
  (y, residual), variables = block.init_with_output(jax.random.key(0), x, train=False)
  assert "shortcut" not in variables["params"]
  np.testing.assert_array_equal(residual, np.zeros((1, 3, 3, 8)))
  np.testing.assert_array_equal(y, np.maximum(x[:, ::2, ::2], 0))


@pytest.mark.parametrize(
  "output_stride,strides",
  [(8, (4, 8, 8, 8, 8)), (16, (4, 8, 16, 16, 16)), (32, (4, 8, 16, 32, 32))],
)
def test_maps_have_their_strides_and_channels(output_stride, strides):
  network = table.compose(
    *deeplab_tf.deeplabv3plus_tf(5, output_stride=output_stride, dtype=jnp.bfloat16)
  )
  variables = jax.eval_shape(network.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((2, 65, 50, 3), jnp.float32)
  maps, _ = jax.eval_shape(
    functools.partial(network.encode, train=True, groups=2), *variables, images
  )
  expected = [
    (2, -(-65 // s), -(-50 // s), c)
    for s, c in zip(strides, (256, 256, 512, 1024, 2048), strict=True)
  ]
  assert [x.shape for x in maps] == expected
  assert {x.dtype for x in maps} == {jnp.dtype("bfloat16")}
  scores, _ = jax.eval_shape(functools.partial(network.decode, train=False), *variables, maps)
  assert (scores.shape, scores.dtype) == ((2, 17, 13, 5), jnp.float32)


# --- the whole


@pytest.fixture(scope="module")
def small():
  """A training forward (low-level map, scores, statistics) of a network with few blocks, its
  variables, and images.
  """
  backbone, head = deeplab_tf.deeplabv3plus_tf(3, head_momentum=0.75)
  network = table.compose(backbone.clone(variant="few"), head)

  @functools.partial(jax.jit, static_argnames="groups")
  def forward(params, stats, images, groups):
    maps, stats = network.encode(params, stats, images, train=True, groups=groups)
    scores, stats = network.decode(params, stats, maps, train=True, groups=groups)
    return maps[0], scores, stats

  with pytest.MonkeyPatch.context() as patch:  # compiles in a third of the time
    patch.setitem(resnet.BLOCKS, "few", (2, 1, 1, 1))
    params, stats = network.init(jax.random.key(1))
    yield forward, params, stats, jnp.tanh(normal(8, 6, 33, 33, 3))


def test_grouped_forward_is_two_forwards(small):
  forward, params, stats, images = small
  low, scores, moved = forward(params, stats, images, 2)
  low_first, first, between = forward(params, stats, images[::2], 1)
  low_second, second, after = forward(params, between, images[1::2], 1)
  np.testing.assert_allclose(
    low, jnp.stack([low_first, low_second], 1).reshape(low.shape), atol=1e-4
  )
  # Batch norms over three pooled values amplify rounding: input noise of 1e-7 moves these scores by
  # 2e-3 already.
  np.testing.assert_allclose(scores, jnp.stack([first, second], 1).reshape(scores.shape), atol=2e-2)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-2), moved, after)


def test_running_statistics_of_backbone_and_head_keep_their_own_share(small):
  forward, params, stats, images = small
  _, _, once = forward(params, stats, images[::2], 1)
  _, _, twice = forward(params, once, images[::2], 1)
  once, twice = traverse_util.flatten_dict(once), traverse_util.flatten_dict(twice)
  for path in once:
    if path[-1] == "mean":  # (1 - m) x, then m (1 - m) x + (1 - m) x
      share = 0.75 if path[0] == "head" else 0.95
      np.testing.assert_allclose(
        twice[path] - once[path], share * once[path], rtol=1e-3, atol=1e-4, err_msg=path
      )


def head_and_maps(**options):
  _, head = deeplab_tf.deeplabv3plus_tf(3, **options)
  maps = (normal(9, 2, 9, 8, 6), jax.nn.relu(normal(10, 2, 3, 2, 12)))
  shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), maps, train=False))
  return head, initial.initial_values(jax.random.key(2), shapes), maps


def test_dropout_acts_where_training_and_a_key_meet_and_drops_its_fraction():
  head, variables, maps = head_and_maps(dropout=0.25)

  @functools.partial(jax.jit, static_argnames="train")
  def context(key, *, train):
    rngs = {} if key is None else {"dropout": key}
    _, seen = head.apply(
      variables,
      maps,
      train=train,
      rngs=rngs,
      mutable=True,
      capture_intermediates=lambda module, _: module.name == "aspp",
    )
    return seen["intermediates"]["aspp"]["__call__"][0]

  first, second = (np.asarray(context(jax.random.key(seed), train=True)) for seed in (3, 4))
  whole, kept = np.asarray(context(None, train=True)), first != 0
  np.testing.assert_allclose(first[kept], whole[kept] / 0.75, rtol=1e-4)
  assert abs(1 - kept[whole > 0].mean() - 0.25) < 0.05
  assert (first != second).any()
  np.testing.assert_array_equal(context(jax.random.key(3), train=False), context(None, train=False))


def test_gradient_of_the_head_in_bfloat16_is_finite_and_reaches_every_parameter():
  head, variables, maps = head_and_maps(dtype=jnp.bfloat16)

  def loss(params):
    variables_now = variables | {"params": params}
    scores, _ = head.apply(variables_now, maps, train=True, mutable=["batch_stats"])
    return jnp.sum(jnp.square(scores - 1))

  gradient = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(variables["params"]), sep="/")
  for path, leaf in gradient.items():
    assert jnp.isfinite(leaf).all() and (leaf != 0).any(), path


def test_depthwise_kernels_are_drawn_disturb_no_other_draw_and_do_not_decay():
  shapes = {"unit": {"kernel": jnp.zeros((1, 1, 8, 4)), "bias": jnp.zeros(4)}}
  more = shapes | {"depthwise": {"conv": {"depthwise": jnp.zeros((3, 3, 1, 2000))}}}
  values = initial.initial_values(jax.random.key(3), more)
  jax.tree.map(
    np.testing.assert_array_equal,
    values["unit"],
    initial.initial_values(jax.random.key(3), shapes)["unit"],
  )
  drawn = values["depthwise"]["conv"]["depthwise"]  # each sum has nine terms: variance 2 / 9
  np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, (2 / 9) ** 0.5], atol=1e-2)
  _, head = deeplab_tf.deeplabv3plus_tf(3)
  maps = (jnp.zeros((1, 5, 5, 4)), jnp.zeros((1, 2, 2, 4)))
  leaves = traverse_util.flatten_dict(
    jax.eval_shape(lambda: head.init(jax.random.key(0), maps, train=False))["params"], sep="/"
  )
  spared = {
    path
    for path, leaf in leaves.items()
    if len(leaf.shape) == 4 and not optim.decays(path, "kernels")
  }
  separable = ("aspp/branch1", "aspp/branch2", "aspp/branch3", "unit1", "unit2")
  assert spared == {f"{name}/depthwise/conv/depthwise" for name in separable}


def test_what_a_network_cannot_be_is_told_at_once():
  with pytest.raises(checks.InputError) as error:
    deeplab_tf.deeplabv3plus_tf(
      3, output_stride=4, multi_grid=(1, 2), dropout=1.0, head_momentum=-0.1
    )
  message = str(error.value)
  for words in (
    "output_stride: got 4",
    "multi_grid: got (1, 2)",
    "dropout: got 1.0",
    "head_momentum: got -0.1",
  ):
    assert words in message
  with pytest.raises(checks.InputError, match="resnet18.*resnet101, resnet50"):
    deeplab_tf.deeplabv3plus_tf(3, backbone="resnet18")


# --- weights from TensorFlow


def with_heads(backbone, num_classes):
  """Shapes of a network with PseudoSeg's heads."""
  network = table.compose(*deeplab_tf.deeplabv3plus_tf(num_classes, backbone=backbone))
  params, stats = jax.eval_shape(network.init, jax.random.key(0))
  classifier, _ = jax.eval_shape(
    heads.image_classifier(2048, num_classes - 1).init, jax.random.key(0)
  )
  attention, moving = jax.eval_shape(
    heads.self_attention(3072, num_classes).init, jax.random.key(0)
  )
  return params | {"classifier": classifier, "attention": attention}, stats | {"attention": moving}


def variables_for(params, stats, variant):
  """A checkpoint that fits, of views of one zero: name -> array in TensorFlow's shape."""
  variables = {}
  for path, leaf in traverse_util.flatten_dict(
    {"params": params, "batch_stats": stats}, sep="/"
  ).items():
    name = tf_names.tf_name(path.split("/", 1)[1], variant=variant)
    shape = (1, 1, *leaf.shape) if len(leaf.shape) == 2 else leaf.shape
    if name.endswith("depthwise_weights"):
      shape = (*shape[:2], shape[3], shape[2])
    variables[name] = np.broadcast_to(np.float32(0), shape)
  return variables


@pytest.mark.parametrize("variant", tf_names.SCOPES)
def test_names_are_distinct_and_those_of_the_scope(variant):
  params, stats = with_heads(variant, 21)
  variables = variables_for(params, stats, variant)
  assert len(variables) == len(jax.tree.leaves((params, stats)))
  scope = tf_names.SCOPES[variant]
  deepest = {
    "resnet50": "block3/unit_6/bottleneck_v1/conv3",
    "resnet101": "block3/unit_23/bottleneck_v1/conv3",
    "xception65": "middle_flow/block1/unit_16/xception_module/separable_conv3_pointwise",
  }
  assert f"{scope}/{deepest[variant]}/BatchNorm/moving_variance" in variables
  assert variables[f"{scope}/logits/weights"].shape == (1, 1, 2048, 20)
  assert {name.split("/")[0] for name in variables if name.startswith(("resnet", "xception"))} == {
    scope
  }
  tf_names.from_tf(variables, params, stats)


def test_paths_that_tensorflow_does_not_have_have_no_name():
  for path in (
    "backbone/layer1_0/unit2/conv/bias",
    "head/unit3/conv/kernel",
    "head/aspp/branch4/pointwise/conv/kernel",
    "low",
  ):
    assert tf_names.tf_name(path, variant="resnet50") is None


def test_tensorflow_weights_that_do_not_fit_are_listed_together():
  params, stats = with_heads("resnet50", 3)
  variables = variables_for(params, stats, "resnet50")
  variables["global_step"] = np.zeros((), np.int64)
  variables["logits/semantic/weights/Momentum"] = np.zeros((1, 1, 256, 3), np.float32)
  filled, _ = tf_names.from_tf(variables, params, stats)
  assert jax.tree.map(jnp.shape, filled) == jax.tree.map(lambda leaf: leaf.shape, params)

  del variables["aspp2_depthwise/depthwise_weights"]
  variables["logits/semantic/weights"] = np.zeros((1, 1, 256, 21), np.float32)
  variables["resnet_v1_50/mean_rgb"] = np.zeros(3, np.float32)
  with pytest.raises(checks.InputError) as error:
    tf_names.from_tf(variables, params, stats)
  message = str(error.value)
  missing = "params/head/aspp/branch2/depthwise/conv/depthwise: got no variable 'aspp2_depthwise/depthwise_weights' in the file"
  assert missing in message
  assert "(1, 1, 256, 21)" in message and "(1, 1, 256, 3)" in message
  assert "resnet_v1_50/mean_rgb of shape (3,): not used" in message
