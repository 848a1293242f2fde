# resnet-toy.py with as many parameters as the other toy backbones.
_base_ = ['resnet-toy.py']
backbone = dict(base_channels=20)
channels = [80, 160, 320, 640]
