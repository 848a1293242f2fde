"""Hooks of mmengine's runner."""

import functools
import math
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from hat_mm.layers import switch_to_deploy
from hat_mm.registry import HOOKS

from .cli import UserError


@HOOKS.register_module()
class SwitchToDeployHook(Hook):
    """Brings backbones and plugins of hat_mm into deploy form before a test.

    ``tools/test.py --deploy`` adds it. It is only for a runner that tests: afterwards the model
    cannot be trained, nor its weights averaged by ``EMAHook``.
    """

    priority = 'LOWEST'  # after all hooks that change the weights

    def before_test_epoch(self, runner: Runner) -> None:
        """Switches the runner's model, whose weights are loaded by then."""
        runner.model.eval()  # the test loop does so only after this
        switch_to_deploy(runner.model)


@HOOKS.register_module()
class UnaveragedWeightsHook(Hook):
    """Loads the weights as trained if a checkpoint has them beside their average.

    ``tools/test.py`` uses it in place of an ``EMAHook`` with ``evaluate_on_ema=False`` where the
    ``EMAHook`` cannot be used.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Replaces the averaged weights, which ``EMAHook`` saves as those of the model."""
        for key, value in checkpoint.get('ema_state_dict', {}).items():
            if key.startswith('module.'):
                checkpoint['state_dict'][key.removeprefix('module.')] = value


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Keeps a loss that is NaN or infinite in any process from changing the weights.

    The check waits for the loss, so on a GPU each step costs one synchronization.

    Args:
        policy: ``'stop'`` the training with an error, or ``'skip'`` the step: the log names step
            and losses, and counts.
        max_consecutive: With ``'skip'``, how many steps in a row may be skipped. One more is an
            error, because the weights themselves are then probably not finite.

    Attributes:
        skipped: How many steps were skipped.

    Raises:
        ValueError: The policy is neither of these.
    """

    def __init__(self, policy: str = 'stop', max_consecutive: int = 10) -> None:
        if policy not in ('stop', 'skip'):
            raise ValueError(f"policy must be 'stop' or 'skip', got {policy!r}")
        self.policy = policy
        self.max_consecutive = max_consecutive
        self.skipped = 0
        self._consecutive = 0
        self._finite = True
        self._buffers: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        """Puts the check before the update of the weights."""
        wrapper = runner.optim_wrapper
        several = isinstance(wrapper, OptimWrapperDict)
        for one in wrapper.values() if several else [wrapper]:
            self._guard(one, runner.model)

    def _guard(self, wrapper: OptimWrapper, model: nn.Module) -> None:
        update = wrapper.update_params

        @functools.wraps(update)
        def update_if_finite(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            bad = (~torch.isfinite(loss.detach())).any().float()
            all_reduce(bad, 'max')  # all processes have to do the same
            if not bad:
                update(loss, *args, **kwargs)
                return
            self._finite = False
            # The forward pass has changed the statistics of batch norms.
            for buffer, before in zip(model.buffers(), self._buffers, strict=False):
                buffer.copy_(before)
            # The step counts where gradients are accumulated, as after a resume.
            wrapper._inner_count += 1
            gradients = [p.grad for group in wrapper.param_groups for p in group['params']]
            if wrapper.should_update() and any(grad is not None for grad in gradients):
                wrapper.step()
                wrapper.zero_grad()

        wrapper.update_params = update_if_finite

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keeps what a skipped step has to leave as it was."""
        self._finite = True
        if self.policy == 'skip':
            self._buffers = [buffer.clone() for buffer in runner.model.buffers()]

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Stops, or logs that the step was skipped.

        Raises:
            UserError: The loss is not finite, and the policy is to stop.
        """
        self._consecutive = 0 if self._finite else self._consecutive + 1
        if self._finite:
            return
        losses = {
            name: float(torch.as_tensor(value).detach())
            for name, value in outputs.items()
            if 'loss' in name
        }
        bad = [f'{name} = {value}' for name, value in losses.items() if not math.isfinite(value)]
        where = f'iteration {runner.iter + 1} (epoch {runner.epoch + 1})'
        text = f'{where}: {", ".join(bad) or "the loss in another process"} is not finite'
        if self.policy == 'stop' or self._consecutive > self.max_consecutive:
            raise UserError(f'{text}; this step did not change the weights')
        self.skipped += 1
        runner.logger.warning(f'{text}; step skipped, {self.skipped} so far')
