# Fine-tuning on ImageNet-1K of a backbone that the authors trained on ImageNet-21K and tuned on
# ImageNet-1K, with a new head.
_base_ = ['./in1k.py', '../schedules/adamw_cosine-30e.py']
