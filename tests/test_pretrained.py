"""Weights of others in our trees: small networks stand for large ones where only names and shapes
matter.
"""

import sys
import types

import jax
import numpy as np
import pytest

from pseudoseg_jax import checks
from pseudoseg_jax.models import checkpoint_files, pretrained, resnet, table, torch_names

STEMS = {
  "mmsegmentation": ["stem.0", "stem.1", "stem.3", "stem.4", "stem.6", "stem.7"],
  "torchcv": [
    "prefix.conv1",
    "prefix.bn1",
    "prefix.conv2",
    "prefix.bn2",
    "prefix.conv3",
    "prefix.bn3",
  ],
  "csail": ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"],
}
OURS = ["conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1"]


def shapes_of(network="deeplabv3plus", num_classes=3, **options):
  options = {"backbone": "resnet18"} | options
  network = table.make_network(network, num_classes=num_classes, **options)
  return pretrained.shapes_of(*jax.eval_shape(network.init, jax.random.key(0)))


def torch_file(shapes, names, prefix=""):
  """A state dict that holds exactly these leaves, in PyTorch's layout, with random values."""
  rng, tensors = np.random.default_rng(0), {}
  for key, shape in shapes.items():
    if name := names[key.split("/", 1)[1]]:
      value = rng.standard_normal(shape, np.float32)
      tensors[prefix + name] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
      if name.endswith("running_var"):
        tensors[prefix + name.replace("running_var", "num_batches_tracked")] = np.array(7)
  return tensors


def paths(shapes):
  return [key.split("/", 1)[1] for key in shapes]


@pytest.fixture(scope="module")
def backbone():
  """shapes of a network with a plain ResNet-18, and the file of such a backbone with its ImageNet
  classifier.
  """
  shapes = shapes_of(stem="plain")
  file = torch_file(shapes, torch_names.backbone_names(paths(shapes)))
  return shapes, file | {
    "fc.weight": np.zeros((1000, 512), np.float32),
    "fc.bias": np.zeros(1000, np.float32),
  }


@pytest.mark.parametrize(
  "prefix",
  ["", "module.", "state_dict.module.", "model.encoder.", "student.backbone.", "ema.branch1."],
)
def test_a_backbone_is_found_under_any_prefix(backbone, prefix):
  shapes, file = backbone
  values, report = pretrained.fit(
    {prefix + name: value for name, value in file.items()}, shapes, "deeplabv3plus"
  )
  assert set(values) == {key for key in shapes if "/backbone/" in key}
  np.testing.assert_array_equal(
    values["params/backbone/layer2_0/shortcut/conv/kernel"],
    file["layer2.0.downsample.0.weight"].transpose(2, 3, 1, 0),
  )
  np.testing.assert_array_equal(
    values["batch_stats/backbone/layer4_1/unit2/bn/var"], file["layer4.1.bn2.running_var"]
  )
  assert report.prefix == prefix


def test_every_tensor_and_every_leaf_is_accounted_for(backbone):
  shapes, file = backbone
  values, report = pretrained.fit(file, shapes, "deeplabv3plus")
  fresh = [key for keys in report.fresh.values() for key in keys]
  assert sorted([*report.loaded, *fresh]) == sorted(shapes) and {
    key.split("/")[1] for key in fresh
  } == {"head"}
  dropped = {reason: len(names) for reason, names in report.dropped.items()}
  # a ResNet-18 has 20 batch norms.
  assert dropped == {"batch counters": 20, "not the network's: fc": 2}
  assert len(file) == len(values) + 22
  assert "loaded 100 of the backbone" in str(report) and "no such head" in str(report)


@pytest.mark.parametrize("code", STEMS)
def test_deep_stems_of_other_codes(code):
  shapes = shapes_of(stem="deep")
  file = torch_file(shapes, torch_names.backbone_names(paths(shapes)))
  theirs = dict(zip(OURS, STEMS[code], strict=True))
  renamed = {}
  for name, value in file.items():
    module, _, leaf = name.rpartition(".")
    renamed[f"{theirs.get(module, module)}.{leaf}"] = value
  values, _ = pretrained.fit(renamed, shapes, "deeplabv3plus")
  want, _ = pretrained.fit(file, shapes, "deeplabv3plus")
  assert values.keys() == want.keys() and all(
    np.array_equal(values[key], want[key]) for key in want
  )
  assert pretrained.guess(renamed)[0] == {
    "name": "deeplabv3plus",
    "backbone": "resnet18",
    "stem": "deep",
  }


