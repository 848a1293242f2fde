"""Measures models beside each other, and how the cost of attention grows.

commands:
  models     time, memory and FLOPs of backbones and whole models
  attention  one block of hierarchical attention beside one of full attention, on growing maps
  report     tables and plots of an earlier benchmark.json, once more
"""

from __future__ import annotations

import argparse
import sys

import attention
import models
import report

from hat_mm.engine.cli import run_tool


def main(argv: list[str] | None = None) -> None:
    """Runs a command."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser('benchmark', description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for name, description, add_arguments, run in (
        ('models', models.DESCRIPTION, models.add_models_arguments, models.run),
        ('attention', attention.__doc__, models.add_attention_arguments, models.run_attention),
        ('report', report.__doc__, report.add_arguments, report.run),
    ):
        command = commands.add_parser(name, description=description, formatter_class=style)
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'benchmark'))
