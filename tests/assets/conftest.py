"""What trained the models is in the source tree only: beside a wheel, nobody collects its tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

collect_ignore = (
    []
    if importlib.util.find_spec("kvshare_mm.assets.training")
    else [
        str(file)
        for file in Path(__file__).parent.glob("test_*.py")
        if "\nfrom kvshare_mm.assets.training" in file.read_text(encoding="utf-8")
    ]
)
