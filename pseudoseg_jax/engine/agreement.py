"""A check that the processes of one run were started alike.

Several processes train one run only then. They are compared before the first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from pseudoseg_jax import checks


def check(values: Mapping[str, str], *, failure: str = "") -> None:
  """Compares what each process was started with.

  It does nothing for a single process.

  Args:
    values: what is compared -> a text that must be the same in all processes; differences of JSON
      objects are reported by key.
    failure: why this process cannot run, "" where it can: the others must hear of it, or they would
      wait for it.

  Raises:
    InputError: in every process, with the processes that differ from process 0, and in what; or
      with the failure of one.
  """
  if jax.process_count() == 1:
    return
  problems = checks.Problems("the processes of this run do not agree")
  failed = multihost_utils.process_allgather(np.int32(bool(failure)))
  for process in np.flatnonzero(failed).tolist():
    text = failure if process == jax.process_index() else "an error of its own: see its output"
    problems.add(f"process {process} of {jax.process_count()}", got=text.replace("\n", "\n  "))
  problems.raise_if_any()
  if not values:
    return
  digests = np.stack(
    [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32) for text in values.values()]
  )
  of_all = multihost_utils.process_allgather(digests)
  for number, (name, text) in enumerate(values.items()):
    others = [
      process
      for process in range(len(of_all))
      if (of_all[process, number] != of_all[0, number]).any()
    ]
    if not others:
      continue
    first = _broadcast(text)  # every process takes part
    for process in others:
      got = "another one than process 0"
      if process == jax.process_index():
        got = "; ".join(_differences(text, first)) or got
      problems.add(f"process {process}: {name}", got=got)
  if problems.items:
    problems.add(
      "remedy: start all processes with the same command, on the same data and the same shared workdir"
    )
  problems.raise_if_any()


def _broadcast(text: str) -> str:
  """Returns the text of process 0."""
  content = np.frombuffer(text.encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  padded = np.zeros(size, np.uint8)
  padded[: len(content)] = content[:size]
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)).decode()


def _differences(ours: str, theirs: str) -> list[str]:
  """Lists the differences of two texts.

  There is one text for each key in which two JSON objects differ; for other texts there is one with
  both, if they are short.
  """
  try:
    mine, other = json.loads(ours), json.loads(theirs)
    keys = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
  except (ValueError, AttributeError):
    return [f"{ours}, in process 0 {theirs}"] if max(len(ours), len(theirs)) < 80 else []
  return [
    f"{key}: {json.dumps(mine.get(key))}, in process 0 {json.dumps(other.get(key))}"
    for key in keys[:10]
  ]
