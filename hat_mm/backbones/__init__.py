"""Backbones, registered in the ``hat_mm`` scope."""

from .fastervit import FasterViT

__all__ = ['FasterViT']
