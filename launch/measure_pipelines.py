"""Runs every pipeline of stages the same way, and prints one table: time of each stage, how good
labels and last stage are.

  python launch/measure_pipelines.py --workdir=W                     synthetic scenes, three seeds
  python launch/measure_pipelines.py --workdir=W --camvid=DIR        CamVid too, with 1/8 of the masks and one seed

Columns: minutes of wall time of each stage (of the first seed); mIoU in % of the labels that are
learned from, against the true masks, for self_correcting those of its ancillary network before any
correction; mIoU of the last stage's headline predictor after its last step, on images that nothing
was learned from, mean and spread over the seeds, and what that is above the supervised
baseline: the same masks, network and steps as one training stage. Image-level labels and boxes are
read off masks. Everything stays in WORKDIR, so the command can be stopped and repeated; the table
is WORKDIR/pipelines.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from typing import NamedTuple

import label_quality

from pseudoseg_jax import config as configs

_PIPELINES = (
  "learn_pseudo",
  "self_correcting",
  "self_correcting,correction=convolutional",
  "self_training",
)
_LAUNCH = pathlib.Path(__file__).parent
_CONFIGS = _LAUNCH.parent / "configs"


class Measured(NamedTuple):
  """minutes: of each stage. labels: mIoU in % of each folder of labels, in order. miou: of the last
  stage, in %.
  """

  minutes: dict[str, float]
  labels: dict[str, float]
  miou: float


class Data(NamedTuple):
  """A data set: its config with argument, for pipelines as for a single run; options of every run;
  where weak labels are kept.
  """

  name: str
  argument: str
  options: list[str]
  weak_labels: dict[str, pathlib.Path]

  @property
  def config(self) -> str:
    return f"{_CONFIGS / self.name}.py" + f":{self.argument}" * bool(self.argument)


def _parse():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  parser.add_argument(
    "--pipelines",
    default=" ".join(_PIPELINES),
    help="separated by blanks, with arguments (default: all)",
  )
  parser.add_argument("--seeds", default="0,1,2", help="of the synthetic runs (default: 0,1,2)")
  parser.add_argument(
    "--steps", default=1000, type=int, help="of each training on scenes (default: 1000)"
  )
  parser.add_argument(
    "--camvid", default="", help="folder of CamVid; without it those columns are left out"
  )
  parser.add_argument(
    "--camvid_steps", default=300, type=int, help="of each training on CamVid (default: 300)"
  )
  return parser.parse_args()


def _options(steps: int) -> list[str]:
  """One evaluation, at the end."""
  return [
    f"--config.total_steps={steps}",
    f"--config.eval_every_steps={steps}",
    "--config.evaluation.pictures=0",
  ]


def _camvid(root: str, workdir: pathlib.Path, steps: int) -> Data:
  """CamVid, with weak labels read off its masks."""
  data = Data("camvid", "split=1_8", [f"--config.data.root={root}", *_options(steps)], {})
  made = {
    "image_labels": ("tags_from_masks", "tags.csv"),
    "boxes": ("boxes_from_masks", "boxes.json"),
  }
  for kind, (maker, name) in made.items():
    data.weak_labels[kind] = path = (workdir / name).resolve()
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      command = [
        sys.executable,
        _LAUNCH / f"{maker}.py",
        f"--config={data.config}",
        f"--out={path}",
      ]
      subprocess.run([*command, f"--config.data.root={root}"], check=True)
  return data


def _baseline(data: Data, seed: int, workdir: pathlib.Path) -> float:
  """mIoU in % of a supervised run after the last step, now or of an earlier one."""
  told = workdir / "results.json"
  if not told.exists():
    config = (
      f"{_CONFIGS / data.name}.py:{','.join(filter(None, [data.argument, 'method=supervised']))}"
    )
    command = [
      sys.executable,
      "-m",
      "pseudoseg_jax.main",
      f"--config={config}",
      f"--workdir={workdir}",
      f"--config.seed={seed}",
    ]
    subprocess.run([*command, *data.options], check=True)
  return 100 * json.loads(told.read_text())["last"]["predictors"]["student"]["miou"]


def _run(pipeline: str, data: Data, seed: int, workdir: pathlib.Path) -> Measured:
  """One run of a pipeline, or what is left of an earlier one."""
  told = workdir / "measured.json"
  if told.exists():
    return Measured(**json.loads(told.read_text()))
  name = pipeline.partition(",")[0]
  config = ",".join(
    filter(None, [f"{_CONFIGS}/pipelines.py:{pipeline},data={data.name}", data.argument])
  )
  wanted = {"learn_pseudo": "image_labels", "self_correcting": "boxes"}.get(name)
  weak = (
    [f"--config.data.{wanted}={data.weak_labels[wanted]}"] if wanted in data.weak_labels else []
  )
  command = [
    sys.executable,
    _LAUNCH / "pipeline.py",
    f"--config={config}",
    f"--workdir={workdir}",
    f"--config.seed={seed}",
  ]
  subprocess.run([*command, *data.options, *weak], check=True)
  stages = json.loads((workdir / "summary.json").read_text())
  folders = [stage["name"] for stage in stages if stage["kind"] == "export"]
  if name == "self_correcting":
    folders = ["ancillary_labels"]
    export = [sys.executable, "-m", "pseudoseg_jax.export_labels", f"--workdir={workdir}/ancillary"]
    subprocess.run([*export, f"--out={workdir / folders[0]}"], check=True)
  overrides = dict(option.removeprefix("--config.").split("=", 1) for option in data.options)
  opened = configs.frozen(configs.load(data.config, overrides))
  scores = {
    folder: 100 * label_quality.score(workdir / folder, opened)[1].miou for folder in folders
  }
  minutes = {stage["name"]: stage["minutes"] for stage in stages}
  measured = Measured(minutes, scores, 100 * next(iter(stages[-1]["miou"].values())))
  told.write_text(json.dumps(measured._asdict()))
  return measured


def _row(runs: list[Measured], baseline: list[float]) -> str:
  """The columns of one data set: labels, last stage, above supervised."""
  names = list(runs[0].labels)
  labels = ", ".join(
    f"{name} {statistics.mean(run.labels[name] for run in runs):.1f}" for name in names
  )
  mious = [run.miou for run in runs]
  spread = f" ± {statistics.stdev(mious):.1f}" if len(mious) > 1 else ""
  return f" {labels} | {statistics.mean(mious):.1f}{spread} | {statistics.mean(mious) - statistics.mean(baseline):+.1f} |"


def main() -> None:
  known = _parse()
  seeds, root = [int(seed) for seed in known.seeds.split(",")], known.workdir
  sets = {"synthetic": (Data("quickstart", "", _options(known.steps), {}), seeds)}
  if known.camvid:
    sets["CamVid 1/8"] = (_camvid(known.camvid, root / "weak_labels", known.camvid_steps), [0])
  baseline = {}
  for name, (data, of_set) in sets.items():
    folder = root / data.name / "supervised"
    baseline[name] = [_baseline(data, seed, folder / str(seed)) for seed in of_set]
  lines = [
    "| pipeline | minutes, scenes |"
    + "".join(f" {name}: labels | {name}: mIoU | above supervised |" for name in sets),
    "|---|---|" + "---|---|---|" * len(sets),
    "| supervised | |"
    + "".join(f" | {statistics.mean(mious):.1f} | |" for mious in baseline.values()),
  ]
  for pipeline in known.pipelines.split():
    folder = pipeline.replace(",", "_").replace("=", "_")
    runs = {
      name: [_run(pipeline, data, seed, root / data.name / folder / str(seed)) for seed in seeds]
      for name, (data, seeds) in sets.items()
    }
    minutes = ", ".join(
      f"{stage} {value:.1f}" for stage, value in runs["synthetic"][0].minutes.items()
    )
    lines.append(
      f"| {pipeline} | {minutes} |" + "".join(_row(runs[name], baseline[name]) for name in sets)
    )
  text = "\n".join(lines)
  (root / "pipelines.md").write_text(text + "\n")
  print("\n" + text)


if __name__ == "__main__":
  main()
