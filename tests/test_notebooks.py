"""The notebooks: stripped, with names that exist, and executed as a person does, from a fresh
kernel, on small settings.
"""

import ast
import json
import pathlib
import re
import sys

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from pseudoseg_jax import build, config as configs, make_data

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "launch" / "notebooks").glob("*.ipynb"))
SCENES = [
  "background",
  *(
    f"{texture}_{shape}"
    for shape in ("disc", "cross")
    for texture in ("striped", "checked", "speckled")
  ),
]


def read(name):
  return nbformat.read(ROOT / "launch" / "notebooks" / f"{name}.ipynb", as_version=4)


def named(path):
  return path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_is_valid_and_stripped(path):
  book = nbformat.read(path, as_version=4)
  nbformat.validate(book)
  assert (book.nbformat, book.nbformat_minor) == (4, 5)
  assert path.read_text() == nbformat.writes(book, indent=1).rstrip("\n") + "\n"
  assert book.metadata.kernelspec.name == "python3" and set(book.metadata) == {
    "kernelspec",
    "language_info",
  }
  assert len({cell.id for cell in book.cells}) == len(book.cells)
  assert [cell.id for cell in book.cells if "parameters" in cell.metadata.get("tags", [])] == [
    "parameters"
  ]
  for cell in book.cells:
    assert set(cell.metadata) <= {"tags"}
    if cell.cell_type == "code":
      assert cell.execution_count is None and cell.outputs == []


# --- every name exists ----------------------------------------------------------------------------


def plain_python(source):
  """A cell without its lines for the shell and for IPython, which stand for `pass`."""
  return re.sub(r"^( *)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


def python_of(path):
  """The code of a notebook, or of a page's blocks."""
  if path.suffix == ".ipynb":
    return "\n".join(
      plain_python(cell.source)
      for cell in nbformat.read(path, as_version=4).cells
      if cell.cell_type == "code"
    )
  return "\n".join(blocks(path))


def blocks(page):
  return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def imported(tree):
  """What the code imports from the package, by name."""
  nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
  scope = {}
  exec("\n".join(text for text in map(ast.unparse, nodes) if "pseudoseg_jax" in text), scope)
  return scope


PAGES = [*NOTEBOOKS, ROOT / "docs" / "notebooks.md"]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_what_is_taken_from_the_package_exists(path):
  tree = ast.parse(python_of(path))
  names = imported(tree)
  used = [
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in names
  ]
  assert "pseudoseg_jax" in names and used
  assert not [ast.unparse(node) for node in used if not hasattr(names[node.value.id], node.attr)]


# --- executed -------------------------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  """The name of a kernel of this very Python, which sees one device, as a person's does."""
  folder = tmp_path / "jupyter" / "kernels" / "this_python"
  folder.mkdir(parents=True)
  command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
  (folder / "kernel.json").write_text(
    json.dumps({"argv": command, "display_name": "this Python", "language": "python"})
  )
  monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  for name in ("XLA_FLAGS", "NPROC"):  # of conftest.py
    monkeypatch.delenv(name, raising=False)
  # a few steps take less time than compiling them well.
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  return "this_python"


def run(book, kernel, folder):
  NotebookClient(
    book, timeout=600, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}
  ).execute()
  return {cell.id: cell for cell in book.cells if cell.cell_type == "code"}


def execute(name, kernel, folder, **parameters):
  """Runs a notebook in `folder` with other parameters, set behind its own; its code cells by id."""
  book = read(name)
  place = next(index for index, cell in enumerate(book.cells) if cell.id == "parameters")
  known = {
    node.id for node in ast.walk(ast.parse(book.cells[place].source)) if isinstance(node, ast.Name)
  }
  assert parameters.keys() <= known
  values = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
  book.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
  return run(book, kernel, folder)


def shown(cell, kind):
  """What a cell displays of a MIME type."""
  return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def printed(cell):
  return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def assert_trained(cell, workdir, steps):
  """A run whose progress stands in one display, with its end in it, and not in lines."""
  (display,) = [html for html in shown(cell, "text/html") if "<progress" in html]
  assert (
    "value='1.0000'" in display
    and f"step {steps}/{steps}" in display
    and "data:image/png;base64" in display
  )
  assert (workdir / "log.txt").read_text().count(f"/{steps} (") > 1  # so often it was updated
  assert (
    f"/{steps} (" not in printed(cell)
    and [output.output_type for output in cell.outputs].count("display_data") == 1
  )
  assert json.loads((workdir / "results.json").read_text())["last"]["step"] == steps


def assert_table(cell, names, *headings):
  tables = [html for html in shown(cell, "text/html") if "mean IoU" in html]
  assert tables and all(name in tables[-1] for name in [*names, *headings])


