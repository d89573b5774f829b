"""The pages as a site: `make docs`. They stay where their code is, to be read beside it."""

project = html_title = "KVShare-MM"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "docs/*.md",
    *(f"{part}/**.md" for part in ("apps", "kvshare_mm", "kernels", "modalities")),
]
myst_heading_anchors = 4
# Links to code: `tests/test_docs.py` follows every link.
suppress_warnings = ["myst.xref_missing"]
html_theme = "furo"
