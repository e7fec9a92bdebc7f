"""Writes a trained network's predictions as labels to learn from.

The predictions are those for a data set's images. See --help.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import hashlib
import io
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from pseudoseg_jax import build, checks, command_line, workdir as workdirs
from pseudoseg_jax.contract import State
from pseudoseg_jax.data import decode, sources, splits
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.evaluation import inference, pictures, report, weak_labels
from pseudoseg_jax.evaluation.evaluator import Evaluator
from pseudoseg_jax.evaluation.progress import Progress
from pseudoseg_jax.options import replaced
from pseudoseg_jax.trained import is_exported, open_trained

FORMAT = "pseudoseg_jax exported labels, version 1"
SPLITS = ("unlabeled", "labeled", "train", "evaluated")

_AHEAD = 8  # images being written at a time

DESCRIPTION = """\
Predicts the images of a training run's own data, each whole, and writes for image ID

  OUT/labels/ID.png      class ids (0, 1, 2, ...) as the pixels of an 8-bit palette PNG
  OUT/confidence/ID.png  with --confidence: 255 times the probability of that class, 8-bit grey

and OUT/legend.png, the classes' colors, OUT/list.txt, the ids, and, once all is there, OUT/manifest.json: what the labels are
from, and how many pixels each class has. A run learns from them with --config.pseudo_labels.folder=OUT. Sub-folders of ids are
kept, endings of image files are not. Files appear whole or not at all; the same command again goes on where it was stopped.
"""

EPILOG = """\
examples:
  python -m pseudoseg_jax.export_labels --workdir=W --out=OUT
  python -m pseudoseg_jax.export_labels --workdir=W --out=OUT --config.evaluation.scales=0.5,1,1.5 --config.evaluation.flip=True
  python -m pseudoseg_jax.export_labels --workdir=W --out=OUT --image_labels --config.data.image_labels=tags.csv
  python -m pseudoseg_jax.export_labels --workdir=W --out=OUT_third --step=1000     an earlier state, for pseudoseg_jax.reliable

