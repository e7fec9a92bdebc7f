import ctypes
import gc
import os
import pathlib
from importlib import metadata

import pytest

# Eight simulated devices for the whole suite: "one device = eight" is then a mesh of the first one
# against a mesh of all.
_FLAGS = "--xla_force_host_platform_device_count=8"
# Older ones abort at a flag that they do not know.
if int(metadata.version("jaxlib").split(".")[1]) >= 8:
  # On a busy machine a device may wait long for the others; XLA aborts the process after 40 s of
  # that unless told otherwise. After fifteen minutes it is no longer the machine: once, a step on
  # eight devices never came back (cct, begun while a checkpoint of its donated state was written),
  # with all of the process at rest. Then an abort tells who is missing, and costs one test.
  _FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=900"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
# Threads of XLA's pools. With one a core (or one a device) those that wait for other devices can
# leave none for these.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_addoption(parser):
  default = pathlib.Path(__file__).parent / "golden" / "data"
  parser.addoption(
    "--golden-dir", default=str(default), help="folder of golden .npz files (default: our copy)"
  )
  parser.addoption(
    "--method", help="my_module:my_factory, whose contract is tested beside that of our methods"
  )


def pytest_configure(config):
  if name := config.getoption("--method"):
    from pseudoseg_jax.methods import table

    table.METHODS[name.partition(":")[2]] = table.find(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Keeps a file's tests in one process, since they share fixtures; those of the contract, a method
  at a time, since they share what it compiled.

  `--dist loadgroup` does the same by marks, but not with pytest 9.2 and xdist 3.8: the one reads a
  node's name elsewhere than the other writes the group.
  """
  from xdist.scheduler import LoadScopeScheduling

  class ByFileOrCase(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      path, _, test = nodeid.partition("::")
      return path + test.partition("[")[2] if "methods_contract" in path else path

  return ByFileOrCase(config, log)


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope compile something
def pytest_runtest_setup(item):
  """Steps that are few take less time than compiling them well. As users compile it: what a slow
  test learns in hundreds of steps, what is compared with recordings, what is marked `optimized`.
  """
  import jax

  marked = any(map(item.get_closest_marker, ("slow", "optimized")))
  quick = not marked and item.path.parent.name != "golden"
  if jax.config.read("jax_disable_most_optimizations") != quick:
    # What was compiled the other way would be taken for the same.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", quick)


_MORE_BYTES = 3 * 2**30  # that a process may take before compiled code is let go of
_resident_limit = [_MORE_BYTES]


@pytest.fixture(autouse=True)
def little_compiled_code():
  """Lets go of compiled code in time: it takes memory, and memory mappings, of which Linux kills at
  65530.
  """
  yield
  mappings = pathlib.Path("/proc/self/maps")
  if mappings.exists() and (
    _resident_bytes() > _resident_limit[0] or mappings.read_bytes().count(b"\n") > 30_000
  ):
    import jax

    jax.clear_caches()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
      libc.malloc_trim(0)
    _resident_limit[0] = _resident_bytes() + _MORE_BYTES  # what is left is no compiled code


def _resident_bytes():
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
