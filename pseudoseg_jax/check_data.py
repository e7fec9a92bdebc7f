"""Looks at every image and mask before training. See --help.

report.json, of --out:

  {"config": str, "split": str, "classes": [str],
   "errors": int, "warnings": int,                        numbers of findings
   "roles": {"labeled" | "unlabeled" | "evaluated":
             {"images": int, "usable": int,
              "sizes": [[height, width, images]],         the most frequent first
              "classes": {CLASS: {"pixels": int, "share": number | null, "images": int}} | null,   null: masks are not opened
              "ignored_share": number | null}},
   "domains": {NAME: {"split": str, "classes": [str], "roles": {...}}},   of config.other_data; their roles in findings: NAME/ROLE
   "findings": [{"severity": "error" | "warning", "kind": str, "role": str, "what": str, "remedy":
   str,
                 "items": [{"path": str, "detail": str}]}]}

Kinds are the keys of data.audit.KINDS. Shares are fractions: of a class among the pixels that have
one; of the ignored among all.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pseudoseg_jax import build, checks, command_line, config as configs, settings
from pseudoseg_jax.data import audit
from pseudoseg_jax.data.audit import Audit, Finding, Item
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.data.sources import Source
from pseudoseg_jax.engine import mesh as meshes
from pseudoseg_jax.evaluation import pictures, report
from pseudoseg_jax.evaluation.progress import Progress
from pseudoseg_jax.options import AnyData, Config

ROLES = ("labeled", "unlabeled", "evaluated")

_EXAMPLES = 6  # images of a role in its picture

DESCRIPTION = """\
Opens the data of a config as training would, decodes every image and every mask, and reports what is damaged, what is in
two lists, what is not used, and how often each class occurs; and whatever else training with this config would refuse. Masks of
unlabeled images are never opened. With --out it also writes

  OUT/report.json                     everything, for programs
  OUT/labeled.png, evaluated.png      a few images with their masks
  OUT/classes.png                     how often each class occurs
  OUT/NAME/...                        these pictures of a further domain, config.other_data.NAME

Exit code: 0 without errors (there may be warnings), 1 with errors, 2 where nothing can be opened.
"""

EPILOG = """\
examples:
  python -m pseudoseg_jax.check_data --config=configs/camvid.py:split=1_8 --config.data.root=DIR
  python -m pseudoseg_jax.check_data --config=configs/voc.py:split=92 --config.data.root=DIR --out=/tmp/checked
