"""mmdet's DINO for the files of the authors' detector."""

from typing import Any

from torch import nn

from hat_mm.registry import MODELS
from hat_mm.weights.dino import is_authors_dino, to_mmdet
from hat_mm.weights.loading import compare, unwrap


@MODELS.register_module()
def FasterViTDINO(**settings: Any) -> nn.Module:
    """Builds mmdet's DINO, which then also loads files of the authors' DINO with FasterViT.

    Args:
        **settings: Those of mmdet's ``DINO``. To equal the authors' detector, the backbone needs
            ``arch='4-21k-224-dino'`` and the neck ``bias=True``.

    Returns:
        An instance of ``mmdet.models.DINO``.
    """
    model = MODELS.build({**settings, 'type': 'mmdet.DINO'})
    model.register_load_state_dict_pre_hook(_rename)
    return model


def _rename(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the tensors of a file of the authors' DINO, in place."""
    names = [name for name in state_dict if name.startswith(prefix)]
    state = unwrap({name.removeprefix(prefix): state_dict[name] for name in names})
    if not is_authors_dino(state):
        return
    renamed = to_mmdet(state)[0]
    # The backbone compares its part itself. Other shapes are an error or a warning of the loader.
    report = compare(dict(model.state_dict()), renamed, spare=r'backbone\..*')
    if report.missing or report.unexpected:
        raise ValueError(f"a file of the authors' DINO does not fit this one: {report}")
    for name in names:
        del state_dict[name]
    state_dict.update({prefix + name: value for name, value in renamed.items()})
