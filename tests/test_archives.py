"""Archives that were damaged, or made to harm: told, in little time and memory. What whole ones
hold is tested with `prepare`.
"""

import contextlib
import gzip
import io
import os
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile

import pytest

from pseudoseg_jax import checks
from pseudoseg_jax.data import archives

LOCAL, CENTRAL = b"PK\3\4", b"PK\1\2"


@contextlib.contextmanager
def limited(seconds, mebibytes):
  """Fails where what is done inside takes more of the processor or of memory."""
  tracemalloc.start()
  started = time.process_time()
  try:
    yield
    took, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert took < seconds and peak < mebibytes * 2**20, (took, peak / 2**20)


def read_all(path):
  return {member.name: member.read() for member in archives.members(path, bool)}


def make_zip(path, files, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def make_tar(path, files, mode="w"):
  with tarfile.open(path, mode) as archive:
    for name, content in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      archive.addfile(entry, io.BytesIO(content))
  return path


def patch(path, offsets, value):
  """Writes `value` into each of a zip's records of some kinds, at an offset of each kind."""
  content = bytearray(path.read_bytes())
  for mark, offset in offsets.items():
    start = -1
    while (start := content.find(mark, start + 1)) >= 0:
      content[start + offset : start + offset + len(value)] = value
  path.write_bytes(content)


def header(name, size, kind=b"0", size_field=None):
  """A block of a tar that says `size` of what follows, or holds `size_field` in that place."""
  field = size_field or b"%011o\0" % size
  block = bytearray(
    name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0"
  )
  block += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(512 - 265)
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block)


