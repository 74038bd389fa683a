"""What running out of memory looks like, on every device, and how what it holds is given back.

torch has a class of its own for its allocator's refusal only. A library that allocates beside it (cuBLAS and cuDNN
their work spaces, NCCL its buffers, bitsandbytes through any of them) says so in the text of a RuntimeError, and so do
kernels that are launched without memory for their stack, older torch and other devices.
"""

from __future__ import annotations

import gc
import re
import traceback

# torch: "CUDA out of memory. Tried to ...", "CUDA error: out of memory", HIP, XPU, MPS, NCCL's "Cuda failure 2 'out of
# memory'" · CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED, CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
# · DefaultCPUAllocator: "can't allocate memory", "not enough memory" · std::bad_alloc · a handle of cuBLAS that could
# not be made: "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", the same refusal
_TEXT = re.compile(
    r"out[ _]of[ _]memory|_ALLOC(ATION)?_FAILED|can.?t allocate memory|cannot allocate memory|not enough memory"
    r"|bad_alloc|NOT_INITIALIZED when calling .?cublas(Lt)?Create",
    re.IGNORECASE,
)
_DEVICE = re.compile(r"\b(CUDA|HIP|XPU) (driver )?error\b|device-side assert", re.IGNORECASE)
_CLASSES = {"OutOfMemoryError", "MemoryError"}  # by name: torch need not be there to ask


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or the error that it was raised from, says that a device or the machine has no memory left."""
    while error is not None:
        if _CLASSES & {kind.__name__ for kind in type(error).__mro__}:
            return True
        # A user's mistake may quote such a text; it is no refusal of an allocator.
        if isinstance(error, RuntimeError | OSError | SystemError) and _TEXT.search(str(error)):
            return True
        error = error.__cause__
    return False


def is_device_error(error: BaseException | None) -> bool:
    """Whether `error` came from the device itself, and not from a lack of memory.

    After an illegal access, a failed assertion or a lost card every later call of the process fails as well: torch's
    AcceleratorError, or the text that it had before.
    """
    if error is None or is_out_of_memory(error):
        return False
    return any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__) or (
        isinstance(error, RuntimeError) and _DEVICE.search(str(error)) is not None
    )


def give_back(error: BaseException) -> None:
    """Free what the frames of a caught error hold: activations, graphs, gradients; then torch's unused blocks.

    Whoever keeps the error (a log, another error's context, a cycle through a frame's own variable) would keep all
    tensors that its traceback reaches. Call it where the error is not raised again.
    """
    seen: set[int] = set()
    errors: list[BaseException | None] = [error]
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)  # frames that still run are left alone
        one.__traceback__ = None
        errors += [one.__cause__, one.__context__]
    free_unused()


def free_unused() -> None:
    """Cycles that nothing reaches, and the blocks that torch keeps for later."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
