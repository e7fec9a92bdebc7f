"""Runs a benchmark: methods x seeds x data sets x label shares, each run a fresh process; tables
and plots are made from what they leave.

  python launch/benchmark.py run launch/benchmarks/photographs.py --data_root=DIR --workdir=W --workers=2
  python launch/benchmark.py run launch/benchmarks/photographs.py --data_root=DIR --workdir=W --only=leeds_butterfly/fixmatch
  python launch/benchmark.py table launch/benchmarks/photographs.py --data_root=DIR --workdir=W

or, of any config, the methods that you name (or `all`), scored on what the config evaluates on:

  python launch/benchmark.py run configs/quickstart.py --methods=supervised,pseudoseg+image_labels=1 --seeds=0,1 --workdir=W
  python launch/benchmark.py run configs/folder.py --methods=supervised,cps_cutmix+method.weight=0.5 --workdir=W --config.data.root=DIR

Every finished run is one line of JSON in launch/benchmarks/results/NAME.jsonl (of a config:
WORKDIR/NAME.jsonl), with a digest of its settings: a run is done again when its settings have
changed, and only then; one that was interrupted resumes where it was. A failed run is told with its
log and stops no other. The table holds the runs with the settings of now, and says what is missing:
`run` prints it at its end, `table` also writes it beside the results, as NAME.md, and draws it in
NAME.png. `table --check` writes nothing, and says whether NAME.md is what the results make.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import concurrent.futures
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Run:
  """config: an ml_collections config that is evaluated on val. test: overrides that evaluate on
  test instead; {}: val is all. variant: what the method is given beside images, in words; "" for
  nothing. labels: the labeled share, in words. before: configs of stages to be trained first, by
  name, in their order. In config.nets_from and config.pseudo_labels.folder of what follows, {NAME}
  is a stage's workdir, and {NAME_labels} the labels that it gives to the unlabeled images, kept to
  the image-level labels where it has some.
  """

  data_set: str
  method: str
  variant: str
  labels: str
  seed: int
  config: Any
  test: Mapping[str, str]
  before: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> str:
    """ "leeds_butterfly/pseudoseg+image-level labels/5 a class/0": unique in a benchmark, also the
    name of its folder.
    """
    return "/".join(
      filter(
        None,
        [
          self.data_set,
          self.method + f"+{self.variant}" * bool(self.variant),
          self.labels,
          str(self.seed),
        ],
      )
    )

  def digest(self) -> str:
    """Of all options of the method, and of those others that are not at their default: an option
    that a later release adds, and whose default changes nothing, leaves it as it is. Where the data
    lie is no part of it.
    """
    earlier = {name: _chosen(config) for name, config in self.before.items()}
    text = json.dumps(
      [self.data_set, _chosen(self.config), dict(self.test), *([earlier] if earlier else [])],
      sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chosen(config) -> dict[str, Any]:
  from pseudoseg_jax import config as configs

  defaults = configs.base(config.method)
  defaults.network = configs.network(config.network.name)
  chosen = configs.all_options({"method": config.method})
  chosen |= {
    key: ours for key, (ours, _) in configs.changes(config, defaults).items() if ours != "absent"
  }
  return chosen | {
    "data.root": "",
    "data.split": pathlib.PurePath(config.data.get("split", "")).name,
  }


def load(path: pathlib.Path):
  """A benchmark file as a module: `runs(data_root, workdir, seeds)` yields Run, its docstring is
  the protocol.
  """
  sys.modules.setdefault("benchmark", sys.modules[__name__])
  if str(path.parent) not in sys.path:
    sys.path.append(str(path.parent))  # one benchmark may be made of another
  spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def alone() -> list[str]:
  """The methods that learn in one run from one data set."""
  from pseudoseg_jax.methods.table import METHODS

  return [
    name
    for name in METHODS
    if name not in ("cct_domains", "ancillary", "self_correcting", "learn_pseudo")
  ]


def of_config(
  path: str, methods: str, overrides: Mapping[str, Any], seeds: list[int]
) -> Iterator[Run]:
  """Runs of one config, scored on what it evaluates on.

  Args:
    path: config file with its argument, without the method.
    methods: comma-separated, or "all" that learn in one run; "mean_teacher+convention=official"
      adds an argument of the config, "pseudoseg+method.image_labels=True" an option.
    overrides: dotted options of every config.
  """
  from pseudoseg_jax import config as configs

  file, _, argument = path.partition(":")
  for seed in seeds:
    for method in alone() if methods == "all" else methods.split(","):
      name, *extra = method.split("+")
      options = {
        key: value for key, _, value in (part.partition("=") for part in extra) if "." in key
      }
      arguments = [
        argument,
        f"method={name}",
        *(part for part in extra if part.partition("=")[0] not in options),
      ]
      config = configs.load(
        f"{file}:{','.join(filter(None, arguments))}", {**overrides, **options, "seed": seed}
      )
      yield Run(pathlib.Path(file).stem, name, "+".join(extra), argument, seed, config, {})


def read_results(path: pathlib.Path) -> list[dict]:
  """The lines of a results file; one that a kill cut short is told and left out."""
  results = []
  for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
    try:
      results.append(json.loads(line))
    except json.JSONDecodeError:
      print(f"{path}, line {number}: no JSON, left out", file=sys.stderr)
  return results


def newest(results: list[dict], runs: list[Run]) -> dict[str, dict]:
  """key -> the newest result of each run with the settings of now."""
  digests = {run.key: run.digest() for run in runs}
  return {
    result["key"]: result for result in results if digests.get(result["key"]) == result["digest"]
  }


# --- one run


def do_one(run: Run, workdir: pathlib.Path) -> dict:
  """Trains and scores a run in this process, and returns its result."""
  import jax

  import pseudoseg_jax
  from pseudoseg_jax import export_labels

  folder, begun = workdir / "runs" / run.digest(), time.time()
  earlier = folder.with_suffix(".minutes")  # of processes that were stopped
  before = float(earlier.read_text()) if earlier.exists() else 0.0
  atexit.register(lambda: earlier.write_text(f"{before + (time.time() - begun) / 60}"))
  places: dict[str, str] = {}
  for name, config in run.before.items():
    places[name] = f"{folder}_{name}"
    if not pseudoseg_jax.train(_placed(config, places), places[name])["finished"]:
      raise SystemExit("stopped in an earlier stage")
    if f"{{{name}_labels}}" in "".join(
      later.pseudo_labels.folder for later in (*run.before.values(), run.config)
    ):
      places[f"{name}_labels"] = f"{folder}_{name}_labels"
      out = pathlib.Path(places[f"{name}_labels"])
      export_labels.export_labels(
        pathlib.Path(places[name]), out, image_labels=bool(config.data.image_labels)
      )
  trained = pseudoseg_jax.train(_placed(run.config, places), folder)
  if not trained["finished"]:
    raise SystemExit(f"stopped by {trained['stopped_by']}")
  last, best = trained["last"], trained["best"]

  def on_test(checkpoint):
    scores = pseudoseg_jax.evaluate(folder, checkpoint=checkpoint, overrides=dict(run.test))
    return {name: round(100 * float(score.miou), 2) for name, score in scores.items()}, scores

  val = {name: round(100 * score["miou"], 2) for name, score in last["predictors"].items()}
  headline = next(iter(val))
  best_val = {"step": best["step"], "val": round(100 * best["predictors"][headline]["miou"], 2)}
  test, iou = {}, list(last["predictors"][headline]["iou"].values())
  if run.test:
    test, scores = on_test("last")
    iou = scores[headline].iou.tolist()
    best_val["test"] = (
      test[headline] if best["step"] == last["step"] else on_test("best")[0][headline]
    )
  return {
    "key": run.key,
    "digest": run.digest(),
    "data_set": run.data_set,
    "method": run.method,
    "variant": run.variant,
    "labels": run.labels,
    "seed": run.seed,
    "steps": last["step"],
    "headline": headline,
    "test": test,
    "val": val,
    "best_val": best_val,
    "iou": [None if value is None or math.isnan(value) else round(100 * value, 1) for value in iou],
    "minutes": round(before + (time.time() - begun) / 60, 1),
    "date": datetime.date.today().isoformat(),
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "pseudoseg_jax": pseudoseg_jax.__version__,
  }


def _placed(config, places: Mapping[str, str]):
  """The config with the places of earlier stages in it."""
  config = config.copy_and_resolve_references()
  config.nets_from = config.nets_from.format_map(places)
  config.pseudo_labels.folder = config.pseudo_labels.folder.format_map(places)
  return config


def _environment(core: int | None, workdir: pathlib.Path) -> dict[str, str]:
  """One core for a run where several run side by side; all share what the compiler made."""
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
  }
  if core is None:
    return os.environ | cache
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
  threads = dict.fromkeys(
    ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1"
  )
  return os.environ | cache | threads | {"XLA_FLAGS": flags.strip()}


def _start(known, run: Run, core: int | None, children: set) -> dict | None:
  """Runs one in a process of its own; its result, None where it failed."""
  folder = known.workdir / "runs" / run.digest()
  folder.mkdir(parents=True, exist_ok=True)
  told, log = folder.with_suffix(".json"), folder.with_suffix(".log")
  command = [
    sys.executable,
    __file__,
    "one",
    *known.again,
    f"--seeds={run.seed}",
    f"--only=^{re.escape(run.key)}$",
  ]
  with log.open("a") as file:
    pinned = (
      {"preexec_fn": lambda: os.sched_setaffinity(0, {core})}
      if core is not None and hasattr(os, "sched_setaffinity")
      else {}
    )
    child = subprocess.Popen(
      command, env=_environment(core, known.workdir), stdout=file, stderr=file, **pinned
    )
  children.add(child)
  code = child.wait()
  children.discard(child)
  if code or not told.exists():
    print(f"FAILED  {run.key}: exit status {code}, see {log}", flush=True)
    return None
  return json.loads(told.read_text())


def do_run(known, runs: list[Run]) -> int:
  """Runs what has no result yet; the number of those that failed."""
  done = newest(read_results(known.results), runs)
  left = [run for run in runs if run.key not in done]
  print(f"{len(runs)} runs, {len(runs) - len(left)} done, {len(left)} to do", flush=True)
  allowed = (
    sorted(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else list(range(os.cpu_count() or 1))
  )
  cores = collections.deque(
    [allowed[index % len(allowed)] for index in range(known.workers)]
    if known.workers > 1
    else [None]
  )
  lock, children, failed, stopping = threading.Lock(), set(), [], threading.Event()

  def work(number_and_run):
    number, run = number_and_run
    if stopping.is_set():
      return
    with lock:
      core = cores.popleft()
    result = _start(known, run, core, children)
    with lock:
      cores.append(core)
      if result is None:
        failed.append(run.key)
        return
      known.results.parent.mkdir(parents=True, exist_ok=True)
      with known.results.open("a") as file:
        file.write(json.dumps(result) + "\n")
      print(
        f"{number}/{len(left)}  {run.key}: {scored(result)} {score(result):.1f}  ({result['minutes']:.1f} min)",
        flush=True,
      )

  with concurrent.futures.ThreadPoolExecutor(max(known.workers, 1)) as pool:
    try:
      list(pool.map(work, enumerate(left, start=1)))
    except KeyboardInterrupt:
      stopping.set()
      for child in list(children):
        child.terminate()
      raise
  return len(failed)


# --- tables


def scored(result: Mapping[str, Any]) -> str:
  """The split that a result is reported on."""
  return "test" if result["test"] else "val"


def score(result: Mapping[str, Any]) -> float:
  """mIoU in % of the method's first predictor after the last step, on the split that `scored`
  names.
  """
  return result[scored(result)][result["headline"]]


def _mean(values: list[float]) -> str:
  return f"{statistics.mean(values):.1f}" + (
    f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
  )


def _groups(
  runs: list[Run], done: Mapping[str, dict]
) -> dict[tuple[str, str], dict[str, dict[int, dict]]]:
  """(data set, labels) -> method with its variant -> seed -> result, of the runs that are done."""
  groups = collections.defaultdict(lambda: collections.defaultdict(dict))
  for run in runs:
    if run.key in done:
      groups[run.data_set, run.labels][run.method + f" + {run.variant}" * bool(run.variant)][
        run.seed
      ] = done[run.key]
  return groups


def _title(data_set: str, labels: str) -> str:
  """labels: "5 a class", "1_8" or the argument of a config."""
  return (
    f"{data_set}, {labels}"
    if "=" in labels
    else data_set + f", labels: {labels.replace('_', '/')}" * bool(labels)
  )


def table(protocol: str, runs: list[Run], done: Mapping[str, dict]) -> str:
  """One section a data set and label share: mean, standard deviation and number of seeds, and what
  that is above supervised.

  The difference is taken seed by seed, over the seeds that both have.
  """
  lines = [protocol.strip(), "", f"{len(done)} of {len(runs)} runs are done."]
  for (data_set, labels), methods in _groups(runs, done).items():
    baseline = {seed: score(result) for seed, result in methods.get("supervised", {}).items()}
    split = scored(next(iter(next(iter(methods.values())).values())))
    lines += [
      "",
      f"## {_title(data_set, labels)}",
      "",
      f"| method | seeds | {split} mIoU % | above supervised | at the best val | minutes |",
      "|---|---|---|---|---|---|",
    ]
    order = sorted(methods.items(), key=lambda item: -statistics.mean(map(score, item[1].values())))
    for name, by_seed in order:
      above = [
        score(result) - baseline[seed] for seed, result in by_seed.items() if seed in baseline
      ]
      gain = "-" if name == "supervised" or not above else re.sub(r"^(?=\d)", "+", _mean(above))
      best = statistics.mean(result["best_val"][split] for result in by_seed.values())
      minutes = statistics.mean(result["minutes"] for result in by_seed.values())
      scores = _mean([score(result) for result in by_seed.values()])
      lines.append(f"| {name} | {len(by_seed)} | {scores} | {gain} | {best:.1f} | {minutes:.0f} |")
  return "\n".join(lines) + "\n"


def draw(runs: list[Run], done: Mapping[str, dict], path: pathlib.Path) -> None:
  """A PNG: for each data set and label share a row a method, a dot a seed, a bar at their mean;
  dashed: supervised.
  """
  from matplotlib.figure import Figure

  groups = {
    group: {
      name: [score(result) for result in by_seed.values()] for name, by_seed in methods.items()
    }
    for group, methods in _groups(runs, done).items()
  }
  rows = [len(methods) for methods in groups.values()]
  figure = Figure(figsize=(8, 0.9 * len(rows) + 0.27 * sum(rows)), dpi=110, layout="constrained")
  all_axes = figure.subplots(
    len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": [count + 1 for count in rows]}
  )[:, 0]
  for axes, ((data_set, labels), methods) in zip(all_axes, groups.items(), strict=True):
    order = sorted(methods, key=lambda name: statistics.mean(methods[name]))
    for place, name in enumerate(order):
      color = "0.35" if name == "supervised" else "tab:blue"
      axes.plot(
        methods[name], [place] * len(methods[name]), "o", color=color, markersize=4, alpha=0.6
      )
      axes.plot(
        statistics.mean(methods[name]), place, "|", color=color, markersize=13, markeredgewidth=2
      )
    if "supervised" in methods:
      axes.axvline(
        statistics.mean(methods["supervised"]), color="0.35", linestyle="--", linewidth=1
      )
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_title(_title(data_set, labels), fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  all_axes[-1].set_xlabel(f"{scored(next(iter(done.values())))} mIoU %, a dot a seed")
  figure.savefig(path)


def _parse(arguments=None):
  from pseudoseg_jax.command_line import parse_with_overrides

  arguments = sys.argv[1:] if arguments is None else list(arguments)
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument(
    "action", choices=("run", "table", "one"), help="'one' is what 'run' starts for each"
  )
  parser.add_argument(
    "benchmark",
    help="a file of launch/benchmarks; with --methods a config, as --config takes it, without the method",
  )
  parser.add_argument(
    "--data_root", default="", help="the folder that holds a benchmark's data sets"
  )
  parser.add_argument(
    "--methods",
    default="",
    help="of a config: comma-separated, or all; NAME+KEY=VALUE sets an argument or option",
  )
  parser.add_argument(
    "--workdir",
    required=True,
    type=pathlib.Path,
    help="for checkpoints and logs; may be deleted when all is done",
  )
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    help="default: results/NAME.jsonl beside the benchmark, WORKDIR/NAME.jsonl of a config",
  )
  parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
  parser.add_argument(
    "--only", action="append", default=[], help="runs whose key this pattern finds; may be repeated"
  )
  parser.add_argument(
    "--workers",
    default=1,
    type=int,
    help="runs side by side, each on a core of its own where more than one",
  )
  parser.add_argument(
    "--check",
    action="store_true",
    help="of table: exit with 1 where the written table is another one",
  )
  known, overrides = parse_with_overrides(parser, arguments)
  if bool(known.data_root) == bool(known.methods):
    parser.error(
      "a benchmark file needs --data_root=DIR; a config needs --methods=NAME,NAME and has --config.data.root=DIR"
    )
  if overrides and not known.methods:
    parser.error(
      "--config.KEY=VALUE is for a config with --methods; the settings of a benchmark file stand in it"
    )
  name = pathlib.Path(known.benchmark.partition(":")[0] if known.methods else known.benchmark)
  results = known.workdir if known.methods else name.parent / "results"
  known.results = known.results or results / f"{name.stem}.jsonl"
  # What a process for one of the runs is started with.
  known.again = [
    known.benchmark,
    f"--workdir={known.workdir}",
    f"--data_root={known.data_root}",
    f"--methods={known.methods}",
  ]
  known.again += [f"--config.{key}={value}" for key, value in overrides.items()]
  return known, overrides


def _runs(known, overrides: Mapping[str, str]) -> tuple[str, list[Run]]:
  """The protocol in words, and the runs that are asked for."""
  seeds = [int(seed) for seed in known.seeds.split(",")]
  if known.methods:
    options = "".join(
      f" --config.{key}={value}" for key, value in overrides.items() if key != "data.root"
    )
    protocol = f"`{known.benchmark}{options}`; mIoU after the last step on what the config evaluates on, here called val."
    runs = of_config(known.benchmark, known.methods, overrides, seeds)
  else:
    benchmark = load(pathlib.Path(known.benchmark))
    protocol, runs = (
      benchmark.__doc__,
      benchmark.runs(pathlib.Path(known.data_root), known.workdir, seeds),
    )
  return protocol, [
    run
    for run in runs
    if not known.only or any(re.search(pattern, run.key) for pattern in known.only)
  ]


def main(arguments=None) -> int:
  known, overrides = _parse(arguments)
  protocol, runs = _runs(known, overrides)
  if not runs:
    print(f"no run fits {known.only}", file=sys.stderr)
    return 2
  if known.action == "one":
    result = do_one(runs[0], known.workdir)
    (known.workdir / "runs" / f"{runs[0].digest()}.json").write_text(json.dumps(result))
    return 0
  failed = 0
  if known.action == "run":
    # Both, whatever the shell has made of them: one that starts this in the background has SIGINT
    # ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.default_int_handler)
    failed = do_run(known, runs)
  done = newest(read_results(known.results), runs)
  text, written = table(protocol, runs, done), known.results.with_suffix(".md")
  if known.check:
    same = written.exists() and written.read_text() == text
    print(
      f"{written} is {'what the results make' if same else 'another table: make it anew without --check'}"
    )
    return 0 if same else 1
  if known.action == "table":
    written.write_text(text)
    if done:
      draw(runs, done, known.results.with_suffix(".png"))
  print(text)
  return 1 if failed else 0


if __name__ == "__main__":
  from pseudoseg_jax import command_line

  sys.exit(command_line.run(main, again="the same command goes on there"))
