_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    '../_base_/backbones/r50-hmhsa.py',
]
model = dict(backbone=_base_.backbone)
