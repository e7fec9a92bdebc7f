"""Tensors of .safetensors files and of PyTorch's .pth and .pt files.

They are read without running anything that a file contains.

A PyTorch checkpoint is a pickle, a program for a machine that may call any function. Here its
instructions are followed on inert values: the few calls that rebuild tensors become arrays, every
other one becomes a marker that nothing looks into. The time and memory that reading takes grow with
the file, whatever it claims: nothing is unfolded that a file holds once and names often.
"""

from __future__ import annotations

import io
import itertools
import mmap
import pathlib
import pickletools
import shlex
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from pseudoseg_jax import checks
from pseudoseg_jax.data.text import LFS_POINTER

_MAGIC = 0x1950A86A20F9469CFC6C  # first number of the form that PyTorch wrote before 1.6

# Far above what networks have, far below what harms. A tensor takes about 40 instructions, and 100
# bytes of a header.
_MOST_NAME_CHARACTERS = 256
_MOST_DIMENSIONS = 32
_MOST_INSTRUCTIONS = 1 << 20
_MOST_PICKLE_BYTES = 1 << 26
_MOST_HEADER_BYTES = 1 << 22
_MOST_ERROR_CHARACTERS = 500

# Element types by both formats' names. numpy has no bfloat16, the upper half of a float32: read as
# bits, then widened.
_BFLOAT16 = "bfloat16"
_DTYPES = {
  "Float": "f4",
  "Double": "f8",
  "Half": "f2",
  "BFloat16": _BFLOAT16,
  "Byte": "u1",
  "Char": "i1",
  "Short": "i2",
  "Int": "i4",
  "Long": "i8",
  "Bool": "?",
  "F32": "f4",
  "F64": "f8",
  "F16": "f2",
  "BF16": _BFLOAT16,
  "BOOL": "?",
  "U8": "u1",
  "I8": "i1",
  "U16": "u2",
  "I16": "i2",
  "U32": "u4",
  "I32": "i4",
  "U64": "u8",
  "I64": "i8",
}


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all tensors of a file, by name.

  Names of nested dicts are joined by "." ("state_dict.layer1.0.conv1.weight"). Arrays are read-only
  and may share memory; bfloat16 becomes float32. What is no tensor is left out. A dict that a file
  holds twice is read once.

  Raises:
    checks.InputError: no such file, damaged, of another kind, or without a tensor; names the file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise checks.InputError(f"no such file: {path}")
  try:
    with path.open("rb") as file:
      _check_beginning(file, path)
      if path.suffix == ".safetensors":
        tensors = _read_safetensors(file)
      else:
        tensors = (
          _read_zip(file, path.stat().st_size) if zipfile.is_zipfile(file) else _read_legacy(file)
        )
  # Whatever parsers meet in a damaged file, or one that was made to harm.
  except Exception as error:
    refusal = error if isinstance(error, _Refused) else _Refused(f"{type(error).__name__}: {error}")
    raise checks.InputError(
      f"cannot read weights from {path}: {str(refusal)[:_MOST_ERROR_CHARACTERS]}\n"
      f"  allowed: a .safetensors file, or what torch.save made of a state dict; remedy: {refusal.remedy}."
    ) from error
  if not tensors:
    raise checks.InputError(
      f"{path} holds no tensors; a pickled module wants torch.save(module.state_dict(), path) first"
    )
  return tensors


def to_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
  """Returns the content of a .safetensors file."""
  return safetensors.numpy.save(
    {name: np.ascontiguousarray(array) for name, array in arrays.items()}, dict(metadata)
  )


class _Refused(ValueError):
  """The refusal of a file: why it is not read, and what to do."""

  def __init__(self, cause: str, remedy: str = "fetch the file again, or save it anew"):
    super().__init__(cause)
    self.remedy = remedy


_STATE_DICT_ALONE = "save the weights alone, torch.save(model.state_dict(), path)"


def _check_beginning(file: BinaryIO, path: pathlib.Path) -> None:
  beginning = file.read(len(LFS_POINTER))
  if not beginning:
    raise _Refused("the file is empty")
  if beginning == LFS_POINTER:
    raise _Refused(
      "a pointer of Git LFS in the place of the file",
      f"git -C {shlex.quote(str(path.parent))} lfs pull",
    )
  file.seek(0)


