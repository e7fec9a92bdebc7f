"""Files are made here as torch.save makes them, without PyTorch; the last test, and
test_pretrained.py, have PyTorch's own.
"""

import collections
import contextlib
import io
import os
import pickle
import struct
import sys
import time
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from pseudoseg_jax import checks
from pseudoseg_jax.models import checkpoint_files


class Storage:
  """What torch.save takes for one: `array` holds its numbers (bfloat16 as uint16 bits), `kind` is
  "Float", "Half", ...
  """

  def __init__(self, key, array, kind):
    self.key, self.array, self.kind = key, array, kind


class Tensor:
  def __init__(self, storage, size, stride, offset=0):
    self.arguments = storage, offset, size, stride, False, collections.OrderedDict()

  def __reduce__(self):
    return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Parameter:
  def __init__(self, tensor):
    self.tensor = tensor

  def __reduce__(self):
    return sys.modules["torch._utils"]._rebuild_parameter, (
      self.tensor,
      True,
      collections.OrderedDict(),
    )


def _rebuild_tensor_v2():
  pass


def _rebuild_parameter():
  pass


class _Pickler(pickle.Pickler):
  legacy = False

  def persistent_id(self, value):
    if isinstance(value, Storage):
      kind = getattr(sys.modules["torch"], f"{value.kind}Storage")
      return ("storage", kind, value.key, "cpu", len(value.array)) + (
        (None,) if self.legacy else ()
      )
    return None


class _LegacyPickler(_Pickler):
  legacy = True


@pytest.fixture
def torch_names(monkeypatch):
  """Modules of PyTorch's names while files are written; reading must need none."""
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for function in (_rebuild_tensor_v2, _rebuild_parameter):
    monkeypatch.setattr(function, "__module__", "torch._utils")
    setattr(utils, function.__name__, function)
  for kind in (
    "Float",
    "Double",
    "Half",
    "BFloat16",
    "Long",
    "Int",
    "Short",
    "Char",
    "Byte",
    "Bool",
  ):
    setattr(torch, f"{kind}Storage", type(f"{kind}Storage", (), {"__module__": "torch"}))
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "torch", torch)
    patch.setitem(sys.modules, "torch._utils", utils)
    yield


def zipped(path, content, storages, compression=zipfile.ZIP_STORED):
  data = io.BytesIO()
  _Pickler(data, protocol=2).dump(content)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", data.getvalue())
    archive.writestr("archive/byteorder", "little")
    for storage in storages:
      archive.writestr(f"archive/data/{storage.key}", storage.array.tobytes())
    archive.writestr("archive/version", "3\n")
  return path


