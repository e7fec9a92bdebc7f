"""What training leaves behind, opened again: a workdir at one of its checkpoints, or a network exported from one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from pseudoseg_jax import build, checks, config as configs, nets
from pseudoseg_jax.contract import Method, Needs, Network, NetState, State
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.engine import loop, mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints
from pseudoseg_jax.evaluation import report
from pseudoseg_jax.models import checkpoint_files, pretrained

_WEIGHTS = "model.safetensors"  # an exported folder is known by it


class Trained(NamedTuple):
  """What can be used: of the method the predictors, on this state."""

  config: configs.ConfigDict
  classes: Classes
  method: Method
  state: State
  other_classes: Mapping[str, Classes] = {}  # by further domain, in the order of their numbers


def open_trained(folder: pathlib.Path, mesh, checkpoint: str, overrides: Mapping[str, Any] | None = None) -> Trained:
  """A workdir at one of its checkpoints, or an exported folder."""
  if is_exported(folder):
    return _open_exported(folder, mesh, overrides)
  config = saved_config(folder)
  configs.override(config, overrides or {})
  classes, other_classes = _saved_classes(folder)
  method = build.build_method(config, len(classes), other_classes=list(map(len, other_classes.values())))
  return Trained(config, classes, method, restore(folder, method, mesh, checkpoint), other_classes)


def is_exported(folder: pathlib.Path) -> bool:
  return (folder / _WEIGHTS).is_file()


def _open_exported(folder: pathlib.Path, mesh, overrides: Mapping[str, Any] | None) -> Trained:
  try:
    about = json.loads((folder / "config.json").read_text())
    config, classes, name = configs.from_json(json.dumps(about["config"])), _classes(about["classes"]), about["predictor"]
    step = np.int32(about["provenance"].get("step", 0))  # a converted network has none
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise checks.InputError(f"cannot read {folder / 'config.json'}: {type(error).__name__}: {error}; export again") from error
  configs.override(config, overrides or {})
  network = build.build_network(config, len(classes))
  weights = checkpoint_files.read(folder / _WEIGHTS)
  if {key: value.shape for key, value in weights.items()} != network_shapes(network):
    raise checks.InputError(f"{folder / _WEIGHTS} does not fit the network of {folder / 'config.json'}; export again")
  weights = jax.device_put(pretrained.unflat(weights), meshes.replicated(mesh))
  net = NetState.create(apply_fn=network.apply, **weights, tx=optax.set_to_zero())
  state = State(step=step, nets={name: net})
  # No method: it is past learning. Only the predictors are ever asked for.
  method = Method(Needs(unlabeled=False), init=None, draw=None, update=None, predictors=nets.predictors(network, name))
  return Trained(config, classes, method, jax.device_put(state, meshes.replicated(mesh)))


def network_shapes(network: Network) -> dict[str, tuple[int, ...]]:
  """The shape of every leaf, by its name in a file of weights."""
  return pretrained.shapes_of(*jax.eval_shape(network.init, jax.random.key(0)))


def weights_of(trained: Trained, predictor: str) -> dict[str, np.ndarray]:
  """The leaves of one network that predicts the first domain's classes, without what its method added to it."""
  first_domain = [name for name in trained.method.predictors if not trained.method.predictor_domains.get(name)]
  checks.check_name("predictor", predictor, [name for name in first_domain if name in trained.state.nets])
  net = trained.state.nets[predictor]
  leaves = pretrained.flat(net.params, net.batch_stats)
  network = build.build_network(trained.config, len(trained.classes))
  return {key: np.asarray(leaves[key]) for key in network_shapes(network)}


def saved_config(workdir: pathlib.Path) -> configs.ConfigDict:
  """The config that a workdir was made with."""
  path = workdir / "config.json"
  if not path.is_file():
    problems = checks.Problems("cannot use workdir")
    problems.add("workdir", got=str(workdir), allowed="a folder that a training run made (it holds config.json)")
    problems.raise_if_any()
  return configs.from_json(path.read_text())


