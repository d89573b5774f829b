"""Lets type checkers see a development install, whose folders are mapped by a finder of Python's.

They read the package ``kvshare_mm-stubs`` (PEP 561), whose every ``.pyi`` is a link to a module of
the source tree. Nothing else reads it.
"""

import shutil
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent
STUBS = Path(sysconfig.get_path("purelib"), "kvshare_mm-stubs")
FOLDERS = {".": "kvshare_mm"} | {name: name for name in ("apps", "assets", "kernels", "modalities")}

shutil.rmtree(STUBS, ignore_errors=True)
for package, folder in FOLDERS.items():
    for module in (SOURCES / folder).rglob("*.py"):
        link = STUBS / package / module.relative_to(SOURCES / folder).with_suffix(".pyi")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(module)
