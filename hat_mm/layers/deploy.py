"""The form of a network that only predicts: less to compute, the same results."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .common import DropPath


class Deployable(nn.Module):
    """A module with a second form that only predicts.

    Attributes:
        deploy: Whether the module is in that form.
    """

    deploy = False

    def switch_to_deploy(self) -> None:
        """Brings the module and all inside it into the form that only predicts, in place.

        Batch norms go into the convolutions before them, layer scales into the linear layers;
        position MLPs of a fixed grid are replaced by their result, drop paths by nothing. A second
        call changes nothing. What is left takes no gradient and the module cannot train again.

        Raises:
            RuntimeError: The module, or a part of it, is in training mode.
        """
        _refuse_training(self)
        # Also in inference mode, whose tensors can do less.
        with torch.inference_mode(False), torch.no_grad():
            for module in [*self.modules()]:
                if isinstance(module, Deployable) and not module.deploy:
                    module._fold()
                    module.deploy = True
                for name, child in module.named_children():
                    if isinstance(child, DropPath):
                        setattr(module, name, nn.Identity().eval())
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
        """Sets the mode.

        Raises:
            RuntimeError: The module is in deploy form and is to train.
        """
        if mode and self.deploy:
            raise RuntimeError(
                f'{type(self).__name__} is in deploy form, which cannot train; build it anew and '
                'load the checkpoint that it was made from. To go on predicting with this one, '
                'call eval() on the whole model'
            )
        return super().train(mode)


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Brings all backbones and plugins of hat_mm in ``model`` into the form that only predicts.

    Args:
        model: Network in eval mode, such as a detector; its other parts stay as they are.

    Returns:
        ``model``, which was changed in place.

    Raises:
        ValueError: Nothing in ``model`` is from hat_mm.
        RuntimeError: ``model``, or a part of it, is in training mode.
    """
    parts = [module for module in model.modules() if isinstance(module, Deployable)]
    if not parts:
        raise ValueError(f'{type(model).__name__} has no backbone or plugin of hat_mm')
    _refuse_training(model)
    for part in parts:
        part.switch_to_deploy()
    return model


def _refuse_training(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise RuntimeError(
            f'{type(model).__name__} is in training mode, or a part of it: call eval() before '
            'switch_to_deploy(), which is for prediction alone'
        )


def folded_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution that does the work of the batch norm behind it, and what is left of the norm.

    Other norms depend on the map, and so does a batch norm without running statistics.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return conv, norm
    return fuse_conv_bn_eval(conv, norm), nn.Identity().eval()


def fold_scale(layer: nn.Linear, scale: Tensor) -> None:
    """Multiplies the results of ``layer`` by ``scale`` (C',), in place."""
    layer.weight.mul_(scale[:, None])
    layer.bias.mul_(scale)


class FixedPositions(nn.Module):
    """The result of a position module, for the one grid that its tokens ever have.

    Args:
        values: What the module gave for that grid.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer('values', values.clone())
        self.eval()

    def forward(self, sides: tuple[int, int]) -> Tensor:
        """Returns the values, which are those of ``sides``."""
        return self.values
