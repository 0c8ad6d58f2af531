"""Where the library keeps what it downloads and decodes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder ADVALIGN_CACHE names, or the operating system's place for caches; it need not exist yet."""
    import pooch

    return Path(os.environ.get("ADVALIGN_CACHE") or pooch.os_cache("advalign"))
