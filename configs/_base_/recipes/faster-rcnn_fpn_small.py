# mmdet's Faster R-CNN made small, to learn small objects on a CPU from a random start: a leaf adds
# the backbone, the neck's inputs, the data and the length.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    './rcnn_parts.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../schedules/adamw_small.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(_delete_=True),
    neck=_base_.neck,
    rpn_head=dict(_base_.rpn_head, anchor_generator=_base_.small_anchors),
    roi_head=dict(bbox_roi_extractor=_base_.roi_extractor, bbox_head=_base_.bbox_head),
    train_cfg=_base_.small_train_cfg,
)
