"""Builders of the data sets of a run, opened.

They are made of config.data, or of images that a program has in its hands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from pseudoseg_jax import checks
from pseudoseg_jax.builders.classes import (
  build_classes,
  check_in_files,
  check_several,
  resolve_path,
  with_background,
)
from pseudoseg_jax.builders.folder import open_folder, split_file, split_in_words
from pseudoseg_jax.builders.opened import Data, Domain
from pseudoseg_jax.data import (
  classes as classes_lib,
  decode,
  given,
  listing,
  pipeline,
  sources,
  splits,
  synthetic,
)
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.decode import ImageLike
from pseudoseg_jax.data.given import GivenImages
from pseudoseg_jax.options import AnyData, Config, FolderData, GivenData, SyntheticData, TfdsData


def build_data(data_config: AnyData, *, check: bool = True) -> Data:
  """Opens the sources of config.data.

  Args:
    check: False: looks at no file of a folder, and lets roles share images: for `check_data`, which
      reports all that.

  Raises:
    InputError: everything that can be known without decoding all images.
  """
  check_in_files(data_config)
  if isinstance(data_config, FolderData):
    return open_folder(data_config, check)
  return _synthetic(data_config) if isinstance(data_config, SyntheticData) else _tfds(data_config)


def make_data(
  images: Sequence[ImageLike],
  masks: Sequence[ImageLike | None],
  classes: Classes | Sequence[str],
  *,
  evaluated: tuple[Sequence[ImageLike], Sequence[ImageLike]],
  unlabeled: Sequence[ImageLike] = (),
  background: str = "auto",
  channels: int = 3,
  max_value: float = 0.0,
  exif_orientation: str = "apply",
  label_map: Mapping[int, int] | None = None,
) -> Data:
  """Makes a data set of images that a program has in its hands.

  It is for `train(..., data=...)` and `evaluate(..., data=...)`.

  >>> data = make_data(photos, masks, ["background", "leaf"], evaluated=(other_photos, other_masks))

  Args:
    images: to learn from, each a path, a PIL image or an array [h, w, C] of any type, see
      `data.decode.read_any_image`; sizes may differ.
    masks: one for each image: a path, a PIL image or an array [h, w] of class indices, 255 = no
      label; None: the image is unlabeled.
    classes: names by class index, or Classes.
    evaluated: images and masks that nothing is learned from.
    unlabeled: further images without masks.
    background: whether class 0 is what is left beside things, "yes" or "no"; "auto": its name
      decides.
    channels, max_value, exif_orientation: of all images: how many channels they have, their value
      of full brightness (0 = 255, of files by their type), and whether EXIF orientations are
      applied ("apply") or not ("ignore").
    label_map: mask value -> class, {11: 255}.

  Raises:
    InputError: everything that shows without decoding files, all at once.
  """
  checks.check_name("background", background, ("auto", "yes", "no"))
  decode.check_options(exif_orientation, max_value)
  if not isinstance(classes, Classes):
    palette = classes_lib.voc_palette(len(classes) + 1)[: len(classes)]
    classes = Classes(tuple(classes), tuple(tuple(map(int, color)) for color in palette))
  check_several(classes, "classes")
  classes = with_background(classes, background)
  problems = checks.Problems("the data cannot be used")
  images, masks = list(images), list(masks)
  if len(images) != len(masks):
    problems.add(
      "masks",
      got=f"{len(masks)} for {len(images)} images",
      allowed="one for each, None where there is none",
    )
    problems.raise_if_any()
  reading = {"channels": channels, "max_value": max_value, "exif_orientation": exif_orientation}
  with_masks = reading | {"num_classes": len(classes), "label_map": label_map}
  has_mask = [mask is not None for mask in masks]
  labeled_images = [image for image, has in zip(images, has_mask, strict=True) if has]
  labeled_masks = [mask for mask in masks if mask is not None]
  unlabeled = [*(image for image, has in zip(images, has_mask, strict=True) if not has), *unlabeled]
  opened = {}
  for role, make in (
    ("labeled", lambda: GivenImages(labeled_images, labeled_masks, name="labeled", **with_masks)),
    # No images are left over: methods then see the labeled ones as unlabeled ones too, as with
    # folders.
    (
      "unlabeled",
      lambda: GivenImages(
        unlabeled or labeled_images, name="unlabeled" if unlabeled else "labeled", **reading
      ),
    ),
    ("evaluated", lambda: GivenImages(*evaluated, name="evaluated", **with_masks)),
  ):
    try:
      opened[role] = make()
    except checks.InputError as error:
      problems.extend([str(error).replace("\n", "\n  ")])
  problems.raise_if_any()
  given.check_apart(labeled=opened["labeled"], evaluated=opened["evaluated"])
  split = f"{len(opened['labeled'])} labeled, {len(opened['unlabeled'])} unlabeled"
  return Data(classes=classes, truth_known=False, split=split, options=reading, **opened)


def name_given(config: Config, data: Data) -> Config:
  """Returns the config, whose data are those that were given from Python.

  The normalization stays.
  """
  channels = data.labeled.channels
  normalization = {}
  for name, other in (("mean", 0.5), ("std", 0.25)):
    value = getattr(config.data, name)
    if len(value) != channels and value == getattr(AnyData(), name):
      value = (other,) * channels  # the default is of red, green and blue
    normalization[name] = value
  given = GivenData(**{"channels": channels, **data.options, **normalization})
  return dataclasses.replace(config, data=given)


def build_domains(config: Config, given_data: Data | None = None) -> tuple[Domain, ...]:
  """Opens the data of config.data and of each of config.other_data.

  The domains are in the order of their numbers. config.labeled_every and config.pseudo_labels are
  about the first one, whose images may be given.

  Raises:
    InputError: as `build_data`.
  """
  opened = build_data(config.data) if given_data is None else given_data
  first = _with_pseudo_labels(config, _subsample_labeled(config.labeled_every, opened))
  domains = [Domain("", config, first)]
  for name, options in sorted(config.other_data.items()):
    with errors_name_domain(name):
      domains.append(Domain(name, config_of(config, name), build_data(options)))
  return tuple(domains)


def config_of(config: Config, name: str) -> Config:
  """Returns the config of a domain, see `Domain`."""
  if not name:
    return config
  # One network sees all of them.
  normalization = {"mean": config.data.mean, "std": config.data.std}
  data = dataclasses.replace(config.other_data[name], **normalization)
  seed = pipeline.stream_seed(config.seed, f"domain/{name}")
  return dataclasses.replace(config, data=data, seed=seed)


def with_config(domains: Sequence[Domain], config: Config) -> tuple[Domain, ...]:
  """Returns opened domains under another config.

  Some of its options were chosen since the domains were opened.
  """
  return tuple(domain._replace(config=config_of(config, domain.name)) for domain in domains)


def _subsample_labeled(every: int, data: Data) -> Data:
  """Keeps every n-th of the labeled images alone.

  The others are not used at all.
  """
  kept = data.labeled.ids[::every]
  if len(kept) == len(data.labeled):
    return data
  left_out = {*data.labeled.ids} - {*kept}
  unlabeled = [name for name in data.unlabeled.ids if name not in left_out]
  return data._replace(
    labeled=sources.Subset(data.labeled, kept),
    unlabeled=data.unlabeled
    if len(unlabeled) == len(data.unlabeled)
    else sources.Subset(data.unlabeled, unlabeled),
    split=f"{data.split}; labeled_every {every}: {len(kept)} labeled",
  )


def _with_pseudo_labels(config: Config, data: Data) -> Data:
  """Returns the data with the pseudo labels of config.pseudo_labels.

  Images that are labeled keep their true labels.
  """
  if not config.pseudo_labels.folder:
    return data
  folder = resolve_path(config.pseudo_labels.folder, "")
  sources.check_labels_folder(folder, data.classes.names)
  ids = _pseudo_labeled_ids(config, data)
  pseudo_labeled = sources.PseudoLabels(data.unlabeled, folder, data.classes.names, ids)
  return data._replace(
    pseudo_labeled=pseudo_labeled, split=f"{data.split} + {len(ids)} pseudo labels"
  )


def _pseudo_labeled_ids(config: Config, data: Data) -> list[str]:
  """Selects the unlabeled images that the list of pseudo labels names."""
  options = config.pseudo_labels
  path, pattern = resolve_path(options.folder, "list.txt"), None
  if options.list:
    path = _list_file(config.data, options.list)
    pattern = None if config.data.unlabeled_folder else config.data.image_pattern or None
  listed = [
    entry._replace(id=listing.normalized(entry.id)) for entry in splits.read_entries(path, pattern)
  ]
  unlabeled = {splits.without_suffix(name): name for name in data.unlabeled.ids} | {
    name: name for name in data.unlabeled.ids
  }
  labeled = {*data.labeled.ids}
  ids, unknown_ids = [], []
  for entry in listed:
    # Ids of a bare folder of images end like files, and read as paths.
    name = unlabeled.get(entry.image) or unlabeled.get(entry.id) or entry.id
    if name in unlabeled and name not in labeled:
      ids.append(name)
    elif name not in labeled:
      unknown_ids.append(name)
  problems = checks.Problems(f"cannot use pseudo labels {options.folder}")
  if unknown_ids:
    got = f"{len(unknown_ids)} of {len(listed)} images that are not among the training images: {splits.shorten(unknown_ids)}"
    remedy = f"one of them is '{data.unlabeled.ids[0]}'"
    problems.add(f"list {path}", got=got, allowed="unlabeled images of config.data", remedy=remedy)
  elif not ids:
    problems.add(
      f"list {path}",
      got="only images that have true labels",
      allowed="at least one unlabeled image",
    )
  problems.raise_if_any()
  return ids


def _list_file(data_config: AnyData, path: str) -> pathlib.Path:
  """Finds a list below the data's root, or anywhere."""
  found = resolve_path(data_config.root, path)
  return found if found.is_file() else resolve_path("", path)


