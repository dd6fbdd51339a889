"""Compiles the C++ sources beside this file, once per machine and version, into the user's cache directory.

The name of the result holds a hash of all that it depends on: sources, compiler and its flags, torch and Python. Processes that start
together compile once: the others wait at a lock. Raises BuildError with the reason; whoever calls decides what to do without.
"""

import contextlib
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

NAME = "baton_cpu_kernels"
NEEDED = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
_SOURCES = Path(__file__).parent
# Without contraction each rounding is where the source has it. GCC's own AVX-512 headers set off -Wall's warnings.
_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
_FLAGS += [f"-m{flag.replace('_', '')}" for flag in NEEDED]


class BuildError(Exception):
    """There is no extension on this machine; the text says why."""


def missing_cpu_flags() -> list[str]:
    """What the kernels need and this CPU lacks; everything where /proc/cpuinfo is not to be had."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return list(NEEDED)
    have = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set[str]())
    return [flag for flag in NEEDED if flag not in have]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "baton" / "kernels"


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler (g++ or clang++) is installed")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
        raise BuildError(f"{command[0]} failed: {first}")
    return done.stdout


def _openmp() -> list[str]:
    """torch's own OpenMP library, so that there is one pool of threads in the process; else the compiler's."""
    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parents[1] / "torch.libs")
    found = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("libgomp*.so*"))]
    return [str(found[0])] if found else ["-fopenmp"]


def fingerprint() -> str:
    """Of all that the compiled module depends on."""
    compiler, sources = _compiler(), sorted((*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")))
    digest = hashlib.sha256()
    for part in (_run([compiler, "--version"]), *_FLAGS, torch.__version__, sys.version, torch.__file__):
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(target: Path) -> None:
    compiler = _compiler()
    include = [sysconfig.get_paths()["include"], str(Path(torch.__file__).parent / "include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    library = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)

        def compile_one(source: Path) -> str:
            out = str(work / f"{source.stem}.o")
            _run([compiler, *_FLAGS, abi, *(f"-I{folder}" for folder in include), "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sorted(_SOURCES.glob("*.cpp"))))
        torch_libraries = [f"-L{library}", "-lc10", "-ltorch_cpu", "-ltorch_python", f"-Wl,-rpath,{library}"]
        _run([compiler, "-shared", *objects, *torch_libraries, *_openmp(), "-o", str(work / target.name)])
        (work / target.name).replace(target)


def extension(folder: Path | None = None) -> ModuleType:
    """The compiled module, from the cache where it is there."""
    if missing := missing_cpu_flags():
        raise BuildError(f"this CPU lacks {', '.join(missing)}")
    folder = cache_folder() if folder is None else folder
    target = folder / f"{NAME}-{fingerprint()}.so"
    try:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _lock(folder / "lock"):
                if not target.exists():
                    _compile(target)
        spec = importlib.util.spec_from_loader(NAME, importlib.machinery.ExtensionFileLoader(NAME, str(target)))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (OSError, ImportError) as error:
        raise BuildError(f"{target}: {error}") from error
    return module
