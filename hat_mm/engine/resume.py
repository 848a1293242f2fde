"""Exact resume: a training that was killed goes on as if it had never stopped.

mmengine saves weights, optimizer, schedules and counters, but no random states. A resumed training
draws other augmentations and drops other paths, its epoch starts at the first batch, and the data
of earlier iterations is loaded again.

Here every random number follows from the seed of the run and from where it is drawn, so there is
no state to save. Samplers draw the indices of a batch by the seed (run, iteration). A sample is
augmented by the seed (run, rank, iteration, place in the batch), whichever process loads it; the
model computes by the seed (run, rank, iteration). The data start at the first iteration that is
still to be done.

``runner_type = 'hat_mm.ExactResumeRunner'`` in a config turns all of this on.
"""

import functools
import inspect
import itertools
import random
from collections.abc import Generator, Iterable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.registry import LOOPS as ALL_LOOPS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, Dataset

from hat_mm.registry import LOOPS, RUNNERS


class Purpose(IntEnum):
    """What random numbers are for."""

    ORDER = 1
    SAMPLE = 2
    MODEL = 3


def set_seeds(seed: int, purpose: Purpose, *, rank: int = 0, iteration: int, place: int = 0) -> int:
    """Seeds Python, NumPy and torch on the CPU.

    Args:
        seed: Seed of the run.
        purpose: What the random numbers are for.
        rank: Number of the process.
        iteration: Iteration of the training.
        place: Place of a sample in its batch.

    Returns:
        The seed, a hash of the arguments.
    """
    entropy = (seed, purpose, rank, iteration, place)
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


# --- data -----------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What a worker has to load: the index of a sample, and the numbers that seed it."""

    sample: int
    seed: int
    rank: int
    iteration: int
    place: int


def _fetch(dataset: Dataset, keys: Iterable[Key | int]) -> list[Any]:
    """Loads the samples of a batch, each with random states of its own."""
    samples = []
    for key in keys:
        if not isinstance(key, Key):  # of another data loader of the same dataset
            samples.append(dataset[key])
            continue
        index, seed, rank, iteration, place = key
        set_seeds(seed, Purpose.SAMPLE, rank=rank, iteration=iteration, place=place)
        samples.append(dataset[index])
    return samples


class SeededBatches:
    """Batch sampler that starts at an iteration and says how to seed each sample.

    Args:
        batches: The batch sampler of the training data.
        endless: Whether further epochs follow the first one, as in iteration-based training.

    Attributes:
        seed: Seed of the run, equal in all processes.
        first: Iteration of the first batch of ``batches``.
        start: Iteration at which the next pass starts, which drops the indices of earlier batches.
            Later passes start with the first batch.
    """

    def __init__(self, batches: Any, endless: bool) -> None:
        self.batches = batches
        self.endless = endless
        self.sampler: Any = getattr(batches, 'sampler', None)  # mmengine's hook calls its set_epoch
        self.batch_size = getattr(batches, 'batch_size', None)
        self.seed = self.first = self.start = 0

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yields the index and the seed of each sample in a batch."""
        rank = get_rank()
        start, self.start = self.start, self.first
        batches = iter(self._epochs() if self.endless else self.batches)
        for iteration in itertools.count(self.first):
            # Some samplers draw from the global states.
            set_seeds(self.seed, Purpose.ORDER, iteration=iteration)
            batch = next(batches, None)
            if batch is None:
                return
            if iteration >= start:
                yield [
                    Key(index, self.seed, rank, iteration, place)
                    for place, index in enumerate(batch)
                ]

    def _epochs(self) -> Iterator[list[int]]:
        for epoch in itertools.count():
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            yield from self.batches


class SeededDataLoader(DataLoader):
    """The given data loader with a :class:`SeededBatches`. Iterating starts with the first batch.

    Raises:
        TypeError: It is not torch's data loader, or it loads no batches.
    """

    batch_sampler: SeededBatches

    def __init__(self, loader: DataLoader, endless: bool) -> None:
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            raise TypeError(
                f'exact resume needs a torch DataLoader with a batch size, got {loader!r}'
            )
        same = ['num_workers', 'collate_fn', 'pin_memory', 'timeout', 'worker_init_fn']
        same += ['multiprocessing_context', 'generator', 'prefetch_factor', 'persistent_workers']
        super().__init__(
            loader.dataset,
            batch_sampler=SeededBatches(loader.batch_sampler, endless),
            **{name: getattr(loader, name) for name in same},
        )
        # Hooks read them. torch forbids setting them as attributes.
        vars(self).update(
            {name: getattr(loader, name) for name in ('batch_size', 'sampler', 'drop_last')}
        )
        # The worker calls this with all keys of a batch. The dataset stays the user's object: hooks
        # may replace its pipeline.
        fetch = functools.partial(_fetch, loader.dataset)
        loader.dataset.__getitems__ = fetch  # type: ignore[attr-defined]

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        """Yields batches."""
        # A generator, because mmengine asks for an iterator before it knows where to start, and
        # workers start to load at once.
        yield from super().__iter__()


# --- loops ----------------------------------------------------------------------------------------


class _Progress(Hook):
    """Saves the progress of a run, and repeats a validation that a kill has interrupted."""

    priority = 'LOWEST'  # after CheckpointHook, which keeps the best model, is ready

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        done = runner.message_hub.runtime_info.get('iter_of_validation')
        if loop.iter and loop.validation_is_due() and done != loop.iter:
            runner.logger.info('The validation after the checkpoint comes first')
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        runner.message_hub.update_info('start_of_epoch', (runner.epoch, runner.train_loop.first))

    def before_val_epoch(self, runner: Runner) -> None:
        # CheckpointHook saves this if the model is the best so far.
        runner.message_hub.update_info('iter_of_validation', runner.iter)


class _ExactLoop(BaseLoop):
    """What both loops share."""

    dataloader: SeededDataLoader
    endless: bool

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, **kwargs: Any) -> None:
        BaseLoop.__init__(self, runner, dataloader)  # builds the data loader
        super().__init__(runner, SeededDataLoader(self.dataloader, self.endless), **kwargs)
        sampler = dataloader.get('sampler') if isinstance(dataloader, dict) else None
        self._own_seed = isinstance(sampler, dict) and sampler.get('seed') is not None

    @property
    def first(self) -> int:
        """Iteration of the first batch of this epoch."""
        return self.dataloader.batch_sampler.first

    def run(self) -> torch.nn.Module:
        """Trains from the current iteration to the end."""
        # The seed is of this run, or of the resumed one if the config sets none.
        seeds = [self.runner.seed]
        broadcast_object_list(seeds)
        batches = self.dataloader.batch_sampler
        batches.seed = seeds[0]
        batches.start = self.iter
        if hasattr(batches.sampler, 'seed') and not self._own_seed:
            batches.sampler.seed = seeds[0]
        self.runner.register_hook(_Progress())
        return super().run()

    def run_iter(self, *args: Any) -> None:
        """Does one iteration."""
        run = self.dataloader.batch_sampler.seed
        seed = set_seeds(run, Purpose.MODEL, rank=get_rank(), iteration=self.iter)
        torch.manual_seed(seed)  # of accelerators, too
        super().run_iter(*args)

    def _is_due(self, done: int, end: int) -> bool:
        self._decide_current_val_interval()
        return (
            self.runner.val_loop is not None
            and done >= self.val_begin
            and (done % self.val_interval == 0 or done == end)
        )


@LOOPS.register_module()
class ExactEpochBasedTrainLoop(_ExactLoop, EpochBasedTrainLoop):
    """mmengine's loop with exact resume, also from a checkpoint within an epoch.

    Args:
        runner: The runner.
        dataloader: Training data.
        **kwargs: Arguments of mmengine's ``EpochBasedTrainLoop``.
    """

    endless = False

    def validation_is_due(self) -> bool:
        """Whether a validation follows what has been done."""
        epoch, _ = self._saved_start()
        return epoch != self.epoch and self._is_due(self.epoch, self.max_epochs)

    def _saved_start(self) -> tuple[int, int]:
        """The last epoch that was begun, and its first iteration."""
        return self.runner.message_hub.runtime_info.get('start_of_epoch', (-1, 0))

    def run_epoch(self) -> None:
        """Does one epoch, or what is left of it."""
        batches = self.dataloader.batch_sampler
        epoch, first = self._saved_start()
        batches.first = first if epoch == self.epoch else self.iter
        batches.start = self.iter
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Does one iteration; hooks get its index in the whole epoch."""
        super().run_iter(self.iter - self.first, data_batch)


