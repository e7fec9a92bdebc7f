"""Plain functions that make, run, descend and average networks.

Methods share them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pseudoseg_jax import optim, rng
from pseudoseg_jax.contract import (
  Array,
  Head,
  Metrics,
  NetState,
  Network,
  Optimizer,
  Panel,
  Predictor,
  PyTree,
  State,
  Task,
)


def create(task: Task, key: Array, **heads: Head) -> NetState:
  """Makes a freshly initialized network with its optimizer state.

  `heads` stand beside "backbone" and "head" under their names.
  """
  params, batch_stats = task.network.init(key)
  for name, head in heads.items():
    params[name], batch_stats[name] = head.init(rng.stream(key, name))
  return _initialized(task.network.apply, params, batch_stats, task.optimizer)


def create_from_head(
  head: Head, key: Array, optimizer: Optimizer | optax.GradientTransformation
) -> NetState:
  """Makes a head a network of its own, with an optimizer of its own."""
  return _initialized(head.apply, *head.init(key), optimizer)


def _initialized(
  apply: Callable,
  params: PyTree,
  batch_stats: PyTree,
  optimizer: Optimizer | optax.GradientTransformation,
) -> NetState:
  net = NetState.create(
    apply_fn=apply, params=params, batch_stats=batch_stats, tx=_transformation(optimizer)
  )
  # a Python int would make the second step retrace.
  return net.replace(step=jnp.zeros([], jnp.int32))


def _transformation(
  optimizer: Optimizer | optax.GradientTransformation,
) -> optax.GradientTransformation:
  return optimizer.transform if isinstance(optimizer, Optimizer) else optimizer


# No gradient moves a teacher. Made once: TrainState compares its transformation by identity.
_NO_DESCENT = optax.set_to_zero()


def frozen(net: NetState) -> NetState:
  """Returns the network as one that no gradient moves.

  It has no optimizer state.
  """
  return net.replace(tx=_NO_DESCENT, opt_state=_NO_DESCENT.init(net.params))


def teacher_of(student: NetState) -> NetState:
  """Makes a teacher that is initialized as a copy of the student.

  The arrays are copied, since the engine donates both.
  """
  params, batch_stats = jax.tree.map(jnp.copy, (student.params, student.batch_stats))
  return frozen(student.replace(params=params, batch_stats=batch_stats))


def init_student(task: Task, **heads: Head) -> Callable[[Array], State]:
  """Builds the function key -> State of one network, "student".

  `heads` as in `create`.
  """
  return lambda key: State(
    step=jnp.zeros([], jnp.int32), nets={"student": create(task, key, **heads)}
  )


def init_student_and_teacher(task: Task, **heads: Head) -> Callable[[Array], State]:
  """Builds the function key -> State of a student and a teacher.

  The "teacher" is an exact copy of the "student".
  """

  def init(key):
    student = create(task, key, **heads)
    return State(
      step=jnp.zeros([], jnp.int32), nets={"student": student, "teacher": teacher_of(student)}
    )

  return init


def init_two(task: Task) -> Callable[[Array], State]:
  """Builds the function key -> State of two networks, "a" and "b".

  They have the same architecture and are initialized independently: the only difference between the
  two.
  """

  def init(key):
    key_a, key_b = jax.random.split(key)
    return State(
      step=jnp.zeros([], jnp.int32), nets={"a": create(task, key_a), "b": create(task, key_b)}
    )

  return init


def forward(
  network: Network, net: NetState, *batches: Array, dropout: Array | None = None
) -> tuple[tuple[Array, ...], NetState]:
  """Runs the network in training mode on each batch.

  Every batch has batch-norm statistics of its own. Images that shall share statistics go into one
  batch. Running statistics move once per batch, in the order given.

  Args:
    batches: f32[B, H, W, 3] each.
    dropout: random key for networks with dropout; None for none.

  Returns:
    The logits f32[B, H, W, K] of each batch, and the network with its running statistics moved.
  """
  return _each(network.apply, net, batches, dropout)


def forward_with(network: Network, frozen_batch_norm: str) -> Callable:
  """Builds a `forward` of the network with batch norms on stored statistics.

  Stored statistics do not move.

  Args:
    frozen_batch_norm: of the "backbone", of "all", or "none". Freezing "all" leaves out dropout as
      well: the pass is one of inference, with gradients.
  """

  def backbone_frozen(net, *batches, dropout):
    maps = [infer_maps(network, net, images) for images in batches]
    scores, net = decode(network, net, *maps, dropout=dropout)
    return tuple(
      network.upsample(part, images.shape[1:3])
      for part, images in zip(scores, batches, strict=True)
    ), net

  def all_frozen(net, *batches, dropout):
    return tuple(infer(network, net, images) for images in batches), net

  def live(net, *batches, dropout):
    return forward(network, net, *batches, dropout=dropout)

  return {"none": live, "backbone": backbone_frozen, "all": all_frozen}[frozen_batch_norm]


def dropout_keys(key: Array, *passes: str) -> dict[str, Array]:
  """Derives a random key for the dropout of each named pass of a step."""
  return {name: rng.stream(key, f"dropout/{name}") for name in passes}


def encode(
  network: Network, net: NetState, *batches: Array, dropout: Array | None = None
) -> tuple[tuple, NetState]:
  """Runs the backbone alone, else as `forward`.

  The maps of each batch are a tuple of f32[B, h, w, C] that ends with the deepest.
  """
  return _each(network.encode, net, batches, dropout)


def decode(
  network: Network, net: NetState, *maps: tuple[Array, ...], dropout: Array | None = None
) -> tuple[tuple, NetState]:
  """Runs the head alone on maps of `encode`, else as `forward`.

  The scores of each batch are f32[B, h, w, K], on the head's grid.
  """
  return _each(network.decode, net, maps, dropout)


def _each(
  apply: Callable, net: NetState, batches: tuple, dropout: Array | None
) -> tuple[tuple, NetState]:
  groups = len(batches)
  shapes = [jax.tree.map(jnp.shape, batch) for batch in batches]
  if groups > 1 and all(shape == shapes[0] for shape in shapes):
    # One pass over all batches, interleaved so that a batch axis split over devices stays where it
    # is: the convolutions see one large batch and the graph holds the network once.
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *batches)
    joint = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), stacked)
    outputs, stats = apply(
      net.params, net.batch_stats, joint, train=True, groups=groups, dropout=dropout
    )
    parts = jax.tree.map(lambda array: array.reshape(-1, groups, *array.shape[1:]), outputs)
    return tuple(
      jax.tree.map(lambda part: part[:, group], parts) for group in range(groups)
    ), net.replace(batch_stats=stats)
  outputs, stats = [], net.batch_stats
  for index, batch in enumerate(batches):
    key = None if dropout is None else jax.random.fold_in(dropout, index)
    output, stats = apply(net.params, stats, batch, train=True, dropout=key)
    outputs.append(output)
  return tuple(outputs), net.replace(batch_stats=stats)


@functools.lru_cache(maxsize=16)  # the rules of a method's options ask too
def map_channels(network: Network) -> tuple[int, ...]:
  """Lists the channels of the backbone's maps, the deepest last."""
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, 32, 32, network.in_channels), jnp.float32)
  maps, _ = jax.eval_shape(
    lambda *args: network.encode(*args, train=False), params, batch_stats, image
  )
  return tuple(array.shape[-1] for array in maps)


