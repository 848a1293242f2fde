# mmseg's UPerNet for ADE20K, without its ResNet and without images: the recipes of a crop size add
# those, a leaf the backbone and the heads' inputs.
_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    '../schedules/adamw_160k.py',
    'mmseg::_base_/default_runtime.py',
]
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
