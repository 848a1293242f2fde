_base_ = [
    '../_base_/recipes/classifier_shapes.py',
    '../_base_/backbones/fastervit-tiny.py',
]
model = dict(backbone=_base_.backbone, head=dict(in_channels=_base_.channels[-1]))
