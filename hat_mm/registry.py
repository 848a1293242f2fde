"""Registries of the ``hat_mm`` scope, children of mmengine's.

A config names a class as ``type='hat_mm.FasterViT'`` in any toolbox: mmengine imports this module
for the scope, and ``locations`` import the class. Nothing has to be listed in ``custom_imports``.
"""

from mmengine.registry import MODELS as _MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as _OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

MODELS = Registry(
    'model', parent=_MODELS, scope='hat_mm', locations=['hat_mm.backbones', 'hat_mm.necks']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim_wrapper_constructor',
    parent=_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='hat_mm',
    locations=['hat_mm.optim'],
)
