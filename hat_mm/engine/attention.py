"""Where attention looks, found out from the inputs of its modules in a forward pass.

No model changes for it. Hooks keep what each attention was given, and are removed; then each is run
again, and the queries and keys that it gives to ``scaled_dot_product_attention`` make its weights.

A stage is seen as a graph. Its nodes are the tokens of the map, padding included, and after them
the carriers (FasterViT, SwinHAT) or the averages that all tokens attend to (HAT-Net), both called
summaries here. Each step of a block moves shares between nodes, from those that ask to those that
are looked at.

Letters: T tokens, S summaries, M groups that attend apart (windows), Q queries, K keys, G heads.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hat_mm.backbones.fastervit import HATStage
from hat_mm.backbones.swin_hat import SwinStage
from hat_mm.layers import HierarchicalMHSA, SelfAttention, count_windows, split_windows
from hat_mm.layers.windows import averaging_matrix

__all__ = ['BlockAttention', 'StageAttention', 'attention_weights', 'trace_attention']

# --- weights --------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What a module gave to ``scaled_dot_product_attention``: (M, G, Q or K, d), and a mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    def weights(self) -> Tensor:
        """How much each query takes of each key, (M, G, Q, K)."""
        scores = self.query @ self.key.transpose(-1, -2) / math.sqrt(self.query.shape[-1])
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -torch.inf)
        elif self.mask is not None:
            scores = scores + self.mask
        return scores.softmax(-1)


class _Calls(TorchFunctionMode):
    """Keeps the calls of ``scaled_dot_product_attention``, and answers them by their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        call = Call(query, key, value, kwargs.get('attn_mask'))
        self.found.append(call)
        return call.weights() @ call.value


@torch.no_grad()
def attention_weights(module: nn.Module, *inputs: Any) -> tuple[list[Tensor], Tensor]:
    """Runs an attention again, with its weights in the open.

    Args:
        module: A module that calls ``scaled_dot_product_attention``.
        inputs: What it is called with.

    Returns:
        The weights of each call, (M, G, Q, K), and the module's output, made from them.
    """
    with _Calls() as calls:
        output = module(*inputs)
    return [call.weights() for call in calls.found], output


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple]]:
    """Keeps what modules are given and return, and removes its hooks at the end."""
    seen: dict[nn.Module, tuple] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen[module] = (*args, *kwargs.values()), output

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# --- steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attend:
    """An attention: the queries of each group look at its keys.

    Attributes:
        weights: Mean of all heads, (M, Q, K).
        queries: Their nodes, (M, Q); each node at most once.
        keys: Their nodes, (M, K).
        share: Part of a query's result that comes from the keys; the rest is its own. Half for an
            attention with a skip connection, as usual in attention rollout
            (https://arxiv.org/abs/2005.00928).
    """

    weights: Tensor
    queries: Tensor
    keys: Tensor
    share: float = 0.5

    def back(self, shares: Tensor, share: float | None = None) -> Tensor:
        """Takes shares of the nodes (T + S,) after the step to those before it."""
        share = self.share if share is None else share
        asked = shares[self.queries]
        result = shares.index_copy(0, self.queries.flatten(), (1 - share) * asked.flatten())
        found = share * (asked[:, None] @ self.weights)
        return result.index_add(0, self.keys.flatten(), found.flatten())


@dataclass(frozen=True)
class Summarize:
    """What all summaries are made of: weighted sums of tokens.

    Attributes:
        rows: Weights along the map's rows, (a, H) for a grid of (a, b) summaries.
        cols: Weights along its columns, (b, W).
    """

    rows: Tensor
    cols: Tensor

    def back(self, shares: Tensor) -> Tensor:
        """Takes shares of the nodes (T + S,) to the tokens; the summaries keep none."""
        tokens = self.rows.shape[1] * self.cols.shape[1]
        grid = shares[tokens:].view(len(self.rows), len(self.cols))
        found = self.rows.T @ grid @ self.cols
        return torch.cat([shares[:tokens] + found.flatten(), torch.zeros_like(shares[tokens:])])


@dataclass(frozen=True)
class Pad:
    """New padding: what was at its places before does not come through.

    Attributes:
        kept: 1 for tokens of the map and for summaries, 0 for padding, (T + S,).
    """

    kept: Tensor

    def back(self, shares: Tensor) -> Tensor:
        """Takes shares of the nodes (T + S,) after the step to those before it."""
        return shares * self.kept


