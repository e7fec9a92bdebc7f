"""Segments your own images with a trained workdir. See --help."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import io
import json
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image

import pseudoseg_jax
from pseudoseg_jax import checks, command_line
from pseudoseg_jax.data.listing import IMAGE_SUFFIXES
from pseudoseg_jax.evaluation import inference, pictures, report
from pseudoseg_jax.evaluation.predictor import Predictor, read_image
from pseudoseg_jax.evaluation.progress import Progress

FOLDERS = ("ids", "color", "overlay")

_AHEAD = 8  # images read, or being written, at a time

DESCRIPTION = """\
Segments images of any size with a trained workdir or an exported network. For every image NAME.jpg it writes

  OUT/ids/NAME.png      class ids (0, 1, 2, ...) as the pixels of an 8-bit palette PNG
  OUT/color/NAME.png    classes in colour
  OUT/overlay/NAME.png  the image tinted by class

and OUT/legend.png, the classes' colours. Sub-folders are kept. Files appear whole or not at all; the same command
again goes on where it was stopped. EXIF orientations are not applied: ids lie on the pixels as stored.
"""

EPILOG = """\
examples:
  python -m pseudoseg_jax.predict --workdir=/tmp/quickstart --images=photo.jpg --out=/tmp/segmented
  python -m pseudoseg_jax.predict --workdir=W --images=DIR --out=OUT --predictor=teacher --checkpoint=last