class _Batches(itertools.chain):
    """Batches after as many ``None`` as there are iterations before the first one."""

    def skip_iter(self, count: int) -> None:
        """Drops ``count`` of them, as onedl-mmengine's loop does in one call."""
        for _ in range(count):
            next(self)


@LOOPS.register_module()
class ExactIterBasedTrainLoop(_ExactLoop, IterBasedTrainLoop):
    """mmengine's loop with exact resume, which loads no data of past iterations.

    Args:
        runner: The runner.
        dataloader: Training data.
        **kwargs: Arguments of mmengine's ``IterBasedTrainLoop``.
    """

    endless = True

    def validation_is_due(self) -> bool:
        """Whether a validation follows what has been done."""
        return self._is_due(self.iter, self.max_iters)

    def run(self) -> torch.nn.Module:
        """Trains from the current iteration to the end."""
        # mmengine drops a batch for each past iteration, onedl-mmengine unless it is told not to.
        self.fast_forward_on_resume = False
        batches = iter(self.dataloader)
        self.dataloader_iterator = _Batches(itertools.repeat(None, self.iter), batches)
        try:
            return super().run()
        finally:
            batches.close()  # ends the workers; the garbage collector would take 5 s for each


# --- the setting ----------------------------------------------------------------------------------

_EXACT = {
    EpochBasedTrainLoop: ExactEpochBasedTrainLoop,
    IterBasedTrainLoop: ExactIterBasedTrainLoop,
}


@RUNNERS.register_module()
class ExactResumeRunner(Runner):
    """mmengine's runner, whose training can be killed at any moment and resumed exactly.

    Set ``runner_type = 'hat_mm.ExactResumeRunner'`` in any config. It takes the exact form of
    mmengine's two training loops.
    """

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Builds the training loop.

        Raises:
            ValueError: There is no exact form of the loop.
        """
        if not isinstance(loop, dict):
            return super().build_train_loop(loop)
        loop = dict(loop)
        if 'type' not in loop:
            by_epoch = loop.pop('by_epoch')
            loop['type'] = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
        kind = loop['type']
        kind = kind if inspect.isclass(kind) else ALL_LOOPS.get(kind)
        kind = _EXACT.get(kind, kind)
        if kind is None or not issubclass(kind, _ExactLoop):
            raise ValueError(
                f'hat_mm.ExactResumeRunner has no exact form of the train loop {loop["type"]!r}, '
                'only of EpochBasedTrainLoop and IterBasedTrainLoop; use the default runner_type'
            )
        return super().build_train_loop(loop | {'type': kind})
