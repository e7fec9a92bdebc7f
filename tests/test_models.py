import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from pseudoseg_jax import checks, nets
from pseudoseg_jax.models import layers, resnet, table, torch_names
from pseudoseg_jax.ops import resize


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# --- resizing


def test_align_corners_keeps_the_corners_and_spaces_the_rest_evenly():
  got = resize.bilinear_align_corners(jnp.array([0.0, 3.0, 9.0]).reshape(1, 1, 3, 1), (1, 5))
  np.testing.assert_allclose(got.ravel(), [0, 1.5, 3, 6, 9], atol=1e-6)


def test_half_pixel_treats_pixels_as_areas():
  got = resize.bilinear_half_pixel(jnp.array([0.0, 4.0]).reshape(1, 2, 1, 1), (4, 1))
  # Reads at -1/4 (clipped), 1/4, 3/4, 5/4 (clipped).
  np.testing.assert_allclose(got.ravel(), [0, 1, 3, 4], atol=1e-6)


def test_half_pixel_does_not_antialias():
  got = resize.bilinear_half_pixel(jnp.arange(8.0).reshape(1, 1, 8, 1), (1, 2))
  np.testing.assert_allclose(got.ravel(), [1.5, 5.5])  # two neighbors only, whatever the factor


def test_nearest_reads_the_pixel_left_of_or_at_the_position():
  got = resize.nearest(jnp.array([[[10, 20, 255]]]), (2, 5))
  np.testing.assert_array_equal(got, [[[10, 10, 20, 20, 255]] * 2])
  assert got.dtype == jnp.int32


@pytest.mark.parametrize("bilinear", [resize.bilinear_align_corners, resize.bilinear_half_pixel])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (13, 4)])
def test_bilinear_keeps_constants_and_passes_all_of_the_gradient(bilinear, size):
  x = jnp.ones((2, 5, 3, 4))
  y, pull = jax.vjp(lambda x: bilinear(x, size), x)
  assert y.shape == (2, *size, 4)
  np.testing.assert_allclose(y, 1, atol=1e-6)
  np.testing.assert_allclose(pull(jnp.ones_like(y))[0].sum(), y.size, rtol=1e-6)


def test_bilinear_is_the_identity_at_the_same_size():
  x = normal(0, 1, 4, 5, 2)
  np.testing.assert_array_equal(resize.bilinear_half_pixel(x, (4, 5)), x)


# --- convolution and pooling


def plain_convolution(x, kernel, stride, dilation):
  """The textbook sum, padded symmetrically."""
  pad = dilation * (kernel.shape[0] // 2)
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  height, width = ((size - 1) // stride + 1 for size in x.shape[1:3])
  y = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
  for i in range(kernel.shape[0]):
    for j in range(kernel.shape[1]):
      rows = i * dilation + stride * np.arange(height)
      columns = j * dilation + stride * np.arange(width)
      y += padded[:, rows][:, :, columns] @ kernel[i, j]
  return y


# The last three take the way by taps: some taps see part of the map, or only the middle one sees
# any.
@pytest.mark.parametrize(
  "size,k,stride,dilation",
  [
    (6, 3, 2, 1),
    (7, 7, 2, 1),
    (7, 1, 2, 1),
    (8, 3, 1, 2),
    (5, 3, 1, 3),
    ((5, 3), 3, 1, 4),
    (5, 3, 1, 6),
  ],
)
def test_convolution_is_the_textbook_sum_and_its_gradient_the_adjoint(size, k, stride, dilation):
  height, width = size if isinstance(size, tuple) else (size, size)
  x, kernel = normal(1, 2, height, width, 3), normal(2, k, k, 3, 4)
  y, pull = jax.vjp(lambda x, kernel: layers.convolve(x, kernel, stride, dilation), x, kernel)
  np.testing.assert_allclose(
    y, plain_convolution(np.asarray(x), np.asarray(kernel), stride, dilation), atol=1e-4
  )
  # <g, conv(u)> = <pull(g), u> for every u, because convolution is linear in the map and in the
  # kernel.
  g, u, v = normal(3, *y.shape), normal(4, *x.shape), normal(5, *kernel.shape)
  by_x, by_kernel = pull(g)
  np.testing.assert_allclose(
    (by_x * u).sum(), (g * layers.convolve(u, kernel, stride, dilation)).sum(), rtol=1e-3, atol=1e-3
  )
  np.testing.assert_allclose(
    (by_kernel * v).sum(), (g * layers.convolve(x, v, stride, dilation)).sum(), rtol=1e-3, atol=1e-3
  )


@pytest.mark.parametrize("size", [(7, 6), (4, 5)])
def test_max_pool_and_its_gradient_are_those_of_the_windows(size):
  x = normal(6, 2, *size, 3)
  reference = functools.partial(
    jax.lax.reduce_window,
    init_value=-jnp.inf,
    computation=jax.lax.max,
    window_dimensions=(1, 3, 3, 1),
    window_strides=(1, 2, 2, 1),
    padding=((0, 0), (1, 1), (1, 1), (0, 0)),
  )
  y, pull = jax.vjp(layers.max_pool, x)
  expected, expected_pull = jax.vjp(reference, x)
  np.testing.assert_array_equal(y, expected)
  g = normal(7, *y.shape)
  np.testing.assert_allclose(pull(g)[0], expected_pull(g)[0], atol=1e-6)


def test_max_pool_gives_the_gradient_of_equal_values_to_the_first():
  gradient = jax.grad(lambda x: layers.max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))
  np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])


