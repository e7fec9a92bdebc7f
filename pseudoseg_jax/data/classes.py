"""Class names and colors of a data set."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pseudoseg_jax import checks
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data.listing import normalized
from pseudoseg_jax.data.text import read_text

Color = tuple[int, int, int]

_LONGEST_NAME = 100  # characters; of longer ones no table can be read
# Unicode's categories of characters that move a cursor, run a terminal's commands, or cannot be
# seen.
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_BACKGROUND = frozenset(
  (
    "background",
    "bg",
    "bkg",
    "bkgd",
    "achtergrond",
    "arrièreplan",
    "fond",
    "fondo",
    "fundo",
    "hintergrund",
    "sfondo",
    "tło",
    "фон",
    "背景",
    "배경",
  )
)


@dataclasses.dataclass(frozen=True)
class Classes:
  """Names and display colors, by class index.

  The ignore label is no class and has no entry.

  names: K different names, of characters that can be seen. palette: K colors (red, green, blue),
    each 0..255.
  void: colors of pixels without a label, in masks that are drawn in colors.
  background: whether class 0 is what is left beside things; None: the names decide, see
    `background_index`.
  """

  names: tuple[str, ...]
  palette: tuple[Color, ...]
  void: tuple[Color, ...] = ()
  background: bool | None = None

  def __post_init__(self):
    problems = checks.Problems("classes cannot be used")
    if not self.names:
      problems.add("names", got="none", allowed="at least one class")
    if len(self.names) > IGNORE_LABEL:
      allowed = f"at most {IGNORE_LABEL}, since the value {IGNORE_LABEL} of a mask is no label"
      problems.add("names", got=f"{len(self.names)} classes", allowed=allowed)
    if len(self.names) != len(self.palette):
      problems.add(
        "palette",
        got=f"{len(self.palette)} colors",
        allowed=f"one for each of the {len(self.names)} names",
      )
    for index, name in enumerate(self.names):
      _check_name(f"names[{index}]", name, problems)
    same = collections.Counter(normalized(str(name).strip()) for name in self.names)
    for name in sorted(name for name, count in same.items() if count > 1):
      problems.add("names", got=f"'{name}' {same[name]} times", allowed="different names")
    for index, color in enumerate(self.palette):
      if len(color) != 3 or not all(0 <= value <= 255 for value in color):
        problems.add(f"palette[{index}]", got=color, allowed="three values in 0..255")
    problems.raise_if_any()

  def __len__(self) -> int:
    return len(self.names)

  @property
  def background_index(self) -> int | None:
    """Returns the index of the background class, or None if there is none.

    Background is what is left beside things; it is part of every image but no object.
    """
    if self.background is not None:
      return 0 if self.background else None
    return next(
      (index for index, name in enumerate(self.names) if _letters(name) in _BACKGROUND), None
    )

  def by_color(self) -> dict[Color, int]:
    """Maps each color to its class index or IGNORE_LABEL.

    InputError where a color stands for two of them.
    """
    labels = {color: IGNORE_LABEL for color in self.void} | {
      color: index for index, color in enumerate(self.palette)
    }
    if len(labels) < len(self.palette) + len(set(self.void)):
      problems = checks.Problems("masks in colors cannot be read with these classes")
      colors = [*self.palette, *set(self.void)]
      for color in sorted({color for color in colors if colors.count(color) > 1}):
        names = [
          name for name, other in zip(self.names, self.palette, strict=True) if other == color
        ]
        problems.add(
          f"color {color}",
          got=", ".join(names + ["void"] * (color in self.void)),
          allowed="one class a color",
        )
      problems.raise_if_any()
    return labels


def _check_name(where: str, name: str, problems: checks.Problems) -> None:
  if not isinstance(name, str) or not name.strip():
    problems.add(where, got=repr(name), allowed="a name")
  elif len(name) > _LONGEST_NAME:
    problems.add(
      where,
      got=f"{len(name)} characters, {name[:20]!r}...",
      allowed=f"at most {_LONGEST_NAME} characters",
    )
  elif any(unicodedata.category(character) in _INVISIBLE for character in name):
    remedy = f"write {_visible(name)!r}" if _visible(name) else "write another name"
    problems.add(
      where,
      got=repr(name),
      allowed="no control characters, and none that cannot be seen",
      remedy=remedy,
    )
  elif name != name.strip():
    problems.add(
      where, got=repr(name), allowed="no spaces around a name", remedy=f"write {name.strip()!r}"
    )


def _visible(name: str) -> str:
  """Removes invisible characters and terminal commands from a name."""
  name = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)", "", name)
  return "".join(
    character for character in name if unicodedata.category(character) not in _INVISIBLE
  ).strip()


def _letters(name: str) -> str:
  """Normalizes a name for comparison with names that have a meaning.

  "_Back ground_" becomes "background".
  """
  return re.sub(r"[\W_]+", "", normalized(name).casefold())


_WANTED = "a text file of class names, one a line, or of lines `index name r g b`"
_ALL_INDEXED = "write every line as `index name r g b`"
_LONGEST_LINE = 300  # characters; the forms below take time that grows with its square
_MOST_LINES = 1000  # of classes and of what is none
_IGNORED = "__ignore__"  # LabelMe's first line, of index -1
_HEADING = frozenset(
  "class classes classname label labels labelname category categories name names".split()
)
_IN_HEADING = _HEADING | frozenset(
  "id idx index classid classindex labelid categoryid trainid pixel value r g b red green blue rgb color color colorrgb".split()
)


class _Form(NamedTuple):
  """A form in which all the lines of a file may be written.

  pattern: with the groups name and, where the form has them, index, r, g and b.
  alone: it may also be a name alone, so that only a whole file can show that it is not.
  """

  pattern: re.Pattern
  alone: bool = False

  @property
  def indexed(self) -> bool:
    return "index" in self.pattern.groupindex

  @property
  def colored(self) -> bool:
    return "r" in self.pattern.groupindex


def _forms() -> Iterator[_Form]:
  number = "(?P<{}>[0-9]{{1,9}})".format
  color = [*map(number, "rgb")]
  # CVAT's labelmap.txt, with parts and actions.
  yield _Form(re.compile("(?P<name>[^:]+):" + ",".join(color) + ":[^:]*:[^:]*"))
  for parts in (
    [number("index"), "{name}", *color],
    ["{name}", *color],
    [*color, "{name}"],
    [number("index"), "{name}"],
  ):
    for separator, name in (
      (r"\s+", r"\S(?:.*?\S)?"),
      (r"\s*,\s*", "[^,]+?"),
      (r"\s*;\s*", "[^;]+?"),
      (r"\s*:\s*", "[^:]+?"),
    ):
      pattern = separator.join(parts).replace("{name}", f"(?P<name>{name})")
      yield _Form(re.compile(pattern), alone=separator == r"\s+" and len(parts) == 2)


_FORMS = tuple(_forms())
# What no name holds, but other forms of a file do: brackets, quotes, lists of YAML, separators
# beside numbers or at an end.
_NO_NAME = re.compile(
  r"[\[\]{}<].*|.*[\[{]|[\"'].*[\"'][,;]?|[-*]\s.*|.*[,;:]|.*\t.*|.*[,;:]\s*[\"'#0-9].*|.*[0-9]\s*[,;:].*"
  r"|.*\s[0-9]+\s+[0-9]+|[0-9]+\s+[0-9]+\s.*"
)

_Entry = tuple[int, int, str, Color]  # line number, index, name, color


def read_classes(path: str | pathlib.Path) -> Classes:
  """Reads class names, with or without indices and colors, from a text file.

  Lines are `index name r g b`, or class names alone, one a line, which get VOC's colors.

  Other forms that tools write are known as well: `index name`, `name r g b` and `r g b name`;
  commas, semicolons or colons between; a first line of headings; CVAT's `name:r,g,b:parts:actions`;
  LabelMe's list that begins with `__ignore__`. All lines are of one form.

  `#` starts a comment at the beginning of a line or after a space; blank lines are skipped; indices
  count up from 0. An entry named `void` is left out: it is no class (a source maps its index, or in
  colored masks its color, to the ignore label).

  Raises:
    InputError: missing file, lines of another form, indices that are not 0, 1, 2, ..., names that
      are none or occur twice.
  """
  path = pathlib.Path(path)
  problems = checks.Problems(f"cannot read classes from {path}")
  text = normalized(read_text(path, problems, _WANTED))
  if text.lstrip().startswith(("[", "{", "<")):
    remedy = "write the names into a text file, one a line, in the order of the masks' values"
    problems.add(
      "file", got=f"no lines of names but {text.strip()[:40]!r}...", allowed=_WANTED, remedy=remedy
    )
    problems.raise_if_any()
  lines = [
    (number, re.sub(r"(^|\s)#.*", "", line).strip())
    for number, line in enumerate(text.split("\n"), start=1)
  ]
  lines = [(number, line) for number, line in lines if line]
  if len(lines) > _MOST_LINES:
    problems.add("file", got=f"{len(lines)} lines", allowed=f"at most {IGNORE_LABEL} classes")
  for number, line in lines:
    if len(line) > _LONGEST_LINE:
      problems.add(
        f"line {number}", got=f"{len(line)} characters", allowed=f"at most {_LONGEST_LINE}"
      )
  problems.raise_if_any()
  void: list[Color] = []
  lines = _without_heading(lines, problems)
  if lines and lines[0][1].casefold() == _IGNORED:
    lines, void = lines[1:], [_VOC_BORDER]  # what LabelMe draws it in
  entries = _entries(lines, problems)
  void += [color for _, _, name, color in entries if _is_void(name)]
  _check_indices(entries, problems)
  problems.raise_if_any()
  entries = [entry for entry in entries if not _is_void(entry[2])]
  try:
    return Classes(
      tuple(name for _, _, name, _ in entries), tuple(color for *_, color in entries), tuple(void)
    )
  except checks.InputError as error:
    raise checks.InputError(f"{path}: {error}") from None


def _is_void(name: str) -> bool:
  return _letters(name) == "void" or name.casefold() == _IGNORED


def _without_heading(
  lines: list[tuple[int, str]], problems: checks.Problems
) -> list[tuple[int, str]]:
  """Removes a line of headings, such as `name,r,g,b`.

  A single word becomes a problem, since it may be a class.
  """
  if not lines:
    return lines
  number, line = lines[0]
  separated = re.search("[,;:\t]", line) is not None
  words = [_letters(word) for word in re.split(r"[,;:\s]+", line)]
  if not _HEADING.intersection(words) or not _IN_HEADING.issuperset(words):
    return lines
  if separated or len(words) > 2:
    return lines[1:]
  problems.add(
    f"line {number}",
    got=f"{line!r}, which looks like a heading",
    allowed="names of classes",
    remedy=f"take it out; or, if it is a class: {_ALL_INDEXED}",
  )
  return lines


def _entries(lines: Sequence[tuple[int, str]], problems: checks.Problems) -> list[_Entry]:
  """Parses every line; adds a problem for each that cannot be a class."""
  form = _form_of([line for _, line in lines])
  colors = voc_palette(max(256, len(lines))).tolist()
  example = next((line for _, line in lines if form and form.pattern.fullmatch(line)), None)
  entries = []
  for position, (number, line) in enumerate(lines):
    found = form and form.pattern.fullmatch(line)
    name = found["name"].strip() if found else line
    if form and not found:
      problems.add(
        f"line {number}", got=repr(line), allowed=f"all lines of one form, here that of {example!r}"
      )
    elif not (form and form.indexed and form.colored) and _NO_NAME.fullmatch(name):
      problems.add(
        f"line {number}",
        got=repr(line),
        allowed="a name alone",
        remedy=f"or, if it is one, {_ALL_INDEXED}",
      )
    index = int(found["index"]) if found and form.indexed else position
    color = (
      tuple(int(found[channel]) for channel in "rgb")
      if found and form.colored
      else tuple(colors[position])
    )
    entries.append((number, index, name, color))
  if form is None and len(lines) == 1 and re.search("[,;]", lines[0][1]):
    problems.add(f"line {lines[0][0]}", got=repr(lines[0][1]), allowed="one class a line")
  return entries


def _form_of(lines: Sequence[str]) -> _Form | None:
  """Returns the form of all lines, or the one that the rest should have.

  None: names alone.
  """
  for form in _FORMS:
    found = [form.pattern.fullmatch(line) for line in lines]
    indices = [int(one["index"]) for one in found if one] if form.indexed else []
    if all(found):
      counted = indices == list(range(len(lines)))
      # "2 wheeler", "3 wheeler" are names alone, and so is a single "2 wheeler".
      if (
        not form.alone
        or counted
        or len(lines) > 1
        and len(lines) == len(set(indices)) == len({one["name"] for one in found})
      ):
        return form
    elif (
      form.indexed
      and form.colored
      and any(one and int(one["index"]) == place for place, one in enumerate(found))
    ):
      return form
  some = [form for form in _FORMS if not form.alone and any(map(form.pattern.fullmatch, lines))]
  return some[0] if some else None


def _check_indices(entries: Sequence[_Entry], problems: checks.Problems) -> None:
  classes = [entry for entry in entries if not _is_void(entry[2])]
  for expected, (number, index, name, _) in enumerate(classes):
    if index != expected:
      remedy = f"if the number is part of a name, {_ALL_INDEXED}"
      if len(classes) < len(entries):
        remedy = (
          "put the line of void last; what is stored in masks is mapped by config.data.label_map"
        )
      elif index == 1 and expected == 0:
        remedy = (
          "put the line of class 0, such as background, before it; or count from 0, with config.data.reduce_zero_label=True if "
          "the value 0 of a mask is no label"
        )
      allowed = f"{expected}, as indices count up from 0"
      problems.add(
        f"line {number}", got=f"index {index} for '{name}'", allowed=allowed, remedy=remedy
      )
      break  # all later ones are off as well


def with_background(classes: Classes) -> list[str]:
  """Returns the lines of a file of two classes in place of a single class.

  The two are background and that class. If the class is background, the other one is "object".
  """
  (name,), (color,) = classes.names, classes.palette
  if classes.background_index == 0:
    name = "object"
  red, green, blue = color if any(color) else voc_palette()[1].tolist()
  return ["0 background 0 0 0", f"1 {name} {red} {green} {blue}"]


def read_label_map(text: str | Mapping) -> dict[int, int]:
  """Reads a mapping of stored mask values to classes.

  The text is a mapping, "11:255,12:3", or "cityscapes" for its labelIds.

  Raises:
    InputError: text of another form.
  """
  if isinstance(text, str) and text in LABEL_MAPS:
    return LABEL_MAPS[text]
  pairs = (
    [part.partition(":")[::2] for part in text.split(",") if part.strip()]
    if isinstance(text, str)
    else text.items()
  )
  problems = checks.Problems("cannot read the label map")
  try:
    pairs = [(int(stored), int(index)) for stored, index in pairs]
  except (ValueError, TypeError):
    problems.add(
      "label_map",
      got=repr(text),
      allowed=f"'STORED:CLASS,...' such as '11:255', or {checks.choices(LABEL_MAPS)}",
    )
    problems.raise_if_any()
  for stored, count in collections.Counter(stored for stored, _ in pairs).items():
    if count > 1:
      problems.add(f"label_map, stored value {stored}", got=f"{count} classes", allowed="one")
  problems.raise_if_any()
  return dict(pairs)


def voc_palette(num_colors: int = 256) -> np.ndarray:
  """Computes the PASCAL VOC color map.

  The bits of an index are dealt in turn to red, green and blue, from the highest bit down.

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
VOC = Classes(
  tuple(_VOC_NAMES),
  tuple(tuple(color) for color in voc_palette(len(_VOC_NAMES)).tolist()),
  (_VOC_BORDER,),
)

