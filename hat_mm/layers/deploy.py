"""The form of a network that only predicts: less to compute, the same results."""

from typing import Any, Self
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .norms import DropPath


class Deployable(nn.Module):
    """A module with a second form that only predicts.

    Attributes:
        deploy: Whether the module is in that form.
    """

    deploy = False

    def switch_to_deploy(self) -> None:
        """Brings the module and all inside it into the form that only predicts, in place.

        Batch norms go into the convolutions before them, layer scales into the linear layers;
        position MLPs of windows are replaced by their result, drop paths by nothing. A second
        call changes nothing. The module is in eval mode afterwards, with a warning if it was not
        before. What is left takes no gradient, and the module cannot train again.
        """
        _leave_training(self)
        # Also in inference mode, whose tensors can do less.
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
        """Folds what this very module computes, in place; a subclass says what."""

    def refuse_loading(self) -> None:
        """Raises ValueError in deploy form, in which the weights have another meaning."""
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
    """Brings all backbones and plugins of hat_mm in ``model`` into the form that only predicts.

    Args:
        model: Network such as a detector. Parts that are not of hat_mm stay as they are, but the
            whole network is in eval mode afterwards, with a warning if it was not before.

    Returns:
        ``model``, which was changed in place.

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
    """A convolution that does the work of the batch norm behind it, and what is left of the norm.

    Other norms depend on the map, and so does a batch norm without running statistics.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return conv, norm
    return fuse_conv_bn_eval(conv, norm), nn.Identity()


def fold_scale(layer: nn.Linear, scale: Tensor) -> None:
    """Has ``layer`` multiply its results by ``scale`` (C',)."""
    # New ones: PyTorch refuses to change those that were made in inference mode.
    layer.weight = nn.Parameter(layer.weight * scale[:, None])
    layer.bias = nn.Parameter(layer.bias * scale)
