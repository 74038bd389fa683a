"""Every way in which memory runs out is known as such, and what a caught error holds is freed."""

import weakref

import pytest
import torch

from mtft.common.out_of_memory import give_back, is_device_error, is_out_of_memory

# As the libraries write them: torch 2.13's CUDACachingAllocator, CUDAException, CPUAllocator and cuBLAS/cuDNN handles,
# NCCL, MPS, XPU; bitsandbytes multiplies int8 through cublasLt and allocates through torch.
REFUSALS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB."),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 39.39 GiB total capacity)"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("NCCL error: ncclUnhandledCudaError. Last error:\nCuda failure 2 'out of memory'"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasGemmEx( handle, opa, opb)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
    ValueError("the column says: out of memory"),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_memory_that_ran_out(error):
    assert is_out_of_memory(error)
    wrapped = RuntimeError("the layer failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_another_failure(error):
    assert not is_out_of_memory(error)
    assert is_device_error(error) == str(error).startswith("CUDA")


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_no_memory_is_no_failed_device(error):
    assert not is_device_error(error)


def test_what_a_kept_error_holds_is_freed():
    """Of the error itself, of the one that it came of, and of the one that was being handled."""
    alive, kept = [], []

    def allocate(error):
        activations = torch.zeros(8)
        alive.append(weakref.ref(activations))
        raise error

    def layer():
        try:
            allocate(RuntimeError("CUDA error: out of memory"))
        except RuntimeError as error:
            try:
                allocate(ValueError("while it was handled"))
            except ValueError:
                allocate(RuntimeError("again"))
            raise RuntimeError("the layer failed") from error

    try:
        layer()
    except RuntimeError as error:
        kept.append(error)
    assert [one() is None for one in alive] == [False, False, False]
    give_back(kept[0])
    assert [one() is None for one in alive] == [True, True, True]