# --- batch norm


def batch_norm(x, params, stats, groups=1, negative_slope=1.0):
  layer = layers.BatchNorm(negative_slope=negative_slope)
  return layer.apply(
    {"params": params, "batch_stats": stats}, x, train=True, groups=groups, mutable=["batch_stats"]
  )


def batch_norm_variables(channels):
  params = {"scale": 1 + 0.3 * normal(8, channels), "bias": normal(9, channels)}
  stats = {"mean": normal(10, channels), "var": 1 + normal(11, channels) ** 2}
  return params, stats


@pytest.mark.parametrize("negative_slope", [0.0, 0.01, 1.0])
def test_batch_norm_gradient_is_that_of_its_definition(negative_slope):
  x, weight = 3 + 2 * normal(12, 4, 3, 2, 5), normal(13, 4, 3, 2, 5)
  params, stats = batch_norm_variables(5)

  def definition(x, params):
    z = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5) * params["scale"] + params[
      "bias"
    ]
    return (weight * jnp.where(z > 0, z, negative_slope * z)).sum()

  def ours(x, params):
    return (weight * batch_norm(x, params, stats, negative_slope=negative_slope)[0]).sum()

  got, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, params) for f in (ours, definition))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_interleaved_groups_are_separate_batches_one_after_the_other():
  x, weight = normal(14, 6, 3, 3, 4), normal(15, 6, 3, 3, 4)
  params, stats = batch_norm_variables(4)

  def together(x, params):
    y, moved = batch_norm(x, params, stats, groups=3, negative_slope=0.0)
    return (weight * y).sum(), (y, moved["batch_stats"])

  def apart(x, params):
    total, parts, moved = 0.0, [], stats
    for group in range(3):
      y, changed = batch_norm(x[group::3], params, moved, negative_slope=0.0)
      moved = changed["batch_stats"]
      total += (weight[group::3] * y).sum()
      parts.append(y)
    return total, (jnp.stack(parts, 1).reshape(x.shape), moved)

  got, expected = (
    jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, params) for f in (together, apart)
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def test_running_variance_is_unbiased_and_one_value_per_channel_is_safe():
  params, stats = (
    {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
    {"mean": jnp.zeros(1), "var": jnp.ones(1)},
  )
  _, moved = batch_norm(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1), params, stats)
  # Not 0.1 * 1.
  np.testing.assert_allclose(moved["batch_stats"]["var"], 0.9 * 1 + 0.1 * 2, rtol=1e-6)
  y, moved = batch_norm(jnp.full((1, 1, 1, 1), 5.0), params, stats)
  np.testing.assert_allclose(y, 0)
  np.testing.assert_allclose(moved["batch_stats"]["var"], 0.9, rtol=1e-6)


def test_batch_norm_of_bfloat16_counts_in_float32():
  x = (100 + normal(16, 4, 8, 8, 2)).astype(jnp.bfloat16)
  params, stats = batch_norm_variables(2)
  y, moved = batch_norm(x, params, stats)
  expected, expected_moved = batch_norm(x.astype(jnp.float32), params, stats)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)
  np.testing.assert_allclose(
    moved["batch_stats"]["var"], expected_moved["batch_stats"]["var"], rtol=1e-6
  )