def infer(network: Network, net: NetState, images: Array) -> Array:
  """Computes logits f32[B, H, W, K] in inference mode (running statistics)."""
  return network.apply(net.params, net.batch_stats, images, train=False)[0]


def infer_maps(network: Network, net: NetState, images: Array) -> tuple[Array, ...]:
  """Computes the backbone's maps in inference mode (running statistics)."""
  return network.encode(net.params, net.batch_stats, images, train=False)[0]


def predictors(network: Network, *roles: str) -> dict[str, Predictor]:
  """Makes one predictor per role in `State.nets`; the first is the headline."""

  def predictor(role: str) -> Predictor:
    return Predictor(lambda state, images: infer(network, state.nets[role], images))

  return {role: predictor(role) for role in roles}


def show_predictions(network: Network, *roles: str) -> Callable:
  """Builds a `Method.show` of the predictions on the weak view.

  It shows the weak view, and each network's prediction on it; the last is the pseudo label.
  """

  def show(state, batch, draws):
    weak = batch["unlabeled"]["weak"]
    predictions = [
      Panel(role, "classes", jax.nn.softmax(infer(network, state.nets[role], weak)))
      for role in roles
    ]
    return [Panel("weak view", "image", weak), *predictions], batch["unlabeled"]["valid"]

  return show


class Outcome(NamedTuple):
  """The value of an objective at the networks' parameters.

  losses: terms by name, f32[] each. The step descends their sum, `loss`; each is reported as
    `loss_NAME`.
  nets: the networks with their running statistics moved.
  metrics: further scalars that are reported.
  memory: what `State.memory` is after the step; None leaves it.
  """

  losses: Mapping[str, Array]
  nets: Mapping[str, NetState]
  metrics: Metrics = {}
  memory: dict[str, PyTree] | None = None


