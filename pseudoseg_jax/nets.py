"""The plain functions that methods share: a network is born, run, descended and averaged here."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pseudoseg_jax import optim
from pseudoseg_jax.contract import Array, Metrics, Network, NetState, Optimizer, PyTree, State, Task


def create(task: Task, key: Array) -> NetState:
  """A freshly initialised network with its optimiser state."""
  params, batch_stats = task.network.init(key)
  net = NetState.create(apply_fn=task.network.apply, params=params, batch_stats=batch_stats, tx=task.optimizer.transform)
  return net.replace(step=jnp.zeros([], jnp.int32))  # a Python int would make the second step retrace


# No gradient moves a teacher. Made once: TrainState compares its transformation by identity.
_NO_DESCENT = optax.set_to_zero()


def teacher_of(student: NetState) -> NetState:
  """A teacher born as a copy of the student; copies of the arrays, since the engine donates both."""
  params, batch_stats = jax.tree.map(jnp.copy, (student.params, student.batch_stats))
  return student.replace(params=params, batch_stats=batch_stats, tx=_NO_DESCENT, opt_state=_NO_DESCENT.init(params))


def forward(network: Network, net: NetState, *batches: Array) -> tuple[tuple[Array, ...], NetState]:
  """Runs the network in training mode on each batch, every one with batch-norm statistics of its own.

  Images that shall share statistics go into one batch. Running statistics move once per batch, in the order given.

  Args:
    batches: f32[B, H, W, 3] each.

  Returns:
    The logits f32[B, H, W, K] of each batch, and the network with its running statistics moved.
  """
  same = len({batch.shape for batch in batches}) == 1
  if same and len(batches) > 1:
    # One pass over all batches, interleaved so that a batch axis split over devices stays where it is: the convolutions
    # see one large batch and the graph holds the network once.
    groups = len(batches)
    stacked = jnp.stack(batches, axis=1)
    images = stacked.reshape(-1, *stacked.shape[2:])
    logits, stats = network.apply(net.params, net.batch_stats, images, train=True, groups=groups)
    parts = logits.reshape(-1, groups, *logits.shape[1:])
    return tuple(parts[:, group] for group in range(groups)), net.replace(batch_stats=stats)
  outputs, stats = [], net.batch_stats
  for batch in batches:
    logits, stats = network.apply(net.params, stats, batch, train=True)
    outputs.append(logits)
  return tuple(outputs), net.replace(batch_stats=stats)


def infer(network: Network, net: NetState, images: Array) -> Array:
  """Logits f32[B, H, W, K] in inference mode (running statistics)."""
  return network.apply(net.params, net.batch_stats, images, train=False)[0]


def predictors(network: Network, *roles: str) -> dict[str, Callable[[State, Array], Array]]:
  """One predictor per role in `State.nets`; the first is the headline."""
  return {role: lambda state, images, role=role: infer(network, state.nets[role], images) for role in roles}


Objective = Callable[[dict[str, NetState]], tuple[Array, tuple[dict[str, NetState], Metrics]]]


def descend(optimizer: Optimizer, nets: dict[str, NetState], step: Array, objective: Objective) -> tuple[dict[str, NetState], Metrics]:
  """One optimiser step of every net in `nets` on one objective.

  Args:
    step: i32[], the clock that the learning rate follows.
    objective: nets -> (loss f32[], (nets with moved statistics, metrics)); differentiated by the parameters of all nets.

  Returns:
    The nets after the step, and the metrics with `learning_rate` added.
  """

  def loss(params: dict[str, PyTree]):
    return objective({name: net.replace(params=params[name]) for name, net in nets.items()})

  params = {name: net.params for name, net in nets.items()}
  gradients, (moved, metrics) = jax.grad(loss, has_aux=True)(params)
  learning_rate = optimizer.learning_rate(step)

  def stepped(net: NetState, gradient: PyTree, batch_stats: PyTree) -> NetState:
    direction, opt_state = net.tx.update(gradient, net.opt_state, net.params)
    rates = optim.by_path(optimizer.multiplier, net.params)
    params = jax.tree.map(lambda value, way, rate: value - learning_rate * rate * way, net.params, direction, rates)
    return net.replace(step=net.step + 1, params=params, opt_state=opt_state, batch_stats=batch_stats)

  after = {name: stepped(net, gradients[name], moved[name].batch_stats) for name, net in nets.items()}
  return after, metrics | {"learning_rate": learning_rate}


def ema(teacher: NetState, student: NetState, decay: Array | float, *, statistics: str = "own") -> NetState:
  """teacher <- decay * teacher + (1 - decay) * student, on the parameters.

  statistics: "own" leaves the teacher's batch-norm statistics to its own training-mode passes (all three published Mean Teacher
    codes); "average" averages them with the parameters.
  """

  def average(old, new):
    return decay * old + (1 - decay) * new

  teacher = teacher.replace(params=jax.tree.map(average, teacher.params, student.params))
  if statistics == "average":
    teacher = teacher.replace(batch_stats=jax.tree.map(average, teacher.batch_stats, student.batch_stats))
  return teacher
