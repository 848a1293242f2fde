"""``python -m hat_mm PROGRAM ARGUMENTS`` runs a Python program with the repairs of compat.py.

It is for programs that do not import hat_mm before a toolbox, such as the toolboxes' own tools, and
for programs that the package ships: ``demo/shapes.py`` is found wherever hat_mm is installed.
"""

import os
import runpy
import sys
from pathlib import Path

_SHIPPED = Path(__file__).parent / '.mim'


def main(argv: list[str]) -> None:
    """Runs a program as ``python PROGRAM ARGUMENTS`` would.

    Args:
        argv: Path of the program, relative to the working directory or to what the package ships,
            and its arguments. A program is a file, or a folder with a ``__main__.py``.
    """
    places = [Path(argv[0]), _SHIPPED / argv[0]] if argv else []
    found = [path for path in places if path.is_file() or (path / '__main__.py').is_file()]
    if not found:
        why = f'{argv[0]!r} is no file' if argv else 'no program is given'
        sys.exit(f'usage: python -m hat_mm PROGRAM [ARGUMENTS] ({why})')
    program = str(found[0])
    sys.argv = [program, *argv[1:]]
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    runpy.run_path(program, run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])
