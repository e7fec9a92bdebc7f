"""Common parts of the commands.

These are overrides of a config, exit codes, and how a process ends.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from pseudoseg_jax import checks

_INTERRUPTED = 130  # 128 + SIGINT
# Senders such as `timeout` and Slurm tell a process and then its group: that is one signal told
# twice.
ONE_SIGNAL_SECONDS = 1.0


class SignalCount:
  """A count of signals; those that follow within a moment count as one."""

  def __init__(self):
    self.value, self._last = 0, -float("inf")

  def add(self) -> bool:
    """Counts one more signal; returns whether it is another one."""
    now = time.monotonic()
    if now - self._last < ONE_SIGNAL_SECONDS:
      return False
    self.value, self._last = self.value + 1, now
    return True


def parse_with_overrides(
  parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
  """Parses the arguments of a command and its overrides of the config.

  Returns what the parser knows, and {"optimizer.learning_rate": "0.1"} of every --config.KEY=VALUE.
  Other arguments are errors.
  """
  known, rest = parser.parse_known_args(arguments)
  overrides = {}
  while rest:
    flag = rest.pop(0)
    key, equals, value = flag.partition("=")
    if not key.startswith("--config."):
      parser.error(
        f"unknown argument {flag}; options of the config are given as --config.KEY=VALUE"
      )
    if not equals:
      if not rest:
        parser.error(f"{flag} needs a value: {flag}=VALUE")
      value = rest.pop(0)
    overrides[key.removeprefix("--config.")] = value
  return known, overrides


def run(command: Callable[[], int | None], *, again: str = "") -> int:
  """Runs a command and returns its exit code.

  Errors are reported in a line on stderr. The exit code is 0 (or what the command returns), 2 for
  input that cannot be used, 1 for what the machine or the numbers did (a full disk, a loss that is
  not finite), 130 for Ctrl-C and 143 for SIGTERM.

  Args:
    again: what the same command would do after a failure that is not the input's, e.g. "the same
      command resumes there".
  """
  remedy = f"; {again}" if again else ""
  if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
  ):
    # it was left to the system during imports.
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    return command() or 0
  except checks.InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (OSError, FloatingPointError) as error:
    full = (
      "; free some space" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else ""
    )
    print(f"error: {error}{full}{remedy}", file=sys.stderr)
    return 1
  except KeyboardInterrupt as interrupt:
    print(f"\nstopped{remedy}", file=sys.stderr)
    return getattr(interrupt, "exit_code", _INTERRUPTED)


def run_distributed(
  command: Callable[[], int | None],
  *,
  again: str = "the same command resumes at the newest checkpoint",
) -> int:
  """Runs a command that may be one of several processes, as `run` does.

  A lost peer is reported in a line, and ends this process too.
  """

  def guarded() -> int | None:
    import jax  # not earlier: parsers and --help answer at once

    try:
      code = command()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
      # What is dispatched in Python tells a broken connection by a ValueError.
      lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
      if jax.process_count() == 1 or not lost:
        raise
      first = str(error).splitlines()[0]
      print(
        f"error: another process of this run was lost ({first}); {again}, with as many processes or fewer",
        file=sys.stderr,
      )
      return 1
    if jax.process_count() > 1:
      # All of them are done: nobody takes the end of this one for a loss.
      jax.distributed.shutdown()
    return code

  return run(guarded)


def leave(main: Callable[[], int] | int) -> NoReturn:
  """Ends the process of a command with its exit code.

  Everything that the command printed is written out first. The process does not end by sys.exit:
  that waits for threads and runs destructors of other libraries, and a command that is done must
  not be kept alive by them.

  Args:
    main: the command, which is run first; or the exit code of one that is done.
  """
  try:
    code = main() if callable(main) else main
  except SystemExit as error:  # of argparse
    code = error.code if isinstance(error.code, int) else int(error.code is not None)
  except KeyboardInterrupt:
    code = _INTERRUPTED
  except BaseException:
    traceback.print_exc()
    code = 1
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, ValueError):  # nobody reads it any more
      code = code or 1
  os._exit(code)
