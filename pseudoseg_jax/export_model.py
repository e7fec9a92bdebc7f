"""Writes a trained network as two files that go anywhere. See --help."""

from __future__ import annotations

import argparse
import pathlib
import sys

import pseudoseg_jax
from pseudoseg_jax import command_line

DESCRIPTION = """\
Writes one network of a training run as

  OUT/model.safetensors   weights and batch-norm statistics, float32
  OUT/config.json         network, classes, normalization, protocol, and where it is from: method, step, split, scores

which is all that is needed to use it, on any machine; predictions equal those of the run bit for bit.
"""

EPILOG = """\
examples:
  python -m pseudoseg_jax.export_model --workdir=W --out=OUT
  python -m pseudoseg_jax.export_model --workdir=W --out=OUT --predictor=teacher --checkpoint=last
then
  python -m pseudoseg_jax.predict --workdir=OUT --images=DIR --out=SEGMENTED         pseudoseg_jax.load("OUT") in Python
  python -m pseudoseg_jax.main --mode=eval --workdir=OUT --config.data.root=DIR
  python -m pseudoseg_jax.main --config=... --workdir=W2 --config.init_from=OUT      a run that starts from it
"""


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    "python -m pseudoseg_jax.export_model",
    description=DESCRIPTION,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--workdir", type=pathlib.Path, required=True, help="folder of a training run"
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
  parser.add_argument(
    "--predictor",
    help="which network of the method, e.g. student or teacher (default: the method's headline)",
  )
  parser.add_argument(
    "--checkpoint",
    choices=("best", "last"),
    default="best",
    help="which checkpoint (default: best)",
  )
  known = parser.parse_args(sys.argv[1:] if arguments is None else arguments)

  def command():
    pseudoseg_jax.export(
      known.workdir, known.out, predictor=known.predictor, checkpoint=known.checkpoint
    )
    print("\n".join(f"  {known.out / name}" for name in ("model.safetensors", "config.json")))

  return command_line.run(command)


if __name__ == "__main__":
  command_line.leave(main)
