_base_ = [
    '../_base_/recipes/mask2former_shapes.py',
    '../_base_/backbones/fastervit-tiny.py',
]
model = dict(backbone=_base_.backbone, panoptic_head=dict(in_channels=_base_.channels))
