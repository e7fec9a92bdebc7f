"""Times one training step of several methods on the same network and the same number of images, and
prints a table.

  python launch/step_time.py --config=configs/voc.py:recipe=cps --methods=supervised,pseudoseg --images=8 \\
      --config.views.crop_size=321,321

The images are synthetic scenes of the crop's size, so no data set is needed. A method with
unlabeled images gets half of them as labeled ones; supervised gets them all. Columns: seconds of a
step (median), relative to the first method, seconds of compilation, and the memory that XLA plans
for the step (state, batch and temporaries).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

from pseudoseg_jax import build, config as configs, settings
from pseudoseg_jax.command_line import parse_with_overrides, run
from pseudoseg_jax.engine import loop, mesh as meshes
from pseudoseg_jax.methods.table import METHODS
from pseudoseg_jax.options import BatchSizes, Config, replaced

_ALL = [name for name in METHODS if name != "cct_domains"]  # which learns two data sets at once


def _parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument(
    "--config", required=True, help="config file with its argument, without the method"
  )
  parser.add_argument(
    "--methods",
    required=True,
    help="comma-separated, or all; 'pseudoseg+method.image_labels=True' sets an option",
  )
  parser.add_argument(
    "--images", type=int, default=8, help="images of a step, all streams together (default: 8)"
  )
  parser.add_argument(
    "--steps", type=int, default=5, help="steps to time after the first (default: 5)"
  )
  return parse_with_overrides(parser, arguments)


class Measured(NamedTuple):
  step_seconds: float  # median
  compile_seconds: float
  mebibytes: float  # as XLA plans


def _load(path: str, method: str, overrides: dict[str, str]) -> Config:
  name, *options = method.split("+")
  file, _, argument = path.partition(":")
  overrides = overrides | dict(option.split("=", 1) for option in options)
  config = configs.load(f"{file}:{','.join(filter(None, [argument, f'method={name}']))}", overrides)
  with config.unlocked():
    config.data = {
      "name": "synthetic",
      "num_scenes": 64,
      "num_labeled": 32,
      "num_eval_scenes": 1,
      "size": config.views.crop_size,
      "scenes_seed": 0,
      "mean": config.data.mean,
      "std": config.data.std,
    }
  return configs.frozen(config)


def measure(
  path: str, method: str, *, images: int, steps: int, overrides: dict[str, str]
) -> Measured:
  """One method on a config (path, with its argument), `images` a step in all streams together."""
  config = _load(path, method, overrides)
  data = build.build_data(config.data)
  config, _ = settings.settle_from(config, data)
  method = build.build_method(config, len(data.classes), len(data.unlabeled))
  labeled = images // 2 if method.needs.unlabeled else images
  unlabeled = (images - labeled) // (1 + method.needs.partner) or 1
  config = replaced(config, {"batch_size_global": BatchSizes(labeled, unlabeled)})
  mesh = meshes.make_mesh()
  batch = meshes.global_batch(
    mesh, next(build.batches(build.build_pipeline(config, data, method))(0))
  )
  state = jax.block_until_ready(loop.jit_init(method, mesh, config.seed))
  begun = time.perf_counter()
  step = loop.jit_step(method, mesh, config.seed).lower(state, batch).compile()
  compile_seconds = time.perf_counter() - begun
  plan = step.memory_analysis()
  state, _ = jax.block_until_ready(step(state, batch))
  seconds = []
  for _ in range(steps):
    before = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    seconds.append(time.perf_counter() - before)
  memory = (plan.temp_size_in_bytes + plan.argument_size_in_bytes) / 2**20
  return Measured(statistics.median(seconds), compile_seconds, memory)


def main(arguments=None) -> int:
  known, overrides = _parse(arguments)
  return run(lambda: _print_table(known, overrides))


def _print_table(known: argparse.Namespace, overrides: dict[str, str]) -> None:
  print(
    f"{known.config} {' '.join(f'{key}={value}' for key, value in overrides.items())}, {known.images} images a step"
  )
  print(f"{jax.device_count()} x {jax.devices()[0].device_kind}\n")
  print("| method | step s | ratio | compile s | MiB |\n|---|---|---|---|---|")
  reference = None
  for method in _ALL if known.methods == "all" else known.methods.split(","):
    told = measure(
      known.config, method, images=known.images, steps=known.steps, overrides=overrides
    )
    reference = reference or told.step_seconds
    ratio = told.step_seconds / reference
    print(
      f"| {method} | {told.step_seconds:.3f} | {ratio:.2f} | {told.compile_seconds:.1f} | {told.mebibytes:.0f} |",
      flush=True,
    )


if __name__ == "__main__":
  sys.exit(main())