def _read_safetensors(file: BinaryIO) -> dict[str, np.ndarray]:
  header_bytes = int.from_bytes(file.read(8), "little")
  if header_bytes > _MOST_HEADER_BYTES:
    raise _Refused(
      f"a header of {header_bytes} bytes, where {_MOST_HEADER_BYTES} would do for any network"
    )
  file.seek(0)
  tensors = {}
  for name, entry in safetensors.deserialize(file.read()):
    _check_name(name)
    tensors[name] = _array(entry["data"], entry["dtype"]).reshape(entry["shape"])
  return tensors


def _check_name(name: str) -> None:
  """Refuses names that no network has.

  Names end up on terminals, and are looked through from every dot on.
  """
  if len(name) > _MOST_NAME_CHARACTERS or not name.isprintable():
    raise _Refused(
      f"a tensor of a name that no network has, {len(name)} characters: {ascii(name[:40])} ..."
    )


def _array(data, kind: str, *, big_endian: bool = False) -> np.ndarray:
  """Decodes bytes into a flat array.

  Args:
    kind: a key of _DTYPES.
  """
  if kind not in _DTYPES:
    raise _Refused(
      f"numbers of type {kind[:40]!r}, which is not known here",
      "save them as float32, tensor.float()",
    )
  dtype = _DTYPES[kind]
  order = ">" if big_endian else "<"
  if dtype == _BFLOAT16:
    return (np.frombuffer(data, f"{order}u2").astype(np.uint32) << 16).view(np.float32)
  array = np.frombuffer(data, np.dtype(dtype).newbyteorder(order))
  return array.astype(array.dtype.newbyteorder("=")) if big_endian else array


# --- PyTorch --------------------------------------------------------------------------------------


class _Storage(NamedTuple):
  """A run of numbers that tensors are views of.

  offset, length: in elements.
  """

  key: str
  kind: str
  offset: int
  length: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


class _Opaque:
  """An unknown thing that a file names.

  It is never imported, never called, never looked into.
  """


class _Global(NamedTuple):
  name: str


def _read_zip(file: BinaryIO, file_size: int) -> dict[str, np.ndarray]:
  """Reads the form of PyTorch 1.6 and later.

  It holds NAME/data.pkl, and NAME/data/KEY for each storage.
  """
  with zipfile.ZipFile(file) as archive:
    members = {info.filename: info for info in archive.infolist()}
    if any(info.flag_bits & 1 for info in members.values()):
      raise _Refused(
        "encrypted parts, which PyTorch does not write",
        "unpack it with its password, if there is a .pth in it",
      )
    # PyTorch stores without compressing, so what unfolds to more than the file was made to fill the
    # memory.
    stored = all(
      info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
      for info in members.values()
    )
    if not stored or sum(info.file_size for info in members.values()) > file_size:
      raise _Refused(
        "compressed or overlapping parts, which PyTorch does not write",
        "unpack it, if there is a .pth in it",
      )
    pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
      raise _Refused(
        "a zip archive without data.pkl, so none of PyTorch", "unpack it, if there is a .pth in it"
      )
    if members[pickles[0]].file_size > _MOST_PICKLE_BYTES:
      raise _Refused(
        f"a data.pkl of {members[pickles[0]].file_size} bytes, more than names of tensors take",
        _STATE_DICT_ALONE,
      )
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    big_endian = (
      order is not None and order.file_size == len(b"big") and archive.read(order) == b"big"
    )
    content = _interpret(io.BytesIO(archive.read(pickles[0])))
    return _arrays(content, lambda key: archive.read(f"{root}data/{key}"), big_endian)


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
  """Reads the form of PyTorch before 1.6.

  It holds pickles of a magic number, a version, the system, the content and the keys; then the
  storages.
  """
  # Mapped, so that no length written in the file makes us take memory that the file does not have.
  view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  if _interpret(view) != _MAGIC:
    raise _Refused("neither a zip archive nor PyTorch's older form")
  _interpret(view)
  system, kinds = _interpret(view), {}
  content, keys = _interpret(view, kinds), _interpret(view)
  big_endian = not system["little_endian"]
  places, position = {}, view.tell()
  for key in keys:
    start = position + 8
    length = int.from_bytes(view[position:start], "big" if big_endian else "little")
    position = start + length * _item_bytes(kinds[_name(key)])
    places[key] = slice(start, position)
  return _arrays(content, lambda key: memoryview(view)[places[key]], big_endian)


def _item_bytes(kind: str) -> int:
  return 2 if _DTYPES[kind] == _BFLOAT16 else np.dtype(_DTYPES[kind]).itemsize


