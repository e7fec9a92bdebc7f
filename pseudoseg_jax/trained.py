"""What training leaves behind, opened again.

This is a workdir at one of its checkpoints, or a network exported from one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from pseudoseg_jax import build, checks, config as configs, nets, notebook, workdir as workdirs
from pseudoseg_jax.contract import Method, Needs, NetState, Network, State
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.engine import loop, mesh as meshes
from pseudoseg_jax.engine.checkpoints import Checkpoints
from pseudoseg_jax.evaluation import report, weak_labels
from pseudoseg_jax.models import checkpoint_files, pretrained
from pseudoseg_jax.options import Config
from pseudoseg_jax.workdir import saved_config

log = logging.getLogger("pseudoseg_jax")

_WEIGHTS = "model.safetensors"  # an exported folder is known by it


class Trained(NamedTuple):
  """A method and a state, on which its predictors can be used."""

  config: Config
  classes: Classes
  method: Method
  state: State
  other_classes: Mapping[str, Classes] = {}  # by further domain, in the order of their numbers
  checkpoint: str = ""  # "best" or "last", the one that it is; "" of an exported network


def open_trained(
  folder: pathlib.Path,
  mesh,
  checkpoint: str,
  overrides: Mapping[str, Any] | None = None,
  *,
  step: int | None = None,
) -> Trained:
  """Opens a workdir at one of its checkpoints, or an exported folder.

  `step` is that of an earlier checkpoint of the series.
  """
  if is_exported(folder):
    return _open_exported(folder, mesh, overrides)
  saved = saved_config(folder)
  configs.override(saved, overrides or {})
  config = configs.frozen(saved)
  classes, other_classes = workdirs.saved_classes(folder)
  method = build.build_method(
    config, len(classes), other_classes=list(map(len, other_classes.values()))
  )
  checkpoint = available(folder, checkpoint)
  return Trained(
    config,
    classes,
    method,
    restore(folder, method, mesh, checkpoint, step),
    other_classes,
    checkpoint,
  )


def is_exported(folder: pathlib.Path) -> bool:
  return (folder / _WEIGHTS).is_file()


def _open_exported(folder: pathlib.Path, mesh, overrides: Mapping[str, Any] | None) -> Trained:
  def parse(about):
    step = about["provenance"].get("step", 0)  # a converted network has none
    if not isinstance(about["predictor"], str):
      raise TypeError(f"a predictor that is no name: {about['predictor']!r}")
    return (
      configs.from_saved(about["config"]),
      workdirs.classes_of(about["classes"]),
      about["predictor"],
      np.int32(step),
    )

  saved, classes, name, step = workdirs.read_json(
    folder / "config.json", remedy="export again", parse=parse
  )
  configs.override(saved, overrides or {})
  config = configs.frozen(saved)
  network = build.build_network(config, len(classes))
  weights = checkpoint_files.read(folder / _WEIGHTS)
  if {key: value.shape for key, value in weights.items()} != network_shapes(network):
    raise checks.InputError(
      f"{folder / _WEIGHTS} does not fit the network of {folder / 'config.json'}; export again"
    )
  weights = jax.device_put(pretrained.unflat(weights), meshes.replicated(mesh))
  net = NetState.create(apply_fn=network.apply, **weights, tx=optax.set_to_zero())
  state = State(step=step, nets={name: net})
  # No method: it is past learning. Only the predictors are ever asked for.
  method = Method(
    Needs(unlabeled=False),
    init=None,
    draw=None,
    update=None,
    predictors=nets.predictors(network, name),
  )
  return Trained(config, classes, method, jax.device_put(state, meshes.replicated(mesh)))


def network_shapes(network: Network) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every leaf, by its name in a file of weights."""
  return pretrained.shapes_of(*jax.eval_shape(network.init, jax.random.key(0)))


def weights_of(trained: Trained, predictor: str) -> dict[str, np.ndarray]:
  """Returns the leaves of one network that predicts the first domain's classes.

  They are without what its method added to it.
  """
  first_domain = [name for name, predict in trained.method.predictors.items() if not predict.domain]
  checks.check_name(
    "predictor", predictor, [name for name in first_domain if name in trained.state.nets]
  )
  net = trained.state.nets[predictor]
  leaves = pretrained.flat(net.params, net.batch_stats)
  network = build.build_network(trained.config, len(trained.classes))
  return {key: np.asarray(leaves[key]) for key in network_shapes(network)}


def available(workdir: pathlib.Path, checkpoint: str) -> str:
  """Returns the checkpoint to use, "best" or "last".

  It is the one that was asked for, or "last" where there is no best one yet, which is logged. A run
  that was stopped before its first evaluation has none.
  """
  checks.check_name("checkpoint", checkpoint, ("best", "last"))
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  if (
    checkpoint == "best"
    and checkpoints.step("best") is None
    and checkpoints.step("last") is not None
  ):
    log.warning(
      "%s has no best checkpoint, since no evaluation was finished: its last one is used", workdir
    )
    return "last"
  return checkpoint


