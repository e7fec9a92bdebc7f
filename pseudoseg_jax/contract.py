"""The contract of a method: what it is, what it is given and what it returns.

Everything else in the package depends on this module.

A method is a value: pure functions over one pytree. A factory in `methods/` takes a `Task` and its
own options by keyword and returns a `Method`; the engine jits `Method.step`, shards it and donates
the state, and knows no method by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import struct
from flax.training import train_state

IGNORE_LABEL = 255  # the pixel enters no loss and no score

Array = jax.Array
PyTree = Any

# One global batch, a nested dict of arrays (leading axis = global batch, split over the mesh's
# `data` axis):
#
#   "labeled":   {"image":  f32[Bl, H, W, 3],      normalized (data.photometry.normalize)
#                 "label":  i32[Bl, H, W],         0..K-1, or IGNORE_LABEL
#                 "valid":  bool[Bl, H, W]}        False on padding
#   "unlabeled": {"weak":   f32[Bu, H, W, 3],      geometry only
#                 "strong": f32[Bu, S, H, W, 3],   same geometry, S photometric draws   (needs.strong_views = S > 0)
#                 "valid":  bool[Bu, H, W],        False on padding
#                 "id":     i32[Bu],               row of the image in its list         (needs.ids, likewise the next two)
#                 "flip":   bool[Bu],
#                 "window": f32[Bu, 4],            crop in the image's own frame: top, left, height, width as fractions
#                 "label":  i32[Bu, H, W]}         (needs.labeled_too) the masks of labeled images that are drawn among the
#                                                  unlabeled ones; IGNORE_LABEL throughout for all
#                                                  other images
#   "partner":   like "unlabeled"; a second, independent draw of unlabeled images        (needs.partner)
#
# All three also hold, where needs.weak_label == "image",
#                 "image_label": f32[B, K]         1 for every class that is in the image, whole: of labeled images by their masks,
#                                                  of the others because the user says so
# and, where needs.weak_label == "boxes",
#                 "boxes":  f32[B, M, 5]           class index, then top, left, bottom, right as fractions of the view,
#                                                  clipped to it; class -1 in rows without a box, M
#                                                  the same in all steps
#
# "labeled_1", "unlabeled_1", "labeled_2", ... are those of further domains                (needs.domains)
#
# Images of a source with C channels have C in the place of 3. "unlabeled" and "partner" never hold
# the mask of an image that is not labeled: it is not even opened.
Batch = Mapping[str, Mapping[str, Array]]


class Needs(NamedTuple):
  """The needs of a method beyond labeled images.

  They are what it wants from the input pipeline, and whether it wants the task's criterion.
  """

  unlabeled: bool = True
  partner: bool = False
  strong_views: int = 0
  ids: bool = False
  weak_label: str | None = None  # None, "image" or "boxes"
  domains: bool = False  # further data sets with classes of their own
  labeled_too: bool = False  # "unlabeled" draws the labeled images as well, with their masks
  criterion: bool = True  # False: its supervised loss is its own, and not the task's criterion


class NetState(train_state.TrainState):
  """A Flax TrainState that also carries batch-norm statistics.

  A teacher is one that no gradient moves.

  tx: the transformation that `opt_state` was made by. `nets.descend` moves a network by the
    optimizer that it is given, and sees to it that the state is of that kind.
  step: how often the network was descended. No clock: nothing reads it.
  """

  batch_stats: PyTree = None


@struct.dataclass
class State:
  """Everything that outlives a step: one pytree, one checkpoint.

  step: i32[], the only clock. Learning rates, ramps and random keys are derived from it, never
    stored.
  nets: networks by role: {"student", "teacher"}, {"a", "b"}, ...
  memory: what a method remembers between steps besides its networks (temporal predictions, class
    confidences, ...). Predictors are given a state without it.
  """

  step: Array
  nets: dict[str, NetState]
  memory: dict[str, PyTree] = struct.field(default_factory=dict)

  def with_nets(self, **nets: NetState) -> State:
    """Replaces the networks of the given roles and returns the new state."""
    return dataclasses.replace(self, nets=self.nets | nets)


class Optimizer(NamedTuple):
  """A descent rule with its learning rate outside.

  The clock is thus `State.step` and nothing else. Wherever one is taken, a plain
  optax.GradientTransformation is taken too.

  transform: gradients -> descent direction at learning rate 1 (weight decay, momentum); sign: the
    parameters move by minus it.
  learning_rate: step i32[] -> f32[].
  multiplier: parameter path ("backbone/conv1/kernel") -> factor on the learning rate.
  """

  transform: optax.GradientTransformation
  learning_rate: Callable[[Array | int], Array]
  multiplier: Callable[[str], float] = lambda path: 1.0


def _in_one_piece(*args: Any, **options: Any) -> Any:
  raise NotImplementedError(
    "this network has `apply` alone; `encode`, `decode` and `upsample` are missing"
  )


class Network(NamedTuple):
  """A segmentation network as pure functions over one tree of parameters.

  It comes without its modules.

  init: key -> (params, batch_stats).
  apply: (params, batch_stats, images f32[B,H,W,C], train=bool, groups=int, dropout=key) -> (logits
    f32[B,H,W,K], batch_stats). With train=True batch norm uses the batch's own statistics and
    returns moved running ones. With groups=G the B rows are G interleaved batches (row i belongs to
    batch i % G), each with statistics of its own; running ones move G times, in order. Dropout, in
    networks that have it, acts only where train=True and a key is given.
  encode, decode: the two halves of `apply`, with the same keywords, for methods with heads or
    perturbations of their own: images -> maps, a tuple of [B,h,w,C] that ends with the deepest;
    maps -> scores f32[B,h,w,K] on the grid of the network's head.
  upsample: (scores, (H, W)) -> logits f32[B,H,W,K], in the network's own convention of resizing.
  in_channels: C, channels of the images.
  """

  init: Callable[[Array], tuple[PyTree, PyTree]]
  apply: Callable[..., tuple[Array, PyTree]]
  encode: Callable[..., tuple[tuple[Array, ...], PyTree]] = _in_one_piece
  decode: Callable[..., tuple[Array, PyTree]] = _in_one_piece
  upsample: Callable[[Array, tuple[int, ...]], Array] = _in_one_piece
  in_channels: int = 3


class Head(NamedTuple):
  """A head that a method adds to a network.

  Its parameters stand in the network's tree, under a name of their own.

  init: key -> (params, batch_stats).
  apply: (params, batch_stats, *inputs, train=bool) -> (output, batch_stats).
  """

  init: Callable[[Array], tuple[PyTree, PyTree]]
  apply: Callable[..., tuple[Any, PyTree]]


class Task(NamedTuple):
  """The problem that every method is given.

  It bears no trace of how it was configured.

  criterion: (logits f32[B,H,W,K], label i32[B,H,W]) -> f32[], the supervised loss (plain cross
    entropy, OHEM, ...).
  num_unlabeled: length of the list of unlabeled images, the range of batch["unlabeled"]["id"]; 0
    where nothing will be learned.
  other_classes: the number of classes of each further domain.
  mean, std: what images were normalized with, C numbers each on the scale 0..1.
  unlabeled_weight: step i32[] -> factor on the weight of whatever a method learns without pixel
    labels, on top of its own ramp.
  """

  num_classes: int
  total_steps: int
  network: Network
  optimizer: Optimizer
  criterion: Callable[[Array, Array], Array]
  num_unlabeled: int = 0
  other_classes: tuple[int, ...] = ()
  mean: tuple[float, ...] = (0.485, 0.456, 0.406)
  std: tuple[float, ...] = (0.229, 0.224, 0.225)
  unlabeled_weight: Callable[[Array], Array | float] = lambda step: 1.0


Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A predictor: its logits, its domain, and the weak labels that it is shown.

  logits: (state, images f32[B,H,W,C]) -> f32[B,H,W,K].
  domain: number of the domain whose classes it predicts; 0 is the first.
  weak_label: "boxes" or "image", the weak labels that it is shown beside the image, as K more
    channels of `images`: 1 inside the boxes of a class, or everywhere if the class is in the image,
    else 0 (and 0 on padding). None where it is shown the image alone.
  """

  logits: Callable[[State, Array], Array]
  domain: int = 0
  weak_label: str | None = None

  def __call__(self, state: State, images: Array) -> Array:
    return self.logits(state, images)


