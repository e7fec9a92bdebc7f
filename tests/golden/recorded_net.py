"""Whole networks recorded with weights drawn from the names of their tensors: the same weights and
inputs here.
"""

import functools
import json
import zlib

import jax
import numpy as np
from flax import traverse_util

from pseudoseg_jax.models import table, torch_names

# Compiling is what takes the time here: 27 s for HRNet, 10 s with little optimisation.
QUICKLY = {"xla_backend_optimization_level": 0}


def drawn(name, shape, gain=1.0):
  """The weight rule of the recordings: a normal draw seeded by the tensor's name, scaled by its
  kind; gain: of convolutions.
  """
  n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if len(shape) == 4:
    n = gain * n / np.sqrt(np.prod(shape[1:]))
  elif len(shape) == 2:
    n = n / np.sqrt(shape[1])
  elif name.endswith(".weight"):
    n = 1 + 0.1 * n
  elif name.endswith("running_var"):
    n = 1 + 0.1 * abs(n)
  else:
    n = 0.1 * n
  return n.astype(np.float32)


def torch_shape(shape):
  return tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else tuple(shape)[::-1]


def images_of(golden):
  x = (
    np.random.default_rng(int(golden["input_seed"]))
    .standard_normal(tuple(golden["input_shape"]))
    .astype(np.float32)
  )
  recorded = golden["x"] if "x" in golden else golden.get("x_first8", x[:0])
  np.testing.assert_array_equal(x.ravel()[: recorded.size], recorded.ravel())
  return x.transpose(0, 2, 3, 1)


def nchw(x):
  return np.asarray(x).transpose(0, 3, 1, 2)


@functools.cache
def weights(name, num_classes, gain=1.0, **options):
  """The network, its recorded weights under their names, and (params, batch_stats)."""
  network = table.make_network(name, num_classes=num_classes, **options)
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  leaves = traverse_util.flatten_dict(params | {"": batch_stats}, sep="/")
  theirs = torch_names.names([path.removeprefix("/") for path in leaves], name)
  state_dict = {
    theirs[path.removeprefix("/")]: drawn(
      theirs[path.removeprefix("/")], torch_shape(leaf.shape), gain
    )
    for path, leaf in leaves.items()
  }
  return network, state_dict, torch_names.from_torch(state_dict, params, batch_stats, name)


def forward(name, num_classes, images, watched=(), gain=1.0, **options):
  """Scores, maps and the outputs of the modules `watched` ("head/aspp/pool"), all NCHW, in
  inference mode.
  """
  _, _, (params, batch_stats) = weights(name, num_classes, gain, **options)
  backbone, head, *_ = table.NETWORKS[name](num_classes, **options)

  def part(owner, module, params, batch_stats, x):
    wanted = {tuple(path.split("/")[1:]) for path in watched if path.startswith(f"{owner}/")}
    variables = {"params": params[owner], "batch_stats": batch_stats.get(owner, {})}
    y, captured = module.apply(
      variables, x, train=False, capture_intermediates=lambda m, _: m.path in wanted
    )
    outputs = traverse_util.flatten_dict(captured.get("intermediates", {}))
    return y, {"/".join((owner, *path[:-1])): value[0] for path, value in outputs.items()}

  @functools.partial(jax.jit, compiler_options=QUICKLY)
  def run(params, batch_stats, x):
    maps, first = part("backbone", backbone, params, batch_stats, x)
    scores, second = part("head", head, params, batch_stats, maps)
    return scores, maps, first | second

  return jax.tree.map(nchw, run(params, batch_stats, images))


def check_activations(golden, outputs, atol):
  """Mean, deviation, first and last eight values of the recorded activations named by `outputs`,
  all but those left out there.
  """
  known = list(golden["act_names"])
  for name, got in outputs.items():
    i = known.index(name)
    assert str(got.shape) == golden["act_shapes"][i], name
    for value, key in (
      (got.mean(), "mean"),
      (got.std(), "std"),
      (got.ravel()[:8], "first8"),
      (got.ravel()[-8:], "last8"),
    ):
      np.testing.assert_allclose(
        value, golden[f"act_{key}"][i], rtol=0, atol=atol, err_msg=f"{name} {key}"
      )


def check_tensors(record_file, state_dict, gain=1.0):
  """Names, shapes and, where recorded, first values and checksums are those of the published
  network; neither side has more.

  gain: of the convolutions' recorded first values.
  """
  record = json.loads(record_file.read_text())
  entries = record.get("entries") or [
    {"name": name, "shape": shape, **record["check"].get(name, {})}
    for name, shape in record["shapes"].items()
  ]
  entries = {
    entry["name"]: entry for entry in entries if not entry["name"].endswith("num_batches_tracked")
  }
  assert {name: value.shape for name, value in state_dict.items()} == {
    name: tuple(e["shape"]) for name, e in entries.items()
  }
  for name, entry in entries.items():
    if "first3" in entry:
      assert zlib.crc32(name.encode()) == entry["crc32"]
      np.testing.assert_allclose(
        drawn(name, entry["shape"], gain).ravel()[:3], entry["first3"], rtol=1e-6
      )
  counted = sum(
    value.size
    for name, value in state_dict.items()
    if not name.endswith(("running_mean", "running_var"))
  )
  assert counted == record["n_params"]


def check_statistics(golden, batch_stats, name, atol):
  """The recorded running statistics after a training pass."""
  leaves = traverse_util.flatten_dict(batch_stats, sep="/")
  ours = {theirs: leaves[path] for path, theirs in torch_names.names(leaves, name).items()}
  recorded = golden.under("train_after__")
  assert recorded
  for theirs, value in recorded.items():
    np.testing.assert_allclose(ours[theirs], value, rtol=0, atol=atol, err_msg=theirs)