def _tensors(value: Any) -> Iterator[tuple[str, _Tensor]]:
  """Yields (dotted name, tensor) of all tensors in nested containers.

  Dicts, lists and tuples are containers; each is entered once, so that the search ends.
  """
  # Names are made of tensors alone, and where they are short: those of all things along deep nests
  # take the square of a file.
  entered, waiting = set(), [((None, ""), 0, value)]
  while waiting:
    path, length, value = waiting.pop()
    if isinstance(value, _Tensor):
      if length > _MOST_NAME_CHARACTERS:
        raise _Refused(
          f"a tensor with a name of {length} characters, where no network has {_MOST_NAME_CHARACTERS}"
        )
      name = _dotted(path)
      _check_name(name)
      yield name, value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in entered:
      entered.add(id(value))
      items = value.items() if isinstance(value, dict) else enumerate(value)
      items = [(key, item) for key, item in items if isinstance(item, (_Tensor, dict, list, tuple))]
      waiting.extend(
        ((path, key), length + len(str(key)) + 1, item) for key, item in reversed(items)
      )


def _dotted(path: tuple) -> str:
  """Joins the keys of a path by dots.

  The path is (path above, key). Empty keys at the beginning are left out.
  """
  keys = []
  while path:
    path, key = path
    keys.append(str(key))
  return ".".join(itertools.dropwhile(lambda key: not key, reversed(keys)))


def _arrays(
  content: Any, storage_bytes: Callable[[str], Any], big_endian: bool
) -> dict[str, np.ndarray]:
  """Makes arrays that are views of the storages.

  Each storage is read once: shared ones stay shared, and no written size takes memory.
  """
  storages, arrays = {}, {}
  for name, (storage, offset, size, stride) in _tensors(content):
    if storage.key not in storages:
      storages[storage.key] = (
        storage.kind,
        _array(storage_bytes(storage.key), storage.kind, big_endian=big_endian),
      )
    kind, numbers = storages[storage.key]
    if kind != storage.kind:
      raise _Refused(
        f"tensor '{name}' takes the same numbers for {storage.kind} that another one takes for {kind}"
      )
    flat = numbers[storage.offset :][: storage.length]
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if (
      len(flat) != storage.length
      or min((offset, *size, *stride)) < 0
      or (0 not in size and last >= len(flat))
    ):
      raise _Refused(f"tensor '{name}' reaches beyond its storage")
    steps = [step * flat.itemsize for step in stride]
    arrays[name] = np.lib.stride_tricks.as_strided(flat[offset:], size, steps, writeable=False)
  return arrays


