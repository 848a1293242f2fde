"""Train a detector, segmentor or classifier from a config of mmdet, mmseg or mmpretrain."""

import sys

from hat_mm.engine.cli import run_tool, train

if __name__ == '__main__':
    sys.exit(run_tool(train, 'train.py'))
