"""Backbones that ``huggingface_hub`` saves and loads, in a folder or on the Hub.

::

    from hat_mm.interop.hub import HubBackbone

    model = HubBackbone('FasterViT', arch='0', out_indices=(1, 2, 3))
    model.save_pretrained('my-backbone')  # config.json, model.safetensors
    model = HubBackbone.from_pretrained('my-backbone')

``push_to_hub(REPO)`` and ``from_pretrained(REPO)`` do the same on the Hub.
"""

import json
from typing import Any

from torch import Tensor, nn

from hat_mm import compat
from hat_mm.backbones import FasterViT, HATNet, SwinHAT
from hat_mm.weights.initialization import initialize

PyTorchModelHubMixin: Any = compat.require('huggingface_hub').PyTorchModelHubMixin

KINDS = {kind.__name__: kind for kind in (FasterViT, HATNet, SwinHAT)}


class HubBackbone(nn.Module, PyTorchModelHubMixin, library_name='hat_mm', tags=['backbone']):  # type: ignore[call-arg]
    """A backbone with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    A config takes the saved weights as ``init_cfg=dict(type='Pretrained', prefix='backbone.',
    checkpoint='FOLDER/model.safetensors')``.

    Args:
        kind: ``'FasterViT'``, ``'HATNet'`` or ``'SwinHAT'``.
        **settings: Arguments of the backbone but ``init_cfg``; JSON must be able to hold them.

    Raises:
        ValueError: The kind is unknown, or an argument is wrong, cannot be saved, or is
            ``init_cfg``.
        TypeError: The backbone has no such argument.
    """

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f'kind must be one of {", ".join(KINDS)}, not {kind!r}')
        if settings.get('init_cfg') is not None:
            raise ValueError(
                'init_cfg would be saved in config.json, and each later load would read its file '
                'again: fill the backbone with mmengine.runner.load_checkpoint(model.backbone, '
                'FILE) instead'
            )
        for name, value in settings.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(f'{name}={value!r} cannot be saved as JSON: {error}') from error
        self.backbone = KINDS[kind](**settings)
        initialize(self.backbone)

    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool = True, **kwargs: Any) -> 'HubBackbone':
        """Loads from a folder or the Hub.

        Tensors that are missing or left over are an error, but for new output norms;
        ``strict=False`` lets other ``out_indices`` than the saved ones be loaded.
        """
        return super().from_pretrained(*args, strict=strict, **kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to a tuple of (B, C_i, H_i, W_i)."""
        return self.backbone(x)