"""


def _parse(arguments):
  parser = argparse.ArgumentParser(
    "python -m pseudoseg_jax.check_data",
    description=DESCRIPTION,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config", required=True, help="config file, with its argument after a colon"
  )
  parser.add_argument(
    "--out", type=pathlib.Path, help="folder to write the report and the pictures to"
  )
  parser.add_argument(
    "--most", type=int, default=5, help="files told of each kind; report.json has all (default: 5)"
  )
  return command_line.parse_with_overrides(parser, arguments)


def main(arguments=None) -> int:
  known, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
  # a training run may need the accelerator's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

  def command():
    problems = checks.Problems("the config cannot be run")
    config = configs.frozen(configs.load(known.config, overrides), problems)
    looked = [look(*opened) for opened in _opened(config)]
    findings = [finding for found in looked for finding in found.findings]
    findings += refusals(
      config, problems, looked, [finding for finding in findings if finding.severity == "error"]
    )
    findings.sort(key=lambda finding: finding.severity != "error")
    for found in looked:
      print(f"\n{found.name}:" * bool(found.name) + tables(found.audits, found.data.classes))
    print(findings_text(findings, known.most))
    if known.out is not None:
      write(known.out, known.config, looked, findings)
    return int(any(finding.severity == "error" for finding in findings))

  return command_line.run(command)


class Looked(NamedTuple):
  """The data of a domain, and what was found in them.

  name: that of config.other_data; "" of config.data. audits: by role.
  """

  name: str
  data: build.Data
  audits: dict[str, Audit]
  findings: list[Finding]


def _opened(config: Config) -> Iterator[tuple[str, AnyData, build.Data]]:
  """Yields (name, options, data) of every domain.

  These are config.data and each of config.other_data.
  """
  for name, options in [("", config.data), *sorted(config.other_data.items())]:
    try:
      yield name, options, build.build_data(options, check=False)
    except checks.InputError as error:
      raise checks.InputError(f"domain '{name}': {error}" if name else str(error)) from error


def look(name: str, options: AnyData, data: build.Data) -> Looked:
  """Decodes the images and masks of a domain and collects the findings.

  Masks of unlabeled images are not opened.
  """
  sources = {role: getattr(data, role) for role in ROLES}
  progress = _progress(sum(map(len, sources.values())))
  audits = {
    role: audit.audit(
      role, source, data.classes.names, with_masks=role != "unlabeled", each=progress.more
    )
    for role, source in sources.items()
  }
  print(f"{progress.done} images decoded in {progress.seconds():.1f} s")
  findings = [finding for found in audits.values() for finding in found.findings] + audit.overlaps(
    audits
  )
  left_out = tuple(Item(item.shown_path(), item.why) for item in build.left_out(options))
  findings += [Finding("left_out", "files", left_out)] if left_out else []
  if name:
    findings = [finding._replace(role=f"{name}/{finding.role}") for finding in findings]
  return Looked(name, data, audits, findings)


def refusals(
  config: Config,
  problems: checks.Problems,
  looked: Sequence[Looked],
  known: Sequence[Finding],
) -> list[Finding]:
  """Lists what training would refuse before its first step.

  These are refusals of the config and its data, besides those that concern the files of `known`.
  Starting weights are not looked at.

  Args:
    problems: those of the config that are known already.
  """
  messages = []

  def tried(call: Callable[[], Any]) -> Any:
    try:
      with _quiet():
        return call()
    except checks.InputError as error:
      messages.append(str(error))

  tried(lambda: build.check_run(config, problems))
  domains = tried(lambda: build.build_domains(config)) or _unchecked(config, looked)
  if settled := tried(lambda: settings.settle_from(config, domains[0].data)):
    config, _ = settled
    domains = build.with_config(domains, config)
  (data, *others), mesh = (domain.data for domain in domains), meshes.make_mesh()
  sizes = len(data.classes), len(data.unlabeled), [len(other.classes) for other in others]
  method = tried(lambda: build.build_method(config, *sizes))
  if method is not None:
    tried(lambda: build.build_pipelines(domains, method))
    for number, domain in enumerate(domains):
      tried(
        lambda number=number, domain=domain: build.build_evaluator(
          domain.config, domain.data, method, mesh, number
        )
      )
  of_files = [
    f"{what} {item.path}"
    for finding in known
    for item in finding.items
    for what in ("image", "mask")
  ]
  items = dict.fromkeys(item for message in messages for item in _problems(message))
  items = [item for item in items if not any(known in text for text in item for known in of_files)]
  return [Finding("not_trainable", "config", tuple(items))] if items else []


def _unchecked(config: Config, looked: Sequence[Looked]) -> list[build.Domain]:
  """Builds domains of data that training refuses.

  They serve to find what else it refuses.
  """
  return [build.Domain(name, build.config_of(config, name), data) for name, data, *_ in looked]


def _problems(message: str) -> list[Item]:
  """Splits an InputError into its problems, each with the headline above it."""
  headline, items = "", []
  for line in message.splitlines():
    line = line.strip().removeprefix("- ")
    if line.endswith(":"):
      headline = line.removesuffix(":")
    else:
      items.append(Item(headline or "error", line))
  return items


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the warnings of building, which are among the findings."""
  log = logging.getLogger("pseudoseg_jax")
  before = log.level
  log.setLevel(logging.ERROR)
  try:
    yield
  finally:
    log.setLevel(before)


