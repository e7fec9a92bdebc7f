"""EfficientNet-Lite against the PyPI package efficientnet_lite_pytorch, with weights drawn from the
names of its state dict.

Any version: the recording names it.
"""

import functools

import jax
import numpy as np
import pytest
import recorded_net as recorded
from flax import traverse_util

from pseudoseg_jax.models import efficientnet, table, torch_names

NAMES = "efficientnet_lite"


@functools.cache
def weights(version, gain):
  """The modules, their network, the recorded weights under their names, and (params,
  batch_stats).
  """
  backbone, head = (
    efficientnet.EfficientNetLite(version, output_stride=32),
    efficientnet.ImageClassifier(),
  )
  network = table.compose(backbone, head, lambda logits, size: logits)
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  leaves = traverse_util.flatten_dict(params | {"": batch_stats}, sep="/")
  shapes = {
    path.removeprefix("/"): recorded.torch_shape(leaf.shape) for path, leaf in leaves.items()
  }
  theirs = torch_names.names(shapes, NAMES)
  state_dict = {
    theirs[path]: recorded.drawn(theirs[path], shape, gain) for path, shape in shapes.items()
  }
  return (
    (backbone, head),
    network,
    state_dict,
    torch_names.from_torch(state_dict, params, batch_stats, NAMES),
  )


def of(golden):
  return weights(f"efficientnet_{golden['version']}", float(golden["weight_gain"]))


@pytest.mark.golden("efficientnet_lite")
def test_logits_and_activations_in_inference_mode(golden):
  (backbone, head), _, _, (params, stats) = of(golden)

  @functools.partial(jax.jit, compiler_options=recorded.QUICKLY)
  def run(params, stats, images):
    def part(owner, module, x):
      # stem, block0, ...; of the head its unit.
      units = lambda m, _: m.path and "/" not in "/".join(m.path)
      variables = {"params": params[owner], "batch_stats": stats[owner]}
      return module.apply(variables, x, train=False, capture_intermediates=units)

    maps, first = part("backbone", backbone, images)
    logits, second = part("head", head, maps)
    outputs = {
      name: value["__call__"][0]
      for name, value in (first["intermediates"] | second["intermediates"]).items()
      if name != "__call__"
    }
    return logits, outputs

  logits, outputs = run(params, stats, recorded.images_of(golden))
  outputs = {name: recorded.nchw(value) for name, value in outputs.items() if name != "classifier"}
  outputs["head"] = outputs.pop("unit")
  assert sorted(outputs) == sorted(golden["act_names"])
  # These drawn weights amplify rounding: against the same weights in float64 the recording
  # package's own float32 is off by up to 0.4 % (Lite0) to 4 % (Lite1, Lite2) of a map's deviation
  # and 0.1 % of the largest logit.
  atol = {
    name: 0.04 * max(0.005, deviation)
    for name, deviation in zip(golden["act_names"], golden["act_std"], strict=True)
  }
  for name, output in outputs.items():
    recorded.check_activations(golden, {name: output}, atol[name])
    if f"{name}_sub3" in golden:
      np.testing.assert_allclose(
        output[:, :, ::3, ::3], golden[f"{name}_sub3"], rtol=0, atol=atol[name], err_msg=name
      )
  np.testing.assert_allclose(
    logits, golden["logits"], rtol=0, atol=3e-3 * np.abs(golden["logits"]).max()
  )


@pytest.mark.golden("efficientnet_lite")
def test_head_and_running_statistics_in_training_mode(golden):
  if "train_head_sub" not in golden:
    pytest.skip(f"{golden.path.name} holds no training forward")
  (backbone, head), _, _, (params, stats) = of(golden)

  @functools.partial(jax.jit, compiler_options=recorded.QUICKLY)
  def run(params, stats, images):
    variables = {name: {"params": params[name], "batch_stats": stats[name]} for name in params}
    maps, moved = backbone.apply(variables["backbone"], images, train=True, mutable=["batch_stats"])
    units = lambda m, _: m.path == ("unit",)
    _, head_moved = head.apply(
      variables["head"],
      maps,
      train=True,
      mutable=["batch_stats", "intermediates"],
      capture_intermediates=units,
    )
    return head_moved["intermediates"]["unit"]["__call__"][0], {
      "backbone": moved["batch_stats"],
      "head": head_moved["batch_stats"],
    }

  features, moved = run(params, stats, recorded.images_of(golden))
  features = recorded.nchw(features)
  np.testing.assert_allclose(features[:, ::16], golden["train_head_sub"], rtol=0, atol=2e-3)
  np.testing.assert_allclose(features.mean(), golden["train_head_mean"], rtol=0, atol=2e-3)
  recorded.check_statistics(golden, moved, NAMES, 1e-4)


@pytest.mark.golden("efficientnet_lite")
def test_every_tensor_has_the_recorded_name_and_shape(golden):
  record = golden.path.parent / f"efficientnet_{golden['version']}_params.json"
  if not record.is_file():
    pytest.skip(f"no {record.name} beside the recording")
  recorded.check_tensors(record, of(golden)[2], float(golden["weight_gain"]))
