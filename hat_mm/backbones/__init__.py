"""Backbones, registered in the ``hat_mm`` scope."""

from .fastervit import FasterViT
from .hat_net import HATNet
from .swin_hat import SwinHAT

__all__ = ['FasterViT', 'HATNet', 'SwinHAT']
