# mmdet's Faster R-CNN with FPN, without its ResNet: a leaf adds the backbone and the neck's inputs.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../schedules/adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(backbone=dict(_delete_=True))
