"""Class names and colours of a data set."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL

Color = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Classes:
  """Names and display colours, by class index; the ignore label is no class and has no entry.

  names: K different names. palette: K colours (red, green, blue), each 0..255.
  void: colours of pixels without a label, in masks that are drawn in colours.
  """

  names: tuple[str, ...]
  palette: tuple[Color, ...]
  void: tuple[Color, ...] = ()

  def __post_init__(self):
    problems = checks.Problems("classes cannot be used")
    if not self.names:
      problems.add("names", got="none", allowed="at least one class")
    if len(self.names) != len(self.palette):
      problems.add("palette", got=f"{len(self.palette)} colours", allowed=f"one for each of the {len(self.names)} names")
    for name in sorted({name for name in self.names if self.names.count(name) > 1}):
      problems.add("names", got=f"'{name}' {self.names.count(name)} times", allowed="different names")
    for index, color in enumerate(self.palette):
      if len(color) != 3 or not all(0 <= value <= 255 for value in color):
        problems.add(f"palette[{index}]", got=color, allowed="three values in 0..255")
    problems.raise_if_any()

  def __len__(self) -> int:
    return len(self.names)

  def by_color(self) -> dict[Color, int]:
    """Colour -> class index or IGNORE_LABEL; InputError where a colour stands for two of them."""
    labels = {color: IGNORE_LABEL for color in self.void} | {color: index for index, color in enumerate(self.palette)}
    if len(labels) < len(self.palette) + len(set(self.void)):
      problems = checks.Problems("masks in colours cannot be read with these classes")
      colors = [*self.palette, *set(self.void)]
      for color in sorted({color for color in colors if colors.count(color) > 1}):
        names = [name for name, other in zip(self.names, self.palette, strict=True) if other == color]
        problems.add(f"colour {color}", got=", ".join(names + ["void"] * (color in self.void)), allowed="one class a colour")
      problems.raise_if_any()
    return labels


def read_classes(path: str | pathlib.Path) -> Classes:
  """Reads a text file of `index name r g b` lines, or of class names alone, one a line, which get VOC's colours.

  `#` starts a comment; blank lines are skipped; indices count up from 0. An entry named `void` is left out: it is no class
  (a source maps its index, or in coloured masks its colour, to the ignore label).

  Raises:
    InputError: missing file, a line of another form, indices that are not 0, 1, 2, ...
  """
  path = pathlib.Path(path)
  problems = checks.Problems(f"cannot read classes from {path}")
  try:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    problems.add("file", got=error, remedy="give a text file of class names, one a line, or of lines `index name r g b`")
    problems.raise_if_any()
  lines = [(number, line.split("#")[0].strip()) for number, line in enumerate(lines, start=1)]
  lines = [(number, line) for number, line in lines if line]
  if any(re.match(r"\d+\s", line) for _, line in lines):
    entries = _colored_entries(lines, problems)
  else:
    colors = map(tuple, voc_palette().tolist())
    entries = [(number, index, name, color) for index, ((number, name), color) in enumerate(zip(lines, colors))]
  void = tuple(color for _, _, name, color in entries if name == "void")
  entries = [entry for entry in entries if entry[2] != "void"]
  for expected, (number, index, name, _) in enumerate(entries):
    if index != expected:
      problems.add(f"line {number}", got=f"index {index} for '{name}'", allowed=f"{expected}, as indices count up from 0")
      break  # all later ones are off as well
  problems.raise_if_any()
  try:
    return Classes(tuple(name for _, _, name, _ in entries), tuple(color for *_, color in entries), void)
  except checks.InputError as error:
    raise checks.InputError(f"{path}: {error}") from None


def _colored_entries(lines, problems: checks.Problems) -> list[tuple[int, int, str, Color]]:
  """(line number, index, name, colour) of every line."""
  entries = []
  for number, line in lines:
    try:
      index, name, red, green, blue = line.split()
      entries.append((number, int(index), name, (int(red), int(green), int(blue))))
    except ValueError:
      problems.add(f"line {number}", got=repr(line), allowed="`index name r g b`, names without spaces")
  return entries


def read_label_map(text: str | Mapping) -> dict[int, int]:
  """Stored mask value -> class: a mapping, "11:255,12:3", or "cityscapes" for its labelIds.

  Raises:
    InputError: text of another form.
  """
  if isinstance(text, str) and text in LABEL_MAPS:
    return LABEL_MAPS[text]
  pairs = [part.partition(":")[::2] for part in text.split(",") if part.strip()] if isinstance(text, str) else text.items()
  try:
    return {int(stored): int(index) for stored, index in pairs}
  except ValueError:
    problems = checks.Problems("cannot read the label map")
    problems.add("label_map", got=repr(text), allowed=f"'STORED:CLASS,...' such as '11:255', or {checks.choices(LABEL_MAPS)}")
    problems.raise_if_any()


def voc_palette(num_colors: int = 256) -> np.ndarray:
  """The PASCAL VOC colour map: the bits of an index, dealt in turn to red, green and blue from the highest bit down.

  Returns:
    uint8 [num_colors, 3].
  """
  index = np.arange(num_colors)
  palette = np.zeros((num_colors, 3), np.uint8)
  for bit in range(8):
    for channel in range(3):
      palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
  return palette


_VOC_NAMES = (
  "background aeroplane bicycle bird boat bottle bus car cat chair cow "
  "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()

_VOC_BORDER = (224, 224, 192)
VOC = Classes(tuple(_VOC_NAMES), tuple(tuple(color) for color in voc_palette(len(_VOC_NAMES)).tolist()), (_VOC_BORDER,))

CAMVID = Classes(  # the 11-class form of the SegNet tutorial; its masks say 11 for void
  names=("sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian", "bicyclist"),
  palette=(
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
  ),
  void=((0, 0, 0),),
)  # fmt: skip

_COCO_NAMES = (
  "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
  "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear",
  "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball",
  "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
  "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake",
  "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
  "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
  "hair drier", "toothbrush",
)  # fmt: skip

CITYSCAPES = Classes(  # the 19 that are scored; names and colours of cityscapesScripts' helpers/labels.py
  names=(
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
  ),
  palette=(
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
  ),
  void=((0, 0, 0),),
)  # fmt: skip

# labelIds of the 19, in their order; 0..33 without them are not scored. The id -1 (license plate) is drawn in no mask.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_TRAIN_IDS = {stored: IGNORE_LABEL for stored in range(34)} | {
  stored: index for index, stored in enumerate(_CITYSCAPES_IDS)
}
LABEL_MAPS = {"cityscapes": CITYSCAPES_TRAIN_IDS}

# The 80 things in the order of their category ids, without the gaps; the colours are VOC's.
COCO = Classes(_COCO_NAMES, tuple(tuple(color) for color in voc_palette(len(_COCO_NAMES)).tolist()), (_VOC_BORDER,))

PETS = Classes(("background", "cat", "dog"), ((0, 0, 0), (230, 120, 40), (60, 120, 220)))

BUILTIN = {"voc": VOC, "camvid": CAMVID, "cityscapes": CITYSCAPES, "coco": COCO, "pets": PETS}