def tables(audits: Mapping[str, Audit], classes: Classes) -> str:
  """Formats the roles' images and sizes, and how often each class occurs.

  The table of classes is below that of the roles.
  """
  roles = [
    ["", "images", "height x width"],
    *([role, str(len(found.paths)), _sizes(found)] for role, found in audits.items()),
  ]
  with_masks = {role: found for role, found in audits.items() if found.has_masks}
  header = [
    "class",
    *(title for role in with_masks for title in (f"{role}: pixels %", "in images")),
  ]
  rows = [header]
  for index, name in enumerate(classes.names):
    rows.append([name])
    for found in with_masks.values():
      rows[-1] += [
        f"{100 * found.pixels[index] / max(found.pixels.sum(), 1):.2f}",
        str(found.images[index]),
      ]
  rows.append(["ignored, of all"])
  for found in with_masks.values():
    rows[-1] += [f"{100 * _ignored_share(found):.2f}", ""]
  return f"\n{_aligned(roles, left=(0, 2))}\n\n{_aligned(rows, left=(0,))}\n"


def findings_text(findings: Sequence[Finding], most: int) -> str:
  """Formats every finding with at most `most` of its items.

  A last line counts the findings.
  """
  lines = []
  for finding in findings:
    what, remedy = audit.KINDS[finding.kind]
    lines.append(f"{finding.severity}: {finding.role}: {what} ({len(finding.items)})")
    lines += [
      f"    {item.path}" + (f": {item.detail}" if item.detail else "")
      for item in finding.items[:most]
    ]
    if len(finding.items) > most:
      lines.append(f"    ... and {len(finding.items) - most} more")
    lines.append(f"  -> {remedy}")
  return "\n".join([*lines, *([""] if lines else []), _verdict(findings)])


def write(
  out: pathlib.Path, config: str, looked: Sequence[Looked], findings: Sequence[Finding]
) -> None:
  """Writes report.json and the pictures, and prints their paths."""
  content = {"config": config} | as_json(looked, findings)
  report.write_atomically(
    out / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n"
  )
  written = [out / "report.json"]
  for name, data, audits, _ in looked:
    for role, found in audits.items():
      if found.has_masks and found.usable:
        written.append(out / name / f"{role}.png")
        pictures.save(examples(getattr(data, role), found, data.classes), written[-1])
    written.append(out / name / "classes.png")
    class_picture(
      {role: found for role, found in audits.items() if found.has_masks}, data.classes, written[-1]
    )
  print("\n".join(f"  {path}" for path in written))


def as_json(looked: Sequence[Looked], findings: Sequence[Finding]) -> dict[str, Any]:
  """Returns the content of report.json, except for config."""
  first, *others = (_domain_json(found) for found in looked)
  return first | {
    "errors": sum(finding.severity == "error" for finding in findings),
    "warnings": sum(finding.severity == "warning" for finding in findings),
    "domains": {found.name: content for found, content in zip(looked[1:], others, strict=True)},
    "findings": [
      {
        "severity": finding.severity,
        "kind": finding.kind,
        "role": finding.role,
        **dict(zip(("what", "remedy"), audit.KINDS[finding.kind], strict=True)),
        "items": [item._asdict() for item in finding.items],
      }
      for finding in findings
    ],
  }


def _domain_json(looked: Looked) -> dict[str, Any]:
  classes = looked.data.classes
  return {
    "split": looked.data.split,
    "classes": list(classes.names),
    "roles": {role: _role_json(found, classes) for role, found in looked.audits.items()},
  }


