"""A writer of TensorFlow Datasets data sets of images and masks.

The data sets are of ArrayRecord files, in the order of their lists.
"""

from __future__ import annotations

import io
import itertools
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds
from PIL import Image

VERSION = "1.0.0"
_EXAMPLES_PER_SHARD = 1000


class Split(NamedTuple):
  """The ids of a split, and their files.

  image_path, label_path: by id the path of the image and of the mask. label_path None: images
  without masks.
  """

  ids: Sequence[str]
  image_path: Callable[[str], pathlib.Path]
  label_path: Callable[[str], pathlib.Path] | None = None


def ids_path(directory, key: str, split: str):
  """Returns where a data set keeps the values of its feature `key`.

  The file has one value a line, so the ids of a split are known without reading images.
  """
  return directory / f"{key}.{split}.txt"


def write(
  data_dir: pathlib.Path,
  name: str,
  splits: Mapping[str, Split],
  *,
  progress: Callable[[float], None] = lambda share: None,
) -> pathlib.Path:
  """Writes DATA_DIR/NAME/1.0.0, unless it is there with the same ids.

  It appears whole or not at all.

  Features: "image", the files' own bytes; "label", PNG of indices (palettes, which TensorFlow would
  decode to colors, are taken away), where there are masks; "id". All splits have masks, or none
  has. `tfds_source.TfdsSource` and `tfds.data_source` read it.

  Args:
    progress: is called with the share that is done, after each example.

  Raises:
    OSError: a file that cannot be read, or a full disk.
  """
  final = pathlib.Path(data_dir) / name / VERSION
  if all(_ids(final, split_name) == list(split.ids) for split_name, split in splits.items()):
    return final
  partial = final.with_name(f"{VERSION}.incomplete")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  features = {"image": tfds.features.Image(shape=(None, None, 3)), "id": tfds.features.Text()}
  if any(split.label_path for split in splits.values()):
    features["label"] = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=name, version=tfds.core.Version(VERSION), data_dir=str(partial), module_name=""
    ),
    description=f"{name}: images and masks of class indices, 255 = ignored.",
    features=tfds.features.FeaturesDict(features),
  )
  writer = tfds.core.SequentialWriter(info, _EXAMPLES_PER_SHARD, file_format="array_record")
  done = itertools.count(1)
  total = sum(len(split.ids) for split in splits.values())
  for split_name, split in splits.items():
    try:
      _write_split(writer, split_name, split, lambda: progress(next(done) / total))
    except RuntimeError as error:  # how the ArrayRecord writer reports a full disk
      raise OSError(str(error)) from None
    ids_path(partial, "id", split_name).write_text(
      "".join(f"{image_id}\n" for image_id in split.ids), encoding="utf-8"
    )
  shutil.rmtree(final, ignore_errors=True)
  partial.rename(final)
  return final


def _ids(directory: pathlib.Path, split_name: str) -> list[str] | None:
  path = ids_path(directory, "id", split_name)
  return path.read_text(encoding="utf-8").splitlines() if path.exists() else None


def _write_split(writer, split_name, split, one_more):
  def examples(ids):
    for image_id in ids:
      yield _example(split, image_id)
      one_more()

  writer.initialize_splits([split_name])
  for start in range(0, len(split.ids), _EXAMPLES_PER_SHARD):  # metadata are written at each call
    part = split.ids[start : start + _EXAMPLES_PER_SHARD]
    writer.add_examples({split_name: examples(part)})
  writer.close_splits([split_name])


def _example(split: Split, image_id: str) -> dict[str, object]:
  example = {"image": split.image_path(image_id).read_bytes(), "id": image_id}
  if split.label_path:
    example["label"] = _without_palette(split.label_path(image_id).read_bytes())
  return example


def _without_palette(png: bytes) -> bytes:
  with Image.open(io.BytesIO(png)) as image:
    if image.mode != "P":
      return png
    grey = Image.frombytes("L", image.size, image.tobytes())
  content = io.BytesIO()
  grey.save(content, format="PNG", compress_level=3)
  return content.getvalue()
