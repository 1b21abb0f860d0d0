"""Hook points by name: read activations in a forward pass (`capture`) or replace them (`replace`).

The names are defined in `sae_dist.model.families`; the path of any module of the model works as well and means
that module's output.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_dist.config import UserError
from sae_dist.model.families import decoder, layer_paths, layers
from sae_dist.model.parallel import ONE_PROCESS, ReplicaGroup, gather_last_dim

Activations = Float[Tensor, "batch context width"]
Rewrite = Callable[[Activations], Activations]

_NAME = re.compile(r"(resid_pre|attn_out|mlp_act|mlp_out|resid_post)\.(\d+)")


class HookPoint(NamedTuple):
    """A place in the forward pass: the input or the output of a module."""

    name: str
    module: nn.Module
    side: Literal["input", "output"]


def available(model: PreTrainedModel) -> list[str]:
    """Every named hook point, in the order of the forward pass."""
    return [f"{kind}.{layer}" for layer in range(len(layers(model))) for kind in _kinds(model)]


def resolve(model: PreTrainedModel, hook: str) -> HookPoint:
    """The hook point `hook` of this model; UserError that lists the existing ones if there is none."""
    named = _NAME.fullmatch(hook)
    if named is None:
        modules = dict(model.named_modules())
        if not hook or hook not in modules:
            raise UserError(_unknown(model, hook))
        return HookPoint(hook, modules[hook], "output")

    kind, stack = named[1], layers(model)
    if kind not in _kinds(model) or int(named[2]) >= len(stack):
        raise UserError(_unknown(model, hook))
    layer, inside = stack[int(named[2])], layer_paths(model)
    if kind in ("resid_pre", "resid_post"):
        return HookPoint(hook, layer, "input" if kind == "resid_pre" else "output")
    return HookPoint(hook, layer.get_submodule(getattr(inside, kind)), "input" if kind == "mlp_act" else "output")


def width(model: PreTrainedModel, hook: str, *, group: ReplicaGroup = ONE_PROCESS) -> int:
    """The size of the hook point's last dim, read off a two-token forward pass."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    return capture(model, tokens, [hook], group=group)[hook].shape[-1]


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch context"],
    hooks: Sequence[str],
    *,
    group: ReplicaGroup = ONE_PROCESS,
) -> dict[str, Activations]:
    """The activations at `hooks`, from one forward pass that ends as soon as it has the last of them.

    Later layers, the final norm and the unembedding do not run. Sequences have no padding. A module that runs several
    times in a pass is read at its first run. In a `group` every process runs the same pass and gets whole activations.
    """
    points = [resolve(model, hook) for hook in dict.fromkeys(hooks)]
    captured: dict[str, Tensor] = {}

    def keep(point: HookPoint, value: object) -> None:
        if point.name in captured:
            return
        x = _unflatten(_tensor(point, value), tokens.shape)
        if x.shape[:2] != tokens.shape:
            raise UserError(_unfit(point, f"a tensor of shape {tuple(x.shape)} for tokens {tuple(tokens.shape)}"))
        captured[point.name] = x.detach() if group.size == 1 else gather_last_dim(x, _whole_width(model, point, x))
        if len(captured) == len(points):
            raise _Complete

    with ExitStack() as stack:
        for point in points:
            stack.enter_context(_watch(point, keep))
        try:
            model(input_ids=tokens, use_cache=False)
        except _Complete:
            return {point.name: captured[point.name] for point in points}
    never = [point.name for point in points if point.name not in captured]
    raise UserError(f"hook={never[0]} of {_title(model)} does not run in a forward pass; choose a module that does")


@contextmanager
def replace(model: PreTrainedModel, rewrites: Mapping[str, Rewrite]) -> Iterator[None]:
    """Replaces `x` by `fn(x)` at each hook point in every forward pass, for as long as the context lasts.

    `fn` maps [batch, context, width] to the same shape; its result is cast to the model's dtype. While the model
    generates with a cache, `context` is the one new token.
    """
    shape: list[int] = []  # of the tokens in the current pass: OPT's MLP flattens batch and context into one dim

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        shape[:] = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[:2]

    with ExitStack() as stack:
        handle = decoder(model).register_forward_pre_hook(remember, with_kwargs=True)
        stack.callback(handle.remove)
        for hook, fn in rewrites.items():
            stack.enter_context(_rewrite(resolve(model, hook), fn, shape))
        yield


