"""Semi- and weakly-supervised semantic segmentation in JAX/Flax.

Train, evaluate, load and export networks; make_config and make_data.
"""

import importlib
import os
import signal
import sys

# TensorFlow only feeds images here: without its oneDNN kernels, whose rounding differs between
# machines, and its start-up notes.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"
_HOMES = {
  "evaluate": "api",
  "export": "trained",
  "load": "api",
  "make_config": "config",
  "make_data": "build",
  "train": "api",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - a list it is


def __getattr__(name):
  # On first use: `import pseudoseg_jax` must not start TensorFlow.
  if name in _HOMES:
    with importlib.import_module("pseudoseg_jax.notebook").root_handlers_kept():
      return getattr(importlib.import_module(f"pseudoseg_jax.{_HOMES[name]}"), name)
  raise AttributeError(f"module 'pseudoseg_jax' has no attribute '{name}'")


# Python calls a module so while it looks for the one to run with -m: one of our commands. Ctrl-C
# during its imports, which take seconds, ends the process as shells expect, without a traceback;
# command_line.run takes over from there.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, signal.SIG_DFL)
