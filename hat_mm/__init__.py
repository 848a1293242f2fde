"""FasterViT and HAT-Net for OpenMMLab, and their attention for other networks.

Importing the package needs only torch and numpy. Public names are imported on first use, so
``hat_mm.FasterViT`` works after ``import hat_mm``.
"""

from importlib import import_module
from typing import Any

from . import compat

__version__ = '0.2.0'

# Public name -> module that defines it.
_PUBLIC = {
    'DropoutPooling': 'hat_mm.necks',
    'ExactEpochBasedTrainLoop': 'hat_mm.engine.resume',
    'ExactIterBasedTrainLoop': 'hat_mm.engine.resume',
    'ExactResumeRunner': 'hat_mm.engine.resume',
    'ExportedModel': 'hat_mm.engine.exported',
    'FSDP2Runner': 'hat_mm.engine.fsdp2',
    'FasterViT': 'hat_mm.backbones',
    'FasterViTDINO': 'hat_mm.detectors',
    'HATNet': 'hat_mm.backbones',
    'HATPlugin': 'hat_mm.plugins',
    'HMHSAPlugin': 'hat_mm.plugins',
    'Inferencer': 'hat_mm.inference',
    'LayerDecayOptimWrapperConstructor': 'hat_mm.engine.optim',
    'LayerNorm2d': 'hat_mm.layers',
    'LoadImageOrSkip': 'hat_mm.engine.transforms',
    'MapNorm': 'hat_mm.layers',
    'NonFiniteLossHook': 'hat_mm.engine.hooks',
    'PanopticQuality': 'hat_mm.engine.metrics',
    'SwinHAT': 'hat_mm.backbones',
    'SwitchToDeployHook': 'hat_mm.engine.hooks',
    'export': 'hat_mm.engine.export',
    'get_model': 'hat_mm.zoo.models',
    'list_models': 'hat_mm.zoo.models',
    'register_model_index': 'hat_mm.zoo.models',
    'swap_backbone': 'hat_mm.engine.swap',
    'switch_to_deploy': 'hat_mm.layers',
    'tune_allocator': 'hat_mm.engine.allocator',
}

__all__ = ['__version__', *_PUBLIC]

compat.apply()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        try:
            return getattr(import_module(_PUBLIC[name]), name)
        except ModuleNotFoundError as error:
            package = (error.name or '').partition('.')[0]
            if not package or compat.has_module(package):
                raise
            raise compat.DependencyError(
                f'hat_mm.{name} needs {package}, which is not installed: run `make setup` in a '
                "checkout of hat_mm, or `pip install 'hat_mm[det]'` (or [seg], [cls])"
            ) from error
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