class _Complete(Exception):
    """Ends a forward pass that has reached its last hook point."""


@contextmanager
def _watch(point: HookPoint, keep: Callable[[HookPoint, object], None]) -> Iterator[None]:
    """Passes the activations at the hook point to `keep`, for as long as the context lasts."""
    if point.side == "input":
        handle = point.module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(point, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = point.module.register_forward_hook(lambda _, __, output: keep(point, output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _rewrite(point: HookPoint, fn: Rewrite, shape: Sequence[int]) -> Iterator[None]:
    """Replaces `x` by `fn(x)` at the hook point, for as long as the context lasts."""

    def rewritten(value: object) -> Tensor:
        x = _tensor(point, value)
        before = _unflatten(x, shape)
        after = fn(before)
        if after.shape != before.shape:
            raise ValueError(f"{point.name}: the rewrite gave {tuple(after.shape)} for {tuple(before.shape)}")
        return after.to(x.dtype).reshape(x.shape)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (rewritten(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": rewritten(kwargs["hidden_states"])}

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, list):
            return [rewritten(output), *output[1:]]
        return (rewritten(output), *output[1:]) if isinstance(output, tuple) else rewritten(output)

    if point.side == "input":
        handle = point.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = point.module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def _tensor(point: HookPoint, value: object) -> Tensor:
    """The activations in a module's input or output, which may be a tuple: attention also returns its weights."""
    x = value[0] if isinstance(value, tuple | list) and value else value
    if not isinstance(x, Tensor):
        raise UserError(_unfit(point, f"a {type(x).__name__}"))
    if x.dim() not in (2, 3):
        raise UserError(_unfit(point, f"a tensor of shape {tuple(x.shape)}"))
    return x


def _whole_width(model: PreTrainedModel, point: HookPoint, x: Activations) -> int:
    """The width of the hook point in the whole model; `x` may be one process's slice of it."""
    stated = getattr(point.module, "in_features" if point.side == "input" else "out_features", None)
    hidden = decoder(model).config.hidden_size
    if stated is None and x.shape[-1] != hidden:
        raise UserError(
            f"hook={point.name} is no projection and may be split between processes; choose the projection before or "
            "after it, or use harvest.tensor_parallel=1"
        )
    return hidden if stated is None else int(stated)


def _unflatten(x: Tensor, shape: Sequence[int]) -> Activations:
    return x.view(*shape, -1) if x.dim() == 2 else x


def _kinds(model: PreTrainedModel) -> list[str]:
    inside = layer_paths(model)
    if inside is None:  # inputs and outputs of layers are the same in all families; what is inside is not
        return ["resid_pre", "resid_post"]
    return ["resid_pre", "attn_out", *(["mlp_act"] if inside.mlp_act else []), "mlp_out", "resid_post"]


def _title(model: PreTrainedModel) -> str:
    return f"{model.config.name_or_path or 'the model'} ({type(model).__name__})"


def _unfit(point: HookPoint, what: str) -> str:
    return f"hook={point.name} gives {what}, not [batch, context, width]; choose another module"


def _unknown(model: PreTrainedModel, hook: str) -> str:
    stack = layers(model)
    if not stack:
        path = list(dict(model.named_modules()))[-1]
        return (
            f"hook={hook!r} does not exist in {_title(model)}, whose layers are not known by name; give a module path "
            f"such as {path}"
        )
    path = next(name for name, module in model.named_modules() if module is stack[-1])
    names = " ".join(f"{kind}.L" for kind in _kinds(model))
    return (
        f"hook={hook!r} does not exist in {_title(model)}; it has {names} with L from 0 to {len(stack) - 1}, "
        f"and any module path such as {path}"
    )
