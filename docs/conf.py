"""Makes a site of these pages: `pip install -e ".[docs]" && sphinx-build -W docs site`."""

import importlib.metadata
import re

project = "pseudoseg_jax"
release = importlib.metadata.version("pseudoseg_jax")
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"pseudoseg_jax {release}"
exclude_patterns = ["pictures"]
myst_heading_anchors = 3


def _include(app, name, source):
  """The first page is the README, and others too are files of the folder above this one, whose
  links are as seen from there.
  """
  above = {"index": "README.md", "changes": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
  if name in above:
    text = re.sub(
      r"\]\((?!\w+://|#)", "](../", (app.srcdir.parent / above[name]).read_text()
    ).replace("](../docs/", "](")
    for page, file in above.items():
      text = text.replace(f"](../{file}", f"]({page}.md")
    source[0] = text + source[0]


def setup(app):
  app.connect("source-read", _include)
