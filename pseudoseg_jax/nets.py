"""The plain functions that methods share: networks are made, run, descended and averaged here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
  Panels,
  PyTree,
  State,
  Task,
)


def create(task: Task, key: Array, **heads: Head) -> NetState:
  """A freshly initialized network with its optimizer state; `heads` stand beside "backbone" and
  "head" under their names.
  """
  params, batch_stats = task.network.init(key)
  for name, head in heads.items():
    params[name], batch_stats[name] = head.init(rng.stream(key, name))
  return _initialized(task.network.apply, params, batch_stats, task.optimizer)


def create_from_head(head: Head, key: Array, optimizer: Optimizer) -> NetState:
  """A head as a network of its own, with an optimizer of its own."""
  return _initialized(head.apply, *head.init(key), optimizer)


def _initialized(
  apply: Callable, params: PyTree, batch_stats: PyTree, optimizer: Optimizer
) -> NetState:
  net = NetState.create(
    apply_fn=apply, params=params, batch_stats=batch_stats, tx=optimizer.transform
  )
  # a Python int would make the second step retrace.
  return net.replace(step=jnp.zeros([], jnp.int32))


# No gradient moves a teacher. Made once: TrainState compares its transformation by identity.
_NO_DESCENT = optax.set_to_zero()


def frozen(net: NetState) -> NetState:
  """The network as one that no gradient moves, without optimizer state."""
  return net.replace(tx=_NO_DESCENT, opt_state=_NO_DESCENT.init(net.params))


def teacher_of(student: NetState) -> NetState:
  """A teacher initialized as a copy of the student; copies of the arrays, since the engine donates
  both.
  """
  params, batch_stats = jax.tree.map(jnp.copy, (student.params, student.batch_stats))
  return frozen(student.replace(params=params, batch_stats=batch_stats))


def init_student(task: Task, **heads: Head) -> Callable[[Array], State]:
  """key -> State of one network, "student"; `heads` as in `create`."""
  return lambda key: State(
    step=jnp.zeros([], jnp.int32), nets={"student": create(task, key, **heads)}
  )


def init_student_and_teacher(task: Task, **heads: Head) -> Callable[[Array], State]:
  """key -> State of a "student" and its exact copy, the "teacher"."""

  def init(key):
    student = create(task, key, **heads)
    return State(
      step=jnp.zeros([], jnp.int32), nets={"student": student, "teacher": teacher_of(student)}
    )

  return init


def init_two(task: Task) -> Callable[[Array], State]:
  """key -> State of "a" and "b", the same architecture initialized independently: the only
  difference between the two.
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
  """Runs the network in training mode on each batch, every one with batch-norm statistics of its
  own.

  Images that shall share statistics go into one batch. Running statistics move once per batch, in
  the order given.

  Args:
    batches: f32[B, H, W, 3] each.
    dropout: random key for networks with dropout; None for none.

  Returns:
    The logits f32[B, H, W, K] of each batch, and the network with its running statistics moved.
  """
  return _each(network.apply, net, batches, dropout)


def dropout_keys(key: Array, *passes: str) -> dict[str, Array]:
  """A random key for the dropout of each named pass of a step."""
  return {name: rng.stream(key, f"dropout/{name}") for name in passes}


def encode(
  network: Network, net: NetState, *batches: Array, dropout: Array | None = None
) -> tuple[tuple, NetState]:
  """As `forward`, but the backbone alone: the maps of each batch, a tuple of f32[B, h, w, C] that
  ends with the deepest.
  """
  return _each(network.encode, net, batches, dropout)


def decode(
  network: Network, net: NetState, *maps: tuple[Array, ...], dropout: Array | None = None
) -> tuple[tuple, NetState]:
  """As `forward`, but the head alone, on maps of `encode`: the scores f32[B, h, w, K] of each
  batch, on the head's grid.
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


def map_channels(network: Network) -> tuple[int, ...]:
  """Channels of the backbone's maps, the deepest last."""
  params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, 32, 32, network.in_channels), jnp.float32)
  maps, _ = jax.eval_shape(
    lambda *args: network.encode(*args, train=False), params, batch_stats, image
  )
  return tuple(array.shape[-1] for array in maps)