--config.KEY=VALUE overrides options of the run's saved config, such as data.root or those of evaluation.
"""


def _parse(arguments):
  parser = argparse.ArgumentParser(
    "python -m pseudoseg_jax.export_labels",
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
  split_help = (
    "which images of the run's data; train: labeled and unlabeled ones (default: unlabeled)"
  )
  parser.add_argument("--split", choices=SPLITS, default="unlabeled", help=split_help)
  checkpoint_help = "default: last; best was chosen by looking at the evaluated images' masks, which then tell on the labels"
  parser.add_argument(
    "--checkpoint", choices=("best", "last"), default="last", help=checkpoint_help
  )
  parser.add_argument(
    "--step", type=int, help="a step of that checkpoint that is still kept (default: the newest)"
  )
  parser.add_argument("--confidence", action="store_true", help="write the probabilities too")
  image_labels_help = "only classes that are in the image: by config.data.image_labels; of labeled and evaluated images by masks"
  parser.add_argument("--image_labels", action="store_true", help=image_labels_help)
  several = parser.add_argument_group(
    "several processes (hosts), each started with the same command; all of them must see OUT"
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
  if len({known.coordinator is None, known.process_count is None, known.process_index is None}) > 1:
    parser.error("--coordinator, --process_count and --process_index go together")
  return known, overrides


def main(arguments=None) -> int:
  known, overrides = _parse(sys.argv[1:] if arguments is None else arguments)

  def command():
    if known.distributed or known.coordinator:
      jax.distributed.initialize(known.coordinator, known.process_count, known.process_index)
    export_labels(
      known.workdir,
      known.out,
      predictor=known.predictor,
      split=known.split,
      checkpoint=known.checkpoint,
      step=known.step,
      image_labels=known.image_labels,
      confidence=known.confidence,
      overrides=overrides,
    )

  return command_line.run_distributed(command, again="the same command resumes there")


def export_labels(
  workdir: pathlib.Path,
  out: pathlib.Path,
  *,
  predictor: str | None = None,
  split: str = "unlabeled",
  checkpoint: str = "last",
  step: int | None = None,
  image_labels: bool = False,
  confidence: bool = False,
  overrides: Mapping[str, Any] | None = None,
) -> None:
  """Writes the labels that `out` lacks, then its manifest; see --help.

  Raises:
    InputError: no such workdir, checkpoint, predictor, data or weak labels; `out` was made from
      something else.
  """
  mesh = meshes.make_mesh()
  if is_exported(workdir) and step is not None:
    raise checks.InputError(
      f"--step: got {step}, but {workdir} is an exported network, which has one step"
    )
  trained = open_trained(workdir, mesh, checkpoint, overrides, step=step)
  config, method = trained.config, trained.method
  # Those that the run itself learned from are none of its data, and may be gone.
  config = replaced(config, {"pseudo_labels.folder": ""})
  name = predictor or next(iter(method.predictors))
  checks.check_name("predictor", name, method.predictors)
  number = method.predictors[name].domain
  _, config, data = build.build_domains(config)[number]
  learned = [trained.classes, *trained.other_classes.values()][number]
  problems = checks.Problems("cannot export labels of these data")
  problems.extend(
    workdirs.same_classes(
      data.classes, learned, where="config.data.classes", allowed="of the network"
    )
  )
  problems.raise_if_any()
  names = _file_names(build.images_of(data, split).ids)
  say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda line: None
  protocol = _protocol(config, build.images_of(data, split), say)
  shown = name + weak_labels.IMAGE_LABELS * image_labels
  labeler = build.build_labeler(config, data, method, mesh, shown, split, protocol)
  origin = {
    "format": FORMAT,
    "workdir": str(workdir),
    "config_sha256": hashlib.sha256((workdir / "config.json").read_bytes()).hexdigest(),
    "weights_sha256": _weights_sha256(trained.state),
    "checkpoint": checkpoint,
    "step": int(trained.state.step),
    "predictor": name,
    "protocol": inference.describe(protocol),
    "image_labels": _source_of_image_labels(config, data, split) if image_labels else None,
    "split": split,
    "images": len(names),
    "list_sha256": hashlib.sha256(_list_text(names).encode()).hexdigest(),
  }
  _claim(out, origin)
  todo = _missing(out, names, confidence=confidence)
  if jax.process_index() == 0:
    if todo:
      (out / "manifest.json").unlink(missing_ok=True)
    report.write_atomically(out / "list.txt", _list_text(names))
    _write(out / "legend.png", pictures.legend(data.classes))

  def write(row: int, results: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    ids, of_ids = results[shown]
    if confidence:
      _write(_path(out, "confidence", names[row]), Image.fromarray(of_ids))
    _write(_path(out, "labels", names[row]), pictures.indexed(ids, data.classes))

  progress = Progress(len(todo), say)
  _predict(labeler, trained.state, todo, write, progress)
  multihost_utils.sync_global_devices("labels are written")
  if jax.process_index() == 0:
    manifest = (
      origin | _counted(out, names, data.classes.names, confidence=confidence) | {"finished": True}
    )
    report.write_atomically(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    _tell(out, manifest, progress)


def _file_names(ids: Sequence[str]) -> list[str]:
  """Returns the names of the images' files, with sub-folders.

  They are the ids without the endings of image files.
  """
  names = [splits.without_suffix(name) for name in ids]
  same = collections.defaultdict(list)
  for name, image in zip(names, ids, strict=True):
    same[name].append(image)
  problems = checks.Problems("cannot export labels")
  for name, images in same.items():
    if len(images) > 1:
      problems.add(
        f"labels/{name}.png", got=", ".join(images), allowed="one image", remedy="rename the others"
      )
    if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
      problems.add(
        f"image {name}",
        got="a path that leads out of the folder",
        allowed="ids below the data's root",
      )
  problems.raise_if_any()
  return names


def _protocol(config, source: sources.Source, say: Callable[[str], None]) -> inference.Protocol:
  """Builds the run's protocol, changed to give every pixel a label.

  It is also changed to compile for few sizes.
  """
  protocol = build.build_protocol(config)
  if protocol.style == "center_crop":
    protocol = protocol._replace(style="whole")
  protocol, changed = inference.bounded(protocol, [source.size(row) for row in range(len(source))])
  if changed:
    say(changed)
  return protocol


def _missing(out: pathlib.Path, names: Sequence[str], *, confidence: bool) -> list[int]:
  """Lists the rows whose files are missing, as one process sees them.

  All processes thus predict the same rows.
  """
  folders = ("labels", "confidence")[: 1 + confidence]
  there = np.array([all(_path(out, folder, name).exists() for folder in folders) for name in names])
  return np.flatnonzero(~multihost_utils.broadcast_one_to_all(there)).tolist()


def _list_text(names: Sequence[str]) -> str:
  return "".join(f"{name}\n" for name in names)


def _weights_sha256(state: State) -> str:
  """Hashes the parameters and batch-norm statistics of all networks.

  These are what predicts.
  """
  digest = hashlib.sha256()
  values = {role: (net.params, net.batch_stats) for role, net in state.nets.items()}
  for path, leaf in jax.tree_util.tree_leaves_with_path(values):
    digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _source_of_image_labels(config, data: build.Data, split: str) -> str:
  if data.truth_known or split in ("labeled", "evaluated"):
    return "masks"
  return (
    config.data.image_labels if split == "unlabeled" else f"masks and {config.data.image_labels}"
  )


def _claim(out: pathlib.Path, origin: Mapping[str, Any]) -> None:
  """Records in out/export.json what its labels are from.

  A folder of other labels is refused.
  """
  path = out / "export.json"
  before = report.read_object(path) if path.exists() else origin
  problems = checks.Problems(f"{out} holds labels from something else")
  for key in sorted((origin.keys() | before.keys()) - {"workdir"}):  # a folder may be moved
    if origin.get(key) != before.get(key):
      problems.add(key, got=repr(origin.get(key)), allowed=repr(before.get(key)))
  if problems.items:
    problems.add("remedy: another --out, or remove that folder")
  problems.raise_if_any()
  if jax.process_index() == 0:
    report.write_atomically(path, json.dumps(origin, indent=2) + "\n")


def _predict(
  labeler: Evaluator,
  state: State,
  rows: Sequence[int],
  write: Callable[[int, Mapping], None],
  progress: Progress,
) -> None:
  """Predicts this process's share of the rows.

  Calls write(row, results) for each of them, in threads.
  """
  with concurrent.futures.ThreadPoolExecutor(min(_AHEAD, (os.cpu_count() or 1) + 1)) as threads:
    writing = collections.deque()
    try:
      for number, (row, results) in enumerate(labeler.stream(state, rows)):
        if number % jax.process_count() == jax.process_index():
          writing.append(threads.submit(write, row, results))
        if len(writing) > _AHEAD:
          writing.popleft().result()
        progress.more()
      for written in writing:
        written.result()
    except BaseException:
      threads.shutdown(cancel_futures=True)
      raise


def _counted(
  out: pathlib.Path, names: Sequence[str], class_names: Sequence[str], *, confidence: bool
) -> dict[str, Any]:
  """Computes what the manifest records of the files as they lie there."""

  def read(name: str) -> tuple[bytes, np.ndarray, int]:
    ids = decode.read_mask(_path(out, "labels", name))
    digest = hashlib.sha256(f"{name} {ids.shape}".encode() + ids.tobytes()).digest()
    of_ids = decode.read_mask(_path(out, "confidence", name)) if confidence else np.zeros(0)
    return (
      digest,
      np.bincount(ids.ravel(), minlength=len(class_names)),
      int(of_ids.sum(dtype=np.int64)),
    )

  digest, pixels, total = hashlib.sha256(), np.zeros(len(class_names), np.int64), 0
  with concurrent.futures.ThreadPoolExecutor(min(_AHEAD, (os.cpu_count() or 1) + 1)) as threads:
    for of_file, counts, of_ids in threads.map(read, names):
      digest.update(of_file)
      pixels += counts
      total += of_ids
  count = int(pixels.sum())
  return {
    "classes": {
      name: {"pixels": int(n), "share": int(n) / count}
      for name, n in zip(class_names, pixels, strict=True)
    },
    "mean_confidence": total / 255 / count if confidence else None,
    # of the ids' values, whatever wrote the PNGs: equal sums, equal labels.
    "labels_sha256": digest.hexdigest(),
  }


def _tell(out: pathlib.Path, manifest: Mapping[str, Any], progress: Progress) -> None:
  there = manifest["images"] - progress.done
  print(
    f"{progress.done} images labeled in {progress.seconds():.1f} s"
    + (f", {there} were there already" if there else "")
  )
  shares = sorted(
    ((of["share"], name) for name, of in manifest["classes"].items() if of["pixels"]), reverse=True
  )
  print("pixels: " + ", ".join(f"{name} {100 * share:.1f} %" for share, name in shares))
  if manifest["mean_confidence"] is not None:
    print(f"mean confidence {manifest['mean_confidence']:.3f}")
  print(
    f"  {out / 'manifest.json'}\nNext, to learn from them:\n  {shlex.quote(f'--config.pseudo_labels.folder={out}')}"
  )


def _path(out: pathlib.Path, folder: str, name: str) -> pathlib.Path:
  return out / folder / f"{name}.png"


def _write(path: pathlib.Path, picture: Image.Image) -> None:
  png = io.BytesIO()
  # Files 2 % larger than at PIL's 6, in less than half the time.
  picture.save(png, format="PNG", compress_level=3)
  report.write_atomically(path, png.getvalue())


if __name__ == "__main__":
  command_line.leave(main)
