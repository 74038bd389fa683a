"""A second device made of CPU memory, which holds code to the rules that a GPU has, and counts what a GPU waits for.

    device = simulated_device()               torch.device("simulated:0")
    with Simulation() as seen: ...            tensors there compute as on the CPU, to the bit; .device says simulated:0
    seen.waits                                the places (file:line, what) at which the host would have waited
    seen.unordered                            those at which a GPU adds numbers in another order each time

Refused, as on CUDA (DeviceMixture): an operation on a tensor of the device and one of the CPU; a CPU tensor without
dimensions may go into elementwise operations. Counted as waits: values that the host reads (`item`, `tolist`, `bool`,
`equal`, a copy to the CPU), sizes that depend on values (nonzero, boolean indices, unique), and copies to the device
that aren't both pinned and non-blocking. What a kernel does inside (a solver that looks at its error code) is not seen.

How: tensors of the device are wrapper subclasses on the PrivateUse1 key (autograd, devices, guards: torch's own), and a
dispatch mode runs every operation on the CPU tensors within. Storages and pickling are not there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "simulated"
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve()
aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default: "a value read by the host",
    aten.is_nonzero.default: "a value read by the host",
    aten.equal.default: "a comparison read by the host",
}
SIZES = {
    packet: f"{packet.__name__}: a size that depends on values"
    for packet in (
        aten.nonzero, aten.masked_select, aten._unique2, aten._unique, aten.unique_dim, aten.unique_consecutive,
        aten.bincount, aten.repeat_interleave, aten.masked_scatter_backward,
    )
}  # fmt: skip
UNORDERED = (aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce,
             aten.scatter_reduce_, aten.bincount, aten.cumsum)  # fmt: skip
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
COPIES = (aten._to_copy, aten.copy_, aten.copy)
# Elementwise in effect, though not tagged so: a CPU number without dimensions may stand beside a device tensor.
TAKE_NUMBERS = ("_foreach_", "fill", "masked_fill", "lerp", "addc", "clamp", "where", "index_put", "_index_put_impl")


class DeviceMixture(RuntimeError):
    """A tensor of the CPU met one of the device."""


class Wait(NamedTuple):
    """where: file:line of the repository's innermost frame; what: the kind of wait."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class DeviceTensor(Tensor):
    """A tensor of the simulated device; `held` is the CPU tensor that has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=simulated_device(),
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, None)  # outside of a simulation: nothing is counted

    def tolist(self) -> Any:
        """Refused for subclasses by torch; one copy to the host here, as on CUDA."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"simulated({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = DeviceTensor(self.held.detach().clone(), self.requires_grad)
        return nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made


class Simulation(TorchDispatchMode):
    """Inside, tensors can be made on the device, and its waits are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.copies: list[Wait] = []  # of every kind, in either direction
        self.unordered: list[Wait] = []  # sums of floating-point numbers that a GPU adds in another order each time
        self.pinned: dict[int, Tensor] = {}

    def __enter__(self) -> Simulation:
        self._patches = [mock.patch.object(torch, "Generator", _Generator)]
        for patch in self._patches:
            patch.start()
        _Hooks.here = True
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the CPU, and then copied
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        _Hooks.here = False
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self)

    def wait(self, what: str) -> None:
        self.waits.append(Wait(_place(), what))

    def told(self) -> str:
        """The waits, one a line, with how often each was."""
        counts: dict[Wait, int] = {}
        for wait in self.waits:
            counts[wait] = counts.get(wait, 0) + 1
        return "\n".join(f"{n} x {wait}" for wait, n in counts.items())


def simulated_device() -> torch.device:
    """The device of every simulation."""
    return torch.device(f"{NAME}:0")


def to_device(model: nn.Module) -> nn.Module:
    """Moves a model's parameters and buffers, in place; what is shared stays shared.

    `Module.to` makes new parameters for a tensor subclass, each use its own, where on a GPU it keeps the old ones.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is None or isinstance(value, DeviceTensor):
                    continue
                if id(value) not in made:
                    moved = DeviceTensor(value.detach().clone())
                    is_parameter = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved
                own[name] = made[id(value)]
    return model


def to_cpu(value: Any) -> Any:
    """A tree with the held values in place of device tensors: for tests to look at, and not counted."""
    return tree_map(lambda x: x.held.detach().clone() if isinstance(x, DeviceTensor) else x, value)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Simulation | None) -> Any:
    """One operation, on the held tensors."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, DeviceTensor)]
    packet = func.overloadpacket
    asked = kwargs.get("device")
    there = bool(ours) if asked is None else torch.device(asked).type == NAME
    if not ours and not there:
        return _on_the_cpu(func, packet, args, kwargs, seen)
    if packet in COPIES:
        source, target = (args[0], there) if packet is aten._to_copy else (args[1], isinstance(args[0], DeviceTensor))
        _count_copy(source, target, kwargs, args, seen)
    elif ours:
        _refuse_mixture(func, packet, args, tensors)
    if seen is not None and ours:
        if (what := READS.get(func) or SIZES.get(packet)) is not None:
            seen.wait(what)
        if packet in UNORDERED and any(x.is_floating_point() for x in ours) and not _is_extreme(args, kwargs):
            seen.unordered.append(Wait(_place(), f"{packet.__name__}: a sum in any order"))
        if packet in INDEXING:
            _count_indices(args, seen)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if packet is aten.copy_:
        return args[0]
    if not there or isinstance(out, bool | int | float):
        return out
    by_held = {id(x.held): x for x in ours}

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        known = by_held.get(id(x))
        if known is None:
            return DeviceTensor(x)
        if known.shape != x.shape or known.stride() != x.stride():
            raise NotImplementedError(f"{func} changes the shape of its own argument")
        return known

    return wrap(out) if isinstance(out, Tensor) else tree_map(wrap, out)


def _on_the_cpu(func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Simulation | None) -> Any:
    if seen is not None and packet is aten._pin_memory:
        made = args[0].clone()
        seen.pinned[made.untyped_storage().data_ptr()] = made
        return made
    if seen is not None and packet is aten.is_pinned:
        return _is_pinned(args[0], seen)
    return func(*args, **kwargs)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, DeviceTensor) else x


def _is_extreme(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A largest or smallest value, which no order changes."""
    return kwargs.get("reduce") in ("amax", "amin") or "amax" in args or "amin" in args


def _refuse_mixture(func: Any, packet: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    strangers = [x for x in tensors if not isinstance(x, DeviceTensor)]
    if not strangers:
        return
    if packet in INDEXING:  # a CPU index is copied over, which is a wait; CPU values are refused
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        if isinstance(args[0], DeviceTensor):
            strangers = [x for x in strangers if not any(x is index for index in indices)]
    name = str(func).removeprefix("aten.")
    numbers_allowed = torch.Tag.pointwise in func.tags or name.startswith(TAKE_NUMBERS)
    wrong = [x for x in strangers if x.dim() > 0 or not numbers_allowed]
    if numbers_allowed and name.split(".")[0].endswith("_") and not isinstance(args[0], DeviceTensor):
        wrong = [args[0]]  # a CPU number can't take a device's result in place
    if wrong:
        shapes = ", ".join(str(tuple(x.shape)) for x in wrong)
        raise DeviceMixture(f"{name} at {_place()}: a CPU tensor of shape {shapes} beside tensors of the device")


def _count_copy(source: Any, to_there: bool, kwargs: dict[str, Any], args: Any, seen: Simulation | None) -> None:
    if seen is None or not isinstance(source, Tensor) or isinstance(source, DeviceTensor) == to_there:
        return
    here = Wait(_place(), "a copy to the device" if to_there else "a copy to the host")
    seen.copies.append(here)
    blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
    if to_there and source.dim() == 0 and kwargs.get("device") is None:
        return  # copy_ of a CPU number is a kernel's argument
    if not to_there:
        seen.wait("a copy to the host")
    elif blocks:
        seen.wait("a blocking copy to the device")
    elif not _is_pinned(source, seen):
        seen.wait("a copy to the device of memory that isn't pinned")


def _is_pinned(tensor: Tensor, seen: Simulation) -> bool:
    return tensor.untyped_storage().data_ptr() in seen.pinned


def _count_indices(args: tuple[Any, ...], seen: Simulation) -> None:
    for index in tree_leaves(args[1]):
        if not isinstance(index, Tensor):
            continue
        if not isinstance(index, DeviceTensor):
            seen.wait("an index on the CPU, copied at each use")
        elif index.dtype in (torch.bool, torch.uint8):
            seen.wait("a boolean index: a size that depends on values")


def _place() -> str:
    """file:line of the innermost frame in the repository that is not this file; of mtft, where one is."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != HERE and ".venv" not in path.parts:
            found = f"{path.relative_to(ROOT)}:{frame.f_lineno}"
            break
        frame = frame.f_back
    return found or "elsewhere"


class _Generator(torch.Generator):
    """Generators of the device draw on the CPU, so that its numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)


class _Module(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:
        return _Hooks.here

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]


class _Hooks(backend_registration._DummyPrivateUse1Hook):
    """What torch.accelerator sees: a device inside of a simulation, none outside, where other tests run."""

    here = False

    def is_available(self) -> bool:
        return _Hooks.here


# At the import, before any test runs: the first backward of a process decides which devices autograd knows.
backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hooks(), None)
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast casts nothing here