def legacy(path, content, storages):
  with path.open("wb") as file:
    for value in (
      0x1950A86A20F9469CFC6C,
      1001,
      {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
    ):
      pickle.dump(value, file, protocol=2)
    _LegacyPickler(file, protocol=2).dump(content)
    pickle.dump([storage.key for storage in storages], file, protocol=2)
    for storage in storages:
      file.write(struct.pack("<q", len(storage.array)) + storage.array.tobytes())
  return path


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


WRITERS = pytest.mark.parametrize("write", [zipped, legacy])


@WRITERS
def test_names_of_nested_dicts_are_joined(write, tmp_path, torch_names):
  storage = Storage("0", np.arange(6, dtype=np.float32), "Float")
  weights = collections.OrderedDict(
    a=Parameter(Tensor(storage, (2, 3), (3, 1))), b=Tensor(storage, (), (), 4)
  )
  content = {
    "state_dict": {"layer1": weights},
    "epoch": 3,
    "lr": [0.1, {"x": Tensor(storage, (1,), (1,), 5)}],
    "note": None,
  }
  got = checkpoint_files.read(write(tmp_path / "file.pth", content, [storage]))
  assert list(got) == ["state_dict.layer1.a", "state_dict.layer1.b", "lr.1.x"]
  np.testing.assert_array_equal(got["state_dict.layer1.a"], [[0, 1, 2], [3, 4, 5]])
  assert (
    got["state_dict.layer1.b"] == 4
    and got["state_dict.layer1.b"].shape == ()
    and got["lr.1.x"] == [5]
  )


@WRITERS
def test_views_of_a_shared_storage_with_strides_and_offsets(write, tmp_path, torch_names):
  storage = Storage("7", np.arange(12, dtype=np.float32), "Float")
  content = {
    "transposed": Tensor(storage, (4, 3), (1, 4)),
    "part": Tensor(storage, (2, 2), (4, 1), 5),
    "repeated": Tensor(storage, (3, 2), (0, 1), 10),
    "empty": Tensor(storage, (0, 3), (3, 1)),
  }
  got = checkpoint_files.read(write(tmp_path / "file.pt", content, [storage]))
  np.testing.assert_array_equal(got["transposed"], np.arange(12).reshape(3, 4).T)
  np.testing.assert_array_equal(got["part"], [[5, 6], [9, 10]])
  np.testing.assert_array_equal(got["repeated"], [[10, 11]] * 3)
  assert got["empty"].shape == (0, 3)


@WRITERS
@pytest.mark.parametrize(
  ("kind", "values"),
  [
    ("Float", np.array([1.5, -2], "f4")),
    ("Double", np.array([1e-300, 2], "f8")),
    ("Half", np.array([0.5, 65504], "f2")),
    ("Long", np.array([-(2**40), 7], "i8")),
    ("Int", np.array([-5, 7], "i4")),
    ("Short", np.array([-5, 7], "i2")),
    ("Char", np.array([-5, 7], "i1")),
    ("Byte", np.array([250, 7], "u1")),
    ("Bool", np.array([True, False])),
  ],
)
def test_types_of_elements(write, kind, values, tmp_path, torch_names):
  storage = Storage("0", values, kind)
  got = checkpoint_files.read(
    write(tmp_path / "file.pth", {"x": Tensor(storage, (2,), (1,))}, [storage])
  )["x"]
  np.testing.assert_array_equal(got, values)
  assert got.dtype == values.dtype


@WRITERS
def test_bfloat16_is_the_upper_half_of_a_float32(write, tmp_path, torch_names):
  storage = Storage("0", np.array([0x3F80, 0xC040], np.uint16), "BFloat16")  # 1 and -3
  got = checkpoint_files.read(
    write(tmp_path / "file.pth", {"x": Tensor(storage, (2,), (1,))}, [storage])
  )["x"]
  assert got.dtype == np.float32 and got.tolist() == [1, -3]


def safetensors_file(header: bytes, data: bytes) -> bytes:
  return struct.pack("<Q", len(header)) + header + data


def test_safetensors_with_bfloat16_and_back(tmp_path):
  header = b'{"x":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}'
  (tmp_path / "a.safetensors").write_bytes(safetensors_file(header, b"\x80\x3f\x40\xc0"))
  got = checkpoint_files.read(tmp_path / "a.safetensors")
  assert got["x"].tolist() == [[1, -3]]
  arrays = {"x": got["x"], "view": np.arange(6, dtype=np.float32).reshape(2, 3).T}
  (tmp_path / "b.safetensors").write_bytes(
    checkpoint_files.to_safetensors(arrays, {"made_by": "a test"})
  )
  again = checkpoint_files.read(tmp_path / "b.safetensors")
  np.testing.assert_array_equal(again["view"], [[0, 3], [1, 4], [2, 5]])
  with safetensors.safe_open(tmp_path / "b.safetensors", framework="np") as file:
    assert file.metadata() == {"made_by": "a test"}


# --- files that harm, or are damaged --------------------------------------------------------------


class Evil:
  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


class Settings:
  """Any object of a training script: no reader can import its class."""


@WRITERS
def test_no_call_of_a_file_is_made(write, tmp_path, torch_names):
  storage = Storage("0", np.ones(1, np.float32), "Float")
  others = {"evil": Evil(f"touch {tmp_path}/harm"), "settings": Settings(), "when": np.float64(3)}
  content = {"x": Tensor(storage, (1,), (1,)), **others}
  got = checkpoint_files.read(write(tmp_path / "file.pth", content, [storage]))
  assert list(got) == ["x"] and not (tmp_path / "harm").exists()


def test_a_bare_pickle_is_refused_unrun(tmp_path):
  (tmp_path / "file.pth").write_bytes(pickle.dumps(Evil(f"touch {tmp_path}/harm")))
  with pytest.raises(checks.InputError, match="file.pth"):
    checkpoint_files.read(tmp_path / "file.pth")
  assert not (tmp_path / "harm").exists()


@WRITERS
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_named(write, kept, tmp_path, torch_names):
  storage = Storage("0", np.arange(300, dtype=np.float32), "Float")
  path = write(tmp_path / "file.pth", {"x": Tensor(storage, (300,), (1,))}, [storage])
  path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
  with pytest.raises(checks.InputError, match="file.pth"):
    checkpoint_files.read(path)


def test_compressed_archives_are_refused(tmp_path, torch_names):
  storage = Storage("0", np.zeros(10**6, np.float32), "Float")
  path = zipped(
    tmp_path / "bomb.pth", {"x": Tensor(storage, (10**6,), (1,))}, [storage], zipfile.ZIP_DEFLATED
  )
  with pytest.raises(checks.InputError, match="compressed"):
    checkpoint_files.read(path)


@WRITERS
@pytest.mark.parametrize(
  ("size", "stride", "offset"),
  [((4,), (1,), 0), ((2,), (3,), 0), ((1,), (1,), 3), ((-1,), (1,), 0), ((2,), (-1,), 1)],
)
def test_tensors_beyond_their_storage_are_refused(
  write, size, stride, offset, tmp_path, torch_names
):
  storage = Storage("0", np.zeros(3, np.float32), "Float")
  path = write(tmp_path / "file.pth", {"x": Tensor(storage, size, stride, offset)}, [storage])
  with pytest.raises(checks.InputError, match="file.pth"):
    checkpoint_files.read(path)


def test_nested_repetition_takes_no_time(tmp_path, torch_names):
  storage = Storage("0", np.ones(1, np.float32), "Float")
  content = {"x": Tensor(storage, (1,), (1,))}
  for _ in range(100):
    content = {"a": content, "b": content}  # 2 ** 100 paths
  content["itself"] = content
  assert len(checkpoint_files.read(zipped(tmp_path / "file.pth", content, [storage]))) == 1


# Pickles by hand, as pickletools names their instructions, around one tensor of one number.


def instructions(value) -> bytes:
  """Those that make a value, without memo, which the tests fill themselves."""
  data = io.BytesIO()
  pickler = _Pickler(data, protocol=2)
  pickler.fast = True
  pickler.dump(value)
  return data.getvalue()[2:-1]


def text(value: str) -> bytes:
  return b"X" + struct.pack("<I", len(value)) + value.encode()


def get(index: int) -> bytes:
  return b"j" + struct.pack("<I", index)


def put(index: int) -> bytes:
  return b"r" + struct.pack("<I", index)


def nested(depth, tensors):
  """Dicts in dicts, a few bytes each, whose dotted names are as long as the nest is deep."""
  inner = text("t") + get(0) + b"s"
  return (
    b"}"
    + (text("a") + b"}") * depth
    + (inner if tensors else b"")
    + (b"s" + (inner if tensors else b"")) * depth
  )


ORDERED_DICT = b"ccollections\nOrderedDict\n"
HUGE = b"\x8b" + struct.pack("<i", 60_000) + b"\x01" * 60_000  # LONG4, a number of 144,000 digits
BOMBS = {  # instructions -> names of the tensors that are read, or their number; None: refused
  "names that grow": (nested(10_000, tensors=True), None),
  "nests of nothing": (nested(20_000, tensors=False) + text("t") + get(0) + b"s", ["t"]),
  "one long key": (
    b"}"
    + text("k" * 50_000)
    + b"}("
    + b"".join(text(str(n)) + get(0) for n in range(5000))
    + b"us",
    None,
  ),
  "long keys that name no tensor": (
    b"}(" + text("k" * 50_000) + b"}" + text("t") + get(0) + b"u",
    ["t"],
  ),
  "joined names": (text("n" * 50_000) + put(1) + b"0]" + (get(1) * 2 + b"\x93a") * 5000, None),
  "pairs unfolded again and again": (
    b"]("
    + b"".join(b"(" + text(f"k{n}") + get(0) + b"l" for n in range(5000))
    + b"e"
    + put(1)
    + b"0"
    + ORDERED_DICT
    + put(2)
    + b"0]"
    + (get(2) + get(1) + b"\x85Ra") * 5000,
    5000,
  ),
  "pairs of many": (
    b"("
    + b"N" * 20_000
    + b"t"
    + put(1)
    + b"0"
    + ORDERED_DICT
    + b"]("
    + get(1) * 20_000
    + b"e\x85R0}"
    + text("t")
    + get(0)
    + b"s",
    ["t"],
  ),
  "shapes of many sides": (
    b"("
    + b"K\x01" * 20_000
    + b"t"
    + put(1)
    + b"0"
    + b"ctorch._utils\n_rebuild_tensor_v2\n"
    + put(2)
    + b"0]"
    + (get(2) + b"(" + get(3) + b"K\x00" + get(1) * 2 + b"tRa") * 5000,
    None,
  ),
  "huge sides": (
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + get(3) + b"K\x00" + HUGE + b"\x85" + HUGE + b"\x85tR",
    None,
  ),
  "huge keys": (
    b"}" + HUGE + put(1) + b"Ns" + (get(1) + b"Ns") * 30_000 + text("t") + get(0) + b"s",
    ["t"],
  ),
  "a flood of dicts": (b"](" + b"}" * 150_000 + b"e", None),
  "a flood of copies": (b"](}" + b"2" * 150_000 + b"e", None),
  "a flood of notes": (b"]" + b"\x94" * 150_000, None),
  "text longer than the file": (b"\x8d" + struct.pack("<Q", 1 << 62) + b"x", None),
  "bytes longer than the file": (b"\x8e" + struct.pack("<Q", 1 << 40) + b"x", None),
  "digits": (b"L" + b"1" * 100_000 + b"L\n", None),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_files_take_little_time_and_memory(bomb, tmp_path, torch_names, monkeypatch):
  monkeypatch.setattr(checkpoint_files, "_MOST_INSTRUCTIONS", 100_000)
  content, read = BOMBS[bomb]
  storage = Storage("0", np.ones(1, np.float32), "Float")
  tensor = instructions(Tensor(storage, (1,), (1,)))
  numbers = instructions(storage)
  pickled = b"\x80\x02" + tensor + put(0) + b"0" + numbers + put(3) + b"0" + content + b"."
  path = tmp_path / "file.pth"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickled)
    archive.writestr("archive/data/0", storage.array.tobytes())
  with limited(seconds=5, mebibytes=50):
    if read is None:
      with pytest.raises(checks.InputError, match="file.pth") as error:
        checkpoint_files.read(path)
      assert len(str(error.value)) < 1000
    else:
      got = checkpoint_files.read(path)
      assert len(got) == read if isinstance(read, int) else list(got) == read


def test_numbers_are_unfolded_once(tmp_path, torch_names):
  table = np.zeros(1 << 18, np.uint8)
  others = [
    Storage("0", table, kind)
    for kind in ("Byte", "Char", "Bool", "Half", "BFloat16", "Float", "Double")
  ]
  path = zipped(
    tmp_path / "file.pth", {kind.kind: Tensor(kind, (1,), (1,)) for kind in others}, others[:1]
  )
  with limited(seconds=5, mebibytes=2), pytest.raises(checks.InputError, match="the same numbers"):
    checkpoint_files.read(path)


def test_a_shape_that_only_a_file_claims_takes_no_memory(tmp_path, torch_names):
  storage = Storage("0", np.zeros(2), "Double")
  with limited(seconds=5, mebibytes=2):
    path = zipped(tmp_path / "file.pth", {"x": Tensor(storage, (10**6, 10**6), (0, 0))}, [storage])
    assert checkpoint_files.read(path)["x"].shape == (10**6, 10**6)


def patch(path, offsets, value):
  """Writes `value` into each of a zip's records of some kinds, at an offset of each kind."""
  content = bytearray(path.read_bytes())
  for mark, offset in offsets.items():
    start = -1
    while (start := content.find(mark, start + 1)) >= 0:
      content[start + offset : start + offset + len(value)] = value
  path.write_bytes(content)


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def test_encrypted_parts_are_told(tmp_path, torch_names):
  storage = Storage("0", np.ones(1, np.float32), "Float")
  path = zipped(tmp_path / "file.pth", {"x": Tensor(storage, (1,), (1,))}, [storage])
  patch(path, {LOCAL: 6, CENTRAL: 8}, struct.pack("<H", 1))
  with pytest.raises(checks.InputError, match="encrypted.*\n.*password"):
    checkpoint_files.read(path)


@pytest.mark.parametrize(
  ("record", "offset", "value"),
  [
    (LOCAL, 14, b"\1\2\3\4"),  # another checksum
    (CENTRAL, 16, b"\1\2\3\4"),
    (CENTRAL, 20, b"\xfe\xff\xff\xff"),  # sizes of 4 GiB
    (CENTRAL, 24, b"\xfe\xff\xff\x7f"),
    (CENTRAL, 42, b"\0\0\0\0"),  # all parts at the beginning
    (END, 8, b"\xfe\xff\xfe\xff"),  # 65534 parts
    (END, 12, b"\0\0\xff\x7f"),  # a list of parts of 2 GiB
    (END, 16, b"\0\0\xff\x7f"),
  ],
)
def test_archives_that_say_wrong_things_of_themselves(record, offset, value, tmp_path, torch_names):
  storage = Storage("0", np.ones(1, np.float32), "Float")
  path = zipped(tmp_path / "file.pth", {"x": Tensor(storage, (1,), (1,))}, [storage])
  patch(path, {record: offset}, value)
  with limited(seconds=5, mebibytes=10):
    try:
      assert checkpoint_files.read(path)["x"] == 1  # what is not needed may be wrong
    except checks.InputError as error:
      assert "file.pth" in str(error)


def test_large_pickles_and_headers_are_refused_unread(tmp_path):
  with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02" + bytes((1 << 26) + 1))
  with (tmp_path / "file.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", 100_000_000))
    file.truncate(100_000_100)  # sparse
  for path in tmp_path.iterdir():
    with limited(seconds=5, mebibytes=10), pytest.raises(checks.InputError, match=path.name):
      checkpoint_files.read(path)


