# Small parts for mmdet's R-CNNs, which learn on a CPU.
width = 64
norm_cfg = dict(type='BN')
neck = dict(out_channels=width, norm_cfg=norm_cfg, num_outs=4)
rpn_head = dict(
    in_channels=width,
    feat_channels=width,
    anchor_generator=dict(strides=[4, 8, 16, 32]),
)
# One sample a bin: mmcv's RoIAlign would otherwise take a third of the time on a CPU.
roi_extractor = dict(out_channels=width, finest_scale=28, roi_layer=dict(sampling_ratio=1))
bbox_head = dict(
    in_channels=width,
    fc_out_channels=256,
    reg_class_agnostic=True,
)
mask_head = dict(
    num_convs=2,
    in_channels=width,
    conv_out_channels=width,
    class_agnostic=True,
    norm_cfg=norm_cfg,
)
# For objects of 16 pixels a side and more.
small_anchors = dict(scales=[4], strides=[4, 8, 16, 32])
small_train_cfg = dict(
    # With one scale an octave, few anchors reach the usual 0.7.
    rpn=dict(assigner=dict(pos_iou_thr=0.6)),
    rpn_proposal=dict(nms_pre=500, max_per_img=200),
    rcnn=dict(sampler=dict(num=64)),
)
