"""Calls the tools that the toolboxes ship, with hat_mm's repairs in place."""

import runpy
import sys
from pathlib import Path

from hat_mm import compat

from .cli import UserError, read_config


def run_toolbox_tool(name: str, scope: str | None = None) -> None:
    """Runs a tool of a toolbox with the arguments of this process.

    Args:
        name: File of the tool, such as ``'confusion_matrix.py'``.
        scope: The toolbox; None for that of the config, which is the first argument.

    Raises:
        UserError: There is no config, or its toolbox has no such tool.
    """
    if scope is None:
        if len(sys.argv) < 2 or sys.argv[1].startswith('-'):
            raise UserError(
                f'{name} CONFIG …: the toolbox of the config has the tool; `{name} CONFIG --help` '
                'shows its arguments',
                status=2,
            )
        scope = str(read_config(sys.argv[1]).default_scope)
    toolbox = compat.require(scope)
    found = sorted(Path(str(toolbox.__file__)).parent.glob(f'.mim/tools/**/{name}'))
    if not found:
        raise UserError(f'{scope} has no tool {name}, or was installed without its tools')
    sys.argv[0] = str(found[0])
    runpy.run_path(str(found[0]), run_name='__main__')
