"""The gate: what ruff finds is mended, not left."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_ruff_finds_nothing():
  checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "."], cwd=ROOT, capture_output=True, text=True, check=False)
  assert checked.returncode == 0, checked.stdout + checked.stderr
