"""Chooses the images whose labels stayed the same during training.

The training is that of the network that made the labels. See --help.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from pseudoseg_jax import checks, command_line
from pseudoseg_jax.data import decode, splits
from pseudoseg_jax.evaluation import report
from pseudoseg_jax.ops import confusion

DESCRIPTION = """\
The selection of ST++ (Yang et al., CVPR 2022, section 3.3): the labels of earlier checkpoints are compared with those of the last
one, image by image; the stabler an image's labels, the likelier they are right. Its score is the mIoU of the two, on average over
the earlier checkpoints. All label folders are those of pseudoseg_jax.export_labels, for the same images. It writes

  FILE       the ids of the stablest share of the images, the stablest first: what --config.pseudo_labels.list reads
  FILE.json  the scores of all images
"""

EPILOG = """\
example:
  python -m pseudoseg_jax.reliable --labels=LAST --earlier FIRST_THIRD SECOND_THIRD --share=0.5 --out=reliable.txt
"""


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    "python -m pseudoseg_jax.reliable",
    description=DESCRIPTION,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--labels", type=pathlib.Path, required=True, help="folder of the labels to choose from"
  )
  parser.add_argument(
    "--earlier",
    type=pathlib.Path,
    nargs="+",
    required=True,
    help="folders of earlier checkpoints' labels",
  )
  parser.add_argument(
    "--share", type=float, default=0.5, help="of the images that is chosen (default: 0.5)"
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="the list file to write")
  known = parser.parse_args(sys.argv[1:] if arguments is None else arguments)

  def command():
    scores = stability(known.labels, known.earlier)
    chosen = most_stable(scores, known.share)
    about = {
      "labels": str(known.labels),
      "earlier": list(map(str, known.earlier)),
      "share": known.share,
      "scores": scores,
    }
    report.write_atomically(
      known.out.with_name(f"{known.out.name}.json"), json.dumps(about, indent=2) + "\n"
    )
    report.write_atomically(known.out, "".join(f"{name}\n" for name in chosen))
    values = [scores[name] for name in chosen]
    print(
      f"{known.out}: {len(chosen)} of {len(scores)} images, mIoU with earlier labels {min(values):.3f} to {max(values):.3f}"
    )

  return command_line.run(command)


def stability(labels: pathlib.Path, earlier: Sequence[pathlib.Path]) -> dict[str, float]:
  """Scores how stable the labels of each image are.

  Returns {image: mean over `earlier` of the mIoU with the image's last labels}, over the classes
  that either of the two has.

  Raises:
    InputError: folders that are no finished exports, or of other images or classes.
  """
  manifest, *others = _manifests([labels, *earlier])
  num_classes = len(manifest["classes"])
  names = splits.read_list(labels / "list.txt")

  def score(name: str) -> float:
    last, *before = (
      decode.read_mask(folder / "labels" / f"{name}.png") for folder in (labels, *earlier)
    )
    return float(
      np.mean([confusion.scores(matrix_of(last, ids, num_classes)).miou for ids in before])
    )

  with concurrent.futures.ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as threads:
    return dict(zip(names, threads.map(score, names), strict=True))


def most_stable(scores: dict[str, float], share: float) -> list[str]:
  """Returns the `share` of the images with the highest scores.

  The highest come first, equal ones in their order; there is at least one.
  """
  if not 0 < share <= 1:
    raise checks.InputError(f"share: got {share}; allowed: above 0, up to 1")
  # Rounded down, as in the official code (half of the images).
  count = max(1, math.floor(share * len(scores) + 1e-6))
  return sorted(scores, key=scores.__getitem__, reverse=True)[:count]


def matrix_of(label: np.ndarray, ids: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts pixels by (class in `label`, class in `ids`): i64[K, K].

  It does so on the host: files come in any size. Pixels of other values are left out.
  """
  known = (ids < num_classes) & (label < num_classes)
  pairs = num_classes * label[known].astype(np.int64) + ids[known]
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def _manifests(folders: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
  problems = checks.Problems("the labels cannot be compared")
  manifests = []
  for folder in folders:
    try:
      manifests.append(json.loads((folder / "manifest.json").read_text()))
    except (OSError, ValueError) as error:
      problems.add(f"{folder}", got=error, allowed="a folder that export_labels has finished")
  problems.raise_if_any()
  for key, what in {"list_sha256": "the same images", "classes": "the same classes"}.items():
    first, *others = (list(manifest[key]) for manifest in manifests)
    for folder, other in zip(folders[1:], others, strict=True):
      if other != first:
        remedy = "export with the same data and --split"
        problems.add(f"{folder}", got="others", allowed=f"{what} as in {folders[0]}", remedy=remedy)
  problems.raise_if_any()
  return manifests


if __name__ == "__main__":
  command_line.leave(main)
