"""Records data/xception_65.npz from the public TensorFlow code of DeepLab's Xception-65.

The public code is that of googleinterns/wss at b01acaf (third_party/deeplab/core/xception.py), run
with TensorFlow 2.12.1 (CPU) and tf_slim 1.1.0:

  python tests/golden/record_xception.py WSS_CHECKOUT tests/golden/data/xception_65.npz

That code was written for TensorFlow 1; here its `tensorflow` is `tf.compat.v1` and its
`tensorflow.contrib` is tf_slim. A module of MobileNet blocks, which Xception-65 does not call, is
left empty. No arithmetic is replaced.

Arrays:
  variables_name, variables_shape: every variable of the network, shapes padded with 0 to four
    numbers.
  weight_decay, l2_total: the network's regularisation terms and their sum (weights below).
  case*_output_stride, _input_seed, _input_shape: inference on default_rng(seed).uniform(-1, 1,
  shape) as f32. case*_map{i}: the decoder's low-level tap, then the ends of the six blocks: MAPS[i]
  at every map_steps[i]-th row, column and
    channel. case*_map{i}_shape, _mean, _std: of the full map.
  train_moving_mean, train_moving_variance: of the first convolution's batch norm after one step on
    the input of case 0.

Sizes are such that strided convolutions meet even and odd maps, and dilations differ in what they
see at both output strides.

Weights are drawn by `drawn`. Tolerance: absolute 2e-4 on float32, for maps within +-5. Another
float32 implementation differs by 1e-5 at most; the least visible mistake that was tried, an epsilon
of 1e-5 in the batch norms, moves every map by 1e-3 or more.
"""

import pathlib
import sys
import types
import zlib

import numpy as np

CASES = (
  {"output_stride": 16, "shape": (1, 97, 126, 3)},
  {"output_stride": 8, "shape": (1, 65, 64, 3)},
)
MAPS = (
  "entry_flow/block2/unit_1/xception_module/separable_conv2_pointwise",
  "entry_flow/block1",
  "entry_flow/block2",
  "entry_flow/block3",
  "middle_flow/block1",
  "exit_flow/block1",
  "exit_flow/block2",
)
# Steps in height, width and channels: coarse where maps are large; the three deepest are kept at
# every position.
MAP_STEPS = ((5, 5, 16), (9, 9, 16), (5, 5, 32), (2, 2, 64), (1, 1, 64), (1, 1, 64), (1, 1, 64))


def drawn(name, shape):
  """A normal draw seeded by the variable's name, scaled by its kind."""
  n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  kind = name.rsplit("/", 1)[1]
  if kind == "weights":
    n = n / np.sqrt(np.prod(shape[:-1]))
  elif kind == "depthwise_weights":
    n = n / np.sqrt(shape[0] * shape[1])
  elif kind == "gamma":
    n = 1 + 0.1 * n
  elif kind == "moving_variance":
    n = 1 + 0.1 * abs(n)
  else:
    n = 0.1 * n
  return n.astype(np.float32)


def images(seed, shape):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def official_code(checkout):
  """(tf, xception): TensorFlow's v1 interface and the official module, found under the names it
  imports.
  """
  import tensorflow
  import tensorflow.compat.v1 as tf
  import tf_slim
  from tf_slim.nets import resnet_utils

  def module(name, **attributes):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(attributes)

  sys.modules["tensorflow"] = tf
  module("tensorflow.contrib", slim=tf_slim, framework=tf_slim)
  module("tensorflow.contrib.slim.nets", resnet_utils=resnet_utils)
  for package in ("slim", "slim.nets", "slim.nets.mobilenet"):
    module(f"third_party.{package}")
  module("third_party.slim.nets.mobilenet.conv_blocks")
  sys.modules["third_party.slim.nets.mobilenet"].conv_blocks = sys.modules[
    "third_party.slim.nets.mobilenet.conv_blocks"
  ]
  sys.path.insert(0, str(checkout))
  from third_party.deeplab.core import xception

  sys.modules["tensorflow"] = tensorflow  # TensorFlow itself loads parts of it later
  return tf, xception


def run(tf, xception, x, output_stride, train=False):
  """Builds and runs the network; returns its maps, (name, shape) of its variables, the L2 sum and
  the first moving statistics.
  """
  import tf_slim

  with tf.Graph().as_default(), tf.Session() as session:
    with tf_slim.arg_scope(xception.xception_arg_scope()):  # its defaults are what DeepLab passes
      _, end_points = xception.xception_65(
        tf.constant(x),
        is_training=train,
        global_pool=False,
        output_stride=output_stride,
        scope="xception_65",
      )
    variables = {v.op.name: v for v in tf.global_variables()}
    values = {
      v.initializer.inputs[1]: drawn(name, v.shape.as_list()) for name, v in variables.items()
    }
    session.run([v.initializer for v in variables.values()], values)
    l2_total = session.run(tf.add_n(tf.get_collection(tf.GraphKeys.REGULARIZATION_LOSSES)))
    maps = session.run([end_points[f"xception_65/{name}"] for name in MAPS])
    if train:
      session.run(tf.get_collection(tf.GraphKeys.UPDATE_OPS))
    first = session.run(
      [
        variables[f"xception_65/entry_flow/conv1_1/BatchNorm/moving_{kind}"]
        for kind in ("mean", "variance")
      ]
    )
    return (
      maps,
      {name: tuple(variable.shape.as_list()) for name, variable in variables.items()},
      l2_total,
      first,
    )


def record(tf, xception):
  arrays = {"weight_decay": 0.00004}  # xception_arg_scope's default
  for index, case in enumerate(CASES):
    maps, shapes, l2_total, _ = run(
      tf, xception, images(index, case["shape"]), case["output_stride"]
    )
    arrays |= {
      f"case{index}_output_stride": case["output_stride"],
      f"case{index}_input_seed": index,
      f"case{index}_input_shape": case["shape"],
    }
    for number, (x, (rows, columns, channels)) in enumerate(zip(maps, MAP_STEPS, strict=True)):
      name = f"case{index}_map{number}"
      arrays |= {
        name: x[:, ::rows, ::columns, ::channels],
        f"{name}_shape": x.shape,
        f"{name}_mean": x.mean(),
        f"{name}_std": x.std(),
      }
  arrays["variables_name"] = np.array(list(shapes))
  arrays["variables_shape"] = np.array(
    [shape + (0,) * (4 - len(shape)) for shape in shapes.values()]
  )
  arrays["l2_total"] = l2_total
  _, _, _, (mean, variance) = run(
    tf, xception, images(0, CASES[0]["shape"]), CASES[0]["output_stride"], train=True
  )
  return arrays | {
    "train_moving_mean": mean,
    "train_moving_variance": variance,
    "map_steps": MAP_STEPS,
  }


if __name__ == "__main__":
  checkout, target = map(pathlib.Path, sys.argv[1:])
  np.savez_compressed(target, **record(*official_code(checkout)))
