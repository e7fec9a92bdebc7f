"""Every option there is, for tests of texts that name some."""

from pseudoseg_jax import config as configs


def known_options() -> set[str]:
  """Dotted options of every method, network and kind of data."""
  options = set(configs.all_options(configs.load("configs/quickstart.py"))) | {"other_data"}
  options |= set(configs.all_options(configs.base(configs.method("supervised"))))
  options |= {
    f"data.{name}" for data in (configs.folder_data(), configs.tfds_data()) for name in data
  }
  options |= {
    option
    for name in configs.methods_table.METHODS
    for option in configs.all_options({"method": configs.method(name)})
  }
  return options | {
    option
    for name in configs.models_table.NETWORKS
    for option in configs.all_options({"network": configs.network(name)})
  }
