"""Measures every method the same way, and prints one table: cost of a step, and what is learnt.

  python launch/measure.py --workdir=W                     the cost of a step, and synthetic scenes with three seeds
  python launch/measure.py --workdir=W --camvid=DIR        CamVid too, with 1/8 of the labels and one seed

Columns: time of a step relative to supervised on the same network and as many images, seconds of compilation, memory as XLA plans
it (all three: small network, 16 images of 128x128); mIoU in % on 200 synthetic scenes that nothing was learnt from, mean and
spread over the seeds, and what that is above supervised; mIoU on CamVid's test set. Scores are those of the headline predictor
after the last step; of methods that are one stage of several, the cost alone (measure_pipelines.py measures the rest). Costs are
measured first, one method after the other; leave the machine alone meanwhile. Everything measured stays in WORKDIR, so the command
can be stopped and repeated; the table is WORKDIR/table.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics

import compare
import jax
import step_time

from pseudoseg_jax.methods.table import METHODS

_METHODS = [name for name in METHODS if name != "cct_domains"]  # which learns two data sets at once
_STAGES = ("ancillary", "learn_pseudo", "self_correcting")
_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_IMAGES, _STEPS = 16, 10


def _parse():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  parser.add_argument("--methods", default=",".join(_METHODS), help="comma-separated (default: all)")
  parser.add_argument("--seeds", default="0,1,2", help="of the synthetic runs (default: 0,1,2)")
  parser.add_argument("--steps", default=1000, type=int, help="of a synthetic run (default: 1000)")
  parser.add_argument("--camvid", default="", help="folder of CamVid; without it that column is left out")
  parser.add_argument("--camvid_steps", default=300, type=int, help="of a run on CamVid (default: 300)")
  return parser.parse_args()


def _options(steps: int) -> list[str]:
  """One evaluation, at the end."""
  return [f"--config.total_steps={steps}", f"--config.eval_every_steps={steps}", "--config.evaluation.pictures=0"]


def _cost(method: str, workdir: pathlib.Path) -> step_time.Measured:
  """Cost of a step, measured now or read."""
  told = workdir / "cost" / f"{method}.json"
  if not told.exists():
    crop = {"views.crop_size": "128,128"}
    measured = step_time.measure(f"{_CONFIGS}/quickstart.py", method, images=_IMAGES, steps=_STEPS, overrides=crop)
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(measured._asdict()))
  return step_time.Measured(**json.loads(told.read_text()))


def main() -> None:
  known = _parse()
  methods, seeds = known.methods.split(","), [int(seed) for seed in known.seeds.split(",")]
  everything = ["supervised", *(method for method in methods if method != "supervised")]
  costs = {method: _cost(method, known.workdir) for method in everything}
  scenes, camvid = {}, {}
  for method in [method for method in everything if method not in _STAGES]:
    runs = known.workdir / "scenes" / method
    scenes[method] = [
      compare.headline_miou(compare.run(f"{_CONFIGS}/quickstart.py", method, seed, runs / str(seed), _options(known.steps)))
      for seed in seeds
    ]
    if known.camvid:
      run = known.workdir / "camvid" / method / "0"
      options = [f"--config.data.root={known.camvid}", *_options(known.camvid_steps)]
      camvid[method] = compare.headline_miou(compare.run(f"{_CONFIGS}/camvid.py:split=1_8", method, 0, run, options))
  lines = [
    f"{jax.device_count()} x {jax.devices()[0].device_kind}, {known.steps} steps on scenes, {known.camvid_steps} on CamVid", "",
    "| method | step, relative | compile s | MiB | synthetic mIoU | above supervised |" + " CamVid 1/8 mIoU |" * bool(camvid),
    "|---|---|---|---|---|---|" + "---|" * bool(camvid),
  ]  # fmt: skip
  for method in everything:
    cost, mious, on_camvid = costs[method], scenes.get(method), camvid.get(method)
    scores = ["-", "-"]
    if mious:
      spread = f" ± {statistics.stdev(mious):.1f}" if len(mious) > 1 else ""
      above = statistics.mean(mious) - statistics.mean(scenes["supervised"])
      scores = [f"{statistics.mean(mious):.1f}{spread}", f"{above:+.1f}"]
    scores += ["-" if on_camvid is None else f"{on_camvid:.1f}"] if known.camvid else []
    relative = cost.step_seconds / costs["supervised"].step_seconds
    cells = [method, f"{relative:.2f}", f"{cost.compile_seconds:.1f}", f"{cost.mebibytes:.0f}", *scores]
    lines.append(f"| {' | '.join(cells)} |")
  text = "\n".join(lines)
  (known.workdir / "table.md").write_text(text + "\n")
  print("\n" + text)


if __name__ == "__main__":
  main()
