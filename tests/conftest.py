import os
import pathlib

# Eight simulated devices for the whole suite: "one device = eight" is then a mesh of the first one against a mesh of all.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_addoption(parser):
  default = pathlib.Path(__file__).parent / "golden" / "data"
  parser.addoption("--golden-dir", default=str(default), help="folder of golden .npz files (default: our copy)")
