auto_scale_lr = dict(base_batch_size=4, enable=False)
backbone = dict(
    arch=dict(
        carrier_size=2,
        carriers=(2, ),
        depths=(
            1,
            1,
            3,
            1,
        ),
        drop_path_rate=0.0,
        embed_dims=32,
        num_heads=(
            1,
            2,
            4,
            8,
        ),
        propagate=True,
        stem_dims=32,
        window_size=4),
    init_cfg=dict(distribution='uniform', layer='Linear', type='Xavier'),
    type='hat_mm.FasterViT')
channels = [
    32,
    64,
    128,
    256,
]
classes = (
    'background',
    'nucleus',
)
crop_size = (
    256,
    256,
)
custom_hooks = [
    dict(type='hat_mm.NonFiniteLossHook'),
]
data_preprocessor = dict(
    _scope_='mmseg',
    bgr_to_rgb=True,
    mean=[
        123.675,
        116.28,
        103.53,
    ],
    pad_val=0,
    seg_pad_val=255,
    size=(
        256,
        256,
    ),
    std=[
        58.395,
        57.12,
        57.375,
    ],
    type='SegDataPreProcessor')
data_root = 'data/ade/ADEChallengeData2016'
dataset_type = 'ADE20KDataset'
default_hooks = dict(
    checkpoint=dict(
        _scope_='mmseg',
        by_epoch=False,
        interval=60,
        max_keep_ckpts=2,
        type='CheckpointHook'),
    logger=dict(
        _scope_='mmseg',
        interval=50,
        log_metric_by_epoch=False,
        type='LoggerHook'),
    param_scheduler=dict(_scope_='mmseg', type='ParamSchedulerHook'),
    sampler_seed=dict(_scope_='mmseg', type='DistSamplerSeedHook'),
    timer=dict(_scope_='mmseg', type='IterTimerHook'),
    visualization=dict(
        _scope_='mmseg', draw=True, type='SegVisualizationHook'))
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    dist_cfg=dict(backend='nccl'),
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
head = dict(channels=32, norm_cfg=dict(type='BN'))
img_ratios = [
    0.5,
    0.75,
    1.0,
    1.25,
    1.5,
    1.75,
]
launcher = 'none'
load_from = 'work_dirs/nuclei/upernet/iter_600.pth'
log_level = 'INFO'
log_processor = dict(by_epoch=False)
lr = 0.0004
max_iters = 600
metainfo = dict(classes=(
    'background',
    'nucleus',
))
model = dict(
    _scope_='mmseg',
    auxiliary_head=dict(
        align_corners=False,
        channels=32,
        concat_input=False,
        dropout_ratio=0.1,
        in_channels=128,
        in_index=2,
        loss_decode=dict(
            loss_weight=0.4, type='CrossEntropyLoss', use_sigmoid=False),
        norm_cfg=dict(requires_grad=True, type='BN'),
        num_classes=2,
        num_convs=1,
        type='FCNHead'),
    backbone=dict(
        arch=dict(
            carrier_size=2,
            carriers=(2, ),
            depths=(
                1,
                1,
                3,
                1,
            ),
            drop_path_rate=0.0,
            embed_dims=32,
            num_heads=(
                1,
                2,
                4,
                8,
            ),
            propagate=True,
            stem_dims=32,
            window_size=4),
        init_cfg=dict(distribution='uniform', layer='Linear', type='Xavier'),
        type='hat_mm.FasterViT'),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        pad_val=0,
        seg_pad_val=255,
        size=(
            256,
            256,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='SegDataPreProcessor'),
    decode_head=dict(
        align_corners=False,
        channels=32,
        dropout_ratio=0.1,
        in_channels=[
            32,
            64,
            128,
            256,
        ],
        in_index=[
            0,
            1,
            2,
            3,
        ],
        loss_decode=dict(
            loss_weight=1.0, type='CrossEntropyLoss', use_sigmoid=False),
        norm_cfg=dict(requires_grad=True, type='BN'),
        num_classes=2,
        pool_scales=(
            1,
            2,
            3,
            6,
        ),
        type='UPerHead'),
    pretrained=None,
    test_cfg=dict(mode='whole'),
    train_cfg=dict(),
    type='EncoderDecoder')
