import contextlib
import hashlib
import itertools
import re
import time

import pytest

from pseudoseg_jax import checks
from pseudoseg_jax.data import splits

VOC, COCO = "VOCdevkit/VOC2012/JPEGImages/{id}.jpg", "train2017/{id}.jpg"
CITY = "leftImg8bit/train/{id}_leftImg8bit.png"


def read(tmp_path, content, image_pattern=None):
  (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
  return splits.read_entries(tmp_path / "list.txt", image_pattern)


def test_read_list_takes_any_line_ending_and_no_final_newline(tmp_path):
  path = tmp_path / "list.txt"
  path.write_bytes(b"\xef\xbb\xbfb\r\n\r\n  a \r\nc/d")
  assert splits.read_list(path) == ("b", "a", "c/d")


@pytest.mark.parametrize(
  ("line", "pattern", "entry"),
  [
    ("2007_000032", VOC, ("2007_000032", None, None)),
    (
      "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png",
      VOC,
      ("2007_000032", "/JPEGImages/2007_000032.jpg", "/SegmentationClassAug/2007_000032.png"),
    ),
    ("photos/2007_000032.JPEG", VOC, ("2007_000032", "photos/2007_000032.JPEG", None)),
    ("train2017/000000177254", COCO, ("000000177254", None, None)),
    (
      "train2017/000000177254.jpg masks/000000177254.png",
      COCO,
      ("000000177254", "train2017/000000177254.jpg", "masks/000000177254.png"),
    ),
    (
      "leftImg8bit/train/jena/jena_1_2_leftImg8bit.png",
      CITY,
      ("jena/jena_1_2", "leftImg8bit/train/jena/jena_1_2_leftImg8bit.png", None),
    ),
    ("train/jena/jena_1_2", CITY, ("jena/jena_1_2", None, None)),
    ("jena/jena_1_2", CITY, ("jena/jena_1_2", None, None)),
    (
      "/images/train/jena_1_2.png\t/segmentation/train/jena_1_2_gtFine.png",
      CITY,
      ("jena_1_2", "/images/train/jena_1_2.png", "/segmentation/train/jena_1_2_gtFine.png"),
    ),
    (
      "leftImg8bit/train_extra/a/a_1_leftImg8bit.png None",
      CITY,
      ("a_1", "leftImg8bit/train_extra/a/a_1_leftImg8bit.png", None),
    ),
    (
      "my photos/one two.jpg\tmy masks/one two.png",
      "my photos/{id}.jpg",
      ("one two", "my photos/one two.jpg", "my masks/one two.png"),
    ),
    (
      "my photos/one two.jpg my masks/one two.png",
      None,
      ("my photos/one two", "my photos/one two.jpg", "my masks/one two.png"),
    ),
    ("one two", None, ("one two", None, None)),
    ("a\\b.png c\\b.png", None, ("a/b", "a/b.png", "c/b.png")),
    ("v1.5/frame_07", "frames/frame_{id}.png", ("v1.5/frame_07", None, None)),
    ("frames/frame_07.png", "frames/frame_{id}.png", ("07", "frames/frame_07.png", None)),
  ],
)
def test_published_line_forms_give_the_same_ids(tmp_path, line, pattern, entry):
  assert read(tmp_path, line, pattern) == (entry,)


def test_entries_that_were_written_are_read_back(tmp_path):
  entries = read(tmp_path, "a/b.png\tc/b.png\nd\ne f/g.jpg\n")
  assert read(tmp_path, splits.list_text(entries)) == entries


def test_ids_without_folders_are_completed_where_only_one_is_known():
  entries = [
    splits.Entry("jena_1"),
    splits.Entry("ulm/ulm_1"),
    splits.Entry("twice"),
    splits.Entry("unknown"),
  ]
  known = ["jena/jena_1", "ulm/ulm_1", "a/twice", "b/twice"]
  assert [entry.id for entry in splits.complete_ids(entries, known)] == [
    "jena/jena_1",
    "ulm/ulm_1",
    "twice",
    "unknown",
  ]


def test_pickles_and_further_columns_are_refused(tmp_path):
  (tmp_path / "list.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
  with pytest.raises(checks.InputError, match="pickle.*text file"):
    splits.read_list(tmp_path / "list.pkl")
  with pytest.raises(checks.InputError, match="line 2: got 3 columns"):
    read(tmp_path, "a\nb\tc\td\n")


@pytest.mark.parametrize(
  ("content", "part"),
  [(b"\n \r\n", "none"), (b"a\nb\na\n", "a more than once"), (b"\xff\xfe\x00", "file")],
)
def test_unusable_list_is_named(tmp_path, content, part):
  path = tmp_path / "list.txt"
  path.write_bytes(content)
  with pytest.raises(checks.InputError) as error:
    splits.read_list(path)
  assert str(path) in str(error.value) and part in str(error.value)


@pytest.mark.parametrize(
  "line",
  [
    "a.jpg " * 17_000 + "b",
    "a.jpg b" * 14_000,
    "." * 100_000,
    "a" * 100_000,
    "a b " * 25_000 + "None",
    "x.png\t" * 16_000,
    "/a" * 50_000,
  ],
  ids=["suffixes", "words", "dots", "a name", "None", "tabs", "folders"],
)
def test_long_lines_take_time_that_grows_with_their_length(tmp_path, line):
  start = time.monotonic()
  with contextlib.suppress(checks.InputError):
    (entry,) = read(tmp_path, line, VOC)
    assert len(splits.shorten([entry.id])) < 300
  assert time.monotonic() - start < 2  # minutes, where it grows with the square


@pytest.mark.parametrize(
  "line",
  ["a b.jpg c d.png", "a.jpg b.jpg  c.png", "a.jpg.png b.TIF", "x.png None", "x y.png b.png  none"],
)
def test_the_first_path_ends_where_an_image_file_does(tmp_path, line):
  expression = re.compile(r"(.+?\.(?:jpg|png|tif))\s+(.+\.(?:jpg|png|tif)|none)", re.IGNORECASE)
  image, mask = expression.fullmatch(line).groups()
  assert read(tmp_path, line)[0][1:] == (image, None if mask == "None" else mask)


def test_names_are_shown_without_commands_of_terminals():
  assert splits.shorten(["a\x1b[2J", "b\r"]) == "a\\x1b[2J, b\\r"
  assert len(splits.shorten(["x" * 100_000] * 5)) < 1000


def test_missing_list_is_named(tmp_path):
  with pytest.raises(checks.InputError, match="nowhere.txt"):
    splits.read_list(tmp_path / "nowhere.txt")


IDS = [f"{number:03d}" for number in reversed(range(367))]  # CamVid's count
NAMES = ("16", "8", "4", "2")


@pytest.mark.parametrize("kind", ["every", "1"])
def test_parts_are_nested_and_count_as_published(kind):
  parts = [splits.part(IDS, f"{kind}_{k}") for k in NAMES]
  assert [len(part) for part in parts] == [23, 46, 92, 184]
  assert all(
    set(small) < set(large)
    for small, large in itertools.pairwise([*parts, splits.part(IDS, "full")])
  )
  assert set(splits.part(IDS, "full")) == set(IDS)


def test_every_kth_takes_the_sorted_ids():
  assert splits.part(IDS, "every_8")[:3] == ("000", "008", "016")


def test_the_random_part_is_the_same_for_ever_and_depends_on_its_seed():
  # Any change here changes every run on a "1_k".
  digests = sorted((hashlib.sha256(f"0/{name}".encode()).hexdigest(), name) for name in IDS)
  assert (
    splits.part(IDS, "1_8")
    == splits.part(sorted(IDS), "1_8")
    == tuple(name for _, name in digests[:46])
  )
  assert splits.part(IDS, "1_100") == ("325", "014", "203", "359")
  assert set(splits.part(IDS, "1_8", seed=1)) != set(splits.part(IDS, "1_8"))


@pytest.mark.parametrize("name", ["1_0", "1/8", "0.5", "", "every_0", "full_1"])
def test_unknown_part_says_what_is_allowed(name):
  assert not splits.is_part(name)
  with pytest.raises(checks.InputError, match="1_8"):
    splits.part(["a"], name)


@pytest.mark.parametrize(
  "data_set, lists, counts",
  [
    ("voc2012", "cps", (662, 1323, 2646, 5291)),
    ("voc2012", "u2pl", (662, 1323, 2646)),
    ("cityscapes", "cps", (186, 372, 744, 1488)),
    ("cityscapes", "u2pl", (186, 372, 744, 1488)),
  ],
)
def test_shipped_lists_have_their_lengths_and_cps_nests_them(data_set, lists, counts):
  read = [
    set(splits.read_list(splits.published(f"{data_set}/{lists}/1_{k}")))
    for k, _ in zip(NAMES, counts)
  ]
  assert tuple(map(len, read)) == counts
  assert lists != "cps" or all(small < large for small, large in itertools.pairwise(read))


def test_published_lists_are_preferred_and_asked_for_by_name():
  def named(lists, split):
    return splits.published_or_own("voc2012", lists, split, default="cps")

  assert named("", "1_8") == "voc2012/cps/1_8" and named("u2pl", "1_8") == "voc2012/u2pl/1_8"
  assert (
    named("random", "1_8") == "1_8"
    and named("", "1_32") == "1_32"
    and named("", "mine.txt") == "mine.txt"
  )
  with pytest.raises(checks.InputError, match="voc2012/u2pl/1_2'.*did you mean 'voc2012/"):
    named("u2pl", "1_2")


def test_complement_keeps_the_order_and_rejects_a_foreign_list():
  assert splits.complement(["c", "a", "b"], ["a"]) == ("c", "b")
  with pytest.raises(checks.InputError, match="1 of 2 that are not among all ids: x"):
    splits.complement(["a", "b"], ["a", "x"])


def test_overlapping_lists_are_all_reported():
  splits.check_disjoint(labeled=["a"], unlabeled=["b"], val=["c"])
  with pytest.raises(checks.InputError) as error:
    splits.check_disjoint(labeled=["a", "v"], unlabeled=["a", "b"], val=["v"])
  assert "labeled and unlabeled" in str(error.value) and "labeled and val" in str(error.value)
  assert "unlabeled and val" not in str(error.value)
