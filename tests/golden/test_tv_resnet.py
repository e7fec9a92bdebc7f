"""Plain ResNets against torchvision, with weights drawn from the names of their state dicts."""

import functools

import jax
import numpy as np
import pytest
import recorded_net as recorded
from flax import traverse_util

from pseudoseg_jax.models import heads, resnet, torch_names

# torchvision's replace_stride_with_dilation -> output stride
OUTPUT_STRIDES = {(False, False, False): 32, (False, False, True): 16, (False, True, True): 8}


def parts_of(golden):
  dilated = tuple(bool(stage) for stage in golden["replace_stride_with_dilation"])
  backbone = resnet.ResNet(str(golden["arch"]), "plain", OUTPUT_STRIDES[dilated])
  channels = 2048 if str(golden["arch"]) in resnet.BOTTLENECK else 512
  return backbone, heads.image_classifier(channels, int(golden["num_classes"]))


@functools.cache
def weights(arch, num_classes):
  """Recorded tensors by name, and ours: (variables of the backbone, parameters of the
  classifier).
  """
  shapes = jax.eval_shape(
    lambda: resnet.ResNet(arch).init(
      jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False
    )
  )
  leaves = traverse_util.flatten_dict(shapes)
  paths = {leaf: "/".join(("backbone", *leaf[1:])) for leaf in leaves}
  theirs = torch_names.backbone_names(paths.values())
  state_dict = {
    theirs[paths[leaf]]: recorded.torch_shape(array.shape) for leaf, array in leaves.items()
  }
  state_dict |= {
    "fc.weight": (num_classes, 2048 if arch in resnet.BOTTLENECK else 512),
    "fc.bias": (num_classes,),
  }
  state_dict = {name: recorded.drawn(name, shape) for name, shape in state_dict.items()}
  ours = {leaf: torch_names.to_ours(state_dict[theirs[path]], path) for leaf, path in paths.items()}
  fc = {
    leaf: torch_names.to_ours(state_dict[name], leaf)
    for leaf, name in (("kernel", "fc.weight"), ("bias", "fc.bias"))
  }
  return state_dict, (traverse_util.unflatten_dict(ours), fc)


def of(golden):
  return weights(str(golden["arch"]), int(golden["num_classes"]))


@pytest.mark.golden("tv_resnet")
def test_stages_and_class_logits_in_inference_mode(golden):
  (backbone, classifier), (_, (variables, fc)) = parts_of(golden), of(golden)

  @jax.jit
  def run(variables, fc, images):
    stages = backbone.apply(variables, images, train=False)
    return stages, classifier.apply(fc, {}, stages[-1], train=False)[0]

  stages, logits = run(variables, fc, recorded.images_of(golden))
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-4)
  close(logits, golden["logits"])
  stages = {f"layer{i}": recorded.nchw(stage) for i, stage in enumerate(stages, start=1)}
  recorded.check_activations(golden, stages, 2e-4)
  close(stages["layer4"].mean((2, 3)), golden["pooled"])
  close(stages["layer1"][:, ::16, ::3, ::3], golden["layer1_ch16_sub3"])
  close(stages["layer2"][:, ::16, ::2, ::2], golden["layer2_ch16_sub2"])
  close(stages["layer3"][:, ::16], golden["layer3_ch16"])
  close(stages["layer4"][:, ::32], golden["layer4_ch32"])


@pytest.mark.golden("tv_resnet")
def test_class_logits_and_running_statistics_in_training_mode(golden):
  if "train_logits" not in golden:
    pytest.skip(f"{golden.path.name} holds no training forward")
  (backbone, classifier), (_, (variables, fc)) = parts_of(golden), of(golden)
  run = jax.jit(functools.partial(backbone.apply, train=True, mutable=["batch_stats"]))
  stages, moved = run(variables, recorded.images_of(golden))
  logits, _ = classifier.apply(fc, {}, stages[-1], train=True)
  np.testing.assert_allclose(logits, golden["train_logits"], rtol=0, atol=1e-3)
  leaves = traverse_util.flatten_dict({"backbone": moved["batch_stats"]}, sep="/")
  after = {name: leaves[path] for path, name in torch_names.backbone_names(leaves).items()}
  for name, value in golden.under("train_after__").items():
    np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.golden("tv_resnet")
def test_every_tensor_has_the_recorded_name_and_shape(golden):
  file = golden.path.with_name(f"{golden.path.stem.removesuffix('_dilated')}_params.json")
  if golden.path.stem.endswith("_dilated"):
    pytest.skip("the record is of the network that is not dilated; the class counts differ")
  recorded.check_tensors(file, of(golden)[0])
