# mmdet's Cascade Mask R-CNN, without its ResNet, with box heads of four convolutions and one linear
# layer and a GIoU loss on decoded boxes: a leaf adds the backbone and the neck's inputs.
_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    '../datasets/coco_instance_ms-crop.py',
    '../schedules/adamw_3x.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(_delete_=True),
    roi_head=dict(
        bbox_head=[
            dict(
                head,
                type='Shared4Conv1FCBBoxHead',
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=dict(type='SyncBN', requires_grad=True),
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
            )
            for head in _base_.model.roi_head.bbox_head
        ]
    ),
)
