"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces ``path`` if nothing fails.

    Yields:
        A path in the same folder with the same suffix. A link is followed.
    """
    path = Path(path).resolve()
    part = path.with_name(f'.{secrets.token_hex(4)}.{path.name}')
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
