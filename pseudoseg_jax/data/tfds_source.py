"""Images and masks of a TensorFlow Datasets data set, by random access."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import io
import os
import re
import uuid
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data import decode, splits, tfds_builders

_THREADS = 8


class TfdsSource:
  """A split of images and index masks; a `sources.Source` of 8-bit RGB.

  The split is one of a TensorFlow Datasets data set. The stored files are decoded as
  `sources.FolderSource` does, so both forms of a data set give the same pixels; but an EXIF
  orientation is not applied, as TFDS' own decoders do not. Opening reads no example. `ids` are
  looked up at their first use: in the list that `tfds_builders.write` leaves beside the data, else
  by going through all examples once, without decoding; such a list is then left there, where that
  may be written.

  Args:
    name_or_directory: a data set of the TFDS catalog, such as "oxford_iiit_pet" (downloaded and
      prepared at first), or one in data_dir; or the folder that holds its dataset_info.json, also
      below data_dir ("cityscapes/1.0.0": the catalog has a "cityscapes" of its own). Folders and
      data_dir may be gs:// paths.
    split: "train", "train[:90%]", "train+test", ...; as in TFDS.
    data_dir: where TFDS keeps data sets; None: where it always does.
    image_key, label_key, id_key: the features. label_key None: no mask is touched. id_key None: ids
      are "SPLIT/ROW".
    num_classes: K; needed with label_key.
    label_map: stored mask value -> class index or IGNORE_LABEL; other values stay as they are.
    class_key: a class feature of whole images, such as "species": label 1 (after label_map) becomes
      1 + the image's class.

  Raises:
    InputError: at construction, all that does not fit at once; later, examples that cannot be
      decoded and masks with values that are no class.
  """

  channels = 3
  dtype = np.uint8

  def __init__(
    self,
    name_or_directory: str | os.PathLike,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_key: str = "image",
    label_key: str | None = "label",
    id_key: str | None = "id",
    num_classes: int | None = None,
    label_map: Mapping[int, int] | None = None,
    class_key: str | None = None,
  ):
    self.has_labels = label_key is not None
    self._keys = {"image": image_key, "label": label_key, "id": id_key, "class": class_key}
    self._split = split
    self._num_classes = num_classes
    self._builder = _open(os.fspath(name_or_directory), data_dir)
    features = self._builder.info.features
    problems = checks.Problems(f"data set {self._builder.data_dir} cannot be used")
    for role, key in self._keys.items():
      if key is not None and key not in features:
        problems.add(
          f"{role}_key",
          got=repr(key),
          allowed=checks.choices(features),
          remedy=checks.nearest(key, features),
        )
    if self.has_labels and (num_classes is None or not 1 <= num_classes <= IGNORE_LABEL):
      problems.add(
        "num_classes", got=repr(num_classes), allowed=f"1..{IGNORE_LABEL} where there are masks"
      )
    problems.raise_if_any()
    # Images stay files: other features of images, too, would only cost time.
    skip = {
      key: tfds.decode.SkipDecoding()
      for key, feature in features.items()
      if isinstance(feature, tfds.features.Image)
    }
    try:
      self._examples = self._builder.as_data_source(split, decoders=skip)
    except (ValueError, KeyError, NotImplementedError) as error:
      problems.add(
        "split",
        got=repr(split),
        allowed=f"of {checks.choices(self._builder.info.splits)}, as ArrayRecord files",
        remedy=str(error).split("\n")[0],
      )
      problems.raise_if_any()
    self._table = np.arange(256, dtype=np.uint8)
    for value, index in (label_map or {}).items():
      self._table[value] = index

  @functools.cached_property
  def ids(self) -> tuple[str, ...]:
    if self._keys["id"] is None:
      return tuple(f"{self._split}/{row:06d}" for row in range(len(self)))
    path = tfds_builders.ids_path(epath.Path(self._builder.data_dir), self._keys["id"], self._split)
    whole = self._split in dict(self._builder.info.splits)  # "train[:90%]" has no list
    if whole and path.exists():
      ids = tuple(path.read_text().splitlines())
      if len(ids) == len(self):
        return ids
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
      ids = tuple(threads.map(self._id, range(len(self))))
    repeated = len(ids) - len(set(ids))
    if repeated:
      problems = checks.Problems(f"data set {self._builder.data_dir} cannot be used")
      got = f"{self._keys['id']!r}, of which {repeated} values repeat others"
      problems.add(
        "id_key", got=got, allowed="a name of each image", remedy="or None: rows serve as names"
      )
      problems.raise_if_any()
    if whole:
      _write_if_allowed(path, "".join(f"{name}\n" for name in ids))
    return ids

  def __len__(self) -> int:
    return len(self._examples)

  def size(self, row: int) -> tuple[int, int]:
    width, height = self._decode(row, "image", lambda image: image.size)
    return height, width

  def image(self, row: int) -> np.ndarray:
    return self._decode(row, "image", lambda image: np.asarray(image.convert("RGB")))

  def label(self, row: int) -> np.ndarray:
    if not self.has_labels:
      raise ValueError(f"{self._builder.data_dir} was opened without label_key: it has no masks")
    stored = self._decode(row, "label", decode.numbers_of)
    known = stored.ndim == 2 and stored.min() >= 0 and stored.max() <= 255
    label = self._table[stored.astype(np.uint8)] if known else None
    if known and self._keys["class"] is not None:
      label[label == 1] = 1 + int(self._examples[row][self._keys["class"]])
    if not known or not ((label < self._num_classes) | (label == IGNORE_LABEL)).all():
      problems = checks.Problems(f"cannot use {self._where(row, 'label')}")
      got = (
        f"values {splits.shorten(np.unique(stored).tolist(), most=10)}"
        if stored.ndim == 2
        else f"shape {stored.shape}"
      )
      allowed = f"[h, w] of 0..{self._num_classes - 1} and {IGNORE_LABEL} after label_map"
      problems.add(
        "mask",
        got=got,
        allowed=allowed,
        remedy="map stored values with label_map, or correct num_classes",
      )
      problems.raise_if_any()
    return label

  def _id(self, row: int) -> str:
    name = self._examples[row][self._keys["id"]]
    return name.decode() if isinstance(name, bytes) else str(name)

  def _where(self, row: int, role: str) -> str:
    return f"'{self._keys[role]}' of example {row} of {self._builder.data_dir}, split {self._split}"

  def _decode(self, row: int, role: str, convert):
    content = self._examples[row][self._keys[role]]
    try:
      with decode.opened_picture(io.BytesIO(content)) as image:
        if role == "label":
          decode.check_lossless(image)
        return convert(image)
    except Exception as error:  # decoders raise everything at damaged files
      problems = checks.Problems(f"cannot read {self._where(row, role)}")
      problems.add("content", **decode.explained(error).problem)
      problems.raise_if_any()


def _open(name: str, data_dir) -> tfds.core.DatasetBuilder:
  """Opens the builder of a folder, of a data set in data_dir, or by catalog.

  A data set of the catalog is then downloaded and prepared.
  """
  problems = checks.Problems("cannot open a TFDS data set")
  if data_dir is not None and (epath.Path(data_dir) / name / "dataset_info.json").exists():
    # by its path, whatever the catalogue calls so.
    return tfds.builder_from_directory(epath.Path(data_dir) / name)
  if epath.Path(name).is_dir():
    if (epath.Path(name) / "dataset_info.json").exists():
      return tfds.builder_from_directory(name)
    near = sorted(str(path.parent) for path in epath.Path(name).glob("*/*/dataset_info.json"))
    problems.add(
      name,
      got="a folder without dataset_info.json",
      remedy=f"there is {near[-1]}" if near else None,
    )
    problems.raise_if_any()
  try:
    builder = tfds.builder(name, data_dir=data_dir, **_array_record(name))
  except tfds.core.DatasetNotFoundError:
    where = (
      f"a folder, a data set in {data_dir or 'the TFDS folder'}, or a name of the TFDS catalogue"
    )
    problems.add(
      name, got="no such data set", allowed=where, remedy=checks.nearest(name, tfds.list_builders())
    )
    problems.raise_if_any()
  if not builder.is_prepared():
    builder.download_and_prepare(file_format="array_record")
  return builder


def _array_record(name: str) -> dict[str, str]:
  """Returns the options for a builder of the catalog.

  A builder that is only read from data_dir takes no options.
  """
  try:
    tfds.builder_cls(re.split("[/:]", name)[0])  # without config and version
  except tfds.core.DatasetNotFoundError:
    return {}
  return {"file_format": "array_record"}


def _write_if_allowed(path: epath.Path, text: str) -> None:
  import tensorflow as tf  # here, as reading needs no TensorFlow, which takes seconds to import

  # Readers never see half a list.
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
  # Data may be shared and read-only; buckets say so by OpError.
  with contextlib.suppress(OSError, tf.errors.OpError):
    temporary.write_text(text)
    temporary.rename(path)