@dataclass(frozen=True)
class BlockAttention:
    """The attention of a block.

    Attributes:
        name: Name of the block in the model.
        steps: All that happens, in the order of the forward pass.
        local: The attention of tokens in their window.
        to_summaries: The steps from a token to the summaries that it gets something of, the last
            one first; empty if there are none.
        skip: Whether a skip connection leads around all steps.
    """

    name: str
    steps: tuple[Any, ...]
    local: Attend | None
    to_summaries: tuple[Attend, ...] = ()
    skip: bool = False

    def back(self, shares: Tensor) -> Tensor:
        """Takes shares of the nodes (T + S,) after the block to those before it."""
        result = shares
        for step in reversed(self.steps):
            result = step.back(result)
        return (shares + result) / 2 if self.skip else result


@dataclass(frozen=True)
class StageAttention:
    """The attention of a stage, for one image.

    Attributes:
        name: Name of the stage in the model.
        map_size: Its map (H, W) in tokens.
        padded_size: The same with padding to whole windows.
        grid_size: Grid (a, b) of the summaries; None if there are none.
        cell_size: Tokens along a side of a summary's place, for drawing; carriers overlap.
        blocks: Its blocks.
        start: What the carriers are made of at the start; None for no carriers.
    """

    name: str
    map_size: tuple[int, int]
    padded_size: tuple[int, int]
    grid_size: tuple[int, int] | None
    cell_size: float = 0
    blocks: list[BlockAttention] = field(default_factory=list)
    start: Summarize | None = None

    def shares(self, tokens: Tensor) -> Tensor:
        """Shares of the nodes (T + S,), which sum to one, of chosen tokens.

        Args:
            tokens: Booleans or weights, (H, W).

        Raises:
            ValueError: No token is chosen, or the size is another.
        """
        if tuple(tokens.shape) != self.map_size or not tokens.any():
            raise ValueError(
                f'the tokens of {self.name} are {self.map_size}, and at least one must be chosen, '
                f'got {tuple(tokens.shape)} with {int(tokens.count_nonzero())}'
            )
        rows, cols = (big - n for big, n in zip(self.padded_size, self.map_size, strict=True))
        chosen = F.pad(tokens.double() / tokens.double().sum(), (0, cols, 0, rows)).flatten()
        return F.pad(chosen, (0, math.prod(self.grid_size or (0,))))

    def look(self, block: BlockAttention, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What tokens look at in one block.

        Args:
            block: One of ``blocks``.
            tokens: The tokens that ask, (H, W).

        Returns:
            Weights of the tokens (H, W), and of the summaries (a, b): for carriers, what the
            carriers of the window have taken from all carriers before the window looks at them.
        """
        shares = self.shares(tokens)
        near = shares if block.local is None else block.local.back(shares, share=1)
        if not block.to_summaries or self.grid_size is None:
            return self._tokens(near), None
        far = block.to_summaries[0].back(shares, share=1)
        for step in block.to_summaries[1:]:
            far = step.back(far)
        if block.local is None:  # every token is a summary of itself
            near = torch.zeros_like(near)
        return self._tokens(near), far[math.prod(self.padded_size) :].view(self.grid_size)

    def rollout(self, tokens: Tensor) -> Tensor:
        """How much of each token before the stage has reached the chosen ones after it, (H, W).

        Convolutions and MLPs are left out; attention and its skip connection count the same.

        Args:
            tokens: The tokens that ask, (H, W).
        """
        shares = self.shares(tokens)
        for block in reversed(self.blocks):
            shares = block.back(shares)
        return self._tokens(shares if self.start is None else self.start.back(shares))

    def _tokens(self, shares: Tensor) -> Tensor:
        rows, cols = self.padded_size
        tokens = shares[: rows * cols].view(rows, cols)
        return tokens[: self.map_size[0], : self.map_size[1]]


# --- the families ---------------------------------------------------------------------------------


def trace_attention(model: nn.Module, run: Callable[[], Any]) -> list[StageAttention]:
    """Finds out where the attention of a model looks.

    Args:
        model: A model with FasterViT, HAT-Net, SwinHAT, or with the plugins.
        run: Runs the model once, on one image.

    Returns:
        The stages in the order of the model; a plugin is a stage.

    Raises:
        ValueError: The model has no attention of hat_mm.
    """
    kinds = (HATStage, SwinStage, SelfAttention, HierarchicalMHSA)
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    with recorded(modules) as seen, torch.no_grad():
        run()
    stages: dict[str, StageAttention] = {}
    for name, module in model.named_modules():
        if module not in seen:
            continue
        if isinstance(module, HATStage):
            stages[name] = _of_hat_stage(name, module, seen)
        elif isinstance(module, SwinStage):
            stages[name] = _of_swin_stage(name, module, seen)
        elif isinstance(module, HierarchicalMHSA):
            [x, *_], _ = seen[module]
            stage_name = name.rpartition('.blocks.')[0] or name
            block = _of_h_mhsa(name.removesuffix('.attn'), module, x[:1])
            if stage_name not in stages:
                stages[stage_name] = _h_mhsa_stage(stage_name, module, x)
            stages[stage_name].blocks.append(block)
    if not stages:
        raise ValueError(
            'the model has no attention of hat_mm: it needs FasterViT, HATNet or SwinHAT as its '
            'backbone, or HATPlugin or HMHSAPlugin in it'
        )
    return list(stages.values())


def _mean_of_heads(module: SelfAttention, seen: dict[nn.Module, tuple], groups: int) -> Tensor:
    """The weights (M, N, N) of the groups of the first image."""
    (x, grid_size, *mask), _ = seen[module]
    mask = [m if m is None else m[:groups] for m in mask]
    weights, _ = attention_weights(module, x[:groups], grid_size, *mask)
    # Several calls if there are many queries.
    return torch.cat([part.mean(1) for part in weights], 1).double()


def _raster(size: tuple[int, int], like: Tensor, start: int = 0) -> Tensor:
    """Numbers of nodes in raster order, (1, rows, cols, 1)."""
    rows, cols = size
    return torch.arange(start, start + rows * cols, device=like.device).view(1, rows, cols, 1)


class Nodes(NamedTuple):
    """Numbers of the nodes of a stage with windows.

    Attributes:
        tokens: Of the map in raster order, (1, H, W, 1), padding included.
        carriers: Of each window, (M, c * c); none without carriers.
        grid: Of all carriers in raster order, (1, S).
    """

    tokens: Tensor
    carriers: Tensor
    grid: Tensor


def _windowed_stage(
    name: str, stage: HATStage | SwinStage, window_size: int, seen: dict[nn.Module, tuple]
) -> tuple[StageAttention, Nodes]:
    """A stage with windows, yet without blocks."""
    output = seen[stage][1]
    map_size = (output.shape[-2], output.shape[-1])
    num_windows = count_windows(map_size, window_size)
    size = (num_windows[0] * window_size, num_windows[1] * window_size)
    tokens = _raster(size, output)
    grid_size, start, c = None, None, 0
    if stage.tokenizer is not None:
        c = stage.tokenizer.carrier_size
        grid_size = (num_windows[0] * c, num_windows[1] * c)
        start = Summarize(*(stage.tokenizer.pooling(n, output).double() for n in num_windows))
    grid = _raster(grid_size or (0, 0), output, start=tokens.numel())
    carriers = split_windows(grid, num_windows, c)[..., 0] if c else grid.view(1, 0)
    cell = window_size / c if c else 0
    found = StageAttention(name, map_size, size, grid_size, cell, start=start)
    return found, Nodes(tokens, carriers.expand(math.prod(num_windows), -1), grid.view(1, -1))


def _of_hat_stage(name: str, stage: HATStage, seen: dict[nn.Module, tuple]) -> StageAttention:
    w = stage.window_size
    found, nodes = _windowed_stage(name, stage, w, seen)
    windows = split_windows(nodes.tokens, count_windows(found.map_size, w), w)[..., 0]
    members = torch.cat([nodes.carriers, windows], 1)
    block: Any
    for i, block in enumerate(stage.blocks):
        local = Attend(_mean_of_heads(block.window_attn.attn, seen, len(windows)), members, members)
        steps: list[Any] = [local]
        far: tuple[Attend, ...] = ()
        if block.carrier_attn is not None:
            among = _mean_of_heads(block.carrier_attn.attn, seen, 1)
            exchange = Attend(among, nodes.grid, nodes.grid)
            steps, far = [exchange, local], (local, exchange)
        if block.propagate:
            steps.append(_propagation(block, windows, nodes.carriers))
        found.blocks.append(BlockAttention(f'{name}.blocks.{i}', tuple(steps), local, far))
    return found


def _propagation(block: Any, windows: Tensor, carriers: Tensor) -> Attend:
    """Each token is one part itself and ``scale`` parts its nearest carrier."""
    scale = block.carrier_attn.scale
    part = 1.0 if scale is None else float(scale.abs().mean())
    nearest = block.nearest_carriers(carriers)
    one = torch.ones(windows.numel(), 1, 1, dtype=torch.float64, device=windows.device)
    queries, keys = windows.reshape(-1, 1), nearest.reshape(-1, 1)
    return Attend(one, queries, keys, share=part / (1 + part))


def _of_swin_stage(name: str, stage: SwinStage, seen: dict[nn.Module, tuple]) -> StageAttention:
    block: Any = stage.blocks[0]
    w = block.window_size
    found, nodes = _windowed_stage(name, stage, w, seen)
    num_windows = count_windows(found.map_size, w)
    # Swin crops the map after each block, and pads it with zeros before the next.
    pad = Pad((found.shares(torch.ones(found.map_size, device=nodes.tokens.device)) > 0).double())
    pad.kept[nodes.grid] = 1
    for i, block in enumerate(stage.blocks):
        inputs, _ = seen[block.attn]
        shift = 0 if inputs[2] is None else block.shift
        rolled = nodes.tokens.roll((-shift, -shift), (1, 2))
        windows = split_windows(rolled, num_windows, w)[..., 0]
        members = torch.cat([nodes.carriers, windows], 1)
        local = Attend(_mean_of_heads(block.attn, seen, len(windows)), members, members)
        steps: tuple[Any, ...] = (pad, local)
        far: tuple[Attend, ...] = (local,) if found.grid_size else ()
        if block.carrier_attn is not None:
            among = _mean_of_heads(block.carrier_attn.attn, seen, 1)
            exchange = Attend(among, nodes.grid, nodes.grid)
            steps, far = (pad, exchange, local), (local, exchange)
        found.blocks.append(BlockAttention(f'{name}.blocks.{i}', steps, local, far))
    return found


def _h_mhsa_stage(name: str, module: HierarchicalMHSA, x: Tensor) -> StageAttention:
    map_size, w = (x.shape[-2], x.shape[-1]), module.window_size
    nh, nw = count_windows(map_size, w)
    grid_size = count_windows(map_size, module.ds_ratio)
    return StageAttention(name, map_size, (nh * w, nw * w), grid_size, module.ds_ratio)


def _of_h_mhsa(name: str, module: HierarchicalMHSA, x: Tensor) -> BlockAttention:
    weights = [part.mean(1).double() for part in attention_weights(module, x)[0]]
    stage, w = _h_mhsa_stage(name, module, x), module.window_size
    raster = _raster(stage.padded_size, x)
    real = raster[:, : stage.map_size[0], : stage.map_size[1]].reshape(1, -1)
    made_of = Summarize(
        *(
            _averages(n, padded, module.ds_ratio, like=weights[-1])
            for n, padded in zip(stage.map_size, stage.padded_size, strict=True)
        )
    )
    averages = raster.numel() + torch.arange(len(made_of.rows) * len(made_of.cols), device=x.device)
    # With windows, what they have found is added.
    to_averages = Attend(weights[-1], real, averages[None], share=0.5 if w > 1 else 1)
    local = None
    if w > 1:
        windows = split_windows(raster, count_windows(stage.map_size, w), w)[..., 0]
        local = Attend(weights[0], windows, windows)
    steps = (local, made_of, to_averages) if local else (made_of, to_averages)
    return BlockAttention(name, steps, local, (to_averages,), skip=True)


def _averages(n: int, padded: int, size: int, like: Tensor) -> Tensor:
    """The matrix that averages an axis of n tokens in pieces of a size; the last may be smaller."""
    start = torch.arange(0, n, size, device=like.device)
    return averaging_matrix(start, (start + size).clamp(max=n), padded, like.dtype)
