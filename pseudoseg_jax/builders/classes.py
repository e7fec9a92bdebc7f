"""Builders of the classes of config.data."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from pseudoseg_jax import checks
from pseudoseg_jax.data import (
  classes as classes_lib,
  synthetic,
)
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.options import AnyData, GivenData, SyntheticData


def build_classes(data_config: AnyData) -> Classes:
  """Builds the classes alone.

  They are what a trained network needs to be used without its data.

  Raises:
    InputError: no classes, or a single one, of which nothing can be learned.
  """
  problems = checks.Problems("config.data cannot be used")
  check_in_files(data_config)
  if isinstance(data_config, SyntheticData):
    classes = synthetic.CLASSES
  elif data_config.classes in classes_lib.BUILTIN:
    classes = classes_lib.BUILTIN[data_config.classes]
  elif not data_config.classes:
    allowed = f"a file of class names, one a line, or of lines `index name r g b`; or {checks.choices(classes_lib.BUILTIN)}"
    problems.add("config.data.classes", got="nothing", allowed=allowed)
    problems.raise_if_any()
  else:
    classes = classes_lib.read_classes(resolve_path(data_config.root, data_config.classes))
  check_several(classes, f"config.data.classes {data_config.classes}")
  return with_background(classes, data_config.background)


def check_in_files(data_config: AnyData) -> None:
  problems = checks.Problems("the images of this run were given from Python, and are in no file")
  if isinstance(data_config, GivenData):
    problems.add(
      "data",
      got="nothing",
      remedy="give them again, as `data` of pseudoseg_jax.train or pseudoseg_jax.evaluate",
    )
  problems.raise_if_any()


def check_several(classes: Classes, where: str) -> None:
  problems = checks.Problems("config.data cannot be used")
  if len(classes) == 1:
    lines = " and ".join(f"`{line}`" for line in classes_lib.with_background(classes))
    problems.add(
      where,
      got=f"one class, '{classes.names[0]}'",
      allowed="at least two: a network that knows one answer is right everywhere and learns nothing",
      remedy=f"write what is left beside it as class 0: a file of the lines {lines} fits masks of 0 and 1 as they are",
    )
  problems.raise_if_any()


def with_background(classes: Classes, background: str) -> Classes:
  return (
    classes
    if background == "auto"
    else dataclasses.replace(classes, background=background == "yes")
  )


def resolve_path(root: str, path: str) -> pathlib.Path:
  """Resolves a path that is absolute, or relative to the data's root.

  "~" is the user's home.
  """
  return pathlib.Path(os.path.expanduser(root)) / os.path.expanduser(path)
