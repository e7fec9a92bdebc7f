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
  """The first page is the README, and the changes are CHANGELOG.md, whose links are as seen from the folder above this one."""
  above = {"index": "README.md", "changes": "CHANGELOG.md"}
  if name in above:
    text = (app.srcdir.parent / above[name]).read_text()
    text = re.sub(r"\]\((?!\w+://|#)", "](../", text).replace("](../docs/", "](").replace("](../CHANGELOG.md", "](changes.md")
    source[0] = text + source[0]


def setup(app):
  app.connect("source-read", _include)