def test_names_reach_no_terminal_as_they_are(tmp_path, torch_names):
  storage = Storage("0", np.ones(1, np.float32), "Float")
  name = "conv\x1b[2J"
  zipped(tmp_path / "file.pth", {name: Tensor(storage, (1,), (1,))}, [storage])
  header = b'{"conv\\u001b[2J":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
  (tmp_path / "file.safetensors").write_bytes(safetensors_file(header, bytes(4)))
  for path in tmp_path.iterdir():
    with pytest.raises(checks.InputError, match="name that no network has") as error:
      checkpoint_files.read(path)
    assert "\x1b" not in str(error.value)


def test_causes_are_told_with_what_to_do(tmp_path):
  (tmp_path / "empty.pth").touch()
  (tmp_path / "pointer.safetensors").write_text(
    "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
  )
  (tmp_path / "eight.safetensors").write_bytes(
    safetensors_file(b'{"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', bytes(4))
  )
  with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
    archive.writestr("model/weights.pth", b"...")
  said = {
    "empty.pth": "is empty",
    "pointer.safetensors": "lfs pull",
    "eight.safetensors": "F8_E4M3.*\n.*float32",
  }
  said["other.pth"] = "unpack it"
  for name, words in said.items():
    with pytest.raises(checks.InputError, match=words):
      checkpoint_files.read(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
  "content", [b"", b"<html>not found</html>", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 40]
)
def test_other_files_are_refused_by_name(suffix, content, tmp_path):
  path = tmp_path / f"file{suffix}"
  path.write_bytes(content)
  with pytest.raises(checks.InputError, match=f"file{suffix}"):
    checkpoint_files.read(path)


def test_a_missing_file_and_one_without_tensors(tmp_path, torch_names):
  with pytest.raises(checks.InputError, match="no such file"):
    checkpoint_files.read(tmp_path / "none.pth")
  with pytest.raises(checks.InputError, match="no tensors"):
    checkpoint_files.read(zipped(tmp_path / "file.pth", {"epoch": 3}, []))


@pytest.mark.parametrize("new_form", [True, False])
def test_files_of_pytorch_itself(new_form, tmp_path):
  torch = pytest.importorskip("torch")
  table = torch.arange(24.0).reshape(4, 6)
  tensors = {
    "transposed": table.t()[1:3],
    "bfloat16": torch.full((3,), -1.5, dtype=torch.bfloat16),
    "parameter": torch.nn.Parameter(table[2]),
    "scalar": torch.tensor(3),
    "expanded": torch.ones(1).expand(5),
  }
  torch.save(
    {"model": tensors, "step": 3}, tmp_path / "file.pth", _use_new_zipfile_serialization=new_form
  )
  got = checkpoint_files.read(tmp_path / "file.pth")
  assert list(got) == [f"model.{name}" for name in tensors]
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(got[f"model.{name}"], tensor.detach().to(torch.float64).numpy())