# --- backbones


def test_cps_keeps_stride_16_and_dilates_the_last_stage_2_4_8():
  plan = resnet.strides_and_dilations((3, 4, 6, 3), 16, (1, 2, 4))
  assert plan[2] == [(2, 1)] + [(1, 1)] * 5
  assert plan[3] == [(1, 2), (1, 4), (1, 8)]


def test_without_multi_grid_the_first_block_keeps_the_dilation_before():
  plan = resnet.strides_and_dilations((3, 4, 6, 3), 8, None)
  assert plan[1] == [(2, 1), (1, 1), (1, 1), (1, 1)]
  assert plan[2] == [(1, 1)] + [(1, 2)] * 5
  assert plan[3] == [(1, 2), (1, 4), (1, 4)]


@pytest.mark.parametrize("stem", resnet.STEMS)
@pytest.mark.parametrize(
  "variant,output_stride,sizes",
  [("resnet18", 32, (9, 5, 3, 2)), ("resnet34", 16, (9, 5, 3, 3)), ("resnet50", 8, (9, 5, 5, 5))],
)
def test_stages_have_their_strides_and_channels(variant, stem, output_stride, sizes):
  module = resnet.ResNet(variant, stem, output_stride)
  images = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
  stages, _ = jax.eval_shape(
    functools.partial(module.init_with_output, train=False), jax.random.key(0), images
  )
  width = 64 * (4 if variant in resnet.BOTTLENECK else 1)
  assert [stage.shape for stage in stages] == [
    (1, size, size, width * 2**i) for i, size in enumerate(sizes)
  ]


def test_number_of_parameters_of_resnet101_deeplab():
  params, _ = jax.eval_shape(
    table.make_network("deeplabv3plus", num_classes=21, backbone="resnet101").init,
    jax.random.key(0),
  )
  # The official network's count.
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 59_468_085


# --- networks


SMALL = {
  "deeplabv3plus": {"backbone": "resnet18", "stem": "plain"},
  "deeplabv3plus_tf": {},
  "deeplabv3plus_unimatch": {"backbone": "resnet18"},
  "hrnet": {"backbone": "hrnet_w18_small_v1"},
  "pspnet": {"backbone": "resnet18"},
  "pspnet_pixelssl": {"backbone": "resnet18"},
  "tiny": {"width": 4},
}


def abstract_forward(network, images, **arguments):
  key = jax.random.key(0)
  return jax.eval_shape(
    lambda images: network.apply(*network.init(key), images, **arguments), images
  )


