_base_ = [
    '../_base_/recipes/dino-5scale_8xb2-12e_coco.py',
    '../_base_/backbones/fastervit-4.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
