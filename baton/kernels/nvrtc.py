"""CUDA C++ sources compiled at first use with NVRTC (which every CUDA build of torch brings), launched through the driver.

By ctypes, so that nothing but torch is needed. Compiled code is kept on disk, by its source, macros and compiler version.
"""

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from baton.kernels.cpu.build import cache_folder

CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 4, 6  # CUlaunchAttributeID
MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute


class CudaError(RuntimeError):
    """What a call of the driver or of the compiler answered."""


class TensorMap(ctypes.Structure):
    """CUtensorMap: opaque. Make it with `tensor_map`, which sees to its alignment."""

    _fields_ = (("bytes", ctypes.c_ubyte * 128),)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _compiler() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    roots = [Path(torch.__file__).parent.parent / "nvidia", *(Path(p) / "nvidia" for p in sys.path)]
    found = [path for root in roots for path in sorted(root.glob(f"*/lib/{name}"))]
    for candidate in [name, *map(str, found)]:
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CudaError(f"{name} is not here: {', '.join(map(str, roots))}")


def _check(status: int, what: str) -> None:
    if status:
        raise CudaError(f"{what}: error {status}")


def compile_source(source: str, macros: Mapping[str, int], arch: str) -> bytes:
    """Machine code for arch (sm_90a). Safe to call from several threads and processes."""
    lib = _compiler()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    options = [f"--gpu-architecture={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in sorted(macros.items()))]
    key = hashlib.sha256("\0".join([source, *options, f"{major.value}.{minor.value}"]).encode()).hexdigest()
    kept = cache_folder() / f"{key}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        pass
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None), "nvrtcCreateProgram")
    status = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    if status:
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise CudaError(f"does not compile ({' '.join(options)}):\n{log.value.decode(errors='replace')}")
    _check(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    code = ctypes.create_string_buffer(size.value)
    _check(lib.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(code.raw)
        os.replace(file.name, kept)
    except OSError:
        pass  # a read-only home costs a compilation per start
    return code.raw


class Kernel:
    """One function of a compiled source, loaded on the current device."""

    def __init__(self, code: bytes, name: str, shared: int) -> None:
        driver = _driver()
        self._module, self._function, self._shared = ctypes.c_void_p(), ctypes.c_void_p(), shared
        _check(driver.cuModuleLoadData(ctypes.byref(self._module), code), "cuModuleLoadData")
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()), "cuModuleGetFunction")
        _check(driver.cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared), f"{shared} bytes of shared memory")

    def launch(self, grid: int, block: int, args: Sequence[Any], stream: int, overlap: bool = True, cluster: int = 1) -> None:
        """args: ctypes values. overlap: may start before the kernel before it has ended (the source waits for it itself). cluster: so many
        blocks share their memory."""
        attributes = (_Attribute * 2)()
        attributes[0].id, attributes[1].id = PROGRAMMATIC_SERIALIZATION, CLUSTER_DIMENSION
        attributes[0].value[0], attributes[1].value[:3] = int(overlap), (cluster, 1, 1)
        config = _LaunchConfig((grid, 1, 1), (block, 1, 1), self._shared, stream, attributes, 1 if cluster == 1 else 2)
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(a) for a in args))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), "cuLaunchKernelEx")


def tensor_map(address: int, half: bool, rows: int, columns: int, row_bytes: int, box_rows: int) -> TensorMap:
    """For boxes of box_rows × 64 two-byte elements of a row-major matrix, swizzled by 128 bytes; outside it reads as zero."""
    room = (ctypes.c_ubyte * 192)()
    offset = -ctypes.addressof(room) % 64
    made = TensorMap.from_buffer(room, offset)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(made),
        ctypes.c_int(6 if half else 9),  # FLOAT16, BFLOAT16
        ctypes.c_uint(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(row_bytes),
        (ctypes.c_uint32 * 2)(64, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),
        ctypes.c_int(3),  # SWIZZLE_128B
        ctypes.c_int(3),  # L2 promotion to 256 bytes
        ctypes.c_int(0),
    )
    _check(status, f"cuTensorMapEncodeTiled({rows} x {columns}, box of {box_rows})")
    return made
