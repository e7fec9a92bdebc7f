"""Writes image-level labels of a config's unlabeled images, read off their masks: to simulate
images that come with labels only.

  python launch/tags_from_masks.py --config=configs/camvid.py:split=1_8 --config.data.root=DIR --out=tags.csv

The masks are sought by config.data.label_pattern, or where --masks=PATTERN says, e.g.
--masks=more_masks/{id}.png for the images of an unlabeled_folder. The CSV, `id,name,name,...`, is
what --config.data.image_labels=FILE reads (a path below config.data.root, or an absolute one, as it
is printed at the end).
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from pseudoseg_jax import build, command_line, config as configs
from pseudoseg_jax.data import tags


def _parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument(
    "--config", required=True, help="config file, with its argument after a colon"
  )
  parser.add_argument("--out", required=True, type=pathlib.Path, help="the CSV file to write")
  masks_help = (
    "where masks of unlabeled images lie, with {id} in it (default: as those of labeled ones)"
  )
  parser.add_argument("--masks", default="", help=masks_help)
  return command_line.parse_with_overrides(parser, arguments)


def main(arguments=None) -> int:
  known, overrides = _parse(arguments)

  def command():
    data = configs.frozen(configs.load(known.config, overrides)).data
    opened = build.build_data(data)
    ids = opened.unlabeled.ids
    masks = (
      opened.unlabeled
      if opened.truth_known
      else build.unlabeled_masks(data, opened.classes, ids, known.masks)
    )
    found = tags.tags_of_masks(masks, len(opened.classes))
    tags.write_tags(known.out, ids, found, opened.classes)
    print(
      f"{known.out.resolve()}: {len(ids)} images, {found.sum() / len(ids):.1f} classes in an image"
    )

  return command_line.run(command)


if __name__ == "__main__":
  sys.exit(main())
