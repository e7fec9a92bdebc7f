"""Writes image-level labels of a config's unlabeled images, read off their masks: to simulate images that come with labels only.

  python launch/tags_from_masks.py --config=configs/camvid.py:split=1_8 --config.data.root=DIR --out=tags.csv

The masks are sought by config.data.label_pattern. The CSV, `id,name,name,...`, is what --config.data.image_labels=FILE reads (a
path below config.data.root, or an absolute one, as it is printed at the end).
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from pseudoseg_jax import build, checks, config as configs
from pseudoseg_jax.data import sources, tags
from pseudoseg_jax.command_line import parse_with_overrides


def _parse(arguments):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument("--config", required=True, help="config file, with its argument after a colon")
  parser.add_argument("--out", required=True, type=pathlib.Path, help="the CSV file to write")
  return parse_with_overrides(parser, arguments)


def _masks(data: configs.ConfigDict) -> tuple[tuple[str, ...], sources.Source, build.Data]:
  """The unlabeled images' ids and, row by row, their masks."""
  opened = build.build_data(data)
  ids = opened.unlabeled.ids
  if data.name == "synthetic":
    return ids, opened.unlabeled, opened
  # Ids of a bare folder of images end in .jpg or the like, which names of masks do not repeat.
  stems = [tags.without_suffix(name) for name in ids] if data.unlabeled_folder else ids
  pattern = data.label_pattern
  masks = sources.FolderSource(
    data.root,
    stems,
    image_pattern=pattern,  # images play no part
    label_pattern=pattern,
    **build.mask_options(data, opened.classes),
  )
  return ids, masks, opened


def main(arguments=None) -> int:
  known, overrides = _parse(arguments)
  try:
    ids, masks, opened = _masks(configs.load(known.config, overrides).data)
    found = tags.tags_of_masks(masks, len(opened.classes))
  except checks.InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  tags.write_tags(known.out, ids, found, opened.classes)
  print(f"{known.out.resolve()}: {len(ids)} images, {found.sum() / len(ids):.1f} classes in an image")
  return 0


if __name__ == "__main__":
  sys.exit(main())
