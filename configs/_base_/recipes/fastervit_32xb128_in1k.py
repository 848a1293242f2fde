# What FasterViT's authors publish of their training on ImageNet-1K, 32 GPUs with 128 images each.
_base_ = ['./in1k.py', '../schedules/adamw_cosine-310e.py']
custom_hooks = [dict(type='EMAHook', momentum=2e-4, priority='ABOVE_NORMAL')]
