"""README, docs and notebooks: every command, flag, option, config, file and link that they name
exists.
"""

import ast
import pathlib
import re
import shlex
import subprocess
import sys

import nbformat
import pytest
from options import known_options

from pseudoseg_jax import config as configs

ROOT = pathlib.Path(__file__).parents[1]
_OF_THE_SITE = ("index", "changes", "contributing")
PAGES = [
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  *sorted(page for page in (ROOT / "docs").glob("*.md") if page.stem not in _OF_THE_SITE),
]
TEXTS = [*PAGES, *sorted((ROOT / "launch" / "notebooks").glob("*.ipynb"))]


def named(path):
  return path.stem


def text_of(path):
  if path.suffix == ".ipynb":
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
  return path.read_text()


def code_of(text):
  """What stands in fences and between backquotes, a command with continued lines in one."""
  fences = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
  rest = re.sub(r"^```\w*\n(.*?)^```", "", text, flags=re.MULTILINE | re.DOTALL)
  return [
    *"\n".join(fences).replace("\\\n", " ").splitlines(),
    *re.findall(r"`([^`]+)`", rest.replace("\n", " ")),
  ]


def commands_of(text):
  """(file of a command, its words after it), of every command of ours."""
  of_cells = [
    line for line in text.replace("\\\n", " ").splitlines() if line.startswith(("!", "%"))
  ]
  for line in [*code_of(text), *of_cells]:
    for program, words in re.findall(
      r"python (-m pseudoseg_jax\.\w+|launch/\w+\.py)([^|&#;]*)", line
    ):
      module = (
        program.removeprefix("-m ").replace(".", "/") + ".py"
        if program.startswith("-m")
        else program
      )
      yield ROOT / module, shlex.split(words, comments=True)


def flags_in(command):
  return set(re.findall(r'"(--\w+)"', command.read_text()))


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_commands_and_flags_exist(path):
  for command, words in commands_of(text_of(path)):
    assert command.is_file(), command
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    own = {flag for flag in flags if not flag.startswith("--config.")}
    accepted = flags_in(command) | {"--help"}
    if command.name == "pipeline.py":  # --STAGE.KEY=VALUE
      own = {flag for flag in own if "." not in flag}
    elif (
      command.parent.name == "launch"
      and "pseudoseg_jax.main" in command.read_text()
      and "parse_known_args" in command.read_text()
    ):
      accepted |= flags_in(ROOT / "pseudoseg_jax" / "main.py")
    elif command.name == "prepare.py":  # a flag for each archive
      shown = subprocess.run(
        [sys.executable, command, words[0], "--help"], capture_output=True, text=True, check=True
      ).stdout
      accepted = set(re.findall(r"--\w+", shown))
    assert own <= accepted, (command, own - accepted)


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_options_exist(path):
  text, known = text_of(path), known_options()
  groups = {option.split(".")[0] for option in known if "." in option}
  given = {
    option.rstrip(".")
    for option in re.findall(r"--config\.([\w.]+)", text)
    if not re.fullmatch(r"(other_data\..*|KEY)", option)
  }
  quoted = {
    option
    for option in re.findall(r"[`\"](\w+(?:\.\w+)+)(?:=[^`]*`|[`\"])", text)
    if option.split(".")[0] in groups
  }
  quoted -= {
    f"{group}.{suffix}"
    for group in groups
    for suffix in ("py", "csv", "json", "txt", "md", "safetensors")
  }
  assert not (quoted | given) - known


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_configs_can_be_made(path):
  plain = re.sub(r",?\w+=\{\w+\}", "", text_of(path))  # without the arguments that are parameters
  for text in set(re.findall(r"configs/\w+\.py(?::[\w=,]*\w)?", plain)):
    if "pipelines.py" not in text:
      configs.load(text)


def anchors_of(page):
  """The links to headings that GitHub makes."""
  headings = re.findall(
    r"^#+ (.*)$",
    re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL),
    flags=re.MULTILINE,
  )
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_links_lead_somewhere(path):
  for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
    if "://" not in link:
      place, _, anchor = link.partition("#")
      target = (path.parent / place).resolve() if place else path
      assert target.exists() and target.is_relative_to(ROOT), link
      assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_found_from_the_readme():
  linked = {
    (ROOT / link.partition("#")[0]).resolve()
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
  }
  assert not [page.name for page in PAGES[1:] if page not in linked]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_python_can_be_parsed(path):
  for block in re.findall(
    r"^```python\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL
  ):
    ast.parse(block)


def test_the_docs_are_a_site_without_a_warning(tmp_path):
  command = [
    sys.executable,
    "-m",
    "sphinx",
    "-q",
    "-W",
    "--keep-going",
    "-d",
    tmp_path / "doctrees",
    ROOT / "docs",
    tmp_path / "site",
  ]
  made = subprocess.run(command, capture_output=True, text=True, check=False)
  assert made.returncode == 0, made.stderr
  first = (tmp_path / "site" / "index.html").read_text()
  assert 'href="your_data.html"' in first and "Many images, few pixel labels" in first
