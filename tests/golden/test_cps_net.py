"""The CPS network against the official code, with weights drawn from the names of the official
state dict.
"""

import functools
import json

import jax
import numpy as np
import pytest
import recorded_net as recorded
from flax import traverse_util

from pseudoseg_jax.models import torch_names

NAME = "deeplabv3plus"
WATCHED = {
  "stem_conv": "backbone/stem/unit3/conv",
  "maxpool": "backbone/stem",
  "aspp": "head/aspp",
  "low_level_reduce": "head/low",
  "last_conv": "head/unit2",
}


def weights_of(golden):
  return recorded.weights(NAME, int(golden["num_classes"]), backbone=str(golden["backbone"]))


@pytest.mark.golden("cps_net_r50")
def test_logits_and_activations_in_inference_mode(golden):
  images, options = recorded.images_of(golden), {"backbone": str(golden["backbone"])}
  scores, maps, outputs = recorded.forward(
    NAME, int(golden["num_classes"]), images, WATCHED.values(), **options
  )
  acts = {name: outputs[path] for name, path in WATCHED.items()} | {"classifier": scores}
  acts |= dict(zip(("layer1", "layer2", "layer3", "layer4"), maps, strict=True))
  assert acts.keys() == set(golden["act_names"])
  recorded.check_activations(golden, acts, 1e-4)
  logits = recorded.nchw(
    weights_of(golden)[0].upsample(scores.transpose(0, 2, 3, 1), images.shape[1:3])
  )
  sampled = {
    "logits_0": logits[0],
    "logits_1_sub2": logits[-1, :, ::2, ::2],
    "logits_sub20": logits[:, :, ::20, ::20],
    "logits_mean": logits.mean(),
    "logits_std": logits.std(),
    "preupsample": scores,
    "preupsample_sub3": scores[:, :, ::3, ::3],
    "layer4_sub4_ch64": acts["layer4"][:, ::64, ::4, ::4],
    "aspp_sub4_ch16": acts["aspp"][:, ::16, ::4, ::4],
  }
  present = sampled.keys() & golden.keys()
  assert present
  for name in present:
    np.testing.assert_allclose(sampled[name], golden[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.golden("cps_net_r50")
def test_logits_and_running_statistics_in_training_mode(golden):
  if "train_logits_sub8" not in golden:
    pytest.skip(f"{golden.path.name} holds no training forward")
  network, _, (params, batch_stats) = weights_of(golden)
  logits, moved = jax.jit(functools.partial(network.apply, train=True))(
    params, batch_stats, recorded.images_of(golden)
  )
  np.testing.assert_allclose(
    recorded.nchw(logits)[:, :, ::8, ::8], golden["train_logits_sub8"], atol=5e-3
  )
  recorded.check_statistics(golden, moved, NAME, 1e-4)


@pytest.mark.golden("cps_net_r50")
def test_every_tensor_has_the_recorded_name_shape_value_and_decay(golden):
  record_file = golden.path.parent / "cps_net_r50_params.json"
  network, state_dict, _ = weights_of(golden)
  recorded.check_tensors(record_file, state_dict)
  entries = {entry["name"]: entry for entry in json.loads(record_file.read_text())["entries"]}
  # Weight decay goes by the leaf's name here: kernels decay, scales and biases do not, statistics
  # are no parameters.
  kinds = {
    "kernel": "decay",
    "scale": "no_decay",
    "bias": "no_decay",
    "mean": "buffer",
    "var": "buffer",
  }
  trees = jax.eval_shape(network.init, jax.random.key(0))
  leaves = [path for tree in trees for path in traverse_util.flatten_dict(tree, sep="/")]
  for path, name in torch_names.names(leaves, NAME).items():
    assert entries[name]["kind"] == kinds[path.rsplit("/", 1)[1]], path
