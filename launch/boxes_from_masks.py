"""Writes boxes of a config's labeled and unlabeled images, read off their masks: to simulate images
that come with boxes only.

  python launch/boxes_from_masks.py --config=configs/camvid.py:split=1_8 --config.data.root=DIR --out=boxes.json
  python launch/boxes_from_masks.py --config=configs/voc.py:split=183,train=train --config.data.root=DIR --out=boxes.json \\
    --instances=VOCdevkit/VOC2012/SegmentationObject/{id}.png

The masks are sought by config.data.label_pattern; those of unlabeled images where --masks=PATTERN
says, if it is given, e.g.
--masks=more_masks/{id}.png for the images of an unlabeled_folder. A box is around each connected region of a class or, with --instances, around
each object of a mask of object numbers (a pattern below config.data.root): VOC's
SegmentationObject, or Cityscapes' gtFine/{id}_gtFine_instanceIds.png. The COCO JSON is what
--config.data.boxes=FILE reads (a path below config.data.root, or an absolute one, as it is printed
at the end).
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from pseudoseg_jax import build, checks, command_line, config as configs
from pseudoseg_jax.data import boxes, decode, listing, sources, splits
from pseudoseg_jax.options import AnyData


def _parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument(
    "--config", required=True, help="config file, with its argument after a colon"
  )
  parser.add_argument("--out", required=True, type=pathlib.Path, help="the JSON file to write")
  parser.add_argument(
    "--instances", default="", help="where masks of object numbers lie, with {id} in it"
  )
  masks_help = (
    "where masks of unlabeled images lie, with {id} in it (default: as those of labeled ones)"
  )
  parser.add_argument("--masks", default="", help=masks_help)
  return command_line.parse_with_overrides(parser, arguments)


def _masks(data: AnyData, pattern: str) -> tuple[sources.Source, build.Data]:
  """The labeled images and after them those that are only unlabeled; of the latter the masks alone
  can be asked for.
  """
  opened = build.build_data(data)
  labeled, unlabeled = opened.labeled, opened.unlabeled
  others = [name for name in unlabeled.ids if name not in set(labeled.ids)]
  if not others:
    return labeled, opened
  if opened.truth_known:
    return sources.Joined(labeled, sources.Subset(unlabeled, others)), opened
  return sources.Joined(
    labeled, build.unlabeled_masks(data, opened.classes, others, pattern)
  ), opened


def _boxes(data: AnyData, pattern: str, instances: str):
  """The images, their classes and the boxes of each."""
  masks, opened = _masks(data, pattern)
  if not instances:
    return masks, opened.classes, boxes.boxes_of_masks(masks, opened.classes)
  problems = checks.Problems("cannot read boxes off masks")
  root, files = pathlib.Path(data.root).expanduser(), listing.Files()
  wanted = [root / instances.replace("{id}", name) for name in masks.ids]
  absent = [path for path in wanted if path not in files]
  if absent:
    got = f"{len(absent)} of {len(wanted)} files absent: {splits.shorten(absent)}"
    remedy = "leave it out to take connected regions, or choose images that have such masks"
    problems.add(f"--instances {instances}", got=got, remedy=remedy)
    problems.raise_if_any()
  found = []
  for row, (path,) in enumerate(map(files.find, wanted)):
    objects = decode.read_mask(path, exif_orientation=data.exif_orientation)
    label = masks.label(row)
    if objects.shape == label.shape:
      found.append(boxes.boxes_of_instances(objects, label, opened.classes))
    else:
      problems.add(
        f"mask {path}",
        got="{} x {}".format(*objects.shape),
        allowed="{} x {}, as its class mask".format(*label.shape),
      )
  problems.raise_if_any()
  return masks, opened.classes, found


def main(arguments=None) -> int:
  known, overrides = _parse(arguments)

  def command():
    config = configs.frozen(configs.load(known.config, overrides))
    masks, classes, found = _boxes(config.data, known.masks, known.instances)
    sizes = [masks.size(row) for row in range(len(masks))]
    boxes.write_boxes(known.out, masks.ids, sizes, found, classes)
    print(
      f"{known.out.resolve()}: {len(masks)} images, {sum(map(len, found)) / len(masks):.1f} boxes in an image"
    )

  return command_line.run(command)


if __name__ == "__main__":
  sys.exit(main())