def descend(
  optimizer: Optimizer | optax.GradientTransformation | Mapping[str, Any],
  state: State,
  objective: Callable[[dict[str, NetState]], Outcome],
  *,
  learning: Collection[str] | None = None,
) -> tuple[State, Metrics]:
  """Takes the one step of a method: sums the losses, descends, moves the clock.

  Args:
    optimizer: of all networks that learn, or one for each by its role.
    state: the learning rates follow its step.
    objective: networks that learn -> Outcome; differentiated by the parameters of all of them.
    learning: roles of the networks that learn. Without it those of the state's that `optimizer`
      names, or all.

  Returns:
    The state with the step counter one on, the networks that learn after their step, and what the
    outcome remembers; and the metrics: the losses, their sum, the outcome's own, and the
    `learning_rate` of the first network (not of a plain optax transformation, which keeps its own).

  Raises:
    ValueError: a network was made with another optimizer than the one given here, whose state is
      not to be mixed with it.
  """
  if learning is None:
    named = optimizer if isinstance(optimizer, Mapping) else state.nets
    learning = [role for role in named if role in state.nets]
  nets = {role: state.nets[role] for role in learning}
  optimizers = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(nets, optimizer)
  params = {role: net.params for role, net in nets.items()}
  factors = {role: _factors(optimizers[role], net.params) for role, net in nets.items()}
  # What has a factor of 0 is not differentiated: no backward pass runs through a part that is
  # frozen as a whole.
  live = jax.tree.map(lambda factor, value: value if factor else None, factors, params)

  def whole(part: PyTree, default: Callable[[Array], Array]) -> PyTree:
    return jax.tree.map(
      lambda value, own: default(own) if value is None else value,
      part,
      params,
      is_leaf=lambda value: value is None,
    )

  def loss(live: dict[str, PyTree]) -> tuple[Array, tuple[Array, Outcome]]:
    filled = whole(live, lambda own: own)
    outcome = objective({role: net.replace(params=filled[role]) for role, net in nets.items()})
    total = jnp.asarray(sum(outcome.losses.values()))
    return total, (total, outcome)

  gradients, (total, outcome) = jax.grad(loss, has_aux=True)(live)
  gradients = whole(gradients, jnp.zeros_like)

  stepped = {
    role: _stepped(optimizers[role], net, gradients[role], factors[role], state.step, role).replace(
      batch_stats=outcome.nets[role].batch_stats
    )
    for role, net in nets.items()
  }
  metrics = {"loss": total} | {f"loss_{name}": term for name, term in outcome.losses.items()}
  first = optimizers[next(iter(nets))]
  if isinstance(first, Optimizer):
    metrics["learning_rate"] = first.learning_rate(state.step)
  memory = state.memory if outcome.memory is None else outcome.memory
  after = State(step=state.step + 1, nets=state.nets | stepped, memory=memory)
  return after, metrics | outcome.metrics


def _factors(optimizer: Optimizer | optax.GradientTransformation, params: PyTree) -> PyTree:
  """Looks up each parameter's factor on the learning rate; 0 where frozen."""
  if isinstance(optimizer, Optimizer):
    return optim.by_path(optimizer.multiplier, params)
  return jax.tree.map(lambda _: 1.0, params)


def _stepped(
  optimizer: Optimizer | optax.GradientTransformation,
  net: NetState,
  gradients: PyTree,
  factors: PyTree,
  step: Array,
  role: str,
) -> NetState:
  transformation = _transformation(optimizer)
  if not _same_kind(jax.eval_shape(transformation.init, net.params), net.opt_state):
    raise ValueError(
      f"network '{role}' was made with another optimizer than the one that shall move it: give "
      "both nets.create, or create_from_head, and nets.descend the same one; a network that is "
      "frozen does not learn"
    )
  direction, opt_state = transformation.update(gradients, net.opt_state, net.params)
  if isinstance(optimizer, Optimizer):
    learning_rate = optimizer.learning_rate(step)
    params = jax.tree.map(
      lambda value, way, factor: value - learning_rate * factor * way,
      net.params,
      direction,
      factors,
    )
  else:
    params = optax.apply_updates(net.params, direction)
  return net.replace(step=net.step + 1, params=params, opt_state=opt_state)


def _same_kind(a: PyTree, b: PyTree) -> bool:
  """Tells whether two trees have the same structure, shapes and types."""
  kinds = [
    [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)] for tree in (a, b)
  ]
  structures: list[Any] = [jax.tree_util.tree_structure(tree) for tree in (a, b)]
  return structures[0] == structures[1] and kinds[0] == kinds[1]


def ema(
  teacher: NetState, student: NetState, decay: Array | float, *, statistics: str = "own"
) -> NetState:
  """Moves the teacher's parameters towards the student's.

  teacher <- decay * teacher + (1 - decay) * student, on the parameters.

  Args:
    statistics: "own" leaves the teacher's batch-norm statistics to its own training-mode passes
      (all three published Mean Teacher codes); "average" averages them with the parameters.
  """

  def average(old, new):
    # Rounding must not move what is frozen, and thus the same on both sides.
    return jnp.where(old == new, old, decay * old + (1 - decay) * new)

  teacher = teacher.replace(params=jax.tree.map(average, teacher.params, student.params))
  if statistics == "average":
    teacher = teacher.replace(
      batch_stats=jax.tree.map(average, teacher.batch_stats, student.batch_stats)
    )
  return teacher
