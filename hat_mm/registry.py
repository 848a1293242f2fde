"""Registries of the ``hat_mm`` scope, children of mmengine's.

A config names a class as ``type='hat_mm.FasterViT'`` in any toolbox: mmengine imports this module
for the scope, and the modules in ``locations`` for the class. ``custom_imports`` is not needed.

The module also registers the loader of official and safetensors files, which mmengine calls for
URLs and paths in ``init_cfg``, ``load_from`` and ``load_checkpoint``.
"""

import re

from mmengine.registry import HOOKS as _HOOKS
from mmengine.registry import LOOPS as _LOOPS
from mmengine.registry import METRICS as _METRICS
from mmengine.registry import MODELS as _MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as _OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import RUNNERS as _RUNNERS
from mmengine.registry import TRANSFORMS as _TRANSFORMS
from mmengine.registry import Registry, build_runner_from_cfg
from mmengine.runner.checkpoint import CheckpointLoader

from hat_mm.weights.download import load_from_hat_mm
from hat_mm.weights.official import OFFICIAL_PREFIXES

MODELS = Registry(
    'model',
    parent=_MODELS,
    scope='hat_mm',
    locations=['hat_mm.backbones', 'hat_mm.detectors', 'hat_mm.necks', 'hat_mm.plugins'],
)
HOOKS = Registry('hook', parent=_HOOKS, scope='hat_mm', locations=['hat_mm.engine.hooks'])
LOOPS = Registry('loop', parent=_LOOPS, scope='hat_mm', locations=['hat_mm.engine.resume'])
METRICS = Registry('metric', parent=_METRICS, scope='hat_mm', locations=['hat_mm.engine.metrics'])
RUNNERS = Registry(
    'runner',
    build_runner_from_cfg,
    parent=_RUNNERS,
    scope='hat_mm',
    locations=['hat_mm.engine.fsdp2', 'hat_mm.engine.resume'],
)
TRANSFORMS = Registry(
    'transform', parent=_TRANSFORMS, scope='hat_mm', locations=['hat_mm.engine.transforms']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim_wrapper_constructor',
    parent=_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='hat_mm',
    locations=['hat_mm.engine.optim'],
)

# mmengine tries the patterns in reverse alphabetical order; each has to come before the one that
# takes every URL of its scheme. A URL may end with a query.
CheckpointLoader.register_scheme(
    [
        *map(re.escape, OFFICIAL_PREFIXES),
        r'https?://[^?#]*\.safetensors([?#]|$)',
        r'file://[^?#]*\.safetensors([?#]|$)',
        r'(?!.*://).*\.safetensors$',
    ],
    load_from_hat_mm,
    force=True,  # so that the module can be imported again
)
