"""The C++ library, compiled at first use into a cache folder; None, with one warning, where that is not possible."""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in {".cpp", ".h"})
# Without contraction a compiler makes an FMA only where one is written, so that all compilers' bits are the same.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
NEEDED = frozenset({"avx2", "fma"})  # vectors.h uses AVX-512 with BF16 where the processor has it


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, once per process."""
    loaded = _load()
    if isinstance(loaded, str):
        logger.warning("the CPU kernels cannot be used, plain torch (several times slower) takes over: %s", loaded)
        return None
    return loaded


def _load() -> ctypes.CDLL | str:
    missing = NEEDED - cpu_flags()
    if missing:
        return f"this processor has no {', '.join(sorted(missing))}"
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler (g++, clang++ or c++, or CXX=...) is on the path"
    try:
        path = built(compiler)
        if isinstance(path, str):
            return path
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        return f"{error}; SAE_KERNELS_CACHE=FOLDER names a folder for them that can be written to"
    if not adds_in_documented_order(loaded):
        return "this processor adds bf16 products in another order than documented, so selections would differ"
    return loaded


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's features as Linux names them; empty elsewhere."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next(line for line in lines if line.startswith("flags")).split(":")[1].split())


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """SAE_KERNELS_CACHE, or sae_kernels under the user's cache folder."""
    if "SAE_KERNELS_CACHE" in os.environ:
        return Path(os.environ["SAE_KERNELS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sae_kernels"


def built(compiler: str) -> Path | str:
    """The path of the library of these sources for this processor, compiled unless it exists; else the reason.

    Its name is a hash of everything that decides its content. One process compiles while others wait. The file appears
    whole, with a hash at its end, because loading a damaged library would crash the process.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    contents = [*(source.read_bytes() for source in SOURCES), version, " ".join(FLAGS).encode()]
    contents += [" ".join(sorted(cpu_flags())).encode(), torch.__version__.encode()]
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    folder = cache_folder()
    path = folder / f"sae_cpu-{digest[:16]}.so"
    if is_sound(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{path.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_sound(path):
            return path
        if path.exists():
            logger.warning("%s is not what was written; compiling it again", path)
        logger.info("compiling the CPU kernels into %s (some 15 s, once)", path)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / path.name
            source = next(s for s in SOURCES if s.suffix == ".cpp")
            command = [compiler, *FLAGS, str(source), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
                return f"{' '.join(command)} failed: {first}"
            with output.open("ab") as file:
                file.write(hashlib.sha256(output.read_bytes()).digest())
            os.replace(output, path)
    return path


def is_sound(path: Path) -> bool:
    """Whether the library exists and matches the hash at its end."""
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def adds_in_documented_order(loaded: ctypes.CDLL) -> bool:
    """Whether the odd product is added, then the even one, each with one rounding: what the reference does."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 16, 2, generator=generator).bfloat16()
    sums = torch.randn(256, 16, generator=generator)
    out = torch.empty_like(sums)
    for i in range(len(sums)):
        loaded.sae_pair_product(*(ctypes.c_void_p(t.data_ptr()) for t in (sums[i], a[i], b[i], out[i])))
    x, w = a.float(), b.float()
    return torch.equal(out, (sums + x[..., 1] * w[..., 1]) + x[..., 0] * w[..., 0])
