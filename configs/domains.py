"""Two data sets with classes of their own, learned by one network at once: for methods of several
domains.

  --config=configs/domains.py:first=camvid,second=quickstart --config.data.root=DIR
  --config=configs/domains.py:first=cityscapes,first_split=1_8,second=camvid --config.data.root=DIR --config.other_data.camvid.root=DIR2

first, second: configs beside this one, by name. Everything but the second's data (crops, steps,
batch sizes: of each domain, normalization, evaluation) is the first's. first_NAME=VALUE and
second_NAME=VALUE are arguments of those two configs;
--config.data.KEY and --config.other_data.SECOND.KEY set their options. More domains are further entries of config.other_data.
"""

import pathlib

from pseudoseg_jax import checks, config as configs


def get_config(argument=""):
  own, of_first, of_second = _apart(argument or "")
  chosen = configs.arguments(
    own, first="camvid", second="quickstart", method="cct_domains", convention=""
  )
  of_first += [f"{name}={chosen[name]}" for name in ("method", "convention") if chosen[name]]
  config = _load("first", chosen["first"], of_first)
  data = _load("second", chosen["second"], of_second).data.to_dict()
  config.other_data = {
    chosen["second"]: {name: value for name, value in data.items() if name not in ("mean", "std")}
  }
  return config


def _apart(argument):
  """The arguments of this config (text), of the first and of the second (lists)."""
  parts = list(filter(None, argument.split(",")))
  of_first, of_second = (
    [part for part in parts if part.startswith(prefix)] for prefix in ("first_", "second_")
  )
  own = [part for part in parts if part not in of_first and part not in of_second]
  return (
    ",".join(own),
    [part.removeprefix("first_") for part in of_first],
    [part.removeprefix("second_") for part in of_second],
  )


def _load(where, name, arguments):
  folder = pathlib.Path(__file__).parent
  checks.check_name(
    where,
    name,
    [path.stem for path in folder.glob("*.py") if path.stem not in ("domains", "pipelines")],
  )
  return configs.load(f"{folder / name}.py:{','.join(arguments)}")
