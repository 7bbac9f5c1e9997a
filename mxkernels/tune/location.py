"""Where tables lie."""

from __future__ import annotations

import os
import re
from pathlib import Path

VARIABLE = "MXKERNELS_CACHE"
SHIPPED = Path(__file__).parent / "configs"


def cache_directory() -> Path | None:
    """The user's: what the environment variable MXKERNELS_CACHE names, or else the platform's place for caches; None
    if platformdirs, which knows that place, is not installed."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return None
    return user_cache_path("mxkernels", appauthor=False)


def table_name(gpu: str) -> str:
    """The file of a GPU: `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def tables_in(directory: Path | None) -> list[Path]:
    """The tables of a directory, by name; none if it is not there."""
    return sorted(directory.glob("*.json")) if directory else []
