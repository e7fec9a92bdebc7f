"""Golden tests: inputs and outputs recorded from the papers' official code, found in `--golden-dir`
by name.

A test says which file it reads with `@pytest.mark.golden("cps_loss", case=r"case\\d+")`: every file
whose stem starts with "cps_loss" (the longest stem claimed by any test wins) and every case in it,
discovered from the array names, becomes one test whose id holds the file's name. The fixture
`golden` is that case's arrays with the prefix taken off. A file that no test claims is reported as
skipped, by name. Without `case` the whole file is one case.
"""

import pathlib
import re

import numpy as np
import pytest


class Golden(dict):
  """The arrays of one case, by name without the case's prefix; `.path` is the file they come
  from.
  """

  path: pathlib.Path

  def under(self, prefix: str) -> dict[str, np.ndarray]:
    """Arrays below 'prefix', e.g. under('init/student/') -> {'conv.weight': ...}."""
    return {name[len(prefix) :]: value for name, value in self.items() if name.startswith(prefix)}


def pytest_configure(config):
  config.addinivalue_line(
    "markers", "golden(stem, case=None): reads every golden file whose stem starts with `stem`"
  )


def _files(config):
  return sorted(pathlib.Path(config.getoption("--golden-dir")).glob("*.npz"))


# Every stem that a golden test claims, read from the tests' text: known before any test is
# parametrised.
_STEMS = {
  stem
  for file in pathlib.Path(__file__).parent.glob("test_*.py")
  for stem in re.findall(r"mark\.golden\(\s*\"([^\"]+)\"", file.read_text())
}


def _claimed(path):
  return max((stem for stem in _STEMS if path.stem.startswith(stem)), key=len, default=None)


def _cases(path, pattern):
  with np.load(path) as arrays:
    names = arrays.files
  if pattern is None:
    return [None]
  found = {match.group() for match in (re.match(pattern, name) for name in names) if match}
  return sorted(
    found,
    key=lambda case: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", case)],
  )


def pytest_generate_tests(metafunc):
  if "unclaimed_file" in metafunc.fixturenames:
    paths = [path for path in _files(metafunc.config) if _claimed(path) is None]
    metafunc.parametrize("unclaimed_file", paths, ids=[path.name for path in paths])
    return
  marker = metafunc.definition.get_closest_marker("golden")
  if marker is None:
    return
  stem, pattern = marker.args[0], marker.kwargs.get("case")
  cases = [
    (path, case)
    for path in _files(metafunc.config)
    if _claimed(path) == stem
    for case in _cases(path, pattern)
  ]
  ids = [path.name if case is None else f"{path.name}-{case}" for path, case in cases]
  metafunc.parametrize("golden", cases, ids=ids, indirect=True)


@pytest.fixture
def golden(request):
  path, case = request.param
  arrays = Golden()
  arrays.path = path
  with np.load(path, allow_pickle=False) as file:
    for name in file.files:
      if case is None:
        arrays[name] = file[name]
      elif name.startswith((f"{case}_", f"{case}/")):
        arrays[name[len(case) + 1 :]] = file[name]
  return arrays
