"""Hooks of mmengine's runner."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from hat_mm.layers import switch_to_deploy
from hat_mm.registry import HOOKS


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
