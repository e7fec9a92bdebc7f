"""Weights of others, and our own, in our trees.

The module finds which layout a file has, what of it fits, and where everything went. Every tensor
of the file and every leaf of the network is accounted for: loaded, left fresh, dropped for a stated
reason, or part of one error that lists all that do not fit together.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pseudoseg_jax import checks
from pseudoseg_jax.contract import PyTree, State
from pseudoseg_jax.data.splits import shorten
from pseudoseg_jax.models import checkpoint_files, torch_names

Shapes = Mapping[str, tuple[int, ...]]

# The convolutions and batch norms of a deep stem in the order of the data: as torch_names has them
# (CPS, UniMatch, timm), in mmsegmentation (v1c), torchcv, and CSAIL's.
_DEEP_STEM = ("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")
_OTHER_DEEP_STEMS = (
  ("stem.0", "stem.1", "stem.3", "stem.4", "stem.6", "stem.7"),
  ("prefix.conv1", "prefix.bn1", "prefix.conv2", "prefix.bn2", "prefix.conv3", "prefix.bn3"),
  ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"),
)
# A tensor that tells whose head a file has, that network, and its classifier.
_TELLING = (
  ("last_layer.3.weight", "hrnet", "last_layer.3.weight"),
  ("encoder.psp.bottleneck.0.weight", "pspnet", "main_decoder.upsample.0.weight"),
  ("psp.bottleneck.0.weight", "pspnet_pixelssl", "decoder.0.weight"),
  ("fuse.0.weight", "deeplabv3plus_unimatch", "classifier.weight"),
  ("head.aspp.map_bn.weight", "deeplabv3plus", "classifier.weight"),
)
_DEPTHS = {
  (2, False): "resnet18",
  (6, False): "resnet34",
  (6, True): "resnet50",
  (23, True): "resnet101",
}
_OWN, _PUBLISHED, _BACKBONE = "our own layout", "the published network", "a backbone alone"


class Report(NamedTuple):
  """An account of where every tensor and every leaf went.

  layout: in words.
  prefix: what stands before the names in the file.
  others: prefixes of further networks in it, not read.
  loaded: the paths.
  fresh: reason -> paths.
  dropped: reason -> names in the file.
  notes: what was changed on the way.
  """

  layout: str
  prefix: str
  others: tuple[str, ...]
  loaded: tuple[str, ...]
  fresh: dict[str, list[str]]
  dropped: dict[str, list[str]]
  notes: tuple[str, ...]

  def __str__(self) -> str:
    return "; ".join(self._parts())

  def lines(self) -> str:
    return "\n".join(f"  {part}" for part in self._parts())

  def _parts(self) -> list[str]:
    loaded = [
      f"{count} of the {part}"
      for part, count in collections.Counter(map(_part, self.loaded)).items()
    ]
    return [
      f"{self.layout}{f' under {self.prefix!r}' if self.prefix else ''}: loaded {' and '.join(loaded)}",
      *(
        f"fresh {len(paths)} of the {_part(paths[0])} ({reason})"
        for reason, paths in self.fresh.items()
      ),
      *(f"dropped {len(names)} ({reason})" for reason, names in self.dropped.items()),
      *(
        [f"not read, though they would fit as well: {', '.join(self.others)}"]
        if self.others
        else []
      ),
      *self.notes,
    ]


def read(source: str) -> dict[str, np.ndarray]:
  """Reads the tensors of a local file, or of a file of the hub.

  The latter is "hf://organisation/name[/file]" (default file: model.safetensors).

  Raises:
    checks.InputError: no such file, none that can be read, or not to be had from the hub.
  """
  if not source.startswith("hf://"):
    return checkpoint_files.read(source)
  organisation, _, rest = source.removeprefix("hf://").partition("/")
  name, _, file = rest.partition("/")
  problems = checks.Problems(f"cannot fetch weights from {source}")
  if not organisation or not name:
    problems.add(
      "name", got=repr(source), allowed="hf://organisation/name or hf://organisation/name/file"
    )
    problems.raise_if_any()
  try:
    import huggingface_hub
  except ImportError:
    problems.add(
      "package huggingface_hub", got="not installed", remedy="pip install huggingface_hub"
    )
    problems.raise_if_any()
  try:
    path = huggingface_hub.hf_hub_download(f"{organisation}/{name}", file or "model.safetensors")
  except Exception as error:  # the hub's own errors, and those of whatever carries its requests
    message = str(error).strip().partition("\n")[0]
    problems.add(
      "hub",
      got=f"{type(error).__name__}: {message}",
      remedy="check the name and the connection, or give a local file",
    )
    problems.raise_if_any()
  return checkpoint_files.read(path)


def shapes_of(params: PyTree, batch_stats: PyTree) -> dict[str, tuple[int, ...]]:
  """Returns {"params/backbone/...": shape} of a network's trees.

  The trees hold arrays or only their shapes.
  """
  return {path: tuple(leaf.shape) for path, leaf in flat(params, batch_stats).items()}


def flat(params: PyTree, batch_stats: PyTree) -> dict:
  """Flattens a network's trees into one dict by path.

  {"params/backbone/...": leaf, "batch_stats/backbone/...": leaf}. The paths are also the names in
  our own files.
  """
  return traverse_util.flatten_dict({"params": params, "batch_stats": batch_stats}, sep="/")


def unflat(leaves: Mapping) -> dict[str, PyTree]:
  """Restores {"params": tree, "batch_stats": tree} from what `flat` gives."""
  return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(leaves, sep="/")


def _path(key: str) -> str:
  return key.split("/", 1)[1]


def _part(key: str) -> str:
  return key.split("/")[1]


def fit(
  tensors: Mapping[str, np.ndarray],
  shapes: Shapes,
  network: str,
  *,
  where: str = "the file",
  among: str = "",
) -> tuple[dict[str, np.ndarray], Report]:
  """Takes the values for our leaves from a file's tensors.

  All values of the backbone are taken, of the head all or none.

  Recognized under any prefix: our own files; the published code of `network`; backbones alone as
  torchvision, timm, mmsegmentation, torchcv or the CPS code name them. A head of another kind or
  class count is left fresh. So is a first convolution where images have other than three channels,
  but for one: gray levels get the sum over red, green and blue, which computes from a gray image
  what the three computed.

  Args:
    shapes: of all leaves of the network, as `shapes_of` gives them.
    network: a key of `table.NETWORKS`.
    where: the file, for errors.
    among: of several networks in one file, the one whose prefix contains this ("branch2"); default
      the first.

  Returns:
    {"params/backbone/...": f32 array} of what is loaded, and the report.

  Raises:
    checks.InputError: the layout is unknown, or backbone and file differ; everything that differs
      at once.
  """
  layout, prefix, others = _recognise(tensors, _layouts(shapes, network), where, network, among)
  named = _layouts(shapes, network)[layout]
  if layout == _BACKBONE:
    tensors = _with_our_stem(tensors, prefix)
  kind = f"{layout} ({network})" if layout == _PUBLISHED else layout
  left, values, notes = dict(tensors), {}, []
  fresh, wrong = collections.defaultdict(list), []

  def take(key):
    value = left.pop(prefix + named[key])
    return value if layout == _OWN else torch_names.to_ours(value, key)

  for key in (key for key in shapes if _part(key) != "head"):
    if named[key] is None:
      fresh["not part of such files"].append(key)
    elif prefix + named[key] not in left:
      wrong.append(f"{_path(key)}: no tensor '{prefix}{named[key]}' in the file")
    else:
      value = take(key)
      if value.shape != shapes[key] and _is_first_convolution(value.shape, shapes[key]):
        if shapes[key][2] != 1:
          fresh[f"first convolution: {shapes[key][2]} channels here, 3 in the file"].append(key)
          continue
        value = np.sum(value, axis=2, keepdims=True)
        notes.append("first convolution summed over red, green and blue for one channel")
      if value.shape != shapes[key]:
        wrong.append(
          f"{_path(key)}: got {prefix}{named[key]} of shape {value.shape}; allowed: {shapes[key]}"
        )
        continue  # of a shape that a file only claims, a copy may be larger than any memory
      values[key] = np.asarray(value, np.float32)

  head = [key for key in shapes if _part(key) == "head"]
  reason = _why_no_head(left, head, named, prefix, shapes, layout)
  if reason:
    fresh[reason].extend(head)
  else:
    values |= {key: np.asarray(take(key), np.float32) for key in head}

  dropped, unused = _leftovers(left, prefix, _roots(named))
  wrong += [f"{name} of shape {np.shape(left[name])}: not used by the network" for name in unused]
  problems = checks.Problems(
    f"the weights of {where} do not fit network '{network}'{_remedy(tensors, prefix, shapes)}"
  )
  problems.extend(wrong)
  problems.raise_if_any()
  return values, Report(kind, prefix, others, tuple(values), dict(fresh), dropped, tuple(notes))


def _layouts(shapes: Shapes, network: str) -> dict[str, dict[str, str | None]]:
  """Returns layout -> {our leaf: its name in a file of that layout}.

  Names are without prefix; None where the layout has none.
  """
  paths = [_path(key) for key in shapes]
  published = torch_names.names(paths, network)
  layouts = {_OWN: {key: key for key in shapes}}
  # Without published PyTorch code there is none whose backbone computes the same from the same
  # weights (TensorFlow's ResNets).
  if any(published.values()):
    backbone = torch_names.backbone_names(paths)
    layouts[_BACKBONE] = {key: backbone[_path(key)] for key in shapes}
    layouts[_PUBLISHED] = {key: published[_path(key)] for key in shapes}
  return layouts


def _recognise(
  tensors, layouts, where: str, network: str, among: str
) -> tuple[str, str, tuple[str, ...]]:
  """Finds the layout and prefix under which most names are found.

  Among equals the first is taken. The other prefixes with as many are returned too.
  """
  found = []
  for layout, named in layouts.items():
    wanted = {name for name in named.values() if name}
    needed = sum(1 for key, name in named.items() if name and _part(key) != "head") / 2
    # The name after every dot may be one of ours: what stands before it is a prefix.
    counts = collections.Counter(
      before for name in tensors for before, after in _splits(name) if after in wanted
    )
    found += [
      (count, layout, prefix)
      for prefix, count in counts.items()
      if count >= needed and among in prefix
    ]
  problems = checks.Problems(f"the weights of {where} have no known layout for network '{network}'")
  if not found:
    ours = {name for named in layouts.values() for name in list(named.values())[:1]}
    problems.add(
      f"names{f' under a prefix with {among!r}' if among else ''}",
      got=", ".join(list(tensors)[:3]) + ", ...",
      allowed=f"such as {' or '.join(sorted(filter(None, ours)))}",
      remedy="is config.network (name, backbone) the network that the file is of?",
    )
  problems.raise_if_any()
  most, layout, prefix = max(found, key=lambda entry: entry[0])
  return (
    layout,
    prefix,
    tuple(
      other for count, same, other in found if (count, same) == (most, layout) and other != prefix
    ),
  )


def _splits(name: str) -> Iterator[tuple[str, str]]:
  yield "", name
  for dot in re.finditer(r"\.", name):
    yield name[: dot.end()], name[dot.end() :]


def _with_our_stem(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """Renames the tensors of a deep stem to the names of `torch_names`.

  It does so whichever code they are from.
  """
  for stem in _OTHER_DEEP_STEMS:
    if prefix + f"{stem[4]}.weight" in tensors:
      ours = {prefix + theirs: prefix + name for theirs, name in zip(stem, _DEEP_STEM, strict=True)}
      split = {name: name.rpartition(".") for name in tensors}
      return {
        f"{ours.get(module, module)}{dot}{leaf}": tensors[name]
        for name, (module, dot, leaf) in split.items()
      }
  return dict(tensors)


def _is_first_convolution(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
  """Tells whether two kernels differ only in that theirs has three channels.

  In these networks only the first convolution does.
  """
  return (
    len(theirs) == len(ours) == 4
    and theirs[2] == 3
    and theirs[:2] == ours[:2]
    and theirs[3] == ours[3]
  )


def _why_no_head(left, head: list[str], named, prefix: str, shapes: Shapes, layout: str) -> str:
  """Returns why the head cannot be loaded; "" if it can."""
  if not any(named[key] and prefix + named[key] in left for key in head):
    return "no such head in the file"
  for key in head:
    name = prefix + (named[key] or "?")
    if name not in left:
      return f"the file's head is another one: no '{name}'"
    value = left[name] if layout == _OWN else torch_names.to_ours(left[name], key)
    if value.shape != shapes[key]:
      return f"'{name}' is {value.shape} in the file, {shapes[key]} here: another class count?"
  return ""


def _roots(named: Mapping[str, str | None]) -> set[str]:
  """Returns the first words of the backbone's names.

  What else begins so is of a backbone too.
  """
  return {_root(name) for key, name in named.items() if name and _part(key) == "backbone"}


def _root(name: str) -> str:
  return "/".join(name.split("/")[:2]) if "/" in name else name.split(".")[0]


def _leftovers(
  left: Iterable[str], prefix: str, roots: set[str]
) -> tuple[dict[str, list[str]], list[str]]:
  """Sorts the tensors that nothing asked for.

  Returns those that are dropped, by reason, and those of a backbone, which should have been used.
  """
  counters, unused, others = [], [], collections.defaultdict(list)
  for name in left:
    if name.endswith("num_batches_tracked"):
      counters.append(name)
    elif not name.startswith(prefix):
      others[_root(name)].append(name)
    elif _root(name.removeprefix(prefix)) in roots:
      unused.append(name)
    else:
      others[prefix + _root(name.removeprefix(prefix))].append(name)
  foreign = f"not the network's: {shorten(list(others), most=8)}"
  dropped = {"batch counters": counters, foreign: [*itertools.chain(*others.values())]}
  return {reason: names for reason, names in dropped.items() if names}, unused


def _remedy(tensors: Mapping[str, np.ndarray], prefix: str, shapes: Shapes) -> str:
  """Returns what to change where the stems of a ResNet differ, or a hint."""
  ours_is_deep = "params/backbone/stem/unit3/conv/kernel" in shapes
  ours_is_plain = not ours_is_deep and "params/backbone/stem/unit1/conv/kernel" in shapes
  places = prefix, f"{prefix}backbone."
  shape_of = lambda name: next(
    (np.shape(tensors[place + name]) for place in places if place + name in tensors), ()
  )
  first, plain = shape_of("conv1.0.weight"), shape_of("conv1.weight")
  if ours_is_deep and plain:
    return ": its stem is plain, so set --config.network.stem=plain"
  if ours_is_deep and first[:1] == (32,):
    return (
      ": its deep stem is 32, 32, 64 channels wide and ours 64, 64, 128; take another file, or a plain one with "
      "--config.network.stem=plain"
    )
  if ours_is_plain and first:
    return ": its stem is deep, so set --config.network.stem=deep"
  return " (is config.network.backbone the one of the file?)"


def guess(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, str], int]:
  """Infers the network that a PyTorch file is of, from telling names.

  Returns "name", "backbone", "stem", and its classes (1 where no head tells). Without "backbone"
  where the file is neither of a ResNet nor of an HRNet.
  """

  def find(suffix):
    return next((name for name in tensors if name == suffix or name.endswith(f".{suffix}")), None)

  def channels(tensor):
    return (*np.shape(tensors[tensor]), 1)[0] or 1  # of a damaged file they may be none

  name, num_classes = "deeplabv3plus", 1
  for telling, network, classifier in _TELLING:
    if find(telling) and find(classifier):
      name, num_classes = network, channels(find(classifier))
      break
  if widest := find("stage4.0.branches.0.0.conv1.weight"):
    return {"name": "hrnet", "backbone": f"hrnet_w{channels(widest)}"}, num_classes

  # The blocks of the third stage, and whether they have three convolutions, tell the depth.
  layer = "base." if name == "pspnet" else "layer"
  block = re.compile(rf"(?:^|\.){re.escape(layer)}3\.(\d{{1,9}})\.conv1\.weight$")
  blocks = {int(found[1]) for found in map(block.search, tensors) if found}
  count = next(index for index in itertools.count() if index not in blocks)
  backbone = _DEPTHS.get((count, find(f"{layer}3.0.conv3.weight") is not None))
  if backbone is None:
    return {"name": name}, num_classes
  if name == "pspnet":
    return {"name": name, "backbone": backbone}, num_classes
  first = find("layer1.0.conv1.weight")
  if first is None:
    return {"name": name}, num_classes
  prefix = first.removesuffix("layer1.0.conv1.weight")
  deep = any(f"{prefix}{stem[4]}.weight" in tensors for stem in (_DEEP_STEM, *_OTHER_DEEP_STEMS))
  return {"name": name, "backbone": backbone, "stem": "deep" if deep else "plain"}, num_classes


def put(state: State, values: Mapping[str, np.ndarray]) -> tuple[State, str]:
  """Puts `values` into every network of a fresh state that has those leaves.

  Each network gets arrays of its own. Returns the state, and what was done, in words.

  Networks that are initialized with different heads (CPS's two) live by that difference: they get
  no head.
  """
  trees = {role: flat(net.params, net.batch_stats) for role, net in state.nets.items()}
  fits = {
    role: tree
    for role, tree in trees.items()
    if all(key in tree and tree[key].shape == value.shape for key, value in values.items())
  }
  report = f"into {', '.join(fits) or 'no network'}"
  heads = {key for key in values if _part(key) == "head"}
  if any(
    not np.array_equal(first[key], second[key])
    for first, second in itertools.pairwise(fits.values())
    for key in heads
  ):
    values = {key: value for key, value in values.items() if key not in heads}
    report += ", the backbone alone: equal heads would make these networks equal for ever"

  filled = dict(state.nets)
  for role, tree in fits.items():
    # Copies: the engine donates the state, and a teacher must not hold the student's arrays. On a
    # CPU device_put makes none.
    copied = jax.jit(_copies, out_shardings={key: tree[key].sharding for key in values})(values)
    taken = lambda kind, old, copied=copied: traverse_util.path_aware_map(
      lambda path, leaf: copied.get("/".join([kind, *path]), leaf), old
    )
    net = filled[role]
    filled[role] = net.replace(
      params=taken("params", net.params), batch_stats=taken("batch_stats", net.batch_stats)
    )
  return state.replace(nets=filled), report


def _copies(values: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  return {key: jnp.copy(value) for key, value in values.items()}
