"""The families, a tiny arch of each, and its tensors under official names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from golden import fill

import hat_mm
from hat_mm.weights.names import FASTERVIT_NAMES, HAT_NET_NAMES, SWIN_NAMES, NameMap
from test_backbones.plain_fastervit import PlainFasterViT
from test_backbones.plain_hat_net import PlainHATNet
from test_backbones.plain_swin_hat import PlainSwinHAT


def _fastervit_unused(shapes: dict, channels: int) -> dict[str, tuple[int, ...]]:
    return {'head.weight': (10, channels), 'head.bias': (10,)}


def _hat_net_unused(shapes: dict, channels: int) -> dict[str, tuple[int, ...]]:
    unused = {
        name.replace('.proj.', '.proj_norm.'): (shape[0],)
        for name, shape in shapes.items()
        if '.attn.proj.' in name
    }
    return {'classifier.1.weight': (10, channels), 'classifier.1.bias': (10,), **unused}


def _swin_unused(shapes: dict, channels: int) -> dict[str, tuple[int, ...]]:
    return {'head.weight': (10, channels), 'head.bias': (10,)}


def _plain_fastervit(state, backbone):
    spec = backbone.spec
    return PlainFasterViT(
        state,
        spec.depths,
        spec.num_heads,
        spec.window_size,
        spec.carrier_size if spec.carriers else 0,
        spec.propagate,
        spec.pad_every_stage,
        spec.positions_by_tokens,
        spec.carrier_bias,
    )


def _plain_hat_net(state, backbone):
    spec = backbone.spec
    return PlainHATNet(state, spec.depths, spec.grids, spec.ds_ratios, spec.head_dim)


def _plain_swin_hat(state, backbone):
    # No file has the carriers: the backbone's own.
    return PlainSwinHAT(state, backbone.state_dict(), backbone.spec)


@dataclass(frozen=True)
class Family:
    """What the tests know of a family beside its class.

    Attributes:
        backbone: The class.
        arch: Fields of an arch that computes in milliseconds.
        wide: Fields that give it so many channels that PyTorch treats all sizes alike.
        name_map: Its official names.
        official: Substitutions that make official names of native ones.
        unused: Official shapes and channels to shapes of tensors that a backbone has no use for.
        plain: Official tensors and the backbone that loaded them to the plain implementation.
    """

    backbone: type
    arch: dict[str, Any]
    wide: dict[str, Any]
    name_map: NameMap
    unused: Callable
    plain: Callable

    def tiny(self, **fields: Any) -> dict[str, Any]:
        """A tiny arch, with some fields changed."""
        return {**self.arch, **fields}

    def state(self, arch: dict) -> dict:
        """What an official checkpoint of a dict arch would hold, filled by the golden rule."""
        backbone = self.backbone(arch, out_indices=(3,))
        learned = {k: v for k, v in backbone.state_dict().items() if 'num_batches' not in k}
        official, _ = self.name_map.to_official(learned)
        shapes = {name: tuple(tensor.shape) for name, tensor in official.items()}
        shapes |= self.unused(shapes, backbone.out_channels[-1])
        return {name: fill(name, shape) for name, shape in shapes.items()}


FAMILIES = {
    'FasterViT': Family(
        backbone=hat_mm.FasterViT,
        arch=dict(
            embed_dims=4, stem_dims=4, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4
        ),
        wide=dict(embed_dims=64, num_heads=(1, 1, 4, 4)),
        name_map=FASTERVIT_NAMES,
        unused=_fastervit_unused,
        plain=_plain_fastervit,
    ),
    'HATNet': Family(
        backbone=hat_mm.HATNet,
        arch=dict(
            embed_dims=(4, 8, 16, 24),
            head_dim=4,
            depths=(1, 1, 2, 1),
            expansions=(2, 2, 2, 2),
            grids=(4, 3, 4, 1),
            ds_ratios=(4, 3, 2, 1),
        ),
        wide=dict(embed_dims=(64, 64, 160, 640), head_dim=32, depths=(1, 1, 1, 1)),
        name_map=HAT_NET_NAMES,
        unused=_hat_net_unused,
        plain=_plain_hat_net,
    ),
    'SwinHAT': Family(
        backbone=hat_mm.SwinHAT,
        arch=dict(embed_dims=4, depths=(1, 2, 2, 1), num_heads=(1, 1, 2, 2), window_size=4),
        wide=dict(embed_dims=64, num_heads=(1, 1, 4, 4)),
        name_map=SWIN_NAMES,
        unused=_swin_unused,
        plain=_plain_swin_hat,
    ),
}


def tiny(**fields: Any) -> dict[str, Any]:
    """A tiny FasterViT arch, with some fields changed."""
    return FAMILIES['FasterViT'].tiny(**fields)