@contextlib.contextmanager
def errors_name_domain(name: str) -> Iterator[None]:
  """Names, in errors that occur meanwhile, the domain they are about."""
  try:
    yield
  except checks.InputError as error:
    if not name:
      raise
    raise checks.InputError(
      f"domain '{name}': {str(error).replace('config.data', f'config.other_data.{name}')}"
    ) from error


def _synthetic(data_config: SyntheticData) -> Data:
  scenes = synthetic.SyntheticScenes(
    data_config.num_scenes, tuple(data_config.size), seed=data_config.scenes_seed
  )
  if not 1 <= data_config.num_labeled < data_config.num_scenes:
    problems = checks.Problems("config.data does not fit together")
    problems.add(
      "config.data.num_labeled",
      got=data_config.num_labeled,
      allowed=f"1..{data_config.num_scenes - 1} (num_scenes - 1)",
    )
    problems.raise_if_any()
  return Data(
    classes=synthetic.CLASSES,
    labeled=sources.Subset(scenes, scenes.ids[: data_config.num_labeled]),
    unlabeled=sources.Subset(scenes, scenes.ids[data_config.num_labeled :]),
    evaluated=synthetic.SyntheticScenes(
      data_config.num_eval_scenes, tuple(data_config.size), seed=data_config.scenes_seed + 1
    ),
    truth_known=True,
    split=f"{data_config.num_labeled} labeled of {data_config.num_scenes} synthetic scenes",
  )


