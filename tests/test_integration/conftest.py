"""Shared by the tests of the tools."""

import functools

import pytest

import hat_mm.backbones


@pytest.fixture
def forms(monkeypatch) -> list[bool]:
    """For every forward pass of a FasterViT, whether it was in deploy form."""
    seen = []
    forward = hat_mm.backbones.FasterViT.forward

    @functools.wraps(forward)
    def spy(backbone, *args):
        seen.append(backbone.deploy)
        return forward(backbone, *args)

    monkeypatch.setattr(hat_mm.backbones.FasterViT, 'forward', spy)
    return seen
