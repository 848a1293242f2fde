_base_ = [
    '../_base_/recipes/upernet_shapes.py',
    '../_base_/backbones/fastervit-tiny.py',
]
model = dict(
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
