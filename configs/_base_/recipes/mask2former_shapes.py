# mmdet's Mask2Former made small, to learn the objects and the background of toy pictures on a CPU
# within half an hour: a leaf adds the backbone and the head's inputs. `python demo/shapes.py
# --layout panoptic` draws the data: objects as in COCO's files, and label maps with the classes of
# the background after theirs. mmdet's config sets data and schedule as well, and bases beside each
# other may not set the same, so the data of the other toys cannot be a base here.
_base_ = ['mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py']

# --- model ----------------------------------------------------------------------------------------

things, stuff = 3, 2
width = 64
attention = dict(embed_dims=width, num_heads=4)
ffn = dict(embed_dims=width, feedforward_channels=2 * width)
positions = dict(num_feats=width // 2)
classes = dict(num_things_classes=things, num_stuff_classes=stuff)
data_preprocessor = dict(batch_augments=None)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(_delete_=True),
    panoptic_head=dict(
        **classes,
        feat_channels=width,
        out_channels=width,
        num_queries=20,
        pixel_decoder=dict(
            norm_cfg=dict(num_groups=8),
            encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
            positional_encoding=positions,
        ),
        positional_encoding=positions,
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn),
        ),
        loss_cls=dict(class_weight=[1.0] * (things + stuff) + [0.1]),
    ),
    panoptic_fusion_head=classes,
    train_cfg=dict(num_points=1024),
    # After a short training scores are low: the usual threshold of 0.8 would leave holes.
    test_cfg=dict(max_per_image=20, object_mask_thr=0.5),
)

# --- data -----------------------------------------------------------------------------------------

data_root = 'data/shapes-panoptic/'
metainfo = dict(
    classes=('circle', 'square', 'triangle', 'lines', 'dots'),
    palette=[(220, 20, 60), (0, 160, 80), (30, 80, 230), (200, 190, 150), (130, 150, 170)],
)
load_truth = dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    load_truth,
    dict(
        type='RandomChoiceResize',
        scales=[(384, side) for side in (160, 176, 192, 208, 224)],
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(384, 192), keep_ratio=True),
    load_truth,
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/', seg='annotations/train/'),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/', seg='annotations/val/'),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(type='hat_mm.PanopticQuality', **classes),
    dict(type='CocoMetric', ann_file=f'{data_root}annotations/val.json', metric=['bbox', 'segm']),
]
test_evaluator = val_evaluator

# --- schedule -------------------------------------------------------------------------------------

max_epochs = 6
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(_delete_=True, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        T_max=max_epochs,
        eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(
    _delete_=True, type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=16),
    checkpoint=dict(_delete_=True, type='CheckpointHook', interval=1, max_keep_ckpts=2),
    visualization=dict(score_thr=0.5),
)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
# A training that was interrupted, or killed, is resumed exactly.
runner_type = 'hat_mm.ExactResumeRunner'
custom_hooks = [dict(type='hat_mm.NonFiniteLossHook')]
