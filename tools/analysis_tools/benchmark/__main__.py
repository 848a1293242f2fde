"""Compares models, and measures how the cost of attention grows.

commands:
  models     time, memory and FLOPs of backbones and whole models
  attention  one block of hierarchical attention beside one of full attention, on growing maps
  report     tables and plots again, from an earlier benchmark.json
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import attention
import models
import report

from hat_mm.engine.cli import run_tool


def main(argv: list[str] | None = None) -> None:
    """Runs a command."""
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser('benchmark', description=__doc__, **style)
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    command = commands.add_parser('models', description=models.DESCRIPTION, **style)
    models.add_arguments(command, run=models.run)
    command = commands.add_parser('attention', description=attention.__doc__, **style)
    models.add_arguments(
        command,
        run=models.run,
        candidates=[f'attention/{form}' for form in attention.FORMS],
        size=attention.SIZES,
        mode=['forward', 'memory'],
        out=Path('work_dirs/attention_scaling'),
    )
    command = commands.add_parser('report', description=report.__doc__, **style)
    command.add_argument('results', type=Path, help='a benchmark.json')
    command.set_defaults(run=report.run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')  # of the toolboxes
    sys.exit(run_tool(main, 'benchmark'))
