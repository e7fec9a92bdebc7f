"""Scores exported labels against the true masks of the same images: for reports, never for
training.

  python launch/label_quality.py --labels=DIR --config=configs/camvid.py:split=1_8 --config.data.root=ROOT

DIR is a folder of pseudoseg_jax.export_labels. The masks of unlabeled images are sought by
config.data.label_pattern; synthetic scenes know their own.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np

from pseudoseg_jax import build, checks, config as configs, reliable
from pseudoseg_jax.command_line import parse_with_overrides, run
from pseudoseg_jax.data import decode, sources, splits
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.evaluation import report
from pseudoseg_jax.ops import confusion
from pseudoseg_jax.options import AnyData, Config


def _masks(data: AnyData, opened: build.Data, split: str, names: tuple[str, ...]) -> sources.Source:
  """The true masks, in the order of names."""
  source = build.images_of(opened, split)
  if source.has_labels:
    id_of = {splits.without_suffix(name): name for name in source.ids}
    return sources.Subset(source, [id_of.get(name, name) for name in names])
  pattern = data.label_pattern
  if not pattern:
    problems = checks.Problems("the labels cannot be scored")
    problems.add(
      "config.data.label_pattern",
      got="nothing",
      allowed="where the masks of the unlabeled images lie",
    )
    problems.raise_if_any()
  # The masks stand for the images too, which play no part.
  masks = build.mask_options(data, opened.classes)
  return sources.FolderSource(
    data.root, names, image_pattern=pattern, label_pattern=pattern, **masks
  )


def score(labels: pathlib.Path, config: Config) -> tuple[Classes, confusion.Scores]:
  """The classes, and the labels' scores."""
  opened = build.build_data(config.data)
  sources.check_labels_folder(labels, opened.classes.names)
  split = report.read_object(labels / "manifest.json").get("split", "")
  names = splits.read_list(labels / "list.txt")
  masks, num_classes = _masks(config.data, opened, split, names), len(opened.classes)
  matrix = np.zeros((num_classes, num_classes), np.int64)
  for row, name in enumerate(names):
    ids, label = decode.read_mask(labels / "labels" / f"{name}.png"), masks.label(row)
    if ids.shape != label.shape:
      raise checks.InputError(
        f"labels of {name}: got {ids.shape} pixels; allowed: {label.shape}, as its mask"
      )
    matrix += reliable.matrix_of(label, ids, num_classes)
  return opened.classes, confusion.scores(matrix)


def table(labels: pathlib.Path, config: Config) -> str:
  """IoU by class, mIoU and pixel accuracy."""
  classes, scores = score(labels, config)
  return report.table(classes, {"labels": scores})


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument(
    "--labels", required=True, type=pathlib.Path, help="folder of exported labels"
  )
  parser.add_argument(
    "--config", required=True, help="config file, with its argument after a colon"
  )
  known, overrides = parse_with_overrides(parser, sys.argv[1:] if arguments is None else arguments)

  def command():
    print(table(known.labels, configs.frozen(configs.load(known.config, overrides))))

  return run(command)


if __name__ == "__main__":
  sys.exit(main())
