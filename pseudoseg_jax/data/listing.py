"""Which files there are."""

from __future__ import annotations

import os
import pathlib

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Files:
  """Which files there are: one listing a folder instead of one look a file."""

  def __init__(self):
    self._names: dict[str, frozenset[str]] = {}

  def __contains__(self, path: pathlib.Path) -> bool:
    folder, name = os.path.split(path)
    if folder not in self._names:
      self._names[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
    return name in self._names[folder]