def infer(network: Network, net: NetState, images: Array) -> Array:
  """Logits f32[B, H, W, K] in inference mode (running statistics)."""
  return network.apply(net.params, net.batch_stats, images, train=False)[0]


def infer_maps(network: Network, net: NetState, images: Array) -> tuple[Array, ...]:
  """The backbone's maps in inference mode (running statistics)."""
  return network.encode(net.params, net.batch_stats, images, train=False)[0]


def predictors(network: Network, *roles: str) -> dict[str, Callable[[State, Array], Array]]:
  """One predictor per role in `State.nets`; the first is the headline."""

  def predictor(role: str) -> Callable[[State, Array], Array]:
    return lambda state, images: infer(network, state.nets[role], images)

  return {role: predictor(role) for role in roles}


def prediction_panels(network: Network, *roles: str) -> Panels:
  """The weak view, and what each network says of it; the last is the pseudo label."""

  def show(state, batch, draws):
    weak = batch["unlabeled"]["weak"]
    said = (jax.nn.softmax(infer(network, state.nets[role], weak)) for role in roles)
    return (weak, *said), batch["unlabeled"]["valid"]

  return Panels(("weak view", *roles), ("image", *["classes"] * len(roles)), show)


Objective = Callable[[dict[str, NetState]], tuple[Array, tuple[dict[str, NetState], Metrics]]]


def descend(
  optimizer: Optimizer | Mapping[str, Optimizer],
  nets: dict[str, NetState],
  step: Array,
  objective: Objective,
) -> tuple[dict[str, NetState], Metrics]:
  """One optimizer step of every net in `nets` on one objective.

  Args:
    optimizer: of all nets, or one for each by its name.
    step: i32[], the clock that the learning rate follows.
    objective: nets -> (loss f32[], (nets with moved statistics, metrics)); differentiated by the
      parameters of all nets.

  Returns:
    The nets after the step, and the metrics with `learning_rate` added, that of the first net.
  """

  optimizers = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(nets, optimizer)
  params = {name: net.params for name, net in nets.items()}
  rates = {
    name: optim.by_path(optimizers[name].multiplier, net.params) for name, net in nets.items()
  }
  # What has a rate of 0 is not differentiated: no backward pass runs through a part that is frozen
  # as a whole.
  learning = jax.tree.map(lambda rate, value: value if rate else None, rates, params)

  def whole(part: PyTree, default: Callable[[Array], Array]) -> PyTree:
    return jax.tree.map(
      lambda value, own: default(own) if value is None else value,
      part,
      params,
      is_leaf=lambda value: value is None,
    )

  def loss(learning: dict[str, PyTree]):
    filled = whole(learning, lambda own: own)
    return objective({name: net.replace(params=filled[name]) for name, net in nets.items()})

  gradients, (moved, metrics) = jax.grad(loss, has_aux=True)(learning)
  gradients = whole(gradients, jnp.zeros_like)

  def stepped(name: str, net: NetState) -> NetState:
    direction, opt_state = net.tx.update(gradients[name], net.opt_state, net.params)
    learning_rate = optimizers[name].learning_rate(step)
    params = jax.tree.map(
      lambda value, way, rate: value - learning_rate * rate * way,
      net.params,
      direction,
      rates[name],
    )
    return net.replace(
      step=net.step + 1, params=params, opt_state=opt_state, batch_stats=moved[name].batch_stats
    )

  after = {name: stepped(name, net) for name, net in nets.items()}
  return after, metrics | {"learning_rate": optimizers[next(iter(nets))].learning_rate(step)}


def ema(
  teacher: NetState, student: NetState, decay: Array | float, *, statistics: str = "own"
) -> NetState:
  """teacher <- decay * teacher + (1 - decay) * student, on the parameters.

  statistics: "own" leaves the teacher's batch-norm statistics to its own training-mode passes (all
    three published Mean Teacher codes); "average" averages them with the parameters.
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
