"""Draws the confusion matrix of a test's predictions, by the tool of the config's toolbox."""

import functools
import sys

from hat_mm.engine.cli import run_tool
from hat_mm.engine.toolbox_tools import run_toolbox_tool

if __name__ == '__main__':
    sys.exit(
        run_tool(functools.partial(run_toolbox_tool, 'confusion_matrix.py'), 'confusion_matrix.py')
    )