@pytest.mark.parametrize("name", table.NETWORKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_have_the_image_size_and_are_float32(name, dtype):
  network = table.make_network(name, num_classes=5, dtype=dtype, **SMALL[name])
  images = jax.ShapeDtypeStruct((4, 37, 50, 3), jnp.float32)
  params, stats = jax.eval_shape(network.init, jax.random.key(0))
  assert set(params) == {"backbone", "head"}  # what learning-rate multipliers by path rely on
  assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}
  for arguments in ({"train": False}, {"train": True, "groups": 2}):
    logits, moved = abstract_forward(network, images, **arguments)
    assert (logits.shape, logits.dtype) == ((4, 37, 50, 5), jnp.float32)
    assert jax.tree.map(lambda leaf: leaf.shape, moved) == jax.tree.map(
      lambda leaf: leaf.shape, stats
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", table.NETWORKS)
@pytest.mark.parametrize("size", [(33, 33), (32, 32), (16, 9)])
def test_networks_take_tiny_images_of_any_number_of_channels(name, size):
  network = table.make_network(name, num_classes=5, in_channels=4, **SMALL[name])
  assert network.in_channels == 4
  images = jax.ShapeDtypeStruct((2, *size, 4), jnp.float32)
  params, stats = jax.eval_shape(network.init, jax.random.key(0))
  maps, _ = jax.eval_shape(functools.partial(network.encode, train=True), params, stats, images)
  scores, _ = jax.eval_shape(functools.partial(network.decode, train=True), params, stats, maps)
  logits = jax.eval_shape(lambda scores: network.upsample(scores, size), scores)
  assert logits.shape == (2, *size, 5)
  assert tuple(one.shape[-1] for one in maps) == nets.map_channels(network)


@pytest.mark.slow
@pytest.mark.parametrize("name", table.NETWORKS)
def test_every_parameter_has_a_gradient(name):
  # In inference mode: a batch norm with the batch's own statistics would take away the bias of
  # HRNet's head.
  network = table.make_network(name, num_classes=5, **SMALL[name])
  params, stats = network.init(jax.random.key(0))
  images, weight = normal(19, 2, 33, 33, 3), normal(20, 2, 33, 33, 5)
  loss = lambda params: (weight * network.apply(params, stats, images, train=False)[0]).sum()
  quickly = {"xla_backend_optimization_level": 0}  # compiling is what takes the time
  gradients = traverse_util.flatten_dict(
    jax.jit(jax.grad(loss), compiler_options=quickly)(params), sep="/"
  )
  assert [
    path
    for path, gradient in gradients.items()
    if not (jnp.isfinite(gradient).all() and jnp.any(gradient))
  ] == []


@pytest.mark.parametrize(
  "name,options,count",
  [
    ("hrnet", {"num_classes": 19, "backbone": "hrnet_w18"}, 9_641_119),
    ("hrnet", {"num_classes": 19, "backbone": "hrnet_w32"}, 29_546_515),
    ("hrnet", {"num_classes": 19, "backbone": "hrnet_w48"}, 65_859_379),
    ("deeplabv3plus_unimatch", {"num_classes": 21, "backbone": "resnet50"}, 40_475_957),
    ("deeplabv3plus_unimatch", {"num_classes": 21, "backbone": "resnet101"}, 59_468_085),
  ],
)
def test_networks_have_the_published_number_of_parameters(name, options, count):
  params, _ = jax.eval_shape(table.make_network(name, **options).init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
  "name", [name for name in table.NETWORKS if name not in ("deeplabv3plus_tf", "tiny")]
)
def test_every_leaf_has_a_pytorch_name_of_its_own(name):
  network = table.make_network(name, num_classes=5, **SMALL[name])
  leaves = [
    traverse_util.flatten_dict(tree, sep="/")
    for tree in jax.eval_shape(network.init, jax.random.key(0))
  ]
  paths = [path for tree in leaves for path in tree]
  names = torch_names.names(paths, name)
  assert None not in names.values() and len(set(names.values())) == len(paths)
  # Alone, a backbone has the names of its own files; heads and pyramid pooling have none.
  alone = torch_names.backbone_names(paths)
  assert {path for path in paths if alone[path]} == {
    p for p in paths if p.startswith("backbone/") and "/psp/" not in p
  }
  assert alone["backbone/layer1_0/unit2/conv/kernel"] == "layer1.0.conv2.weight"


def test_networks_without_a_pytorch_twin_have_no_names():
  assert torch_names.names(["backbone/unit1/conv/kernel"], "tiny") == {
    "backbone/unit1/conv/kernel": None
  }


def test_linear_layers_are_transposed_and_vectors_are_not():
  np.testing.assert_array_equal(
    torch_names.to_ours(np.arange(6).reshape(2, 3), "classifier/kernel"), [[0, 3], [1, 4], [2, 5]]
  )
  np.testing.assert_array_equal(torch_names.to_ours(np.arange(3), "classifier/bias"), [0, 1, 2])


def test_grouped_forward_of_a_network_is_two_forwards():
  network = table.make_network("tiny", num_classes=3, **SMALL["tiny"])
  params, stats = network.init(jax.random.key(1))
  forward = jax.jit(network.apply, static_argnames=("train", "groups"))
  images = normal(17, 4, 24, 32, 3)
  logits, moved = forward(params, stats, images, train=True, groups=2)
  first, between = forward(params, stats, images[::2], train=True)
  second, after = forward(params, between, images[1::2], train=True)
  np.testing.assert_allclose(logits[::2], first, atol=1e-4)
  np.testing.assert_allclose(logits[1::2], second, atol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), moved, after)


def test_inference_leaves_the_statistics_alone_and_sees_each_image_by_itself():
  network = table.make_network("tiny", num_classes=3, **SMALL["tiny"])
  params, stats = network.init(jax.random.key(1))
  images = normal(18, 3, 16, 16, 3)
  forward = jax.jit(functools.partial(network.apply, train=False))
  logits, same = forward(params, stats, images)
  jax.tree.map(np.testing.assert_array_equal, same, stats)
  np.testing.assert_allclose(forward(params, stats, images[::-1])[0][::-1], logits, atol=1e-5)


