# mmdet's Cascade Mask R-CNN made small: a leaf adds the backbone and the neck's inputs.
_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', 'rcnn_shapes.py']
model = dict(
    backbone=dict(_delete_=True),
    neck=_base_.neck,
    rpn_head=_base_.rpn_head,
    # Lists are not merged with the base's: each stage is taken from it and made small.
    roi_head=dict(
        bbox_roi_extractor=_base_.roi_extractor,
        bbox_head=[dict(head, **_base_.bbox_head) for head in _base_.model.roi_head.bbox_head],
        mask_roi_extractor=_base_.roi_extractor,
        mask_head=_base_.mask_head,
    ),
    train_cfg=dict(
        rpn_proposal=_base_.proposals,
        # Half the boxes of the toy Mask R-CNN in each of the three stages.
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, num=32))
            for stage in _base_.model.train_cfg.rcnn
        ],
    ),
    test_cfg=dict(rpn=_base_.proposals),
)
# A step takes a fifth longer than Mask R-CNN's.
max_epochs = 5
warm_up, decay = _base_.param_scheduler
param_scheduler = [warm_up, dict(decay, T_max=max_epochs)]
train_cfg = dict(max_epochs=max_epochs)
