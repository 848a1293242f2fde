"""Deploy form: a network that can only predict computes less for the same results."""

from typing import Any, Self
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .norms import DropPath


class Deployable(nn.Module):
    """A module with a deploy form, which can only predict.

    Attributes:
        deploy: Whether the module is in deploy form.
    """

    deploy = False

    def switch_to_deploy(self) -> None:
        """Brings the module and everything inside it into deploy form, in place.

        Batch norms are folded into the convolutions before them, layer scales into the linear
        layers; position MLPs of windows are replaced by their results; drop paths are removed. A
        second call changes nothing. Afterwards the module is in eval mode, with a warning if it was
        not before; its parameters get no gradient, and it cannot be trained again.
        """
        _leave_training(self)
        # Outside inference mode, so that the new tensors are ordinary ones.
        with torch.inference_mode(False), torch.no_grad():
            for module in [*self.modules()]:
                if isinstance(module, Deployable) and not module.deploy:
                    module._fold()
                    module.deploy = True
                for name, child in module.named_children():
                    if isinstance(child, DropPath):
                        setattr(module, name, nn.Identity())
        self.eval()
        self.requires_grad_(False)

    def _fold(self) -> None:
        """Folds what this module itself computes, in place; subclasses override it."""

    def refuse_loading(self) -> None:
        """Raises ValueError in deploy form, where the weights have another meaning."""
        if self.deploy:
            raise ValueError(
                f'{type(self).__name__} is in deploy form, which takes no checkpoint: load it '
                'before switch_to_deploy()'
            )

    def _load_from_state_dict(self, *args: Any) -> None:
        self.refuse_loading()
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; in deploy form the module stays in eval mode, and warns.

        An error here would leave the network around it with some parts in training mode.
        """
        if mode and self.deploy:
            warn(
                f'{type(self).__name__} is in deploy form, which cannot train, and stays in eval '
                'mode without gradients; to train, build it anew and load the checkpoint that it '
                'was made from',
                stacklevel=2,
            )
            mode = False
        return super().train(mode)


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Brings all backbones and plugins of hat_mm in ``model`` into deploy form.

    Args:
        model: Network such as a detector. Parts that are not of hat_mm stay as they are, but the
            whole network is in eval mode afterwards, with a warning if it was not before.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: Nothing in ``model`` is from hat_mm.
    """
    parts = [module for module in model.modules() if isinstance(module, Deployable)]
    if not parts:
        raise ValueError(f'{type(model).__name__} has no backbone or plugin of hat_mm')
    _leave_training(model)
    for part in parts:
        part.switch_to_deploy()
    return model


def _leave_training(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        warn(
            f'{type(model).__name__} was in training mode and is in eval mode now: its deploy form '
            'is for prediction alone',
            stacklevel=3,
        )
        model.eval()


def folded_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """Returns the convolution with the batch norm after it folded in, and an identity for the norm.

    Other norms, and batch norms without running statistics, depend on the map; they are returned
    unchanged with the convolution.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return conv, norm
    return fuse_conv_bn_eval(conv, norm), nn.Identity()


def fold_scale(layer: nn.Linear, scale: Tensor) -> None:
    """Folds a factor ``scale`` (C',) for the outputs of ``layer`` into its weights."""
    # New parameters: PyTorch refuses to change those that were made in inference mode.
    layer.weight = nn.Parameter(layer.weight * scale[:, None])
    layer.bias = nn.Parameter(layer.bias * scale)
