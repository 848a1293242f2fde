"""Measures models beside each other, and how the cost of attention grows.

commands:
  models     time, memory and FLOPs of backbones and whole models
  attention  one block of hierarchical attention beside one of full attention, on growing maps
  report     tables and plots of an earlier benchmark.json, once more
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from typing import Any

import attention
import measuring
import models
import report

from hat_mm.engine.cli import run_tool

COMMANDS = {'models': models.main, 'attention': attention.main, 'report': report.main}


def answer(job: dict[str, Any]) -> None:
    """Does what this process was started for."""
    measured = attention if 'form' in job else models
    if job.get('mode', '').endswith('memory'):
        measuring.answer(measured.memory_of_job(job))
    else:
        measuring.answer_times(measured.work_of(job), job['device'])


def main() -> None:
    """Runs a command, or a job of one."""
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')  # of the toolboxes
    job = measuring.job()
    if job is not None:
        answer(job)
        return
    parser = argparse.ArgumentParser(
        prog='benchmark',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=COMMANDS)
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='COMMAND --help lists them')
    args = parser.parse_args()
    COMMANDS[args.command](args.arguments)


if __name__ == '__main__':
    sys.exit(run_tool(main, 'benchmark'))
