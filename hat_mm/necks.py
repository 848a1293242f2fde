"""Necks of classifiers that the toolboxes lack."""

from torch import Tensor, nn

from hat_mm.registry import MODELS


@MODELS.register_module()
class DropoutPooling(nn.Module):
    """Global average pooling, with dropout on the averages in training.

    HAT-Net's classifier does this before its linear layer.

    Args:
        drop_rate: Probability that a channel is dropped, in [0, 1].
    """

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turns each map (B, C, H, W) into a vector (B, C)."""
        return tuple(self.dropout(x.mean((2, 3))) for x in maps)
