"""Train a detector, segmentor or classifier with a config of mmdet, mmseg or mmpretrain."""

import sys

from hat_mm.engine.cli import run_tool, train

if __name__ == '__main__':
    sys.exit(run_tool(train, 'train.py'))