"""


class Job(NamedTuple):
  """path: the image. name: what its three files are called, with sub-folders, without suffix. size: (height, width)."""

  path: pathlib.Path
  name: str
  size: tuple[int, int]


def _parse(arguments):
  parser = argparse.ArgumentParser(
    "python -m pseudoseg_jax.predict", description=DESCRIPTION, epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
  )  # fmt: skip
  parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of a training run, or an exported network")
  parser.add_argument("--images", type=pathlib.Path, required=True, help="an image, or a folder of images (and sub-folders)")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
  parser.add_argument("--predictor", help="which network of the method, e.g. student or teacher (default: the method's headline)")
  parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which checkpoint (default: best)")
  return parser.parse_args(arguments)


def main(arguments=None) -> int:
  known = _parse(sys.argv[1:] if arguments is None else arguments)

  def command():
    # What is wrong with the images is told before a network is loaded.
    jobs = find_images(known.images, known.out, workdir=known.workdir)
    predictor = pseudoseg_jax.load(known.workdir, predictor=known.predictor, checkpoint=known.checkpoint)
    checkpoint = known.workdir / "checkpoints" / known.checkpoint
    origin = {
      "workdir": str(known.workdir.resolve()),
      "checkpoint": known.checkpoint,
      "steps": sorted(os.listdir(checkpoint)) if checkpoint.is_dir() else [],
      "predictor": predictor.name,
    }
    segment(predictor, jobs, known.out, origin)

  return command_line.run(command, again="the same command goes on from here")


def find_images(images: pathlib.Path, out: pathlib.Path, *, workdir: pathlib.Path) -> list[Job]:
  """The images to segment, in order of name; what `out` holds already is no input.

  Raises:
    InputError: no such path, no image, unreadable images, two images of one name, no such workdir; all at once.
  """
  problems = checks.Problems("cannot segment")
  if not workdir.is_dir():
    problems.add("--workdir", got=f"{workdir}, which is no folder", remedy="give the folder of a training run")
  if not images.exists():
    problems.add("--images", got=f"{images}, which does not exist", remedy="give an image or a folder of images")
  if out.exists() and not out.is_dir():
    problems.add("--out", got=f"{out}, which is a file", remedy="give a folder; it is made if need be")
  paths, root = [images], images.parent
  if images.is_dir():
    root = images
    written = [out / folder for folder in FOLDERS] + [out / "legend.png"]  # where `out` lies among the images
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    paths = [path for path in paths if not path.name.startswith(".") and not any(path.is_relative_to(done) for done in written)]
    if not paths:
      problems.add("--images", got=f"{images}, which holds no image", allowed=f"files ending in {', '.join(IMAGE_SUFFIXES)}")

  names = collections.defaultdict(list)
  for path in paths:
    names[path.relative_to(root).with_suffix("").as_posix()].append(path)
  for name, same in names.items():
    if len(same) > 1:
      problems.add(f"outputs '{name}.png'", got=f"{', '.join(map(str, same))}", allowed="one image", remedy="rename the others")

  jobs = []
  with concurrent.futures.ThreadPoolExecutor(_AHEAD) as threads:
    for path, size in zip(paths, threads.map(_header_size, paths), strict=True):
      if isinstance(size, Exception):
        if images.exists():
          problems.add(f"image {path}", got=size, remedy="take it away or repair it")
      else:
        jobs.append(Job(path, path.relative_to(root).with_suffix("").as_posix(), size))
  problems.raise_if_any()
  return jobs


def _header_size(path: pathlib.Path) -> tuple[int, int] | Exception:
  try:
    with Image.open(path) as image:
      return image.height, image.width
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    return error


def bounded(predictor: Predictor, sizes: list[tuple[int, int]]) -> Predictor:
  """The predictor, made to compile for few sizes (see `inference.bounded`)."""
  protocol, changed = inference.bounded(predictor.protocol, sizes)
  if not changed:
    return predictor
  print(changed)
  return predictor.with_protocol(protocol)


def segment(predictor: Predictor, jobs: list[Job], out: pathlib.Path, origin: dict) -> None:
  """Segments what `out` lacks, and reports.

  Args:
    origin: what made the files (JSON); kept in out/predictions.json, so that one folder never mixes two networks.

  Raises:
    InputError: `out` was made by something else; images that could not be decoded (all others are done by then).
  """
  predictor = bounded(predictor, [job.size for job in jobs])
  _claim(out, origin | {"protocol": predictor.protocol._asdict()})
  _write(out / "legend.png", pictures.legend(predictor.classes))
  todo = [job for job in jobs if not all(_output(out, folder, job).exists() for folder in FOLDERS)]
  progress = Progress(len(todo), functools.partial(print, flush=True))
  pixel_counts = np.zeros(len(predictor.classes.names), np.int64)
  problems = checks.Problems("some images could not be segmented; the others are done")

  with concurrent.futures.ThreadPoolExecutor(min(_AHEAD, (os.cpu_count() or 1) + 1)) as threads:
    reading, writing = collections.deque(), collections.deque()
    try:
      for job in [*todo, *[None] * _AHEAD]:
        if job is not None:
          reading.append((job, threads.submit(read_image, job.path, predictor.channels)))
        if reading and (job is None or len(reading) > _AHEAD):
          ready, pixels = reading.popleft()
          try:
            pixels = pixels.result()
          except checks.InputError as error:
            problems.extend([str(error)])
            progress.total -= 1
            continue
          ids = predictor.predict(pixels)
          pixel_counts += np.bincount(ids.ravel(), minlength=len(pixel_counts))
          writing.append(threads.submit(_write_all, out, ready, pixels, ids, predictor.classes))
          progress.more()
        if len(writing) > _AHEAD:
          writing.popleft().result()
      for written in writing:
        written.result()
    except BaseException:
      threads.shutdown(cancel_futures=True)
      raise

  there = len(jobs) - len(todo)
  print(f"{progress.done} images segmented in {progress.seconds():.1f} s" + (f", {there} were there already" if there else ""))
  if progress.done:
    shares = sorted(zip(pixel_counts / pixel_counts.sum(), predictor.classes.names, strict=True), reverse=True)
    print("pixels: " + ", ".join(f"{name} {100 * share:.1f} %" for share, name in shares if share > 0))
  print("\n".join(f"  {out / name}" for name in (*FOLDERS, "legend.png")))
  problems.raise_if_any()


def _claim(out: pathlib.Path, origin: dict) -> None:
  path = out / "predictions.json"
  origin = json.loads(json.dumps(origin))  # as it will be read: tuples become lists
  try:
    before = json.loads(path.read_text()) if path.exists() else origin
  except ValueError:
    before = {}
  problems = checks.Problems(f"{out} holds predictions made otherwise")
  for key in sorted(origin.keys() | before.keys()):
    if origin.get(key) != before.get(key):
      problems.add(key, got=origin.get(key), allowed=before.get(key))
  if problems.items:
    problems.add("remedy: another --out, or remove that folder", got=None)
  problems.raise_if_any()
  report.write_atomically(path, json.dumps(origin, indent=2) + "\n")


def _output(out: pathlib.Path, folder: str, job: Job) -> pathlib.Path:
  return out / folder / f"{job.name}.png"


def _write_all(out, job, pixels, ids, classes) -> None:
  _write(_output(out, "ids", job), pictures.indexed(ids, classes))
  _write(_output(out, "color", job), Image.fromarray(pictures.colorize(ids, classes)))
  _write(_output(out, "overlay", job), Image.fromarray(pictures.overlay(pixels, ids, classes)))


def _write(path: pathlib.Path, picture: Image.Image) -> None:
  png = io.BytesIO()
  picture.save(png, format="PNG", compress_level=3)  # files 2 % larger than at PIL's 6, in less than half the time
  report.write_atomically(path, png.getvalue())


if __name__ == "__main__":
  sys.exit(main())
