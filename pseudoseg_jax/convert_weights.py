"""Converts published weights to our layout. See --help."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

from pseudoseg_jax import command_line

EPILOG = """\
examples:
  python -m pseudoseg_jax.convert_weights resnet101.pth resnet101.safetensors
      a backbone; then --config.network.pretrained=resnet101.safetensors (a .pth works there too, as it is)
  python -m pseudoseg_jax.convert_weights cps.pth cps.safetensors --among=branch2
      the second of a file's networks
  python -m pseudoseg_jax.convert_weights cps.pth CPS --config=configs/voc.py:recipe=cps,backbone=resnet101
      a whole published network as a folder to use, with the config's classes, normalization and protocol:
  python -m pseudoseg_jax.main --mode=eval --workdir=CPS --config.data.root=DIR
  python -m pseudoseg_jax.predict --workdir=CPS --images=DIR --out=OUT

Reads .safetensors, .pth, .pt (also nested, as "state_dict" or "model", under any prefix) and hf://organisation/name[/file].
Nothing in a file is run. Every tensor is accounted for; what does not fit is an error that lists it.
"""


def _parse(arguments):
  parser = argparse.ArgumentParser(
    "python -m pseudoseg_jax.convert_weights",
    description="Converts published weights to our layout.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("source", metavar="IN", help="the file, or hf://organisation/name[/file]")
  parser.add_argument(
    "out", metavar="OUT", type=pathlib.Path, help="a .safetensors file; or, with --config, a folder"
  )
  parser.add_argument("--config", help="config whose network the file is of; needed for a folder")
  parser.add_argument(
    "--network",
    dest="name",
    help="network that the file is of, e.g. deeplabv3plus (default: by its names)",
  )
  parser.add_argument("--backbone", help="its backbone, e.g. resnet101 (default: by its names)")
  parser.add_argument("--stem", help="plain or deep (default: by its names)")
  parser.add_argument(
    "--among",
    default="",
    help="of several networks in a file, the one with this in its prefix, e.g. branch2",
  )
  known = parser.parse_args(arguments)
  if known.out.suffix != ".safetensors" and not known.config:
    parser.error(
      "a folder as OUT needs --config; for the weights alone let OUT end in .safetensors"
    )
  if known.config and (known.name or known.backbone or known.stem):
    parser.error(
      "--config says which network it is: leave --network, --backbone and --stem out, or --config"
    )
  return known


def main(arguments=None) -> int:
  known = _parse(sys.argv[1:] if arguments is None else arguments)
  return command_line.run(lambda: _convert(known))


def _convert(known: argparse.Namespace) -> None:
  import jax  # here, so that --help answers at once

  from pseudoseg_jax import build, checks, config as configs, trained
  from pseudoseg_jax.evaluation import report as reports
  from pseudoseg_jax.models import checkpoint_files, pretrained

  started = time.perf_counter()
  tensors = pretrained.read(known.source)
  print(f"{known.source}: {len(tensors)} tensors, {_millions(tensors.values())}")
  if known.config:
    config = configs.load(known.config)
    classes = build.build_classes(configs.frozen(config).data)
    num_classes = len(classes)
  else:
    guessed, num_classes = pretrained.guess(tensors)
    given = {
      name: getattr(known, name) for name in ("name", "backbone", "stem") if getattr(known, name)
    }
    if "backbone" not in guessed | given:
      problems = checks.Problems(f"cannot tell which network {known.source} is of")
      problems.add(
        "names",
        got=", ".join(list(tensors)[:3]) + ", ...",
        remedy="say so: --network and --backbone, or --config",
      )
      problems.raise_if_any()
    config = configs.base(configs.method("supervised"))
    config.network = configs.network(**(guessed | given))
  print(
    "network: "
    + " ".join(
      f"{name}={value}" for name, value in config.network.items() if value not in ("", None)
    )
  )

  frozen = configs.frozen(config)
  network = build.build_network(frozen, num_classes)
  shapes = pretrained.shapes_of(*jax.eval_shape(network.init, jax.random.key(0)))
  values, report = pretrained.fit(
    tensors, shapes, config.network.name, where=known.source, among=known.among
  )
  print(report.lines())
  if known.out.suffix == ".safetensors":
    about = {
      "network": json.dumps(config.network.to_dict()),
      "source": pathlib.Path(known.source).name,
      "layout": report.layout,
    }
    reports.write_atomically(known.out, checkpoint_files.to_safetensors(values, about))
  else:
    problems = checks.Problems(f"{known.source} is not a whole network of {known.config}")
    for reason, paths in report.fresh.items():
      problems.add(f"{len(paths)} leaves of ours, such as {paths[0]}", got=reason)
    problems.raise_if_any()
    provenance = {
      "source": pathlib.Path(known.source).name,
      "layout": report.layout,
      "prefix": report.prefix,
    }
    trained.write_export(
      known.out, values, frozen, classes, predictor="converted", provenance=provenance
    )
  print(
    f"wrote {known.out}: {len(values)} tensors, {_millions(values.values())}, in {time.perf_counter() - started:.1f} s"
  )


def _millions(arrays) -> str:
  return f"{sum(array.size for array in arrays) / 1e6:.2f} million numbers"


if __name__ == "__main__":
  command_line.leave(main)
