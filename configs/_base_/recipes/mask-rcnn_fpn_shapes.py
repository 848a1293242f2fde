# mmdet's Mask R-CNN made small: a leaf adds the backbone and the neck's inputs.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'rcnn_shapes.py']
model = dict(
    backbone=dict(_delete_=True),
    neck=_base_.neck,
    rpn_head=_base_.rpn_head,
    roi_head=dict(
        bbox_roi_extractor=_base_.roi_extractor,
        bbox_head=_base_.bbox_head,
        mask_roi_extractor=_base_.roi_extractor,
        mask_head=_base_.mask_head,
    ),
    train_cfg=dict(rpn_proposal=_base_.proposals, rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=_base_.proposals),
)