@pytest.mark.parametrize(
  "network", ["deeplabv3plus", "deeplabv3plus_unimatch", "pspnet", "pspnet_pixelssl"]
)
def test_published_networks_with_their_heads(network):
  shapes = shapes_of(network, num_classes=5)
  file = torch_file(shapes, torch_names.names(paths(shapes), network), prefix="model.module.")
  values, report = pretrained.fit(file, shapes, network)
  assert set(values) == set(shapes) and not report.fresh
  guessed, num_classes = pretrained.guess(file)
  assert (guessed["name"], guessed["backbone"], num_classes) == (network, "resnet18", 5)


def test_of_several_networks_in_a_file_one_is_named():
  shapes = shapes_of()
  one = torch_file(shapes, torch_names.names(paths(shapes), "deeplabv3plus"))
  file = {f"model.branch1.{name}": value for name, value in one.items()}
  file |= {f"model.branch2.{name}": value + 1 for name, value in one.items()}
  key = "params/head/classifier/bias"
  first, report = pretrained.fit(file, shapes, "deeplabv3plus")
  assert report.prefix == "model.branch1." and report.others == ("model.branch2.",)
  second, _ = pretrained.fit(file, shapes, "deeplabv3plus", among="branch2")
  np.testing.assert_array_equal(second[key], first[key] + 1)


def test_another_class_count_leaves_the_whole_head_fresh():
  shapes = shapes_of(num_classes=3)
  file = torch_file(shapes_of(num_classes=4), torch_names.names(paths(shapes), "deeplabv3plus"))
  values, report = pretrained.fit(file, shapes, "deeplabv3plus")
  assert set(values) == {key for key in shapes if "/backbone/" in key}
  (reason,) = report.fresh
  assert "class count" in reason and "classifier" in reason


def test_a_head_of_another_code_is_left_fresh():
  theirs = shapes_of("deeplabv3plus_unimatch")
  file = torch_file(theirs, torch_names.names(paths(theirs), "deeplabv3plus_unimatch"))
  values, report = pretrained.fit(file, shapes_of(), "deeplabv3plus")
  assert {key.split("/")[1] for key in values} == {"backbone"} and "another one" in str(report)


def test_grey_images_get_the_sum_over_colors(backbone):
  _, file = backbone
  shapes = shapes_of(stem="plain", in_channels=1)
  values, report = pretrained.fit(file, shapes, "deeplabv3plus")
  got = values["params/backbone/stem/unit1/conv/kernel"]
  np.testing.assert_allclose(
    got[..., 0, :], file["conv1.weight"].sum(1).transpose(1, 2, 0), rtol=1e-5, atol=1e-6
  )
  assert "summed" in str(report)


def test_other_channels_leave_the_first_convolution_fresh(backbone):
  shapes = shapes_of(stem="plain", in_channels=5)
  values, report = pretrained.fit(backbone[1], shapes, "deeplabv3plus")
  assert "params/backbone/stem/unit1/conv/kernel" not in values and len(values) == 99
  assert "5 channels here" in str(report)


def test_our_own_file_comes_back_equal(backbone, tmp_path):
  shapes, file = backbone
  values, _ = pretrained.fit(file, shapes, "deeplabv3plus")
  (tmp_path / "ours.safetensors").write_bytes(checkpoint_files.to_safetensors(values, {}))
  again, report = pretrained.fit(
    pretrained.read(str(tmp_path / "ours.safetensors")), shapes, "deeplabv3plus"
  )
  assert again.keys() == values.keys() and all(
    np.array_equal(again[key], values[key]) for key in values
  )
  assert report.layout == "our own layout" and not report.dropped


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("ours", "theirs", "said"),
  [
    ({"stem": "deep"}, {"stem": "plain"}, ["--config.network.stem=plain", "conv1.0.weight"]),
    ({"stem": "plain"}, {"stem": "deep"}, ["--config.network.stem=deep", "conv1.6.weight"]),
    (
      {"backbone": "resnet18"},
      {"backbone": "resnet34"},
      ["config.network.backbone", "layer1.2.conv1.weight", "not used"],
    ),
    (
      {"backbone": "resnet34"},
      {"backbone": "resnet18"},
      ["config.network.backbone", "no tensor 'layer3.2.conv1.weight'"],
    ),
  ],
)
def test_another_backbone_is_one_error_with_the_remedy(ours, theirs, said):
  theirs = shapes_of(**theirs)
  file = torch_file(theirs, torch_names.backbone_names(paths(theirs)))
  with pytest.raises(checks.InputError) as error:
    pretrained.fit(file, shapes_of(**ours), "deeplabv3plus", where="file.pth")
  # Only the first 20 of many problems are shown.
  text = str(error.value)
  assert (
    said[0] in text
    and "file.pth" in text
    and ("more" in text or all(part in text for part in said))
  ), text


