"""Adds a finished training run and its published weights to a metafile.

Metrics, memory, epochs, date and versions come from the run's log and the weights' metadata;
whatever these do not record is left out.
"""

import argparse
import sys

import yaml

from hat_mm.engine.cli import UserError, run_tool
from hat_mm.zoo.metafiles import add_entry
from hat_mm.zoo.runs import read_run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('work_dir', help='folder of the run: config, logs')
    parser.add_argument(
        'weights', help='what tools/model_converters/publish_model.py made of its checkpoint'
    )
    parser.add_argument('metafile', help='metafile (YAML); it is created if it does not exist')
    parser.add_argument(
        '--url', required=True, help='address of the folder from which the weights will be fetched'
    )
    parser.add_argument('--name', help="name of the model (default: the config's)")
    parser.add_argument(
        '--config', help='configs/… (default: the file of configs/ that is named as the run’s)'
    )
    parser.add_argument(
        '--collection', help='collection of the metafile (default: the only one there)'
    )
    parser.add_argument(
        '--dataset', help='name of the data set, where its type in the config does not tell it'
    )
    parser.add_argument(
        '--unfinished',
        action='store_true',
        help='accept a run that did not reach the end of its schedule',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace the weights of a model that has some'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Adds the entry and shows it."""
    args = parse_args(argv)
    try:
        run = read_run(
            args.work_dir, args.weights, dataset=args.dataset, unfinished=args.unfinished
        )
        entry, notes = add_entry(
            args.metafile,
            run,
            args.weights,
            args.url,
            name=args.name,
            config=args.config,
            collection=args.collection,
            force=args.force,
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(yaml.safe_dump(entry, sort_keys=False, allow_unicode=True), end='')
    for note in notes:
        print(f'note: {note}')
    print(f'{args.metafile}: {entry["Name"]} added')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'make_metafile_entry.py'))
