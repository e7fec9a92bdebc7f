"""The CPS network against the official code, with weights drawn from the names of the official state dict."""

import functools
import json
import zlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from pseudoseg_jax.models import table, torch_names
from pseudoseg_jax.ops import resize


def drawn(name, shape):
  """The weight rule of the recording: a normal draw seeded by the tensor's name, scaled by its kind."""
  n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if len(shape) == 4:
    n = n / np.sqrt(np.prod(shape[1:]))
  elif name.endswith(".weight"):
    n = 1 + 0.1 * n
  elif name.endswith("running_var"):
    n = 1 + 0.1 * abs(n)
  else:
    n = 0.1 * n
  return n.astype(np.float32)


def torch_shape(shape):
  return tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else tuple(shape)


@functools.cache
def network_and_weights(backbone, num_classes):
  network = table.make_network("deeplabv3plus", num_classes=num_classes, backbone=backbone)
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  leaves = traverse_util.flatten_dict({"params": params, "batch_stats": batch_stats}, sep="/")
  state_dict = {}
  for path, leaf in leaves.items():
    name = torch_names.torch_name(path.split("/", 1)[1], deep_stem=True)
    state_dict[name] = drawn(name, torch_shape(leaf.shape))
  return network, state_dict, torch_names.from_torch(state_dict, params, batch_stats)


def of(golden):
  return network_and_weights(str(golden["backbone"]), int(golden["num_classes"]))


def images_of(golden):
  x = np.random.default_rng(int(golden["input_seed"])).standard_normal(tuple(golden["input_shape"])).astype(np.float32)
  if "x" in golden:
    np.testing.assert_array_equal(x, golden["x"])
  return x.transpose(0, 2, 3, 1)


def nchw(x):
  return np.asarray(x).transpose(0, 3, 1, 2)


# Activation -> module whose output it is; the backbone gives all four stages at once.
MODULES = {
  "stem_conv": ("backbone", ("stem", "unit3", "conv")),
  "maxpool": ("backbone", ("stem",)),
  "aspp": ("head", ("aspp",)),
  "low_level_reduce": ("head", ("low",)),
  "last_conv": ("head", ("unit2",)),
  "classifier": ("head", ("classifier",)),
}


def forward_with_activations(golden):
  _, _, (params, batch_stats) = of(golden)
  parts = dict(zip(("backbone", "head"), table.deeplabv3plus(int(golden["num_classes"]), backbone=str(golden["backbone"]))))

  def part(name, params, batch_stats, x):
    wanted = {path for owner, path in MODULES.values() if owner == name}
    variables = {"params": params[name], "batch_stats": batch_stats[name]}
    y, captured = parts[name].apply(variables, x, train=False, capture_intermediates=lambda m, _: m.path in wanted)
    flat = traverse_util.flatten_dict(captured["intermediates"])
    return y, {path[:-1]: value[0] for path, value in flat.items()}

  @jax.jit
  def run(params, batch_stats, x):
    stages, in_backbone = part("backbone", params, batch_stats, x)
    scores, in_head = part("head", params, batch_stats, stages)
    return resize.bilinear_align_corners(scores, x.shape[1:3]), stages, {"backbone": in_backbone, "head": in_head}

  logits, stages, outputs = run(params, batch_stats, images_of(golden))
  acts = {name: nchw(outputs[owner][path]) for name, (owner, path) in MODULES.items()}
  acts |= {f"layer{i}": nchw(stage) for i, stage in enumerate(stages, start=1)}
  return nchw(logits), acts


@pytest.mark.golden("cps_net_r50")
def test_logits_and_activations_in_inference_mode(golden):
  logits, acts = forward_with_activations(golden)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
  for i, name in enumerate(golden["act_names"]):
    got = acts[name]
    assert str(got.shape) == golden["act_shapes"][i]
    for value, key in ((got.mean(), "mean"), (got.std(), "std"), (got.ravel()[:8], "first8"), (got.ravel()[-8:], "last8")):
      close(value, golden[f"act_{key}"][i], err_msg=f"{name} {key}")
  sampled = {
    "logits_0": logits[0],
    "logits_1_sub2": logits[-1, :, ::2, ::2],
    "logits_sub20": logits[:, :, ::20, ::20],
    "logits_mean": logits.mean(),
    "logits_std": logits.std(),
    "preupsample": acts["classifier"],
    "preupsample_sub3": acts["classifier"][:, :, ::3, ::3],
    "layer4_sub4_ch64": acts["layer4"][:, ::64, ::4, ::4],
    "aspp_sub4_ch16": acts["aspp"][:, ::16, ::4, ::4],
  }
  present = sampled.keys() & golden.keys()
  assert present
  for name in present:
    close(sampled[name], golden[name], err_msg=name)


@pytest.mark.golden("cps_net_r50")
def test_logits_and_running_statistics_in_training_mode(golden):
  if "train_logits_sub8" not in golden:
    pytest.skip(f"{golden.path.name} holds no training forward")
  network, _, (params, batch_stats) = of(golden)
  logits, moved = jax.jit(functools.partial(network.apply, train=True))(params, batch_stats, images_of(golden))
  np.testing.assert_allclose(nchw(logits)[:, :, ::8, ::8], golden["train_logits_sub8"], atol=5e-3)
  leaves = traverse_util.flatten_dict(moved, sep="/")
  ours = {torch_names.torch_name(path, deep_stem=True): value for path, value in leaves.items()}
  recorded = golden.under("train_after__")
  assert recorded
  for name, value in recorded.items():
    np.testing.assert_allclose(ours[name], value, atol=1e-4, err_msg=name)


@pytest.mark.golden("cps_net_r50")
def test_every_tensor_has_the_recorded_name_shape_value_and_decay(golden):
  record = json.loads((golden.path.parent / "cps_net_r50_params.json").read_text())
  network, state_dict, _ = of(golden)
  entries = {e["name"]: e for e in record["entries"] if not e["name"].endswith("num_batches_tracked")}
  assert state_dict.keys() == entries.keys()
  for name, entry in entries.items():
    assert state_dict[name].shape == tuple(entry["shape"]), name
    if "first3" in entry:
      assert zlib.crc32(name.encode()) == entry["crc32"]
      np.testing.assert_allclose(state_dict[name].ravel()[:3], entry["first3"], rtol=1e-6)
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == record["n_params"]
  # Weight decay goes by the leaf's name here: kernels decay, scales and biases do not, statistics are no parameters.
  kinds = {"kernel": "decay", "scale": "no_decay", "bias": "no_decay", "mean": "buffer", "var": "buffer"}
  for tree in (params, batch_stats):
    for path in traverse_util.flatten_dict(tree, sep="/"):
      assert entries[torch_names.torch_name(path, deep_stem=True)]["kind"] == kinds[path.rsplit("/", 1)[1]], path