def test_a_narrow_deep_stem_is_told():
  shapes = shapes_of(stem="deep")
  file = torch_file(shapes, torch_names.backbone_names(paths(shapes)))
  file |= {
    "conv1.0.weight": file["conv1.0.weight"][:32],
    "conv1.3.weight": file["conv1.3.weight"][:32, :32],
  }
  with pytest.raises(checks.InputError, match="32, 32, 64"):
    pretrained.fit(file, shapes, "deeplabv3plus")


@pytest.mark.parametrize("network", ["tiny", "deeplabv3plus_tf"])
def test_networks_without_pytorch_code_take_only_our_own_files(network, backbone):
  options = {"backbone": "resnet50"} if network == "deeplabv3plus_tf" else {}
  built = table.make_network(network, num_classes=3, **options)
  shapes = pretrained.shapes_of(*jax.eval_shape(built.init, jax.random.key(0)))
  with pytest.raises(checks.InputError, match="no known layout"):
    pretrained.fit(backbone[1], shapes, network)
  own = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
  assert len(pretrained.fit(own, shapes, network)[0]) == len(shapes)


def test_the_hub_is_asked_for_the_named_file(monkeypatch, tmp_path, backbone):
  asked = []

  def download(repository, file):
    asked.append((repository, file))
    if repository == "timm/none":
      raise OSError("offline")
    return str(tmp_path / "w.safetensors")

  (tmp_path / "w.safetensors").write_bytes(checkpoint_files.to_safetensors(backbone[1], {}))
  hub = types.ModuleType("huggingface_hub")
  hub.hf_hub_download = download
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  assert len(pretrained.read("hf://timm/resnet18")) == len(backbone[1])
  pretrained.read("hf://timm/resnet18/sub/other.safetensors")
  assert asked == [
    ("timm/resnet18", "model.safetensors"),
    ("timm/resnet18", "sub/other.safetensors"),
  ]
  with pytest.raises(checks.InputError, match="offline"):
    pretrained.read("hf://timm/none")
  with pytest.raises(checks.InputError, match="hf://organisation/name"):
    pretrained.read("hf://timm")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(checks.InputError, match="pip install"):
    pretrained.read("hf://timm/resnet18")


# --- with PyTorch, where it is installed ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_features_of_torchvision_are_reproduced(form, tmp_path):
  torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
  torch.manual_seed(0)
  model = torchvision.models.resnet50(weights=None).eval()
  if form == "safetensors":
    path = tmp_path / "r50.safetensors"
    pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
  else:
    path = tmp_path / "r50.pth"
    torch.save(
      {"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=form == "zip"
    )
  values, _ = pretrained.fit(
    pretrained.read(str(path)), shapes_of(backbone="resnet50", stem="plain"), "deeplabv3plus"
  )
  trees = {kind: tree["backbone"] for kind, tree in pretrained.unflat(values).items()}
  images = np.random.default_rng(0).standard_normal((1, 65, 97, 3), np.float32)
  got = resnet.ResNet("resnet50", "plain", 32).apply(trees, images, train=False)[-1]
  with torch.no_grad():
    want = torch.nn.Sequential(*list(model.children())[:-2])(
      torch.from_numpy(images.transpose(0, 3, 1, 2))
    )
  want = want.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_the_trunk_of_timm_loads(tmp_path):
  torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
  torch.save(timm.create_model("hrnet_w18", pretrained=False).state_dict(), tmp_path / "w18.pth")
  values, report = pretrained.fit(
    pretrained.read(str(tmp_path / "w18.pth")), shapes_of("hrnet", backbone="hrnet_w18"), "hrnet"
  )
  assert {key.split("/")[1] for key in values} == {"backbone"} and "incre_modules" in str(report)
