"""`pseudoseg COMMAND ...`: every command of the package under one name.

Each command is a module too.
"""

from __future__ import annotations

import importlib
import sys

from pseudoseg_jax import checks, command_line

# Name -> module, words put before the user's own, what it does.
COMMANDS: dict[str, tuple[str, list[str], str]] = {
  "train": ("main", [], "train, or resume a run"),
  "evaluate": ("main", ["--mode=eval"], "score a trained workdir, also in a paper's way"),
  "predict": ("predict", [], "segment images"),
  "check-data": ("check_data", [], "look at every image and mask before training"),
  "prepare": ("prepare", [], "make a data set's folder from its official archives"),
  "export": ("export_model", [], "take a trained network elsewhere"),
  "convert-weights": ("convert_weights", [], "bring published weights"),
  "export-labels": ("export_labels", [], "write what a network predicts as labels to learn from"),
  "reliable": ("reliable", [], "list the images whose labels are the stablest"),
}


def _help() -> str:
  lines = [f"  {name:16} {what}" for name, (_, _, what) in COMMANDS.items()]
  return "\n".join(
    [
      "usage: pseudoseg COMMAND [options]",
      "",
      "Semi- and weakly-supervised semantic segmentation.",
      "",
      *lines,
      "",
      "pseudoseg COMMAND --help says more. To begin with: pseudoseg train --config=quickstart --workdir=/tmp/quickstart",
    ]
  )


def main() -> int:
  words = sys.argv[1:]
  if not words or words[0] in ("-h", "--help", "help"):
    print(_help(), file=sys.stdout if words else sys.stderr)
    return 0 if words else 2
  name = words[0].replace("_", "-")
  if code := command_line.run(lambda: checks.check_name("command", name, COMMANDS)):
    return code
  module, given, _ = COMMANDS[name]
  sys.argv[1:] = [*given, *words[1:]]
  return importlib.import_module(f"pseudoseg_jax.{module}").main()


def script() -> None:
  """Runs `pseudoseg`, the script that `pip install` makes.

  Modules in the folder where it starts are found, as with `python -m`.
  """
  sys.path.insert(0, "")
  command_line.leave(main)


if __name__ == "__main__":
  script()
