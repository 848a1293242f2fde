"""Builds models named on a command line: a registered type with arguments, or a config.

Also what several tools ask of a built model.
"""

import ast
import copy
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hat_mm import compat
from hat_mm.configs import WEIGHTS

from .cli import TOOLBOXES, UserError


def read_type(text: str) -> tuple[str, dict[str, Any]]:
    """Reads ``TYPE[:KEY=VALUE,...]``.

    Args:
        text: A type with its scope, such as ``hat_mm.FasterViT:arch=0``. A double colon is part of
            the type, commas in brackets are part of a value, and a value that is not a Python
            literal is a string.

    Returns:
        The type and its arguments.

    Raises:
        UserError: An argument is not KEY=VALUE.
    """
    [(kind, words)] = re.findall(r'^((?:[^:]|::)*):?(.*)$', text, re.DOTALL)
    arguments: dict[str, Any] = {}
    for word in filter(None, _split(words)):
        key, equals, value = word.partition('=')
        if not equals:
            raise UserError(f'{word!r} in {text!r} is not KEY=VALUE')
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return kind, arguments


def _split(arguments: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth = [''], 0
    for char in arguments:
        depth += (char in '([{') - (char in ')]}')
        if char == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += char
    return parts


def build_type(kind: str, arguments: dict[str, Any]) -> nn.Module:
    """Builds a backbone by its registered type, with random weights, in eval mode.

    Raises:
        UserError: The type or an argument is unknown, or it does not accept images of three
            channels.
    """
    scope = kind.partition('.')[0]
    if scope in TOOLBOXES:
        compat.require(f'{scope}.models')
    cfg = copy.deepcopy({'type': kind, **arguments})  # some backbones change their arguments
    try:
        backbone = compat.require('mmengine.registry').MODELS.build(cfg)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{kind} cannot be built: {error}') from error
    backbone.eval()
    with torch.inference_mode():
        try:
            backbone(torch.zeros(1, 3, 32, 32))  # also makes libraries allocate what they need once
        except Exception as error:
            raise UserError(f'{kind} takes no image of 3 channels: {error}') from error
    return backbone


def build_model(cfg: Any) -> nn.Module:
    """Builds the model of a config under the config's own scope, with random weights."""
    if cfg.get('data_preprocessor') is not None:  # as mmengine's runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return build_part(cfg.model, cfg.default_scope)


def build_part(cfg: Any, scope: str) -> nn.Module:
    """Builds a model, backbone, neck or head under the scope of a toolbox, with random weights."""
    compat.require(f'{scope}.utils').register_all_modules(init_default_scope=False)
    scopes = importlib.import_module('mmengine.registry').DefaultScope
    with scopes.overwrite_default_scope(scope):
        return importlib.import_module(f'{scope}.registry').MODELS.build(cfg)


def without_weights(cfg: Any) -> Any:
    """A copy of a config in which nothing loads weights."""
    if isinstance(cfg, dict):
        given = {k: without_weights(v) for k, v in cfg.items()}
        none = {k: False if isinstance(v, bool) else None for k, v in given.items()}  # timm's
        drop = ('init_cfg', *WEIGHTS)
        return type(cfg)({k: none[k] if k in drop else v for k, v in given.items()})
    return [without_weights(v) for v in cfg] if isinstance(cfg, list) else cfg


# --- built models ---------------------------------------------------------------------------------


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode for a while; each part returns to its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def swaps_channels(preprocessor: Any) -> bool:
    """Whether a toolbox's data preprocessor turns BGR to RGB, or RGB to BGR."""
    names = ('to_rgb', '_channel_conversion', 'channel_conversion')  # mmpretrain, mmdet, mmseg
    return any(bool(getattr(preprocessor, name, False)) for name in names)
