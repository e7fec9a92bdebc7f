"""The gates: code has the one format, and what ruff finds is mended, not left."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["check --quiet", "format --check --quiet"])
def test_ruff_finds_nothing(command):
  checked = subprocess.run(
    [sys.executable, "-m", "ruff", *command.split(), "."],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert checked.returncode == 0, checked.stdout + checked.stderr
