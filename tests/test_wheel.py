"""The wheel is the whole package: in an environment of its own, in another folder, it trains."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_runs_the_quickstart_in_an_empty_environment(tmp_path):
  def run(*command, cwd=tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
      command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr

  source = tmp_path / "source"  # building leaves files beside the source
  run("git", "clone", "--quiet", str(ROOT), str(source))
  run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "wheels", str(source))
  (wheel,) = (tmp_path / "wheels").glob("*.whl")
  run(sys.executable, "-m", "venv", "empty")
  binaries = tmp_path / "empty" / "bin"
  run(str(binaries / "pip"), "install", "--quiet", str(wheel))
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  small = [
    "--config.total_steps=4",
    "--config.eval_every_steps=4",
    "--config.data.num_eval_scenes=4",
  ]
  command = [str(binaries / "pseudoseg"), "train", "--config=quickstart", "--workdir=run", *small]
  assert "Done: " in run(*command, cwd=elsewhere)
  assert (elsewhere / "run" / "results.json").is_file()
  where = "import pseudoseg_jax, pathlib; print(pathlib.Path(pseudoseg_jax.__file__).parent)"
  package = pathlib.Path(run(str(binaries / "python"), "-c", where, cwd=elsewhere).strip())
  assert package.is_relative_to(tmp_path / "empty") and (package / "py.typed").is_file()