def test_initial_values_are_kaiming_kernels_uniform_biases_and_neutral_norms():
  network = table.make_network("tiny", num_classes=500, width=16)
  params, stats = network.init(jax.random.key(2))
  kernel = params["backbone"]["unit7"]["conv"]["kernel"]  # [3, 3, 64, 64]: variance 2 / (9 * 64)
  np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, (2 / 576) ** 0.5], atol=1e-3)
  # fan_in 16: uniform in +-1/4, standard deviation 1 / sqrt(48).
  bias = params["head"]["classifier"]["bias"]
  assert 0.2 < abs(bias).max() <= 0.25
  np.testing.assert_allclose(bias.std(), 48**-0.5, rtol=0.1)
  leaves = traverse_util.flatten_dict({**params, "stats": stats})
  for path, leaf in leaves.items():
    if path[-1] in ("scale", "var", "mean") or path[-2] == "bn":
      np.testing.assert_array_equal(leaf, float(path[-1] in ("scale", "var")))
  other, _ = network.init(jax.random.key(3))
  assert (other["head"]["classifier"]["kernel"] != params["head"]["classifier"]["kernel"]).all()


@pytest.mark.parametrize(
  "name,options,words",
  [
    (
      "deeplabv3",
      {},
      ["deeplabv3", "deeplabv3plus, deeplabv3plus_tf, deeplabv3plus_unimatch, hrnet, pspnet"],
    ),
    ("tiny", {"witdh": 3}, ["witdh", "did you mean 'width'"]),
    ("deeplabv3plus", {"backbone": "resnet5"}, ["resnet5", "resnet50"]),
    ("deeplabv3plus", {"stem": "wide"}, ["wide", "deep, plain"]),
    ("deeplabv3plus", {"output_stride": 4}, ["output_stride", "8, 16, 32"]),
    ("deeplabv3plus_unimatch", {"output_stride": 4}, ["output_stride", "8, 16, 32"]),
    ("pspnet", {"backbone": "hrnet_w18"}, ["hrnet_w18", "resnet50"]),
    ("pspnet_pixelssl", {"stem": "wide"}, ["wide", "deep, plain"]),
    ("hrnet", {"backbone": "hrnet_w49"}, ["hrnet_w49", "hrnet_w48"]),
    ("hrnet", {"bn_momentum": 1.0}, ["bn_momentum", "0 <= value < 1"]),
    ("tiny", {"in_channels": 0}, ["in_channels", "1 or more"]),
  ],
)
def test_what_a_network_does_not_have_is_named(name, options, words):
  with pytest.raises(checks.InputError) as error:
    table.make_network(name, num_classes=3, **options)
  assert all(word in str(error.value) for word in words)


# --- weights from PyTorch


def test_torch_weights_that_do_not_fit_are_listed_together():
  network = table.make_network("deeplabv3plus", num_classes=3, backbone="resnet18", stem="plain")
  params, stats = jax.eval_shape(network.init, jax.random.key(0))
  leaves = traverse_util.flatten_dict({"params": params, "batch_stats": stats}, sep="/")
  state_dict = {}
  names = torch_names.names([path.split("/", 1)[1] for path in leaves], "deeplabv3plus")
  for path, leaf in leaves.items():
    shape = tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if len(leaf.shape) == 4 else leaf.shape
    state_dict[names[path.split("/", 1)[1]]] = np.zeros(shape, np.float32)
  assert (
    "backbone.conv1.weight" in state_dict
    and "backbone.layer2.0.downsample.1.running_var" in state_dict
  )
  state_dict["backbone.bn1.num_batches_tracked"] = np.zeros((), np.int64)
  filled, _ = torch_names.from_torch(state_dict, params, stats)
  assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, params)

  del state_dict["backbone.layer1.1.conv2.weight"]
  state_dict["classifier.weight"] = np.zeros((21, 256, 1, 1), np.float32)
  state_dict["backbone.fc.weight"] = np.zeros((1000, 512), np.float32)
  with pytest.raises(checks.InputError) as error:
    torch_names.from_torch(state_dict, params, stats)
  message = str(error.value)
  assert (
    "params/backbone/layer1_1/unit2/conv/kernel: got no tensor 'backbone.layer1.1.conv2.weight' in the file"
    in message
  )
  assert "(1, 1, 256, 21)" in message and "(1, 1, 256, 3)" in message
  assert "backbone.fc.weight of shape (1000, 512)" in message
