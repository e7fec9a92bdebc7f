import codecs
import functools
import re
import shlex
import shutil
import subprocess

import pytest

from pseudoseg_jax import checks
from pseudoseg_jax.data import boxes, classes, splits, tags, text
from pseudoseg_jax.data.classes import Classes

CLASSES = Classes(("background", "cat"), ((0, 0, 0), (1, 1, 1)))
READERS = {
  "classes.txt": classes.read_classes,
  "list.txt": splits.read_entries,
  "tags.csv": functools.partial(tags.read_tags, ids=("é",), classes=CLASSES),
  "tags.json": functools.partial(tags.read_tags, ids=("é",), classes=CLASSES),
  "boxes.json": functools.partial(boxes.read_boxes, ids=("é",), classes=CLASSES),
}
TEXTS = {
  "classes.txt": "é\ncat\n",
  "list.txt": "é\n",
  "tags.csv": "é,cat\n",
  "tags.json": '{"é": ["cat"]}',
  "boxes.json": '{"images": [{"id": 1, "file_name": "é"}], "annotations": [], "categories": []}',
}


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


@pytest.mark.parametrize("content", [b"a\r\nb\r\n", b"a\rb\r", b"\xef\xbb\xbfa\nb\n"])
def test_line_endings_and_marks_are_all_the_same(tmp_path, content):
  (tmp_path / "a.txt").write_bytes(content)
  assert text.read_text(tmp_path / "a.txt", checks.Problems("no"), "text") == "a\nb\n"


@pytest.mark.skipif(shutil.which("iconv") is None, reason="the remedy is a command of iconv's")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", READERS)
def test_other_encodings_are_told_and_the_remedy_is_a_command_that_helps(tmp_path, name, encoding):
  path = tmp_path / "with space" / name
  path.parent.mkdir()
  mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
  path.write_bytes(mark + TEXTS[name].encode(encoding))
  told = message(lambda: READERS[name](path))
  assert str(path) in told and "save it as UTF-8" in told
  (command,) = re.findall("iconv .*", told)
  subprocess.run(command, shell=True, check=True)
  READERS[name](path)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_text_is_told_with_its_path(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
  assert f"git -C {shlex.quote(str(tmp_path))} lfs pull" in message(lambda: READERS[name](path))
  path.write_bytes(b"PK\x03\x04\0\0\0")
  assert "null bytes" in message(lambda: READERS[name](path))
  path.write_bytes(b"a\n" * 100_000 + b"\0")
  assert "null bytes" in message(lambda: READERS[name](path))
  path.unlink()
  assert str(path) in message(lambda: READERS[name](path))
  if name != "tags.csv":  # where a folder is one of annotations
    path.mkdir()
    assert str(path) in message(lambda: READERS[name](path))
