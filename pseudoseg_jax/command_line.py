"""What the commands share: overrides of a config, and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from pseudoseg_jax import checks


def parse_with_overrides(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
  """What the parser knows, and {"optimizer.learning_rate": "0.1"} of every --config.KEY=VALUE; other arguments are errors."""
  known, rest = parser.parse_known_args(arguments)
  overrides = {}
  while rest:
    flag = rest.pop(0)
    key, equals, value = flag.partition("=")
    if not key.startswith("--config."):
      parser.error(f"unknown argument {flag}; options of the config are given as --config.KEY=VALUE")
    if not equals:
      if not rest:
        parser.error(f"{flag} needs a value: {flag}=VALUE")
      value = rest.pop(0)
    overrides[key.removeprefix("--config.")] = value
  return known, overrides


def run(command: Callable[[], int | None], *, again: str = "") -> int:
  """Runs a command and returns its exit code, errors told in a line on stderr: 0 (or what the command returns), 2 for input that
  cannot be used, 1 for what the machine or the numbers did (a full disk, a loss that is not finite), 130 for Ctrl-C.

  again: what the same command would do after a failure that is not the input's, e.g. "the same command goes on from here".
  """
  remedy = f"; {again}" if again else ""
  try:
    return command() or 0
  except checks.InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (OSError, FloatingPointError) as error:
    print(f"error: {error}{remedy}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f"\nstopped{remedy}", file=sys.stderr)
    return 130