def save_classes(workdir: pathlib.Path, classes: Classes, other_classes: Mapping[str, Classes]) -> None:
  """Keeps the classes of the first and of further domains, so that a workdir is usable where its data are not."""
  others = {name: dataclasses.asdict(other) for name, other in other_classes.items()}
  report.write_atomically(workdir / "classes.json", json.dumps(dataclasses.asdict(classes) | {"domains": others}))


def _saved_classes(workdir: pathlib.Path) -> tuple[Classes, dict[str, Classes]]:
  """The classes as they were at training time: of the first domain, and of further ones by name."""
  saved = json.loads((workdir / "classes.json").read_text())
  return _classes(saved), {name: _classes(other) for name, other in saved.get("domains", {}).items()}


def _classes(saved: Mapping[str, Any]) -> Classes:
  return Classes(tuple(saved["names"]), tuple(map(tuple, saved["palette"])), tuple(map(tuple, saved.get("void", ()))))


def restore(workdir: pathlib.Path, method: Method, mesh, checkpoint: str) -> State:
  """The networks of a workdir's "best" or "last" checkpoint, on every device of the mesh; no memory comes with them."""
  checks.check_name("checkpoint", checkpoint, ("best", "last"))
  if not (workdir / "checkpoints").is_dir():
    raise checks.InputError(f"no checkpoint in {workdir}: train first")
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    method = method._replace(split_memory=())  # the mesh need not be one that the memory could be split over
    return checkpoints.restore(loop.abstract_state(method, mesh), series=checkpoint, memory=False)
  finally:
    checkpoints.close()


def export(
  workdir: str | pathlib.Path, out: str | pathlib.Path, *, predictor: str | None = None, checkpoint: str = "best"
) -> pathlib.Path:
  """Writes one network of a workdir as `out`/model.safetensors and `out`/config.json: all that `load`, `evaluate` and
  config.init_from need, wherever the folder goes. Predictions equal the workdir's bit for bit.

  Args:
    predictor: the network, default the method's headline.
    checkpoint: "best" or "last".

  Raises:
    InputError: no such workdir or predictor, or `out` is a workdir.
  """
  workdir = pathlib.Path(workdir)
  trained = open_trained(workdir, meshes.make_mesh(jax.devices()[:1]), checkpoint)
  name = predictor or next(iter(trained.method.predictors))
  step = int(trained.state.step)
  provenance = {"method": trained.config.method.name, "checkpoint": checkpoint, "step": step, "seed": trained.config.seed}
  results_path = workdir / "results.json"
  results = report.read_results(results_path) if results_path.exists() else {}
  if results.get(checkpoint, {}).get("step") == step:
    scores = results[checkpoint]["predictors"].get(name)
    provenance |= {"split": results["split"], "protocol": results["protocol"], "scores": scores}
  return write_export(out, weights_of(trained, name), trained.config, trained.classes, predictor=name, provenance=provenance)


def write_export(
  out: str | pathlib.Path,
  weights: Mapping[str, np.ndarray],
  config: configs.ConfigDict,
  classes: Classes,
  *,
  predictor: str,
  provenance: Mapping[str, Any],
) -> pathlib.Path:
  """Writes an exported folder.

  weights: {"params/backbone/...": array} of the whole network that `config` describes. provenance: where they are from (JSON).
  """
  out = pathlib.Path(out)
  if (out / "config.json").exists() and not is_exported(out):
    problems = checks.Problems("cannot export")
    problems.add("out", got=f"{out}, which is a workdir", allowed="a new folder, or an exported one to write over")
    problems.raise_if_any()
  options = json.loads(configs.to_json(config))
  if "root" in options["data"]:
    options["data"]["root"] = ""  # a place on this machine
  options["other_data"] = {}  # the network is one of the first domain
  about = {
    "format": "pseudoseg_jax exported network, version 1",
    "predictor": predictor,
    "classes": dataclasses.asdict(classes),
    "provenance": provenance,
    "config": options,
  }
  report.write_atomically(out / _WEIGHTS, checkpoint_files.to_safetensors(weights, {"format": about["format"]}))
  report.write_atomically(out / "config.json", json.dumps(about, indent=2) + "\n")
  return out
