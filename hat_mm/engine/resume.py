"""Exact resume: a training that was killed goes on as if it had never stopped.

mmengine saves weights, optimizer, schedules and counters, but no random states. A resumed training
draws other augmentations and drops other paths, its epoch starts at the first batch, and the data
of earlier iterations is loaded again.

Here every random number follows from the seed of the run and from where it is drawn, so there is
no state to save. A sample is augmented by the seed (run, rank, iteration, place in the batch),
whichever process loads it; the model computes by the seed (run, rank, iteration). The data start
at the first iteration that is still to be done.

``runner_type = 'hat_mm.ExactResumeRunner'`` in a config turns all of this on.
"""

import functools
import itertools
import random
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, Dataset

from hat_mm.registry import LOOPS, RUNNERS


def set_seeds(*numbers: int) -> int:
    """Seeds Python, NumPy and torch on the CPU.

    Args:
        *numbers: Say what the random numbers are for; not negative.

    Returns:
        The seed, a hash of the numbers.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


# --- data -----------------------------------------------------------------------------------------

Key = tuple[int, tuple[int, ...]]
"""Index of a sample in the dataset, and the numbers that seed it."""


def _fetch(dataset: Dataset, keys: Iterable[Key]) -> list[Any]:
    """Loads the samples of a batch, each with random states of its own."""
    samples = []
    for index, numbers in keys:
        set_seeds(*numbers)
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
        start: Iteration at which to start. Indices of earlier batches are drawn and dropped.
    """

    def __init__(self, batches: Any, endless: bool) -> None:
        self.batches = batches
        self.endless = endless
        self.sampler = getattr(batches, 'sampler', None)  # mmengine's hook calls its set_epoch
        self.batch_size = getattr(batches, 'batch_size', None)
        self.seed = self.first = self.start = 0

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yields the index and the seed of each sample in a batch."""
        rank = get_rank()
        set_seeds(self.seed, self.first)  # for samplers that draw from the global states
        numbered = enumerate(self._epochs() if self.endless else self.batches, self.first)
        for iteration, batch in itertools.islice(numbered, self.start - self.first, None):
            yield [
                (index, (self.seed, rank, iteration, place)) for place, index in enumerate(batch)
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


class _MissedValidation(Hook):
    """Validates after a resume if the killed run should have done so and did not finish."""

    priority = 'LOWEST'  # after CheckpointHook, which keeps the best model, is ready

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        done = runner.message_hub.runtime_info.get('iter_of_validation')
        if loop.iter and loop.validation_is_due() and done != loop.iter:
            runner.logger.info('The validation after the checkpoint comes first')
            runner.val_loop.run()

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

    def run(self) -> torch.nn.Module:
        """Trains from the current iteration to the end."""
        # The seed is of this run, or of the resumed one if the config sets none.
        seeds = [self.runner.seed]
        broadcast_object_list(seeds)
        batches = self.dataloader.batch_sampler
        batches.seed = seeds[0]
        batches.start = self.iter
        if hasattr(batches.sampler, 'seed'):
            batches.sampler.seed = seeds[0]
        self.runner.register_hook(_MissedValidation())
        return super().run()

    def run_iter(self, *args: Any) -> None:
        """Does one iteration."""
        seed = set_seeds(self.dataloader.batch_sampler.seed, get_rank(), self.iter)
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
        whole = self.iter == self.epoch * len(self.dataloader)
        return whole and self._is_due(self.epoch, self.max_epochs)

    def run_epoch(self) -> None:
        """Does one epoch, or what is left of it."""
        batches = self.dataloader.batch_sampler
        batches.first = self.epoch * len(self.dataloader)
        batches.start = self.iter
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Does one iteration; hooks get its index in the whole epoch."""
        super().run_iter(self.iter - self.epoch * len(self.dataloader), data_batch)


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
    'EpochBasedTrainLoop': ExactEpochBasedTrainLoop,
    'IterBasedTrainLoop': ExactIterBasedTrainLoop,
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
        by_epoch = loop.pop('by_epoch', None)
        kind = loop.get('type')
        if by_epoch is not None and kind is None:
            kind = 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop'
        name = getattr(kind, '__name__', str(kind)).rpartition('.')[2]
        if name not in _EXACT and not name.startswith('Exact'):
            raise ValueError(
                f'hat_mm.ExactResumeRunner has no exact form of the train loop {name!r}, only of '
                f'{", ".join(_EXACT)}; use the default runner_type'
            )
        loop['type'] = _EXACT.get(name, kind)
        return super().build_train_loop(loop)
