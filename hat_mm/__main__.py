"""``python -m hat_mm PROGRAM ARGUMENTS`` runs a Python program after the repairs of compat.py.

For programs that do not import hat_mm before a toolbox, such as the toolboxes' own tools, and for
those that come with the package: ``demo/shapes.py`` is found wherever hat_mm is installed.
"""

import os
import runpy
import sys
from pathlib import Path

_SHIPPED = Path(__file__).parent / '.mim'


def main(argv: list[str]) -> None:
    """Runs a program as ``python PROGRAM ARGUMENTS`` would.

    Args:
        argv: Path of the program, relative to the working directory or to what comes with the
            package, and its arguments.
    """
    if argv and not os.path.exists(argv[0]) and (_SHIPPED / argv[0]).is_file():
        argv = [str(_SHIPPED / argv[0]), *argv[1:]]
    if not argv or not os.path.isfile(argv[0]):
        found = f'{argv[0]!r} is no file' if argv else 'no program is given'
        sys.exit(f'usage: python -m hat_mm PROGRAM [ARGUMENTS] ({found})')
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])