# Instructions whose argument is the value.
_LITERALS = {
  "INT",
  "BININT",
  "BININT1",
  "BININT2",
  "LONG",
  "LONG1",
  "LONG4",
  "FLOAT",
  "BINFLOAT",
  "STRING",
  "BINSTRING",
  "SHORT_BINSTRING",
  "BINBYTES",
  "SHORT_BINBYTES",
  "BINBYTES8",
  "BYTEARRAY8",
  "UNICODE",
  "BINUNICODE",
  "SHORT_BINUNICODE",
  "BINUNICODE8",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARK = object()


def _interpret(data, kinds: dict[str, str] | None = None) -> Any:
  """Computes the value of one pickle, with tensors and markers for calls.

  Args:
    data: bytes with read, readline and tell, left behind the pickle's end.
    kinds: filled with key -> kind of the storages that the pickle names.
  """
  stack, memo = [], {}

  def pop_to_mark() -> list:
    items = []
    while (item := stack.pop()) is not _MARK:
      items.append(item)
    return items[::-1]

  for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
    name = opcode.name
    if number >= _MOST_INSTRUCTIONS:
      raise _Refused(
        f"a pickle of more than {_MOST_INSTRUCTIONS} instructions, more than any state dict has",
        _STATE_DICT_ALONE,
      )
    if name in _LITERALS:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name == "MARK":
      stack.append(_MARK)
    elif name == "STOP":
      return stack.pop()
    elif name in ("PROTO", "FRAME"):
      pass
    elif name == "POP":
      stack.pop()
    elif name == "POP_MARK":
      pop_to_mark()
    elif name == "DUP":
      stack.append(stack[-1])
    elif name == "MEMOIZE":
      memo[len(memo)] = stack[-1]
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
      memo[argument] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
      stack.append(memo[argument])
    elif name in ("EMPTY_LIST", "EMPTY_DICT"):
      stack.append([] if name == "EMPTY_LIST" else {})
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
      count = int(name[-1])
      stack[-count:] = [tuple(stack[-count:])]
    elif name in ("TUPLE", "LIST"):
      items = pop_to_mark()
      stack.append(tuple(items) if name == "TUPLE" else items)
    elif name in ("DICT", "SETITEM", "SETITEMS"):
      items = pop_to_mark() if name != "SETITEM" else [stack.pop(-2), stack.pop()]
      if name == "DICT":
        stack.append({})
      _set_items(stack[-1], items)
    elif name in ("APPEND", "APPENDS", "ADDITEMS"):
      items = pop_to_mark() if name != "APPEND" else [stack.pop()]
      if isinstance(stack[-1], list):
        stack[-1].extend(items)
    elif name == "GLOBAL":
      stack.append(_Global(argument.replace(" ", ".")))
    elif name == "STACK_GLOBAL":
      stack.append(_Global(".".join([_name(stack.pop(-2)), _name(stack.pop())])))
    elif name in ("REDUCE", "NEWOBJ"):
      called, arguments = stack.pop(-2), stack.pop()
      stack.append(_call(called, arguments))
    elif name == "BUILD":
      stack.pop()  # attributes of an object, which no tensor here has
    elif name == "BINPERSID":
      stack.append(_storage(stack.pop()))
      if kinds is not None and isinstance(stack[-1], _Storage):
        kinds[stack[-1].key] = stack[-1].kind
    elif name in ("EMPTY_SET", "FROZENSET", "INST", "OBJ", "NEWOBJ_EX"):
      if name in ("FROZENSET", "INST", "OBJ"):
        pop_to_mark()
      elif name == "NEWOBJ_EX":
        del stack[-3:]
      stack.append(_Opaque())
    else:
      raise ValueError(f"unexpected instruction {name}")
  raise EOFError("the pickle has no end")


def _set_items(target: Any, items: list) -> None:
  if isinstance(target, dict):
    # Only keys that can name a tensor; hashing others may take for ever (tuples of tuples of ...,
    # numbers of a million digits).
    pairs = zip(items[::2], items[1::2], strict=True)
    target.update((key, value) for key, value in pairs if isinstance(key, str) or _is_small(key))


def _storage(identity: Any) -> _Storage | _Opaque:
  """Returns what a persistent id stands for.

  The id is ("storage", type, key, device, length[, part of a storage]).
  """
  if not (
    isinstance(identity, tuple)
    and len(identity) >= 5
    and identity[0] == "storage"
    and isinstance(identity[1], _Global)
  ):
    return _Opaque()
  kind = identity[1].name.removeprefix("torch.").removesuffix("Storage")
  if kind not in _DTYPES:
    return _Opaque()
  offset, length = 0, identity[4]
  if len(identity) > 5 and identity[5] is not None:
    _, offset, length = identity[5]
  return _Storage(_name(identity[2]), kind, _count(offset), _count(length))


def _name(value: Any) -> str:
  if not isinstance(value, str) or len(value) > _MOST_NAME_CHARACTERS:
    raise _Refused("a name that is no text, or a long one")
  return value


def _is_small(value: Any) -> bool:
  return isinstance(value, int) and abs(value) < 1 << 63


def _count(value: Any) -> int:
  if not _is_small(value) or value < 0:
    raise _Refused("a size that is no count")
  return value


def _counts(value: Any) -> tuple[int, ...]:
  if not isinstance(value, tuple) or len(value) > _MOST_DIMENSIONS:
    raise _Refused("a shape that is none, or of very many dimensions")
  return tuple(map(_count, value))


def _call(called: Any, arguments: Any) -> Any:
  """Returns the result of a call, if a state dict is made of such calls.

  Every other call gives a marker.
  """
  if not (isinstance(called, _Global) and isinstance(arguments, tuple)):
    return _Opaque()
  match called.name, arguments:
    case (
      ("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor"),
      (_Storage() as storage, offset, size, stride, *_),
    ):
      return _Tensor(storage, _count(offset), _counts(size), _counts(stride))
    case (
      ("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"),
      (_Tensor() as tensor, *_),
    ):
      return tensor
    case "torch._tensor._rebuild_from_type_v2", (_Global() as rebuild, _, tuple() as inner, *_):
      return _call(rebuild, inner)
    case "torch.Size", (tuple() as size,):
      return size
    case (
      (
        "collections.OrderedDict" | "collections.defaultdict" | "builtins.dict" | "__builtin__.dict"
      ),
      _,
    ):
      result = {}  # filled by the instructions that follow, or from pairs (Python 2)
      pairs = arguments[-1] if arguments and isinstance(arguments[-1], list) else []
      if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        _set_items(result, [item for pair in pairs for item in pair])
      pairs.clear()  # a list that is given to many calls is unfolded once
      return result
  return _Opaque()