norm_cfg = dict(_scope_='mmseg', requires_grad=True, type='BN')
num_classes = 2
optim_wrapper = dict(
    _scope_='mmseg',
    clip_grad=dict(max_norm=10.0),
    optimizer=dict(
        betas=(
            0.9,
            0.999,
        ), lr=0.0004, type='AdamW', weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0),
    type='OptimWrapper')
optimizer = dict(
    betas=(
        0.9,
        0.999,
    ), lr=6e-05, type='AdamW', weight_decay=0.01)
param_scheduler = [
    dict(begin=0, by_epoch=False, end=60, start_factor=0.01, type='LinearLR'),
    dict(
        begin=60,
        by_epoch=False,
        end=600,
        eta_min=0.0,
        power=1.0,
        type='PolyLR'),
]
randomness = dict(seed=0)
resume = False
runner_type = 'hat_mm.ExactResumeRunner'
scale = 1.0
test_cfg = dict(_scope_='mmseg', type='TestLoop')
test_dataloader = dict(
    batch_size=1,
    dataset=dict(
        data_prefix=dict(
            img_path='data/nuclei/val', seg_map_path='data/nuclei/labels/val'),
        img_suffix='.png',
        metainfo=dict(classes=(
            'background',
            'nucleus',
        )),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        type='BaseSegDataset'),
    num_workers=4,
    persistent_workers=True,
    sampler=dict(_scope_='mmseg', shuffle=False, type='DefaultSampler'))
test_evaluator = dict(
    _scope_='mmseg', iou_metrics=[
        'mIoU',
    ], type='IoUMetric')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_cfg = dict(
    _scope_='mmseg', max_iters=600, type='IterBasedTrainLoop', val_interval=60)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_prefix=dict(
            img_path='data/nuclei/train',
            seg_map_path='data/nuclei/labels/train'),
        img_suffix='.png',
        metainfo=dict(classes=(
            'background',
            'nucleus',
        )),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(
                transforms=[
                    [
                        dict(keep_ratio=True, scale_factor=0.7, type='Resize'),
                        dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                    ],
                    [
                        dict(
                            keep_ratio=True, scale_factor=0.35, type='Resize'),
                        dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
                    ],
                    [
                        dict(
                            keep_ratio=True,
                            scale_factor=0.24499999999999997,
                            type='Resize'),
                        dict(
                            keep_ratio=True,
                            scale_factor=2.857142857142857,
                            type='Resize'),
                    ],
                    [
                        dict(
                            keep_ratio=True, scale_factor=0.85, type='Resize'),
                        dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                    ],
                    [
                        dict(
                            keep_ratio=True, scale_factor=0.425,
                            type='Resize'),
                        dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
                    ],
                    [
                        dict(
                            keep_ratio=True,
                            scale_factor=0.2975,
                            type='Resize'),
                        dict(
                            keep_ratio=True,
                            scale_factor=2.857142857142857,
                            type='Resize'),
                    ],
                    [
                        dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                        dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                    ],
                    [
                        dict(keep_ratio=True, scale_factor=0.5, type='Resize'),
                        dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
                    ],
                    [
                        dict(
                            keep_ratio=True, scale_factor=0.35, type='Resize'),
                        dict(
                            keep_ratio=True,
                            scale_factor=2.857142857142857,
                            type='Resize'),
                    ],
                    [
                        dict(keep_ratio=True, scale_factor=1.2, type='Resize'),
                        dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                    ],
                    [
                        dict(keep_ratio=True, scale_factor=0.6, type='Resize'),
                        dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
                    ],
                    [
                        dict(
                            keep_ratio=True, scale_factor=0.42, type='Resize'),
                        dict(
                            keep_ratio=True,
                            scale_factor=2.857142857142857,
                            type='Resize'),
                    ],
                    [
                        dict(keep_ratio=True, scale_factor=1.4, type='Resize'),
                        dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                    ],
                    [
                        dict(keep_ratio=True, scale_factor=0.7, type='Resize'),
                        dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
                    ],
                    [
                        dict(
                            keep_ratio=True,
                            scale_factor=0.48999999999999994,
                            type='Resize'),
                        dict(
                            keep_ratio=True,
                            scale_factor=2.857142857142857,
                            type='Resize'),
                    ],
                ],
                type='RandomChoice'),
            dict(crop_size=(
                256,
                256,
            ), type='RandomCrop'),
            dict(
                direction=[
                    'horizontal',
                    'vertical',
                    'diagonal',
                ],
                prob=0.75,
                type='RandomFlip'),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackSegInputs'),
        ],
        type='BaseSegDataset'),
    num_workers=4,
    persistent_workers=True,
    sampler=dict(_scope_='mmseg', shuffle=True, type='InfiniteSampler'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        transforms=[
            [
                dict(keep_ratio=True, scale_factor=0.7, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.35, type='Resize'),
                dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
            ],
            [
                dict(
                    keep_ratio=True,
                    scale_factor=0.24499999999999997,
                    type='Resize'),
                dict(
                    keep_ratio=True,
                    scale_factor=2.857142857142857,
                    type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.85, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.425, type='Resize'),
                dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.2975, type='Resize'),
                dict(
                    keep_ratio=True,
                    scale_factor=2.857142857142857,
                    type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.5, type='Resize'),
                dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.35, type='Resize'),
                dict(
                    keep_ratio=True,
                    scale_factor=2.857142857142857,
                    type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=1.2, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.6, type='Resize'),
                dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.42, type='Resize'),
                dict(
                    keep_ratio=True,
                    scale_factor=2.857142857142857,
                    type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=1.4, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
            ],
            [
                dict(keep_ratio=True, scale_factor=0.7, type='Resize'),
                dict(keep_ratio=True, scale_factor=2.0, type='Resize'),
            ],
            [
                dict(
                    keep_ratio=True,
                    scale_factor=0.48999999999999994,
                    type='Resize'),
                dict(
                    keep_ratio=True,
                    scale_factor=2.857142857142857,
                    type='Resize'),
            ],
        ],
        type='RandomChoice'),
    dict(crop_size=(
        256,
        256,
    ), type='RandomCrop'),
    dict(
        direction=[
            'horizontal',
            'vertical',
            'diagonal',
        ],
        prob=0.75,
        type='RandomFlip'),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
