"""Kernels compiled for a processor that need not be there: registers, spills, shared memory and instructions.

`python -m sae_kernels.triton_compiled sm_90 [pattern ...]` prints one JSON object a configuration; without arguments it
prints the table of kernels/README.md. It must run in a process of its own: Triton's interpreter and its compiler do not
mix.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae_kernels.triton_configurations import Configuration, configurations

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(nvidia.__file__).parent / "bin"
_INSTRUCTIONS = {  # what a listing must show for the claims in kernels/README.md
    "wgmma": r"wgmma\.mma_async", "mma.sync": r"mma\.sync", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma",
    "load128": r"ld\.global(?:\.\w+)*\.v4|ld\.global(?:\.\w+)*\.v2\.b64|global_load_dwordx4|buffer_load_dwordx4",
    "cp.async": r"cp\.async", "atomic": r"atom\.global|global_atomic|red\.global",
}  # fmt: skip


class Compiled(NamedTuple):
    """What the binary of one configuration says."""

    name: str
    target: str
    registers: int  # a thread
    spills: int  # bytes of stack on NVIDIA (nothing else is there), spilled vector registers on AMD
    shared: int  # bytes a program
    warps: int
    instructions: list[str]


def compile_for(target: str, what: Configuration) -> Compiled:
    """Compile one configuration and read its resource use from the binary."""
    names = what.kernel.arg_names
    signature = {name: "constexpr" if name in what.constants else what.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in what.constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in what.aligned}
    source = ASTSource(fn=what.kernel, signature=signature, constexprs=constants, attrs=aligned)
    built: Any = triton.compile(source, target=TARGETS[target], options=dict(what.options))
    text = built.asm.get("ptx") or built.asm["amdgcn"]
    registers, spills = _nvidia(built.asm["cubin"]) if "cubin" in built.asm else _amd(text)
    found = [name for name, pattern in _INSTRUCTIONS.items() if re.search(pattern, text)]
    return Compiled(what.name, target, registers, spills, built.metadata.shared, built.metadata.num_warps, found)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [_TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _amd(text: str) -> tuple[int, int]:
    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), number("vgpr_spill_count")


def report(target: str, patterns: Sequence[str]) -> Iterator[Compiled]:
    """Every configuration of a target whose name begins as one of the patterns says; all when there is none."""
    for configuration in configurations(target):
        if not patterns or any(re.match(pattern, configuration.name) for pattern in patterns):
            yield compile_for(target, configuration)


def table() -> Iterator[str]:
    """The table of kernels/README.md: of the configurations of one row, the most of everything."""
    rows: dict[str, dict[str, list[Compiled]]] = {}
    for target in TARGETS:
        for compiled in report(target, []):
            rows.setdefault(row_of(compiled.name), {}).setdefault(target, []).append(compiled)
    yield f"| kernel | {' | '.join(TARGETS)} |"
    yield "|---" * (1 + len(TARGETS)) + "|"
    for row, by_target in rows.items():
        yield f"| {row} | {' | '.join(_most(by_target.get(target, [])) for target in TARGETS)} |"


def row_of(name: str) -> str:
    """The row of a configuration: one for a block shape, and one for all shapes of 64 numbers and less."""
    kind, _, size = name.split("/")[0].rpartition("-")
    small = kind.startswith(("rank", "update")) and int(size) <= 64
    return f"`{kind}-64` and less" if small else f"`{name.split('/')[0]}`"


def _most(compiled: Sequence[Compiled]) -> str:
    if not compiled:
        return ""
    warps, registers, spills, shared = (
        max(getattr(one, what) for one in compiled) for what in ("warps", "registers", "spills", "shared")
    )
    memory = f"{-(-shared // 1024)} KiB" if shared >= 1024 else f"{shared} B" if shared else "0"
    return f"{warps}: {registers}, {memory}" + (f", **{spills} B spilled**" if spills else "")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        lines = (json.dumps(compiled._asdict()) for compiled in report(sys.argv[1], sys.argv[2:]))
    else:
        lines = table()
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