CAMVID = Classes(  # the 11-class form of the SegNet tutorial; its masks say 11 for void
  names=(
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign_symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
  ),
  palette=(
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
  ),
  void=((0, 0, 0),),
)

_COCO_NAMES = (
  "background",
  "person",
  "bicycle",
  "car",
  "motorcycle",
  "airplane",
  "bus",
  "train",
  "truck",
  "boat",
  "traffic light",
  "fire hydrant",
  "stop sign",
  "parking meter",
  "bench",
  "bird",
  "cat",
  "dog",
  "horse",
  "sheep",
  "cow",
  "elephant",
  "bear",
  "zebra",
  "giraffe",
  "backpack",
  "umbrella",
  "handbag",
  "tie",
  "suitcase",
  "frisbee",
  "skis",
  "snowboard",
  "sports ball",
  "kite",
  "baseball bat",
  "baseball glove",
  "skateboard",
  "surfboard",
  "tennis racket",
  "bottle",
  "wine glass",
  "cup",
  "fork",
  "knife",
  "spoon",
  "bowl",
  "banana",
  "apple",
  "sandwich",
  "orange",
  "broccoli",
  "carrot",
  "hot dog",
  "pizza",
  "donut",
  "cake",
  "chair",
  "couch",
  "potted plant",
  "bed",
  "dining table",
  "toilet",
  "tv",
  "laptop",
  "mouse",
  "remote",
  "keyboard",
  "cell phone",
  "microwave",
  "oven",
  "toaster",
  "sink",
  "refrigerator",
  "book",
  "clock",
  "vase",
  "scissors",
  "teddy bear",
  "hair drier",
  "toothbrush",
)

# The 19 that are scored; names and colors of cityscapesScripts' helpers/labels.py.
CITYSCAPES = Classes(
  names=(
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
  ),
  palette=(
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
  ),
  void=((0, 0, 0),),
)

# labelIds of the 19, in their order; 0..33 without them are not scored. The id -1 (license plate)
# is drawn in no mask.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_TRAIN_IDS = {stored: IGNORE_LABEL for stored in range(34)} | {
  stored: index for index, stored in enumerate(_CITYSCAPES_IDS)
}
LABEL_MAPS = {"cityscapes": CITYSCAPES_TRAIN_IDS}

# The 80 things in the order of their category ids, without the gaps; the colors are VOC's.
COCO = Classes(
  _COCO_NAMES,
  tuple(tuple(color) for color in voc_palette(len(_COCO_NAMES)).tolist()),
  (_VOC_BORDER,),
)

PETS = Classes(("background", "cat", "dog"), ((0, 0, 0), (230, 120, 40), (60, 120, 220)))

BUILTIN = {"voc": VOC, "camvid": CAMVID, "cityscapes": CITYSCAPES, "coco": COCO, "pets": PETS}