tta_model = dict(_scope_='mmseg', type='SegTTAModel')
tta_pipeline = [
    dict(_scope_='mmseg', backend_args=None, type='LoadImageFromFile'),
    dict(
        _scope_='mmseg',
        transforms=[
            [
                dict(keep_ratio=True, scale_factor=0.5, type='Resize'),
                dict(keep_ratio=True, scale_factor=0.75, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.25, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.5, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.75, type='Resize'),
            ],
            [
                dict(direction='horizontal', prob=0.0, type='RandomFlip'),
                dict(direction='horizontal', prob=1.0, type='RandomFlip'),
            ],
            [
                dict(type='LoadAnnotations'),
            ],
            [
                dict(type='PackSegInputs'),
            ],
        ],
        type='TestTimeAug'),
]
val_cfg = dict(_scope_='mmseg', type='ValLoop')
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        data_prefix=dict(
            img_path='data/nuclei/val', seg_map_path='data/nuclei/labels/val'),
        img_suffix='.png',
        metainfo=dict(classes=(
            'background',
            'nucleus',
        )),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        type='BaseSegDataset'),
    num_workers=4,
    persistent_workers=True,
    sampler=dict(_scope_='mmseg', shuffle=False, type='DefaultSampler'))
val_evaluator = dict(
    _scope_='mmseg', iou_metrics=[
        'mIoU',
    ], type='IoUMetric')
vis_backends = [
    dict(_scope_='mmseg', type='LocalVisBackend'),
]
visualizer = dict(
    _scope_='mmseg',
    name='visualizer',
    save_dir='pictures',
    type='SegLocalVisualizer',
    vis_backends=[
        dict(type='LocalVisBackend'),
    ])
width = 32
work_dir = 'work_dirs/nuclei/upernet/test'
