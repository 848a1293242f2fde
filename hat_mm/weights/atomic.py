"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a file beside ``path`` to write into, which takes its name if nothing fails.

    A link is followed, and the mode of an existing file stays.

    Yields:
        An empty file in the same folder, whose name ends as that of ``path`` does.

    Raises:
        OSError: It cannot be written; the error names ``path``.
    """
    path = Path(path)
    target = path.resolve()
    part = target.with_name(f'.{secrets.token_hex(4)}.{target.name}')
    try:
        part.touch(exist_ok=False)
        mode = (target if target.exists() else part).stat().st_mode
        yield part
        with open(part, 'rb') as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        os.replace(part, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)
