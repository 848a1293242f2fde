_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/backbones/r50-hmhsa.py',
]
model = dict(backbone=_base_.backbone)