def _role_json(found: Audit, classes: Classes) -> dict[str, Any]:
  total = int(found.pixels.sum())
  per_class = {
    name: {
      "pixels": int(pixels),
      "share": int(pixels) / total if total else None,
      "images": int(images),
    }
    for name, pixels, images in zip(classes.names, found.pixels, found.images, strict=True)
  }
  return {
    "images": len(found.paths),
    "usable": len(found.usable),
    "sizes": [[*size, count] for size, count in found.sizes.most_common()],
    "classes": per_class if found.has_masks else None,
    "ignored_share": _ignored_share(found) if found.has_masks else None,
  }


def examples(source: Source, found: Audit, classes: Classes) -> Image.Image:
  """Draws a few random images of a role with their masks."""
  rows = np.random.default_rng(0).permutation(found.usable)[:_EXAMPLES].tolist()
  return pictures.contact_sheet(
    [source.image(row) for row in rows], [source.label(row) for row in rows], {}, classes
  )


def class_picture(audits: Mapping[str, Audit], classes: Classes, path: pathlib.Path) -> None:
  """Draws each class's share of the pixels and of the images, by role.

  The share of the images is that of the images that hold the class.
  """
  # Not pyplot: it keeps every figure alive and may look for a display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 1.2 + 0.26 * len(classes)), dpi=110, layout="constrained")
  FigureCanvasAgg(figure)
  panels = {
    "% of the pixels (logarithmic)": lambda found: found.pixels / max(found.pixels.sum(), 1),
    "% of the images hold it": lambda found: found.images / len(found.paths),
  }
  height = 0.8 / len(audits)
  for axes, (title, share) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
    for number, (role, found) in enumerate(audits.items()):
      axes.barh(
        np.arange(len(classes)) + (number - 0.5) * height, 100 * share(found), height, label=role
      )
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
  first, _ = figure.axes
  first.set_xscale("symlog", linthresh=0.01)
  first.set_yticks(np.arange(len(classes)), classes.names)
  first.set_ylim(len(classes) - 0.5, -0.5)
  figure.legend(
    *first.get_legend_handles_labels(),
    loc="outside upper right",
    ncols=2,
    fontsize=9,
    frameon=False,
  )
  png = io.BytesIO()
  figure.savefig(png, format="png")
  report.write_atomically(path, png.getvalue())


def _verdict(findings: Sequence[Finding]) -> str:
  counts = [
    sum(finding.severity == severity for finding in findings) for severity in ("error", "warning")
  ]
  words = [
    f"{count} kind{'s' * (count != 1)} of {name}"
    for count, name in zip(counts, ("error", "warning"), strict=True)
  ]
  return (
    f"{words[0]}, {words[1]}" if any(counts) else "nothing wrong: every image and mask was decoded"
  )


def _ignored_share(found: Audit) -> float:
  return found.ignored_pixels / max(int(found.pixels.sum()) + found.ignored_pixels, 1)


def _sizes(found: Audit) -> str:
  shown = ", ".join(
    f"{height} x {width} ({count})" for (height, width), count in found.sizes.most_common(3)
  )
  return shown if len(found.sizes) <= 3 else f"{shown}, and {len(found.sizes) - 3} other sizes"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
  """Formats columns of equal width, those in `left` aligned to the left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  align = [str.ljust if number in left else str.rjust for number in range(len(widths))]
  lines = (
    "  ".join(put(cell, width) for put, cell, width in zip(align, row, widths, strict=True))
    for row in rows
  )
  return "\n".join(line.rstrip() for line in lines)


def _progress(total: int) -> Progress:
  """Makes a progress display on stderr.

  It is a bar in a terminal, else a line now and then.
  """
  if not sys.stderr.isatty():
    return Progress(total, functools.partial(print, file=sys.stderr, flush=True))

  def draw(text: str) -> None:
    filled = 30 * progress.done // total
    end = "\n" if progress.done == total else ""
    print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {text} ", end=end, file=sys.stderr, flush=True)

  progress = Progress(total, draw, every_seconds=0.1)
  return progress


if __name__ == "__main__":
  command_line.leave(main)
