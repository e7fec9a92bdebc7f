"""The opened data that a run learns from, and those it is scored on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pseudoseg_jax.data import (
  sources,
)
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.skipped import Skipped
from pseudoseg_jax.data.sources import Source
from pseudoseg_jax.options import Config


class Data(NamedTuple):
  """The images of a data set, opened, by role.

  labeled: images with masks; unlabeled: images alone; evaluated: images with masks that nothing is
  learned from.

  truth_known: the unlabeled images have masks that may be shown, never learned from.
  pseudo_labeled: images that are learned from as the labeled ones are, with labels that a network
    made; or None.
  skipped: the files that nothing is learned from since they cannot be read, so far; None: such a
    file is an error.
  options: what config.data is to hold on how images that were given from Python are read, see
    `name_given`.
  """

  classes: Classes
  labeled: Source
  unlabeled: Source
  evaluated: Source
  truth_known: bool
  split: str  # in words, for reports
  pseudo_labeled: Source | None = None
  skipped: Skipped | None = None
  options: Mapping[str, Any] = {}


class Domain(NamedTuple):
  """One of the data sets that a run learns from.

  name: that of config.other_data; "" of the first domain.
  config: the run's; of a further domain with its data in the place of the first one's, and a seed
    of its own.
  """

  name: str
  config: Config
  data: Data


def images_of(data: Data, role: str) -> Source:
  """Returns the images of a role.

  The roles are "labeled", "unlabeled" and "evaluated"; or "train", the labeled ones and then those
  that are unlabeled alone.
  """
  if role != "train":
    return getattr(data, role)
  others = [data.unlabeled.ids[row] for row in rows_unlabeled_alone(data)]
  return (
    sources.Joined(data.labeled, sources.Subset(data.unlabeled, others)) if others else data.labeled
  )


def rows_unlabeled_alone(data: Data) -> list[int]:
  labeled = frozenset(data.labeled.ids)
  return [row for row, name in enumerate(data.unlabeled.ids) if name not in labeled]
