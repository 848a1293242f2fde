"""Backbones, registered in the ``hat_mm`` scope."""

from .fastervit import FasterViT
from .hat_net import HATNet

__all__ = ['FasterViT', 'HATNet']
