"""Class names and colours of a data set."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from pseudoseg_jax import checks

Color = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Classes:
  """Names and display colours, by class index; the ignore label is no class and has no entry.

  names: K different names. palette: K colours (red, green, blue), each 0..255.
  """

  names: tuple[str, ...]
  palette: tuple[Color, ...]

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


def read_classes(path: str | pathlib.Path) -> Classes:
  """Reads a text file of `index name r g b` lines.

  `#` starts a comment; blank lines are skipped; indices count up from 0. An entry named `void` is left out: it is no class
  (a source maps its index to the ignore label).

  Raises:
    InputError: missing file, a line of another form, indices that are not 0, 1, 2, ...
  """
  path = pathlib.Path(path)
  problems = checks.Problems(f"cannot read classes from {path}")
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    problems.add("file", got=error, remedy="give a text file of lines `index name r g b`")
    problems.raise_if_any()
  entries = []
  for number, line in enumerate(lines, start=1):
    fields = line.split("#")[0].split()
    if not fields:
      continue
    try:
      index, name, red, green, blue = fields
      entry = int(index), name, (int(red), int(green), int(blue))
    except ValueError:
      problems.add(f"line {number}", got=repr(line.strip()), allowed="`index name r g b`, names without spaces")
      continue
    if name != "void":
      entries.append((number, *entry))
  for expected, (number, index, name, _) in enumerate(entries):
    if index != expected:
      problems.add(f"line {number}", got=f"index {index} for '{name}'", allowed=f"{expected}, as indices count up from 0")
      break  # all later ones are off as well
  problems.raise_if_any()
  try:
    return Classes(names=tuple(name for _, _, name, _ in entries), palette=tuple(color for *_, color in entries))
  except checks.InputError as error:
    raise checks.InputError(f"{path}: {error}") from None


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

VOC = Classes(tuple(_VOC_NAMES), tuple(tuple(color) for color in voc_palette(len(_VOC_NAMES)).tolist()))

CAMVID = Classes(  # the 11-class form of the SegNet tutorial; its masks say 11 for void
  names=("sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian", "bicyclist"),
  palette=(
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
  ),
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

# The 80 things in the order of their category ids, without the gaps; the colours are VOC's.
COCO = Classes(_COCO_NAMES, tuple(tuple(color) for color in voc_palette(len(_COCO_NAMES)).tolist()))
