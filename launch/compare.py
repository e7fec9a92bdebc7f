"""Runs one config with several methods and seeds, one after the other, and prints a table of what they reach.

  python launch/compare.py --config=configs/quickstart.py --methods=supervised,mean_teacher --seeds=0,1,2 --workdir=/tmp/compare
  python launch/compare.py --config=configs/camvid.py:split=1_8 --methods=supervised,cps,cps_cutmix,mean_teacher --workdir=W \\
      --config.data.root=DIR

Every run is a process of its own in WORKDIR/METHOD/SEED; finished ones are only read, so the command can be repeated. Other
arguments go to each run as they are. The table, in WORKDIR/table.md: mIoU in % of each method's headline predictor after the last
step, per seed and on average, and the minutes of wall time.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time


def _parse():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument("--config", required=True, help="config file with its argument, without the method")
  parser.add_argument(
    "--methods", required=True,
    help="comma-separated; 'mean_teacher+convention=official' or 'pseudoseg+method.image_labels=True' add options",
  )  # fmt: skip
  parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  return parser.parse_known_args()


def run(config: str, method: str, seed: int, workdir: pathlib.Path, rest: list[str]) -> dict:
  """One run, or what is left of an earlier one; returns results.json with "minutes" of the newest process that trained."""
  told = workdir / "minutes.json"
  path, _, argument = config.partition(":")
  name, *extra = method.split("+")
  options = [f"--config.{part}" for part in extra if "." in part.partition("=")[0]]
  arguments = [part for part in extra if f"--config.{part}" not in options]
  argument = ",".join([*filter(None, [argument, f"method={name}"]), *arguments])
  if not told.exists():
    command = [sys.executable, "-m", "pseudoseg_jax.main", f"--config={path}:{argument}", f"--workdir={workdir}"]
    begun = time.time()
    subprocess.run([*command, f"--config.seed={seed}", *rest, *options], check=True)
    told.write_text(json.dumps((time.time() - begun) / 60))
  return json.loads((workdir / "results.json").read_text()) | {"minutes": json.loads(told.read_text())}


def headline_miou(results: dict) -> float:
  """mIoU in % of the headline predictor after the last step."""
  return 100 * next(iter(results["last"]["predictors"].values()))["miou"]


def main() -> None:
  known, rest = _parse()
  seeds = [int(seed) for seed in known.seeds.split(",")]
  lines = [f"| method | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | minutes |", "|---" * (len(seeds) + 3) + "|"]
  for method in known.methods.split(","):
    runs = [run(known.config, method, seed, known.workdir / method / str(seed), rest) for seed in seeds]
    mious = [headline_miou(results) for results in runs]
    minutes = statistics.mean(results["minutes"] for results in runs)
    lines.append(f"| {method} | {' | '.join(f'{miou:.2f}' for miou in mious)} | {statistics.mean(mious):.2f} | {minutes:.1f} |")
  text = "\n".join([f"{known.config} {' '.join(rest)}", "", *lines])
  (known.workdir / "table.md").write_text(text + "\n")
  print("\n" + text)


if __name__ == "__main__":
  main()
