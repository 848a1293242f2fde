"""The backbones in timm's registry, for whatever takes a timm model as its encoder.

Importing this module registers them as timm's plug-ins do::

    import hat_mm.interop.timm
    import timm

    encoder = timm.create_model('fastervit_0', features_only=True, out_indices=(1, 2, 3))
    encoder.feature_info.channels()  # [128, 256, 512]

The names are those of the published backbones in ``configs/_base_/backbones``, with underscores.
Models for classification are mmpretrain's, see :func:`hat_mm.get_model`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hat_mm import compat
from hat_mm.backbones import FasterViT, HATNet, SwinHAT
from hat_mm.backbones.base import HierarchicalBackbone
from hat_mm.weights.initialization import initialize
from hat_mm.weights.official import OFFICIAL_FILES

models: Any = compat.require('timm').models

FAMILIES: dict[str, type[HierarchicalBackbone]] = {
    'fastervit': FasterViT,
    'hat_net': HATNet,
    'swin_hat': SwinHAT,
}
URLS = {(file.family, file.arch): file.url for file in OFFICIAL_FILES if file.detector is None}


class Features(nn.Module):
    """A backbone with the interface of timm's ``features_only`` models.

    Args:
        backbone: The backbone.

    Attributes:
        feature_info: timm's description of the maps: channels, reduction (stride), module.
    """

    def __init__(self, backbone: HierarchicalBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        stages = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f'backbone.stages.{i}')
            for i, dim in enumerate(backbone.spec.dims)
        ]
        self.feature_info = models.FeatureInfo(stages, backbone.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps images (B, in_chans, H, W) to a list of (B, C_i, H_i, W_i)."""
        return list(self.backbone(x))


def create(
    family: str,
    arch: str,
    pretrained: bool = False,
    features_only: bool = False,
    in_chans: int = 3,
    out_indices: int | Sequence[int] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **settings: Any,
) -> Features:
    """Makes a model for ``timm.create_model``.

    Args:
        family: Key of :data:`FAMILIES`.
        arch: Variant.
        pretrained: Loads the authors' weights, which are downloaded unless they are there.
        features_only: Must be true.
        in_chans: Channels of the images.
        out_indices: Stages whose maps are returned, as in timm: a number n means the last n
            stages, and negative indices count from the end. None for all.
        pretrained_cfg: Must be None: timm's description of its own weights.
        pretrained_cfg_overlay: Must be None, too.
        cache_dir: Not used, see ``HAT_MM_WEIGHTS``.
        **settings: Arguments of the backbone, such as ``window_size``.

    Raises:
        ValueError: ``features_only`` is false, ``out_indices`` is out of range, there are no
            weights, or others are asked for.
        TypeError: The backbone has no such argument.
    """
    kind = FAMILIES[family]
    if not features_only:
        raise ValueError(
            f'{family} {arch}: hat_mm gives timm backbones with features_only=True only; '
            'hat_mm.get_model(NAME) builds a classifier of mmpretrain'
        )
    given = dict(pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay)
    given |= dict(init_cfg=settings.pop('init_cfg', None))
    if given := {name: value for name, value in given.items() if value is not None}:
        raise ValueError(
            f"{family} {arch} has no tags and takes no {given}: pretrained=True loads the authors' "
            'weights, and mmengine.runner.load_checkpoint(model.backbone, FILE) others'
        )
    url = URLS.get((kind.__name__, arch))
    if pretrained and url is None:
        raise ValueError(f'{family} {arch}: its authors publish no weights, so pretrained=False')
    stages = range(len(kind.archs[arch].depths))
    if out_indices is None:
        out_indices = stages
    elif isinstance(out_indices, int):
        if out_indices not in range(1, len(stages) + 1):
            raise ValueError(
                f'out_indices={out_indices} must be a list of stages, or the number of the last '
                f'stages that are wanted, 1 to {len(stages)}'
            )
        out_indices = stages[-out_indices:]
    backbone = kind(
        arch=arch,
        in_channels=in_chans,
        out_indices=[i + len(stages) if i < 0 else i for i in out_indices],
        init_cfg=dict(type='Pretrained', checkpoint=url) if pretrained else None,
        **settings,
    )
    # On the meta device when a library only reads feature_info.
    if not next(backbone.parameters()).is_meta:
        initialize(backbone)
    return Features(backbone)


def _entry_point(family: str, arch: str) -> Callable[..., Features]:
    def entry_point(**arguments: Any) -> Features:
        return create(family, arch, **arguments)

    entry_point.__name__ = f'{family}_{arch}'.replace('-', '_')
    entry_point.__doc__ = f'{FAMILIES[family].__name__} {arch}, see :func:`create`.'
    return entry_point


for _family, _kind in FAMILIES.items():
    for _arch in _kind.archs:
        if _arch == '4-21k-224-dino':  # only a part of the authors' detector
            continue
        _entry = _entry_point(_family, _arch)
        # register_model adds the name to __all__, so it has to exist.
        globals()[_entry.__name__] = models.register_model(_entry)
