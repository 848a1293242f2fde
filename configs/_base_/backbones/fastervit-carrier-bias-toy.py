# fastervit-toy.py whose carriers get as much attention at the start as the tokens.
_base_ = ['fastervit-toy.py']
backbone = dict(arch=dict(carrier_bias=8.0))