def restore(
  workdir: pathlib.Path, method: Method, mesh, checkpoint: str, step: int | None = None
) -> State:
  """Restores the networks of a workdir's "best" or "last" checkpoint.

  The checkpoint is the newest or that of `step`. The networks are on every device; without memory.
  """
  checks.check_name("checkpoint", checkpoint, ("best", "last"))
  if not (workdir / "checkpoints").is_dir():
    raise checks.InputError(f"no checkpoint in {workdir}: train first")
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  kept = sorted(checkpoints.steps(checkpoint))
  if step is not None and step not in kept:
    problems = checks.Problems(f"cannot use workdir {workdir}")
    remedy = "train with a larger config.keep_last_checkpoints to keep more"
    problems.add(
      f"{checkpoint} checkpoint of step",
      got=step,
      allowed=", ".join(map(str, kept)) or "none",
      remedy=remedy,
    )
    problems.raise_if_any()
  try:
    # The mesh need not be one that the memory could be split over.
    method = method._replace(split_memory=())
    return checkpoints.restore(
      loop.abstract_state(method, mesh), series=checkpoint, step=step, memory=False
    )
  finally:
    checkpoints.close()


def check_plain(method: Method, predictor: str) -> None:
  """Raises InputError for a predictor that an image alone is not enough for.

  It does so also for what is no predictor of the method.
  """
  of = predictor.removesuffix(weak_labels.IMAGE_LABELS)
  checks.check_name("predictor", of, method.predictors)
  kind = method.predictors[of].weak_label or ("image" if of != predictor else None)
  if kind:
    problems = checks.Problems(f"predictor '{predictor}' needs more than an image")
    plain = [name for name, predict in method.predictors.items() if not predict.weak_label]
    what = {"boxes": "boxes", "image": "image-level labels"}[kind]
    problems.add(
      "predictor",
      got=f"{what} are shown to it beside the image",
      allowed=checks.choices(plain) or "none of this method",
      remedy="python -m pseudoseg_jax.export_labels predicts the images of a data set with their weak labels",
    )
    problems.raise_if_any()


@notebook.root_handlers_kept()
def export(
  workdir: str | pathlib.Path,
  out: str | pathlib.Path,
  *,
  predictor: str | None = None,
  checkpoint: str = "best",
) -> pathlib.Path:
  """Writes one network of a workdir as a folder.

  The folder holds `out`/model.safetensors and `out`/config.json: all that `load`, `evaluate` and
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
  check_plain(trained.method, name)
  step = int(trained.state.step)
  provenance = {
    "method": trained.config.method.name,
    "checkpoint": checkpoint,
    "step": step,
    "seed": trained.config.seed,
  }
  results_path = workdir / "results.json"
  results = report.read_results(results_path) if results_path.exists() else {}
  if results.get(checkpoint, {}).get("step") == step:
    scores = results[checkpoint]["predictors"].get(name)
    provenance |= {"split": results["split"], "protocol": results["protocol"], "scores": scores}
  return write_export(
    out,
    weights_of(trained, name),
    trained.config,
    trained.classes,
    predictor=name,
    provenance=provenance,
  )


def write_export(
  out: str | pathlib.Path,
  weights: Mapping[str, np.ndarray],
  config: Config,
  classes: Classes,
  *,
  predictor: str,
  provenance: Mapping[str, Any],
) -> pathlib.Path:
  """Writes an exported folder.

  Args:
    weights: {"params/backbone/...": array} of the whole network that `config` describes.
    provenance: where they are from (JSON).
  """
  out = pathlib.Path(out)
  if (out / "config.json").exists() and not is_exported(out):
    problems = checks.Problems("cannot export")
    problems.add(
      "out",
      got=f"{out}, which is a workdir",
      allowed="a new folder, or an exported one to write over",
    )
    problems.raise_if_any()
  options = json.loads(configs.to_json(config))
  if "root" in options["data"]:
    options["data"]["root"] = ""  # a place on this machine
  options["other_data"] = {}  # the network is one of the first domain
  # What it was learned from.
  options["nets_from"] = options["pseudo_labels"]["folder"] = options["pseudo_labels"]["list"] = ""
  about = {
    "format": "pseudoseg_jax exported network, version 1",
    "predictor": predictor,
    "classes": dataclasses.asdict(classes),
    "provenance": provenance,
    "config": options,
  }
  report.write_atomically(
    out / _WEIGHTS, checkpoint_files.to_safetensors(weights, {"format": about["format"]})
  )
  report.write_atomically(out / "config.json", json.dumps(about, indent=2) + "\n")
  return out
