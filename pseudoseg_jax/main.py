"""The command line: trains, resumes, or scores a workdir. See --help."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile

from pseudoseg_jax import command_line

EPILOG = """\
examples:
  python -m pseudoseg_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart
  python -m pseudoseg_jax.main --config=configs/quickstart.py:method=supervised --workdir=/tmp/baseline
  python -m pseudoseg_jax.main --config=configs/camvid.py:method=cps,split=1_8 --config.data.root=DIR --workdir=W
  python -m pseudoseg_jax.main --config=configs/voc.py --config.data.root=DIR --config.optimizer.learning_rate=0.005 --workdir=W
  python -m pseudoseg_jax.main --mode=eval --workdir=W --config.evaluation.preset=cps_voc
  python -m pseudoseg_jax.main --mode=eval --workdir=W --config.evaluation.scales=0.5,1,1.5 --config.evaluation.flip=True

Running the same command again resumes at the newest checkpoint. Ctrl-C or SIGTERM saves and leaves, with exit code 130 or 143.
--config.KEY=VALUE overrides any option of the config; --print_config shows them all, and --explain=KEY says what one is.
"""


def _parse(arguments):
  parser = argparse.ArgumentParser(
    "python -m pseudoseg_jax.main",
    description="Trains semi-supervised semantic segmentation, or scores what was trained.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config",
    help="config file, with its argument after a colon: configs/voc.py:method=cps,split=1_8",
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    help="folder of the run: checkpoints, logs, pictures, results.json",
  )
  mode_help = "eval scores a trained workdir, into its evaluations/ (default: train)"
  parser.add_argument("--mode", choices=("train", "eval"), default="train", help=mode_help)
  parser.add_argument(
    "--checkpoint",
    choices=("best", "last"),
    default="best",
    help="which one eval scores (default: best)",
  )
  parser.add_argument(
    "--print_config", action="store_true", help="print the config with all its options, and leave"
  )
  parser.add_argument(
    "--explain",
    metavar="KEY",
    nargs="?",
    const="",
    help="say what an option is (optimizer.learning_rate), or all of a group (views), or all, and "
    "which values it may have, and leave",
  )
  several = parser.add_argument_group(
    "several processes (hosts), each started with the same command"
  )
  several.add_argument(
    "--distributed",
    action="store_true",
    help="find the others through the cluster (Slurm, TPU, GKE, Open MPI)",
  )
  several.add_argument("--coordinator", metavar="HOST:PORT", help="or say where process 0 is, ...")
  several.add_argument("--process_count", type=int, help="... how many processes there are ...")
  several.add_argument("--process_index", type=int, help="... and which one this is, from 0")
  known, overrides = command_line.parse_with_overrides(parser, arguments)
  if known.mode == "train" and not known.config and known.explain is None:
    parser.error("--config is needed to train, e.g. --config=configs/quickstart.py")
  if len({known.coordinator is None, known.process_count is None, known.process_index is None}) > 1:
    parser.error("--coordinator, --process_count and --process_index go together")
  if known.workdir is None and not known.print_config and known.explain is None:
    parser.error("--workdir is needed")
  return known, overrides


def main(arguments=None) -> int:
  known, overrides = _parse(sys.argv[1:] if arguments is None else arguments)

  # Here, so that --help answers at once, and before command_line.run, which takes Ctrl-C over from
  # the system.
  import jax

  from pseudoseg_jax import api, config as configs
  from pseudoseg_jax.engine import stopping

  def command() -> int:
    if known.distributed or known.coordinator:
      jax.distributed.initialize(known.coordinator, known.process_count, known.process_index)
    jax.config.update("jax_compilation_cache_dir", _compilation_cache())
    if known.print_config:
      print(configs.to_json(configs.load(known.config, overrides)), end="")
    elif known.explain is not None:
      print(configs.explain(configs.load(known.config or "folder", overrides), known.explain))
    elif known.mode == "eval":
      api.evaluate(known.workdir, checkpoint=known.checkpoint, overrides=overrides)
    else:
      results = api.train(known.config, known.workdir, overrides, owns_process=arguments is None)
      if results["stopped_by"]:
        return stopping.exit_code(results["stopped_by"])  # so that `train && next` stops here too
    return 0

  return command_line.run_distributed(command)


def _compilation_cache() -> str:
  """Returns the folder where compiled programs are kept.

  It is the user's, or this machine's for a user without a home.
  """
  try:
    home = pathlib.Path.home() / ".cache"
  except RuntimeError:  # no HOME, and no entry in the system's list of users
    home = pathlib.Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
  return os.environ.get("JAX_COMPILATION_CACHE_DIR", str(home / "pseudoseg_jax" / "compiled"))


if __name__ == "__main__":
  command_line.leave(main)
