"""Test a checkpoint with a config of mmdet, mmseg or mmpretrain."""

import sys

from hat_mm.engine.cli import run_tool, test

if __name__ == '__main__':
    sys.exit(run_tool(test, 'test.py'))
