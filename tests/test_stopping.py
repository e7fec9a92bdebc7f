"""Signals: acknowledged at once, acted on where nothing is lost, and left to others afterwards."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from pseudoseg_jax import command_line
from pseudoseg_jax.engine import stopping
from pseudoseg_jax.engine.stopping import Interrupted, StopRequest


def send(number):
  os.kill(os.getpid(), number)
  time.sleep(0.2)  # Python calls the handler in here


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_where_nothing_can_be_lost_a_signal_leaves_at_once(number, code):
  with StopRequest() as stop, pytest.raises(Interrupted) as interrupted, stop.nothing_to_lose():
    send(number)
    pytest.fail("the signal was not noticed")
  assert interrupted.value.exit_code == code == stopping.exit_code(number.name)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_elsewhere_it_is_noted_and_acknowledged(number, caplog):
  with StopRequest() as stop:
    assert not stop.requested(1)
    send(number)
    assert stop.requested(2) and stop.name == number.name
    with pytest.raises(Interrupted), stop.nothing_to_lose():
      pytest.fail("nothing more is begun")
  assert (
    f"{number.name}: saving and leaving" in caplog.text
    and "once more to leave at once" in caplog.text
  )


def test_a_second_one_leaves_at_once(caplog):
  with StopRequest():
    send(signal.SIGINT)
    time.sleep(command_line.ONE_SIGNAL_SECONDS)
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)
  assert "leaving; what was saved" in caplog.text


def test_one_that_is_told_to_a_process_and_to_its_group_is_one(caplog):
  with StopRequest() as stop:
    for _ in range(3):
      send(signal.SIGTERM)
    assert stop.requested(1)
  assert caplog.text.count("SIGTERM") == 1


def test_nothing_is_left_behind():
  handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
  threads = threading.active_count()
  with StopRequest():
    assert [signal.getsignal(number) for number in stopping.SIGNALS] != handlers
  assert [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
  assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == threads


def test_signals_stay_with_whoever_has_them_outside_the_main_thread():
  handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
  seen = []

  def work():
    with StopRequest() as stop, stop.nothing_to_lose():
      seen.append(
        [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
        and not stop.requested(1)
      )

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [True]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_compiled_code_that_ignores_signals_does_not_keep_a_command_alive(number, code):
  program = """
    import hashlib
    from pseudoseg_jax.engine.stopping import StopRequest
    with StopRequest(owns_process=True) as stop, stop.nothing_to_lose():
      print("begun", flush=True)
      hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, without a look at Python's signals
  """
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(program)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "begun\n"
  time.sleep(0.5)  # into C
  process.send_signal(number)
  # at once, not after the computation.
  assert any(f"{number.name}: leaving" in line for line in process.stderr)
  try:
    assert process.wait(timeout=30) == code
  finally:
    process.kill()


@pytest.mark.parametrize(
  "ending, code, words",
  [
    ("lambda: 3", 3, ""),
    ("lambda: sys.exit(2)", 2, ""),
    ("lambda: 1 / 0", 1, "ZeroDivisionError"),
    ("lambda: command_line.run(lambda: (_ for _ in ()).throw(KeyboardInterrupt))", 130, "stopped"),
  ],
)
def test_a_command_ends_its_process_whatever_threads_wait_for(ending, code, words):
  program = f"""
    import sys, threading
    from pseudoseg_jax import command_line
    threading.Thread(target=threading.Event().wait).start()  # sys.exit would wait for it for ever
    print("last words")
    command_line.leave({ending})
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
  )
  assert (done.returncode, done.stdout) == (code, "last words\n") and words in done.stderr


def test_an_interrupt_during_imports_is_no_traceback():
  program = """
    import os, signal, sys
    sys.argv = ["-m"]  # as Python has it while it looks for the module
    import pseudoseg_jax
    from pseudoseg_jax import command_line
    if len(sys.orig_argv) > 3:
      command_line.run(lambda: os.kill(os.getpid(), signal.SIGINT))  # past the imports it is told
      command_line.leave(130)
    os.kill(os.getpid(), signal.SIGINT)
  """
  for arguments, code, words in ([], -signal.SIGINT, ""), (["past"], 130, "stopped"):
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (
      done.returncode == code and "Traceback" not in done.stderr and done.stderr.strip() == words
    )


def test_exit_codes_of_a_command(capsys):
  def interrupted():
    raise Interrupted("SIGTERM")

  def full():
    raise OSError(28, "No space left on device")

  assert (
    command_line.run(interrupted) == 143
    and command_line.run(full) == 1
    and command_line.run(lambda: None) == 0
  )
  assert "No space left on device; free some space" in capsys.readouterr().err


def test_a_signal_that_the_parent_had_ignored_stays_ignored():
  # as a shell does for jobs in the background.
  handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with StopRequest() as stop:
      send(signal.SIGINT)
      assert not stop.requested(1)
  finally:
    signal.signal(signal.SIGINT, handler)
