"""``python -m hat_mm PROGRAM ARGUMENTS`` runs a Python program after the repairs of compat.py.

For programs that do not import hat_mm before a toolbox, such as the toolboxes' own tools.
"""

import os
import runpy
import sys


def main(argv: list[str]) -> None:
    """Runs a program as ``python PROGRAM ARGUMENTS`` would.

    Args:
        argv: Path of the program and its arguments.
    """
    if not argv or not os.path.isfile(argv[0]):
        found = f'{argv[0]!r} is no file' if argv else 'no program is given'
        sys.exit(f'usage: python -m hat_mm PROGRAM [ARGUMENTS] ({found})')
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])
