"""Xception-65 against the TensorFlow DeepLab library, with weights drawn from the names of its
variables (record_xception.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from record_xception import drawn, images

from pseudoseg_jax import optim
from pseudoseg_jax.models.tf_names import tf_name
from pseudoseg_jax.models.xception import Xception65


def tf_shape(path, shape):
  """There, depthwise kernels are [3, 3, C, 1]."""
  return (*shape[:2], shape[3], shape[2]) if path.endswith("/depthwise") else shape


@functools.cache
def leaves():
  """Every leaf of the backbone by path ("params/backbone/...", "batch_stats/backbone/..."), as its
  shape.
  """
  trees = jax.eval_shape(
    lambda: Xception65().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
  )
  nested = {kind: {"backbone": tree} for kind, tree in trees.items()}
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(nested, sep="/").items()}


def name_of(path):
  return tf_name(path.split("/", 1)[1], variant="xception65")


@functools.cache
def variables():
  values = {
    path: drawn(name_of(path), tf_shape(path, shape)).reshape(shape)
    for path, shape in leaves().items()
  }
  return {
    kind: tree["backbone"] for kind, tree in traverse_util.unflatten_dict(values, sep="/").items()
  }


def images_of(golden):
  return images(int(golden["input_seed"]), tuple(golden["input_shape"]))


@pytest.mark.golden("xception_65")
def test_variables_have_the_official_names_and_shapes(golden):
  ours = {name_of(path): tf_shape(path, shape) for path, shape in leaves().items()}
  shapes = [tuple(size for size in shape if size) for shape in golden["variables_shape"].tolist()]
  assert len(ours) == len(leaves())
  assert ours == dict(zip(golden["variables_name"].tolist(), shapes, strict=True))


@pytest.mark.golden("xception_65", case=r"case\d+")
def test_maps_of_the_backbone(golden):
  module = Xception65(int(golden["output_stride"]))
  maps = jax.jit(lambda variables, x: module.apply(variables, x, train=False))(
    variables(), images_of(golden)
  )
  with np.load(golden.path) as file:
    steps = file["map_steps"]
  for index, (got, (rows, columns, channels)) in enumerate(
    zip(map(np.asarray, maps), steps, strict=True)
  ):
    close = functools.partial(np.testing.assert_allclose, rtol=0, err_msg=f"map {index}")
    assert got.shape == tuple(golden[f"map{index}_shape"])
    close(got[:, ::rows, ::columns, ::channels], golden[f"map{index}"], atol=2e-4)
    close(got.mean(), golden[f"map{index}_mean"], atol=1e-6)
    close(got.std(), golden[f"map{index}_std"], atol=1e-5)


@pytest.mark.golden("xception_65")
def test_weight_decay_adds_up_alike(golden):
  flat = traverse_util.flatten_dict({"backbone": variables()["params"]}, sep="/")
  total = sum(
    float(np.sum(np.square(leaf))) for path, leaf in flat.items() if optim.decays(path, "kernels")
  )
  np.testing.assert_allclose(
    0.5 * float(golden["weight_decay"]) * total, golden["l2_total"], rtol=1e-5
  )


@pytest.mark.golden("xception_65")
def test_running_statistics_of_the_first_convolution_after_a_step(golden):
  case = {
    name.removeprefix("case0_"): value
    for name, value in golden.under("").items()
    if name.startswith("case0_")
  }

  @jax.jit  # of the whole step, XLA keeps the first convolution
  def step(variables, x):
    return Xception65().apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"][
      "conv1"
    ]["bn"]

  moved = step(variables(), images_of(case))
  # The step moves them by some 1e-4.
  np.testing.assert_allclose(moved["mean"], golden["train_moving_mean"], rtol=0, atol=3e-7)
  np.testing.assert_allclose(moved["var"], golden["train_moving_variance"], rtol=0, atol=3e-7)
