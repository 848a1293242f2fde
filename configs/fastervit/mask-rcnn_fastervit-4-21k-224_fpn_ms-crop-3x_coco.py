_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_ms-crop-3x_coco.py',
    '../_base_/backbones/fastervit-4-21k-224.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
