"""The gates: one format, nothing that ruff finds, types where methods are written."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  "command", ["ruff check --quiet .", "ruff format --check --quiet .", "mypy"]
)
def test_the_gate_finds_nothing(command):
  checked = subprocess.run(
    [sys.executable, "-m", *command.split()],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert checked.returncode == 0, checked.stdout + checked.stderr