def test_the_quickstart_runs(kernel, tmp_path):
  workdir = tmp_path / "runs"
  cells = execute(
    "quickstart", kernel, tmp_path, STEPS=3, SCENES=12, LABELED=4, EVALUATED=4, WORKDIR=str(workdir)
  )
  assert_trained(cells["train"], workdir / "pseudoseg", 3)
  assert_trained(cells["baseline"], workdir / "supervised", 3)
  assert_table(cells["results"], SCENES, "student, last", "student, best")
  assert_table(cells["evaluate"], SCENES, "flip")
  assert_table(cells["compare"], SCENES, "pseudoseg", "supervised")
  assert [
    len(shown(cells[name], "image/png")) for name in ("scenes", "overlays", "predict", "panels")
  ] == [1, 1, 3, 1]
  assert "Predictor &#x27;student&#x27;" in shown(cells["load"], "text/html")[0]
  assert not [cell.id for cell in cells.values() if "Traceback" in printed(cell)]


@pytest.mark.slow
def test_own_data_runs(kernel, tmp_path):
  workdir = tmp_path / "runs"
  sizes = {"PHOTOS": 12, "LABELED": 4, "EVALUATED": 3, "STEPS": 4, "CROP": 33}
  cells = execute("own_data", kernel, tmp_path, WORKDIR=str(workdir), **sizes)
  for name, cell in (("supervised", "supervised"), ("cutmix_seg", "method")):
    assert_trained(cells[cell], workdir / name, 4)
  classes = ["background", "striped", "checked", "speckled"]
  assert_table(cells["compare"], classes, "supervised", "cutmix_seg")
  assert_table(cells["arrays"], classes, "teacher, last")
  pictures = {"photos": 1, "check": 2, "side-by-side": 1, "predict": 2, "export": 3}
  assert {name: len(shown(cells[name], "image/png")) for name in pictures} == pictures
  assert "nothing wrong" in printed(cells["check"])
  unlabeled = {f"IMG_{row:04d}" for row in range(7, 12)}
  assert {path.stem for path in (workdir / "labels" / "labels").iterdir()} == unlabeled
  assert json.loads((workdir / "labels" / "manifest.json").read_text())["images"] == 5


def test_own_data_makes_a_folder_of_the_pets(tmp_path, monkeypatch):
  """All but the download: a stand-in for TensorFlow Datasets' images, of odd sizes."""
  random = np.random.default_rng(0)
  images = [random.integers(0, 256, (21 + row, 32, 3), np.uint8) for row in range(6)]
  masks = [random.choice(np.array([0, 1, 2, 255], np.uint8), image.shape[:2]) for image in images]
  opened = []

  def stand_in(data):
    opened.append((data.dataset, data.split))
    return make_data(
      images, masks, ["background", "cat", "dog"], evaluated=([images[0] // 2], [masks[0]])
    )

  cells = {cell.id: cell.source for cell in read("own_data").cells}
  scope = {}
  exec(plain_python(cells["parameters"]), scope)
  scope |= {"DOWNLOAD": True, "PHOTOS": 5, "LABELED": 2, "EVALUATED": 1, "WORKDIR": str(tmp_path)}
  with monkeypatch.context() as patched:
    patched.setattr(build, "build_data", stand_in)
    exec(cells["folder"], scope)
  assert opened == [("oxford_iiit_pet", "full")]
  data = build.build_data(
    configs.frozen(configs.load("configs/folder.py", {"data.root": str(tmp_path / "photos")})).data
  )
  assert [len(source) for source in (data.labeled, data.unlabeled, data.evaluated)] == [2, 2, 1]
  assert data.classes.names == ("background", "cat", "dog")
  for row in range(2):
    np.testing.assert_array_equal(data.labeled.label(row), masks[row][::2, ::2])
    assert data.labeled.image(row).shape[:2] == data.labeled.label(row).shape


@pytest.mark.slow
def test_the_code_of_the_page_runs(kernel, tmp_path):
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(
    tmp_path / "photo.jpg"
  )
  sources = [block.replace("200", "4") for block in blocks(ROOT / "docs" / "notebooks.md")]
  sources.append(
    "print(ids.shape, (ids == same).all(), data.split, results['last']['step'], *sorted(scores))"
  )
  cells = [
    nbformat.v4.new_code_cell(source, id=f"block{number}") for number, source in enumerate(sources)
  ]
  done = run(nbformat.v4.new_notebook(cells=cells), kernel, tmp_path)
  assert printed(done[cells[-1].id]) == "(40, 50) True 4 labeled, 2 unlabeled 4 student teacher\n"
  assert json.loads((tmp_path / "runs" / "first" / "results.json").read_text())["last"]["step"] == 4
