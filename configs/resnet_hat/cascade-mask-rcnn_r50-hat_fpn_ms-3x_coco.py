_base_ = [
    '../_base_/recipes/cascade-mask-rcnn_r50_fpn_ms-3x_coco.py',
    '../_base_/backbones/r50-hat.py',
]
model = dict(backbone=_base_.backbone)