def _tfds(data_config: TfdsData) -> Data:
  from pseudoseg_jax.data.tfds_source import TfdsSource  # takes seconds to import, and few need it

  classes = build_classes(data_config)
  keys = {name: getattr(data_config, name) or None for name in ("image_key", "id_key", "class_key")}
  images = functools.partial(
    TfdsSource,
    os.path.expanduser(data_config.dataset),
    data_dir=os.path.expanduser(data_config.root) or None,
  )
  masks = {
    "label_key": data_config.label_key,
    "num_classes": len(classes),
    "label_map": classes_lib.read_label_map(data_config.label_map),
  }
  train = images(data_config.train_split, **masks, **keys)
  if splits.is_part(data_config.split):
    labeled_ids = splits.part(train.ids, data_config.split, seed=data_config.split_seed)
  else:
    labeled_ids = splits.read_list(split_file(data_config))
  rest = splits.complement(train.ids, labeled_ids)
  unlabeled = images(
    data_config.unlabeled_split or data_config.train_split,
    label_key=None,
    **keys | {"class_key": None},
  )
  opened = {
    "labeled": sources.Subset(train, labeled_ids),
    "unlabeled": unlabeled
    if data_config.unlabeled_split
    else sources.Subset(unlabeled, rest or labeled_ids),
    "evaluated": images(data_config.eval_split, **masks, **keys),
  }
  return Data(
    classes=classes, truth_known=False, split=split_in_words(data_config, opened), **opened
  )
