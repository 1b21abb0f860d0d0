"""A dictionary on a Hugging Face model while it runs: read its latents, clamp them, or replace what it rebuilds."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from sae_kernels import Active
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.model import hooks
from sae_dist.model.hooks import PreTrainedModel
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.module import DictionaryModule
from sae_dist.steer.activity import of_pages
from sae_dist.steer.clamp import Target, change, check_latents, resolve, values_of
from sae_dist.steer.positions import AFTER_FIRST, check_span, positions, within

Rows = Float[Tensor, "rows width"]


class Attached:
    """What the dictionary has read since `attach`. Values are those before any clamp."""

    def __init__(self, record: Sequence[int], device: torch.device) -> None:
        self._latents = torch.tensor(list(record), dtype=torch.int64, device=device)
        self._recorded: list[Tensor] = []
        self._active: Active | None = None

    @property
    def active(self) -> Active:
        """The active latents of the newest forward pass; row b * context + t is token t of sequence b."""
        if self._active is None:
            raise UserError("the model has not run since the dictionary was attached; call it inside the `with`")
        return self._active

    @property
    def recorded(self) -> Float[Tensor, "batch positions recorded"]:
        """The latents of `record=` on every token, passes of a cache end to end; empty after `clear`."""
        return torch.cat(self._recorded, dim=1) if self._recorded else torch.zeros(0, 0, len(self._latents))

    def clear(self) -> None:
        """Forgets what was recorded, as between texts of another batch size."""
        self._recorded.clear()

    def _keep(self, active: Active, shape: torch.Size) -> None:
        self._active = active
        if len(self._latents):
            self._recorded.append(values_of(active, self._latents).view(*shape, -1))


@contextmanager
def attach(
    model: PreTrainedModel,
    dictionary: Dictionary | DictionaryModule,
    *,
    clamp: Mapping[int, Target] | None = None,
    replace: bool = False,
    at: slice = AFTER_FIRST,
    record: Sequence[int] = (),
    run: str | Path | None = None,
) -> Iterator[Attached]:
    """Attaches a dictionary to the hook point that it was trained on, in every forward pass until the context ends.

    clamp: {latent: value}, each held at a value, at "10x" its maximum or at its "mean". The activation x becomes
        x + decode(clamped latents) - decode(latents): what the dictionary does not explain of x stays as it is
    replace: x becomes the dictionary's reconstruction, of the clamped latents where there are some
    at: positions to change, counted from the start of the text; by default all but the first
    record: latents whose values are kept for all passes, in `recorded`
    run: the folder of a run whose feature pages say the maximum and mean of every latent

    A transcoder reads one hook point and changes the other. UserError where the dictionary does not fit the model.
    """
    check_span(at)
    dictionary = dictionary.dictionary if isinstance(dictionary, DictionaryModule) else dictionary
    activity = None if run is None else of_pages(Path(run) / "pages")
    clamps = resolve(clamp or {}, dictionary, activity)
    own = on_device(dictionary, model.device)
    check_latents("record", record, own)
    attached = Attached(record, model.device)

    def edit(y: Rows, active: Active, x: Rows) -> Rows:
        kept = own.decode(active, x) if replace else y
        return kept + change(active, clamps, own.parameters.W_dec) if len(clamps.latents) else kept

    with positions(model) as present, _read(model, own, attached, _at(present, at), edit):
        yield attached


@contextmanager
def add(
    model: PreTrainedModel, hook: str, vector: Float[Tensor, " width"], *, at: slice = AFTER_FIRST
) -> Iterator[None]:
    """Adds a vector to the activations at `hook`, in every forward pass until the context ends."""
    check_span(at)
    moved = vector.to(model.device, torch.float32)
    with positions(model) as present:
        chosen = _at(present, at)
        with hooks.replace(model, {hook: lambda x: torch.where(chosen()[..., None], x.float() + moved, x.float())}):
            yield


def sites(dictionary: Dictionary) -> tuple[str, str]:
    """The hook points that a dictionary reads and rebuilds; UserError where it has several on a side, or none."""
    reads = str(dictionary.info.get("hook", ""))
    writes = str(dictionary.info.get("target_hook", reads))
    if not reads or "+" in reads + writes:
        raise UserError(
            f"the dictionary's hook point is {reads or 'not known'}{f' -> {writes}' if writes != reads else ''}; "
            "interventions need one hook point that it reads and one that it rebuilds"
        )
    return reads, writes


def on_device(dictionary: Dictionary, device: torch.device) -> Dictionary:
    """The dictionary with its weights where the model is; itself where they are there."""
    if dictionary.parameters.W_dec.device == device:
        return dictionary
    moved = {name: tensor.to(device) for name, tensor in dictionary.more.items()}
    parameters = type(dictionary.parameters)(*(tensor.to(device) for tensor in dictionary.parameters))
    return dataclasses.replace(dictionary, parameters=parameters, **moved)


def _at(present: Callable[[], Int[Tensor, "batch context"]], at: slice) -> Callable[[], Bool[Tensor, "batch context"]]:
    return lambda: within(present(), at)


@contextmanager
def _read(
    model: PreTrainedModel,
    dictionary: Dictionary,
    attached: Attached,
    chosen: Callable[[], Bool[Tensor, "batch context"]],
    edit: Callable[[Rows, Active, Rows], Rows],
) -> Iterator[None]:
    """Encodes what is read and edits what is rebuilt, which may be the same activations; `edit` has both."""
    reads, writes = sites(dictionary)
    _check_fit(model, dictionary)
    found: list[tuple[Active, Rows]] = []

    def read(x: Tensor) -> Tensor:
        with torch.no_grad():
            rows = x.detach().flatten(0, 1).float()
            found[:] = [(dictionary.encode(rows), rows)]
        attached._keep(found[0][0], x.shape[:2])
        return x

    def write(y: Tensor) -> Tensor:
        if not found:
            raise UserError(f"target_hook={writes} runs before hook={reads}; interventions need it to run afterwards")
        rows = y.float().flatten(0, 1)
        edited = torch.where(chosen().flatten()[:, None], edit(rows, *found.pop()), rows)
        return edited.view(y.shape)

    rewrites = {reads: lambda x: write(read(x))} if reads == writes else {reads: read, writes: write}
    with hooks.replace(model, rewrites):
        yield


def _check_fit(model: PreTrainedModel, dictionary: Dictionary) -> None:
    """UserError where a hook point is missing in the model or has another width: the dictionary is of another model."""
    sizes = dictionary.sizes
    for hook, wanted in zip(sites(dictionary), (sizes.d_in, sizes.d_out), strict=True):
        if (there := hooks.width(model, hook)) != wanted:
            raise UserError(
                f"the dictionary of {dictionary.info.get('model', 'another model')} is {wanted} wide at {hook}, "
                f"{model.config.name_or_path or 'this model'} is {there} wide there; give the model that it was "
                "trained on"
            )