def binary(size):
  """A size as GNU writes those beyond eight gigabytes, and negative ones."""
  return (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_may_be_read_or_left(tmp_path, mode):
  noise = random.Random(0)
  files = {f"{number}.jpg": noise.randbytes(300 * number) for number in range(20)} | {
    "long" * 60: b"x" * 3_000_000
  }
  path = make_tar(tmp_path / "a.tar", files, mode)
  assert read_all(path) == files
  assert {
    member.name: member.read() for member in archives.members(path, lambda name: name[0] in "1l")
  } == {name: content for name, content in files.items() if name[0] in "1l"}


def test_linked_folders_of_an_extracted_archive_are_entered(tmp_path):
  (tmp_path / "disk" / "train2017").mkdir(parents=True)
  (tmp_path / "disk" / "train2017" / "a.jpg").write_bytes(b"a")
  (tmp_path / "out").mkdir()
  os.symlink(tmp_path / "disk" / "train2017", tmp_path / "out" / "train2017")
  assert list(read_all(tmp_path / "out").values()) == [b"a"]


def test_encrypted_members_are_told_and_a_folder_is_the_way_on(tmp_path):
  path = make_zip(tmp_path / "a.zip", {"train2017/a.jpg": b"a"})
  patch(path, {LOCAL: 6, CENTRAL: 8}, struct.pack("<H", 1))
  with pytest.raises(checks.InputError, match="a.zip: got encrypted.*password.*folder"):
    read_all(path)
  (tmp_path / "extracted").mkdir()
  (tmp_path / "extracted" / "a.jpg").write_bytes(b"a")
  assert list(read_all(tmp_path / "extracted").values()) == [b"a"]


@pytest.mark.parametrize("kind", ["zip", "tgz", "tgz, left", "tgz, many"])
def test_bombs_are_refused(tmp_path, kind, monkeypatch):
  monkeypatch.setattr(archives, "_ANY_RATIO_BYTES", 1 << 20)
  path, zeros = tmp_path / "bomb", bytes(20 << 20)
  if kind == "zip":
    make_zip(path, {"a.jpg": zeros}, zipfile.ZIP_DEFLATED)
  elif kind == "tgz, many":
    make_tar(path, {f"{number}.jpg": zeros[: 1 << 19] for number in range(40)}, "w:gz")
  else:
    make_tar(path, {"a.jpg": zeros, "b.jpg": b""}, "w:gz")
  wanted = (lambda name: name == "b.jpg") if kind == "tgz, left" else bool
  with (
    limited(seconds=5, mebibytes=8),
    pytest.raises(checks.InputError, match="not safe(.|\n)*100 times") as error,
  ):
    for member in archives.members(path, wanted):
      member.read()
  assert str(path) in str(error.value)


def test_what_a_bomb_is_leaves_lists_and_masks_alone(tmp_path):
  files = {"train.txt": b"2007_000032\n" * 100_000, "mask.png": bytes(1 << 20)}
  assert read_all(make_zip(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)) == files
  assert read_all(make_tar(tmp_path / "a.tgz", files, "w:gz")) == files


@pytest.mark.parametrize(
  ("offset", "value"),
  [
    (20, b"\xfe\xff\xff\xff"),
    (24, b"\xfe\xff\xff\x7f"),
    (42, b"\0\0\0\0"),
    (16, b"\1\2\3\4"),
    (10, b"\x63\0"),
    (8, b"\x20\0"),
  ],
  ids=["stored size", "size", "place", "checksum", "method", "patch"],
)
def test_zips_that_say_wrong_things_of_themselves(tmp_path, offset, value):
  path = make_zip(tmp_path / "a.zip", {"a.jpg": b"a" * 1000, "b.jpg": b"b" * 1000})
  patch(path, {CENTRAL: offset}, value)
  with limited(seconds=5, mebibytes=8), pytest.raises(checks.InputError, match="a.zip"):
    read_all(path)


TARS = {
  "a huge member": header("a.jpg", 0, size_field=binary(1 << 60)),
  "a member of eight gigabytes": header("a.jpg", (8 << 30) - 1),
  "a huge name": header("././@LongLink", 0, b"L", size_field=binary(1 << 40)) + header("a.jpg", 0),
  "huge notes": header("pax", 0, b"x", size_field=binary(1 << 40)) + header("a.jpg", 0),
  "a negative member": header("a.jpg", 0, size_field=binary(-1024)),
  "a negative name": header("././@LongLink", 0, b"L", size_field=binary(-1024))
  + header("a.jpg", 0),
  "negative notes": header("pax", 0, b"x", size_field=binary(-1024)) + header("a.jpg", 0),
  "notes of a negative size": header("pax", 13, b"x")
  + b"13 size=-512\n".ljust(512, b"\0")
  + header("a.jpg", 0),
  "names of names": header("././@LongLink", 0, b"L") * 5000 + header("a.jpg", 0),
  "a sparse file": header("pax", 66, b"x")
  + b"22 GNU.sparse.major=0\n22 GNU.sparse.minor=0\n27 GNU.sparse.size=99999999\n".ljust(512, b"\0")
  + header("a.jpg", 0),
  "an old sparse file": header("a.jpg", 0, b"S"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tgz"])
@pytest.mark.parametrize("kind", TARS)
def test_tars_that_say_wrong_things_of_themselves(tmp_path, kind, packed):
  path = tmp_path / "a.tar"
  content = TARS[kind] + bytes(1024)
  path.write_bytes(gzip.compress(content) if packed else content)
  with limited(seconds=5, mebibytes=8), pytest.raises(checks.InputError, match="a.tar"):
    read_all(path)


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_damage_anywhere_is_told(tmp_path, kind):
  noise = random.Random(kind)
  files = {
    "JPEGImages/ä.jpg": noise.randbytes(700),
    "list.txt": b"a\n" * 500,
    "deep" * 30 + "/b.png": noise.randbytes(600),
  }
  path = tmp_path / f"a.{kind}"
  if kind == "zip":
    make_zip(path, files, zipfile.ZIP_DEFLATED)
  else:
    make_tar(path, files, "w:gz" if kind == "tgz" else "w")
  whole = path.read_bytes()
  told = 0
  for _ in range(400):
    content = bytearray(whole)
    for _ in range(noise.randint(1, 4)):
      place = noise.randrange(len(content))
      if noise.random() < 0.7:
        content[place] = noise.randrange(256)
      else:
        del content[place : place + noise.randint(1, 30)]
    path.write_bytes(content)
    try:
      read_all(path)
    except checks.InputError as error:
      told += 1
      assert str(path) in str(error)
  assert told > 30