@struct.dataclass
class Panel:
  """One picture of a batch, for people who want to see why a method works.

  kind: "image" (f32[B,H,W,C], normalized), "classes" (f32[B,h,w,K], probabilities or scores from 0
    on, on any grid) or "heat" (f32[B,h,w] in 0..1).
  """

  name: str = struct.field(pytree_node=False)
  kind: str = struct.field(pytree_node=False)
  values: Array


class Method(NamedTuple):
  """A method: its needs, its initial state, its step and its predictors.

  init: key -> State.
  draw: (key, batch) -> draws, every random number of one step (None where a step has none).
  update: (state, batch, draws) -> (state, metrics); pure arithmetic. The step counter moves by one
    (`nets.descend` does it). `metrics` are scalars; those named `loss*` are loss terms.
  predictors: by name; the first is the headline.
  show: (state, batch, draws) -> (panels, kept bool[B,h,w]): what is learned from the unlabeled
    images of a batch, in the order in which it is shown. The last panel of kind "classes" is the
    pseudo label, and `kept` is where it is learned from. None for a method that learns from labels
    alone.
  split_memory: entries of `State.memory` that are split over the devices along their leading axis;
    all else is on every device.
  given_nets: networks that an earlier run made; training starts from theirs (config.nets_from).
  """

  needs: Needs
  init: Callable[[Array], State]
  draw: Callable[[Array, Batch], PyTree]
  update: Callable[[State, Batch, PyTree], tuple[State, Metrics]]
  predictors: Mapping[str, Predictor]
  show: Callable[[State, Batch, PyTree], tuple[Sequence[Panel], Array]] | None = None
  split_memory: tuple[str, ...] = ()
  given_nets: tuple[str, ...] = ()

  def step(self, state: State, batch: Batch, key: Array) -> tuple[State, Metrics]:
    return self.update(state, batch, self.draw(key, batch))
