"""`pseudoseg`: one name for every command."""

import importlib
import json
import subprocess
import sys

import pytest

from pseudoseg_jax import cli


def call(*words, **options):
  return subprocess.run(
    [sys.executable, "-m", "pseudoseg_jax.cli", *words],
    capture_output=True,
    text=True,
    check=False,
    **options,
  )


def test_help_names_every_command():
  shown = call("--help")
  assert shown.returncode == 0
  assert all(f"  {name} " in shown.stdout for name in cli.COMMANDS)
  silent = call()
  assert (
    silent.returncode == 2 and not silent.stdout and "usage: pseudoseg COMMAND" in silent.stderr
  )


def test_help_waits_for_no_library():
  code = "import sys; from pseudoseg_jax import cli; cli.main(); print(sorted({'jax', 'numpy', 'tensorflow'} & set(sys.modules)))"
  shown = subprocess.run(
    [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
  ).stdout
  assert shown.endswith("[]\n")


@pytest.mark.parametrize("word", ["predcit", "--config=quickstart"])
def test_what_is_no_command_is_told(word):
  shown = call(word)
  assert shown.returncode == 2 and "train" in shown.stderr and "Traceback" not in shown.stderr
  assert "did you mean 'predict'" in shown.stderr or word != "predcit"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_words_reach_the_module_and_its_exit_code_comes_back(monkeypatch, name):
  module, given, _ = cli.COMMANDS[name]
  seen = []
  monkeypatch.setattr(
    importlib.import_module(f"pseudoseg_jax.{module}"),
    "main",
    lambda: seen.append(sys.argv[1:]) or 5,
  )
  monkeypatch.setattr("sys.argv", ["pseudoseg", name, "--one", "two"])
  assert cli.main() == 5 and seen == [[*given, "--one", "two"]]


def test_a_run_from_anywhere(tmp_path):
  shown = call(
    "train",
    "--config=quickstart:method=supervised",
    "--print_config",
    "--config.total_steps=7",
    cwd=tmp_path,
  )
  assert shown.returncode == 0, shown.stderr
  config = json.loads(shown.stdout)
  assert config["total_steps"] == 7 and config["method"]["name"] == "supervised"
  assert call("evaluate", f"--workdir={tmp_path / 'nowhere'}", cwd=tmp_path).returncode == 2
