"""The PseudoSeg network against the official code, with weights drawn from the names of the
official variables.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from record_xception import drawn

from pseudoseg_jax import optim
from pseudoseg_jax.models import deeplab_tf, heads, table, tf_names
from pseudoseg_jax.ops import cam as cams

CHANNELS = {"block3": 1024, "block4": 2048}


def entries_of(golden):
  record = json.loads((golden.path.parent / "pseudoseg_net_r50beta_params.json").read_text())
  assert len(record["entries"]) == record["n_entries"]
  return record["entries"]


def parts_of(golden):
  """Network, classifier and attention."""
  num_classes = int(golden["num_classes"])
  multi_grid = tuple(int(factor) for factor in golden["multi_grid"])
  network = table.compose(*deeplab_tf.deeplabv3plus_tf(num_classes, multi_grid=multi_grid))
  classifier = heads.image_classifier(CHANNELS["block4"], num_classes - 1)
  attention = heads.self_attention(sum(CHANNELS.values()), num_classes)
  return network, classifier, attention


def shapes_of(golden):
  network, *added = parts_of(golden)
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  for name, head in zip(("classifier", "attention"), added, strict=True):
    more, more_stats = jax.eval_shape(head.init, jax.random.key(0))
    params, batch_stats = (
      params | {name: more},
      batch_stats | ({name: more_stats} if more_stats else {}),
    )
  return params, batch_stats


def weights_of(golden):
  """Every recorded variable; `from_tf` insists that they are ours, in name and shape, and that none
  is left.
  """
  variables = {entry["name"]: drawn(entry["name"], entry["shape"]) for entry in entries_of(golden)}
  return tf_names.from_tf(variables, *shapes_of(golden))


_forwards = {}


def forward_of(golden):
  """Maps, scores, classifier logits, maps of classes and of attention; one compilation a file."""
  if golden.path not in _forwards:
    network, classifier, attention = parts_of(golden)

    @jax.jit
    def forward(params, batch_stats, images):
      maps, _ = network.encode(params, batch_stats, images, train=False)
      scores, _ = network.decode(params, batch_stats, maps, train=False)
      deepest = maps[-1]
      logits, _ = classifier.apply(params["classifier"], {}, deepest, train=False)
      cam = cams.class_activation_maps(
        deepest, params["classifier"]["kernel"], (logits >= 0).astype(jnp.float32)
      )
      features = jnp.concatenate([deepest, maps[-2]], axis=-1)
      valid = jnp.ones(deepest.shape[:3], bool)
      sgc, _ = attention.apply(
        params["attention"], batch_stats["attention"], features, cam, valid, train=False
      )
      return {
        "maps": maps,
        "logits": scores,
        "cls_logits": logits,
        "sgc": sgc,
        "cam": cams.with_background(cam),
      }

    shape, seed = tuple(golden["input_shape"]), int(golden["input_seed"])
    images = (255 * np.random.default_rng(seed).random(shape)).astype(np.float32)
    _forwards[golden.path] = forward(*weights_of(golden), images / 127.5 - 1)
  return _forwards[golden.path]


def compare(golden, name, got, tolerance):
  """With the array `name`, or with `name_sub2`, `name_sub3`: every second, third pixel."""
  step, recorded = next(
    (n, golden[key]) for n in (1, 2, 3) if (key := name if n == 1 else f"{name}_sub{n}") in golden
  )
  np.testing.assert_allclose(
    got[:, ::step, ::step] if got.ndim == 4 else got, recorded, rtol=0, atol=tolerance
  )


@pytest.mark.golden("pseudoseg_net_r50beta")
def test_maps_of_the_backbone(golden):
  low, *blocks = forward_of(golden)["maps"]
  ours = {f"block{i}": block for i, block in enumerate(blocks, start=1)} | {
    "block1/unit_2/bottleneck_v1/conv3": low
  }
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
  for i, name in enumerate(golden["act_names"]):
    got = np.asarray(ours[name.removeprefix("resnet_v1_50/")])
    assert str(got.shape) == golden["act_shapes"][i], name
    for value, key in ((got.mean(), "mean"), (got.std(), "std"), (got.ravel()[:8], "first8")):
      close(value, golden[f"act_{key}"][i], err_msg=f"{name} {key}")


@pytest.mark.golden("pseudoseg_net_r50beta")
def test_scores_of_the_decoder(golden):
  compare(golden, "logits", forward_of(golden)["logits"], 2e-5)


@pytest.mark.golden("pseudoseg_net_r50beta")
def test_classifier_and_its_class_activation_maps(golden):
  got = forward_of(golden)
  compare(golden, "cls_logits", got["cls_logits"], 2e-5)
  compare(golden, "cam_with_background", got["cam"], 2e-4)


@pytest.mark.golden("pseudoseg_net_r50beta")
def test_self_attention_on_the_network(golden):
  compare(golden, "sgc_logits", forward_of(golden)["sgc"], 1e-3)


@pytest.mark.golden("pseudoseg_net_r50beta")
def test_weight_decay_acts_on_the_same_variables_and_adds_up_alike(golden):
  kinds = {entry["name"]: entry["kind"] for entry in entries_of(golden)}
  params, batch_stats = weights_of(golden)
  total = 0.0
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    decays = optim.decays(path, "kernels")
    assert kinds.pop(tf_names.tf_name(path, variant="resnet50")) == (
      "decay" if decays else "no_decay"
    ), path
    total += decays * float(jnp.sum(jnp.square(leaf)))
  for path in traverse_util.flatten_dict(batch_stats, sep="/"):
    assert kinds.pop(tf_names.tf_name(path, variant="resnet50")) == "buffer", path
  assert not kinds
  np.testing.assert_allclose(
    0.5 * float(golden["weight_decay"]) * total, golden["l2_total"], rtol=1e-5
  )
