"""A finished dictionary on raw activations, and its folder: dictionary.safetensors and config.json."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sae_kernels
import torch
import xxhash
from jaxtyping import Float
from sae_kernels.reference import Active
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_dist.config import UserError, digest
from sae_dist.sae.config import KINDS
from sae_dist.sae.initialize import Parameters
from sae_dist.sae.variants.interface import Sizes, TensorSpec, Top, tensors

FORMAT = 1
WEIGHTS = "weights_xxh3_128"  # the key of config.json that holds the hash of dictionary.safetensors
CURE = "repeat the run's command, which writes it again, or use another copy of the dictionary"


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """x_hat = decode(encode(x)) on raw activations; `info` is config.json: variant, model, hook point, provenance.

    A latent is active where it is among the k largest of its row (`signed`: by size, of any sign), or where it is above
    its `threshold` if there is one.
    With `b_in` it is a transcoder: it reads x - b_in and rebuilds other activations than x, of `target_hook`. With
    `W_skip` it adds (x - b_in) W_skip to what the latents give, so that `decode` needs x, too.
    """

    parameters: Parameters
    k: int | None  # latents a token: exact, in the mean or expected; None where an import with thresholds does not say
    info: Mapping[str, Any]
    threshold: Float[Tensor, " n_latents"] | None = None
    b_in: Float[Tensor, " d_in"] | None = None
    W_skip: Float[Tensor, "d_in d_out"] | None = None

    @property
    def more(self) -> dict[str, Tensor]:
        """The tensors that it has besides its parameters, by name."""
        found = {"threshold": self.threshold, "b_in": self.b_in, "W_skip": self.W_skip}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def signed(self) -> bool:
        """Whether values may be negative."""
        rule = KINDS[self.info["variant"]]().rule
        return isinstance(rule, Top) and rule.signed

    @property
    def n_latents(self) -> int:
        return self.sizes.n_latents

    @property
    def sizes(self) -> Sizes:
        n_latents, d_out = self.parameters.W_dec.shape
        return Sizes(n_latents, d_in=len(self.parameters.W_enc), d_out=d_out)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Active:
        """The active latents of every row, largest first."""
        W_enc, _, b_enc, b_dec = self.parameters
        centre = b_dec if self.b_in is None else self.b_in
        if self.threshold is not None:
            return sae_kernels.threshold_encode(x.float(), W_enc, b_enc, centre, theta=self.threshold)
        assert self.k is not None
        encode = sae_kernels.abs_topk_encode if self.signed else sae_kernels.topk_encode
        return sae_kernels.packed(encode(x.float(), W_enc, b_enc, centre, k=self.k))

    def decode(self, active: Active, x: Float[Tensor, "batch d_in"] | None = None) -> Float[Tensor, "batch d_out"]:
        """x_hat, or the target's rows, from the active latents and, with a skip connection, from x."""
        _, W_dec, _, b_dec = self.parameters
        rebuilt = sae_kernels.active_decode(active, W_dec, b_dec)
        return rebuilt if self.W_skip is None else rebuilt + self.skipped(x)

    def skipped(self, x: Float[Tensor, "batch d_in"] | None) -> Float[Tensor, "batch d_out"]:
        """What the skip connection adds; ValueError without an x."""
        assert self.W_skip is not None and self.b_in is not None
        if x is None:
            raise ValueError("this dictionary has a skip connection: give `decode` the x that was encoded, too")
        return (x.float() - self.b_in) @ self.W_skip

    def reconstruct(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """decode(encode(x), x)."""
        return self.decode(self.encode(x), x)


def save(dictionary: Dictionary, folder: Path) -> None:
    """Writes both files, each whole or not at all; config.json last, so that a folder with one is complete."""
    own: dict[str, Tensor] = dictionary.parameters._asdict() | dictionary.more
    specs = _specs(dictionary.info)
    parts = ((s, 0, own[s.name].t() if s.stored_transposed else own[s.name]) for s in specs)
    write(folder, parts, specs=specs, sizes=dictionary.sizes, k=dictionary.k, info=dictionary.info)


def write(
    folder: Path, parts: Iterable[tuple[TensorSpec, int, Tensor]], *, specs: Iterable[TensorSpec], sizes: Sizes,
    k: int | None, info: Mapping[str, Any],
) -> None:  # fmt: skip
    """Writes a dictionary from parts (spec, first latent, fp32 rows), of which one is in memory at a time.

    Rows are latents, also of W_enc: [latents, d_in]. b_dec is one part. `specs` are all tensors of the dictionary.
    ValueError where parts are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / "dictionary.safetensors", folder / "config.json"
    shapes = {spec.name: spec.shape(sizes) for spec in sorted(specs)}  # by name
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": str(FORMAT)}}
    at = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (at, at + size)}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    missing = {name: math.prod(shape) for name, shape in shapes.items()}
    with weights.with_suffix(".part").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        begin = file.tell()
        for spec, start, rows in parts:
            at = begin + header[spec.name]["data_offsets"][0]
            rows = rows.detach().float().cpu()
            pieces = rows.t() if spec.stored_transposed else rows.reshape(1, -1)  # as stored in the file
            first = start if spec.stored_transposed else start * rows[:1].numel()
            for number, piece in enumerate(pieces.contiguous().numpy()):
                file.seek(at + 4 * (number * sizes.n_latents + first))
                file.write(piece.data)
            missing[spec.name] -= rows.numel()
    if any(missing.values()):
        raise ValueError(f"{folder} would lack some of {', '.join(name for name, n in missing.items() if n)}")
    about = {**info, "format": FORMAT, "k": k, WEIGHTS: _xxh3_128(weights.with_suffix(".part"))}
    weights.with_suffix(".part").replace(weights)
    _write_about(config, about)


def link(source: Path, target: Path, **changed: Any) -> None:
    """The dictionary in `source` in a new folder too: the same file of weights, and a config.json with other values.

    UserError when the dictionary is damaged.
    """
    about = check(source)
    target.mkdir(parents=True)
    os.link(source / "dictionary.safetensors", target / "dictionary.safetensors")
    _write_about(target / "config.json", about | changed)


def _write_about(config: Path, about: Mapping[str, Any]) -> None:
    config.with_suffix(".part").write_text(
        json.dumps({**about, "digest": digest(about)}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    config.with_suffix(".part").replace(config)


def check(folder: Path) -> dict[str, Any]:
    """config.json of the dictionary in `folder`; UserError where a file is missing, damaged or of another format.

    Reads all weights once to compare their hash with the one in config.json, which has a digest of itself.
    """
    config, weights = folder / "config.json", folder / "dictionary.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise UserError(f"dictionary={folder} has no {path.name}; give the dictionary/ folder of a finished run")
    try:
        info = json.loads(config.read_text(encoding="utf-8"))
        sealed, found = info.pop("digest"), digest(info)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{config} is damaged; {CURE}") from None
    if info.get("format") != FORMAT:
        raise UserError(f"dictionary={folder} is of format {info.get('format')}, this program reads {FORMAT}")
    if sealed != found:
        raise UserError(f"{config} does not match its own digest; {CURE}")
    if _xxh3_128(weights) != info.get(WEIGHTS):
        raise UserError(f"{weights} is damaged: it does not match {WEIGHTS} in config.json; {CURE}")
    return info


def _specs(info: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """The tensors of a dictionary that says this of itself."""
    every = tensors(KINDS[info["variant"]](), transcodes="target_hook" in info, skip=bool(info.get("skip")))
    return tuple(spec for spec in every if spec.exported)


def _xxh3_128(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            state.update(piece)
    return state.hexdigest()


def load(folder: Path, part: Callable[[int], range] | None = None) -> Dictionary:
    """The dictionary in `folder`; UserError where it is missing, damaged or of another format.

    `part` says which of so many latents are wanted; None: all. No others are read into memory.
    """
    config, weights = folder / "config.json", folder / "dictionary.safetensors"
    info = check(folder)
    variant = info.get("variant")
    if variant not in KINDS:
        raise UserError(f"{config} says variant={variant}; this program knows {', '.join(KINDS)}")
    specs = {spec.name: spec for spec in _specs(info)}
    try:
        with safe_open(weights, "pt") as file:
            if names := specs.keys() ^ set(file.keys()):
                raise UserError(
                    f"{weights} and variant={variant} in {config} do not agree on {', '.join(sorted(names))}; repeat "
                    "the command of the run with another out="
                )
            own = {name: _read(file, spec, part) for name, spec in specs.items()}
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged ({error}); {CURE}") from error
    W_enc = own["W_enc"].T.contiguous().T
    parameters = Parameters(W_enc, own["W_dec"], own["b_enc"], own["b_dec"])
    b_in, (n_latents, d_out) = own.get("b_in"), parameters.W_dec.shape
    if W_enc.shape != (d_out if b_in is None else len(b_in), n_latents):
        raise UserError(f"{weights}: W_enc {list(W_enc.shape)} does not fit W_dec {list(parameters.W_dec.shape)}")
    assert all(t.dtype == torch.float32 for t in parameters)
    more = {name: own.get(name) for name in ("threshold", "W_skip")}
    return Dictionary(parameters=parameters, k=info["k"], info=info, b_in=b_in, **more)


def _read(file: Any, spec: TensorSpec, part: Callable[[int], range] | None) -> Tensor:
    """One tensor of an open file, or of one with an entry per latent what belongs to these latents."""
    if part is None or not spec.per_latent:
        return file.get_tensor(spec.name)
    stored, at = file.get_slice(spec.name), spec.dims.index("n_latents")
    latents = part(stored.get_shape()[at])
    here = slice(latents.start, latents.stop)
    return stored[:, here] if at else stored[here]
