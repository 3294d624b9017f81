"""The few calls of the CUDA driver and of its run-time compiler that torch has no public way to make.

``libcuda.so.1`` is the driver's stable interface, the same for every CUDA toolkit. All calls need the
device's context to be current in the calling thread, which ``with torch.cuda.device(...)`` sees to.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
from typing import Any

import torch

IPC_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class CudaDriverError(Exception):
    """A call failed. Translated by the transport.

    Args:
        call: name of the driver's function.
        code: its ``CUresult``.
        name: of the code, as in ``cuda.h``.
    """

    def __init__(self, call: str, code: int, name: str) -> None:
        self.call, self.code, self.name = call, code, name
        super().__init__(f"{call} answered {name} ({code})")


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_BYTES),)


@functools.cache
def _driver(*, keeps_gil: bool) -> Any:
    # Calls that return at once keep the GIL: giving it up costs more than they take.
    return (ctypes.PyDLL if keeps_gil else ctypes.CDLL)("libcuda.so.1")


def _call(function: str, *arguments: Any, keeps_gil: bool = False) -> None:
    code = int(getattr(_driver(keeps_gil=keeps_gil), function)(*arguments))
    if code:
        name = ctypes.c_char_p()
        _driver(keeps_gil=True).cuGetErrorName(code, ctypes.byref(name))
        raise CudaDriverError(function, code, (name.value or b"an unknown error").decode())


def find_allocation(address: int) -> tuple[int, int]:
    """Base and size in bytes of the allocation that holds ``address``.

    Raises:
        CudaDriverError: it is no device memory of this process.
    """
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    return base.value, size.value


def export_allocation(base: int) -> bytes:
    """A handle with which another process of this host can map the allocation.

    Raises:
        CudaDriverError: it is of a kind that has none, as expandable segments are.
    """
    handle = _IpcHandle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
    return ctypes.string_at(ctypes.byref(handle), IPC_HANDLE_BYTES)


def map_allocation(handle: bytes) -> int:
    """Map another process's allocation so that the current device can read it; returns its address here.

    Raises:
        CudaDriverError: the owner is gone, or the devices cannot reach each other.
    """
    raw = _IpcHandle()
    ctypes.memmove(ctypes.byref(raw), handle, IPC_HANDLE_BYTES)
    base = ctypes.c_uint64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(base), raw, ctypes.c_uint(_LAZY_PEER_ACCESS))
    return base.value


def unmap_allocation(address: int) -> None:
    """Undo :func:`map_allocation`.

    Raises:
        CudaDriverError: the context is broken.
    """
    _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def call_host(stream: torch.cuda.Stream, function: ctypes.c_void_p, argument: ctypes.c_void_p) -> None:
    """Have the driver's thread call a C function when the stream gets there; not called after an error."""
    _call("cuLaunchHostFunc", ctypes.c_void_p(stream.cuda_stream), function, argument, keeps_gil=True)


class Kernel:
    """A compiled CUDA kernel whose one argument is a device address.

    Args:
        source: CUDA C that defines ``extern "C" __global__`` the function ``name``.
        name: of the function.
        device: that it will run on.

    Raises:
        CudaDriverError: it cannot be loaded.
        OSError: there is no run-time compiler beside this torch.
    """

    def __init__(self, source: str, name: str, device: torch.device) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        image = compile_source(source, f"sm_{major}{minor}")
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the context current in this thread
            _call("cuModuleLoadData", ctypes.byref(self._module), image)
            _call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())

    def launch(self, stream: torch.cuda.Stream, *, num_blocks: int, num_threads: int, address: int) -> None:
        """Queue the kernel on a stream; returns before it has run.

        Raises:
            CudaDriverError: the device is in error.
        """
        argument = ctypes.c_uint64(address)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        grid, block = (num_blocks, 1, 1), (num_threads, 1, 1)
        handle = ctypes.c_void_p(stream.cuda_stream)
        _call("cuLaunchKernel", self._function, *grid, *block, 0, handle, arguments, None, keeps_gil=True)


def compile_source(source: str, architecture: str) -> bytes:
    """Machine code for one architecture (``"sm_90"``), by the compiler that comes with torch. Needs no GPU.

    Raises:
        OSError: there is no such library.
        CudaDriverError: the source does not compile.
    """
    compiler, program = _find_compiler(), ctypes.c_void_p()

    def call(function: str, *arguments: Any) -> None:
        code = int(getattr(compiler, function)(*arguments))
        if code:
            raise CudaDriverError(function, code, _compile_log(compiler, program) or "an error")

    call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"rdt.cu", 0, None, None)
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        call("nvrtcCompileProgram", program, 1, options)
        size = ctypes.c_size_t()
        call("nvrtcGetCUBINSize", program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        call("nvrtcGetCUBIN", program, image)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def _compile_log(compiler: Any, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    if program.value is None or compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size)) != 0:
        return ""
    log = ctypes.create_string_buffer(size.value + 1)
    compiler.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace").strip()


@functools.cache
def _find_compiler() -> Any:
    major = (torch.version.cuda or "").partition(".")[0]
    name = f"libnvrtc.so.{major}" if major else "libnvrtc.so"
    # torch's wheels keep it beside torch, below a folder that no loader searches.
    packages = os.path.dirname(os.path.dirname(torch.__file__))  # noqa: PTH120  glob takes a string
    beside = glob.glob(f"{packages}/nvidia/*/lib/libnvrtc.so*")  # noqa: PTH207  see above
    for candidate in (name, *sorted(beside), "libnvrtc.so"):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise OSError(f"neither {name} nor a copy of it below {packages}/nvidia can be loaded")
