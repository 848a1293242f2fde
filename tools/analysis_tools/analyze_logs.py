"""Draws the curves of trainings from their logs, ``work_dirs/…/vis_data/scalars.json``.

The logs of all toolboxes have one format; this is the tool of mmdet.
"""

import functools
import sys

from hat_mm.engine.cli import run_tool
from hat_mm.engine.toolbox_tools import run_toolbox_tool

if __name__ == '__main__':
    run = functools.partial(run_toolbox_tool, 'analyze_logs.py', scope='mmdet')
    sys.exit(run_tool(run, 'analyze_logs.py'))
