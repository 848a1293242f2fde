_base_ = [
    '../_base_/recipes/dino-4scale_8xb2-12e_coco.py',
    '../_base_/backbones/fastervit-4-21k-224.py',
]
# The authors' trained detector, to test or fine-tune it.
model = dict(
    type='hat_mm.FasterViTDINO',
    backbone=dict(_base_.backbone, arch='4-21k-224-dino', init_cfg=None),
    neck=dict(in_channels=_base_.channels[1:], bias=True),
)
load_from = (
    'https://huggingface.co/ahatamiz/FasterViT/resolve/main/'
    'DINO_4scale_faster_vit_4_21k_224_ms_coco.pth'
)
