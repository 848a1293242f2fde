"""mmdet's DINO for the files of the authors' detector."""

import re
from typing import Any

from torch import nn

from hat_mm.registry import MODELS
from hat_mm.weights.dino import is_authors_dino, to_mmdet
from hat_mm.weights.loading import compare, unwrap

# What depends on the classes, or on the number of queries.
_OF_A_DATA_SET = r'bbox_head\.cls_branches\.|dn_query_generator\.|query_embedding\.'


@MODELS.register_module()
def FasterViTDINO(**settings: Any) -> nn.Module:
    """Builds mmdet's DINO, which then also loads files of the authors' DINO with FasterViT.

    Args:
        **settings: Those of mmdet's ``DINO``. To equal the authors' detector, the backbone needs
            ``arch='4-21k-224-dino'`` and the neck ``bias=True``.

    Returns:
        An instance of ``mmdet.models.DINO``, whose loading raises ValueError if a file of the
        authors' does not fit it.
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
    backbone: Any = model.backbone
    spec = getattr(backbone, 'spec', None)
    if not (
        getattr(spec, 'pad_every_stage', False) and getattr(spec, 'positions_by_tokens', False)
    ):
        raise ValueError(
            "the backbone of the authors' DINO is a FasterViT with pad_every_stage and "
            f"positions_by_tokens, such as arch='4-21k-224-dino', not {type(backbone).__name__} "
            f'{getattr(backbone, "arch", "")}'
        )
    # The backbone compares its part itself.
    own, outside = (
        {k: v for k, v in tensors.items() if not k.startswith('backbone.')}
        for tensors in (model.state_dict(), renamed)
    )
    report = compare(own, outside, spare='(?!)')
    # Other classes and queries are the loader's to warn of, as for any detector.
    wrong = [
        name
        for name in report.mismatched
        if not re.match(_OF_A_DATA_SET, name) or own[name].shape[1:] != outside[name].shape[1:]
    ]
    if report.missing or report.unexpected or wrong:
        raise ValueError(f"a file of the authors' DINO does not fit this one: {report}")
    for name in names:
        del state_dict[name]
    state_dict.update({prefix + name: value for name, value in renamed.items()})
