"""The words at the end of a run: its scores, their meaning, what to do next."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from pseudoseg_jax import (
  build,
  checks,
  config as configs,
  settings,
)
from pseudoseg_jax.data import frequencies
from pseudoseg_jax.evaluation import report
from pseudoseg_jax.options import Config, replaced
from pseudoseg_jax.scoring import Scoring


def summarize(
  scoring: Scoring, workdir: pathlib.Path, source: dict[str, str], overrides: Mapping[str, Any]
) -> str:
  """Describes what a person wants to know at the end."""
  results = scoring.results
  lines = ["", f"Done: {results['method']} on {results['split']}, seed {results['seed']}", ""]
  for series in ("last", "best"):
    entry = results[series]
    mious = ", ".join(
      f"{name} {report.percent(score['miou'])}" for name, score in entry["predictors"].items()
    )
    chosen = f" (best by {entry['selected_by']})" if series == "best" else ""
    lines.append(f"  {series:5} step {entry['step']:>6}  mIoU %: {mious}{chosen}")
  if results.get("ended_early"):
    lines += [
      f"  ended before step {scoring.config.total_steps}, as nothing got better (early_stopping_patience): the learning rate has not come down to",
      "  what total_steps foresees, and best was chosen on the evaluated images, on which it looks better than it is",
    ]
  lines += findings(scoring.results, scoring.config)
  drawn = ",".join(sorted(path.stem for path in (workdir / "pictures").glob("*.png")))
  skipped = sum(
    len(domain.data.skipped.reasons()) for domain in scoring.domains if domain.data.skipped
  )
  lines += [
    "",
    *(
      [f"  {skipped} files could not be read and were left out: {workdir}/skipped.json"]
      if skipped
      else []
    ),
    f"  pictures     {workdir}/pictures/{{{drawn}}}.png",
    f"  scores       {workdir}/results.json, {workdir}/scores.csv",
    f"  checkpoints  {workdir}/checkpoints/{{last,best}}",
    f"  TensorBoard  tensorboard --logdir {workdir}/tensorboard",
    "",
    "Next:",
    f"  python -m pseudoseg_jax.predict {shlex.quote(f'--workdir={workdir}')} --images DIR --out OUT      segment your own images",
  ]
  flags = {
    key: value for key, value in overrides.items() if not key.startswith(("method.", "nets_from"))
  }
  baseline = baseline_command(source, scoring.config, flags)
  if baseline is not None:
    options = [f"--config.{key}={configs.as_flag(value)}" for key, value in flags.items()]
    command = [f"--config={baseline}", f"--workdir={workdir}_supervised", *options]
    lines.append(
      f"  python -m pseudoseg_jax.main {shlex.join(command)}      the baseline to compare with"
    )
  return "\n".join(lines)


def findings(results: report.Results, config: Config) -> list[str]:
  """Describes what the scores mean.

  That is the gain over a supervised run beside this one, and a network that has learned next to
  nothing.
  """
  lines = []
  if baseline := results.get("baseline"):
    differs = (
      f", though it differs in {', '.join(baseline['differs'])}" if baseline["differs"] else ""
    )
    where = f"{report.percent(baseline['miou'])} in {baseline['workdir']}{differs}"
    lines.append(f"  {100 * baseline['gain']:+.2f} mIoU against supervised, {where}")
  name, score = next(iter(results["last"]["predictors"].items()))
  seen = [kind for kind, iou in score["iou"].items() if iou is not None]
  predicted = score.get("predicted_classes", seen)  # which older releases did not write
  if len(predicted) == 1 and len(seen) > 1:
    more = (
      "--config.early_stopping_patience=0"
      if results.get("ended_early")
      else f"--config.total_steps={2 * config.total_steps}"
    )
    lines.append(
      f"  '{name}' PREDICTS '{predicted[0]}' FOR EVERY PIXEL: it has learned nothing yet. Where the loss falls, it needs more"
      f" steps ({more}) or more weight on rare classes (--config.criterion.class_weights=effective);"
      f" where it does not, a smaller --config.optimizer.learning_rate={config.optimizer.learning_rate / 10:g}"
    )
  return lines


def baseline_command(
  source: dict[str, str], config: Config, flags: Mapping[str, Any]
) -> str | None:
  """Finds the supervised method in a run that is otherwise the same.

  Returns it as config file with argument; None where the file knows none.
  """
  if not source["path"] or config.method.name == "supervised" or config.other_data:
    return None
  of_the_method = ("method", "convention", "image_labels")
  kept = [
    part
    for part in source["argument"].split(",")
    if part and part.partition("=")[0] not in of_the_method
  ]
  for recipe in ([], [f"recipe={config.method.name}"]):
    path = f"{source['path']}:{','.join(['method=supervised', *kept, *recipe])}"
    try:
      other = build.take_normalization(configs.frozen(configs.load(path, flags)))
    except checks.InputError:
      continue
    other = settings.settle_as(other, config)
    if other.criterion.class_weights in frequencies.WEIGHTS:  # computed by now
      weights = config.criterion.class_weights
      other = replaced(other, {"criterion.class_weights": weights})
    different = configs.differences(config, other)
    if all(line.startswith("method.") for line in different):
      return path
  return None
