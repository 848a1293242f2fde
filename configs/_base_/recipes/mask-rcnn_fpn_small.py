# faster-rcnn_fpn_small with mmdet's mask head made small.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    './rcnn_parts.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../schedules/adamw_small.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(_delete_=True),
    neck=_base_.neck,
    rpn_head=dict(_base_.rpn_head, anchor_generator=_base_.small_anchors),
    roi_head=dict(
        bbox_roi_extractor=_base_.roi_extractor,
        bbox_head=_base_.bbox_head,
        mask_roi_extractor=_base_.roi_extractor,
        mask_head=_base_.mask_head,
    ),
    train_cfg=_base_.small_train_cfg,
)
