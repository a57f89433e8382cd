"""A CUDA device for machines without one: the CPU computes, the rules of a device are kept.

Inside `pretend_cuda()` torch reports one GPU. A tensor "on cuda" is an ordinary one whose storage
is marked; a torch function mode answers for its device, and a dispatch mode looks at each operation
with the tensors it gets, those of backward passes and of optimizers among them.

What it sees:
- tensors of both devices in one operation that CUDA would refuse (`MixedDevices` is raised);
- each wait of the host for the device, with the line of the project that caused it: `.item()`,
  `.cpu()`, `nonzero` and indexing by a mask, copies that are blocking or from memory that is not
  pinned, CPU values written through an index (the rules are in torch's sources, see `_Dispatch`);
- a tensor that leaves for numpy, or is pinned though it is on the device; a generator of the CPU.

What it cannot see: kernels (their results, their limits on strides and types, which of them
autocast picks), streams and races between them, NCCL (see `nccl_rules`), speed, memory,
torch.compile, what C++ code decides by the device without an operation. So it finds waits and
mixed devices; nothing that it passes has run on a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0)
_OURS = tuple(f"{ROOT / part}/" for part in ("moco", "detection", "tools"))


class MixedDevices(RuntimeError):
    """CUDA would refuse this operation: its tensors are on two devices."""


class Record:
    """What happened: (kind, "file:line function") -> how often.

    waits: the host waited for the device, or may have (a copy from memory that is not pinned).
    paced: the host waited for an event it had recorded, a step ago in `StepGuard`: it bounds how
    far the host runs ahead, and nothing stands still for it.
    """

    def __init__(self) -> None:
        self.waits: collections.Counter = collections.Counter()
        self.paced: collections.Counter = collections.Counter()

    def clear(self) -> None:
        self.waits.clear()
        self.paced.clear()

    def lines(self, per: float = 1) -> list[str]:
        """The waits, most frequent first; `per`: divide their numbers by it."""
        ordered = sorted(self.waits.items(), key=lambda item: (-item[1], item[0]))
        return [f"{num / per:7.1f}  {kind:28s} {place}" for (kind, place), num in ordered]


class _Marks:
    """Storages that carry a mark, for as long as they live."""

    def __init__(self) -> None:
        self._marked: dict[int, StorageWeakRef] = {}

    def add(self, value: object) -> object:
        with torch._C.DisableTorchFunction():
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor) and (storage := _storage(tensor)) is not None:
                    self._marked[storage._cdata] = StorageWeakRef(storage)
        return value

    def __contains__(self, tensor: object) -> bool:
        if not isinstance(tensor, torch.Tensor):
            return False
        with torch._C.DisableTorchFunction():
            storage = _storage(tensor)
        mark = storage is not None and self._marked.get(storage._cdata)
        return bool(mark) and not mark.expired()


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # meta, sparse
        return None


_on_device, _pinned = _Marks(), _Marks()
_record = Record()


def is_on_device(tensor: torch.Tensor) -> bool:
    return tensor in _on_device


def _place() -> str:
    """The innermost line of the project on the stack, else of who called torch."""
    frame, fallback = sys._getframe(1), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OURS):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        if fallback == "?" and "/torch/" not in name and name != __file__:
            fallback = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return fallback


def _wait(kind: str) -> None:
    _record.waits[kind, _place()] += 1


# Their results' sizes, or values, are read by the host.
_READS = {
    "aten::_local_scalar_dense": "item", "aten::nonzero": "nonzero", "aten::equal": "equal",
    "aten::masked_select": "masked_select", "aten::is_nonzero": "bool",
    "aten::bincount": "bincount", "aten::_unique2": "unique", "aten::unique_dim": "unique",
    "torchvision::nms": "nms (size of its result)",
}  # fmt: skip
_MAY_MIX = {"aten::_to_copy", "aten::set_", "aten::_has_compatible_shallow_copy_type"}
_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class _Dispatch(TorchDispatchMode):
    """Looks at every operation, below autograd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not any(t in _on_device for t in tensors):
            return func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::copy_":
            self._copy(*tensors[:2], kwargs.get("non_blocking", args[2] if args[2:] else False))
            return func(*args, **kwargs)
        if name in _INDEX:
            self._index(name, args)
        elif name not in _MAY_MIX:
            self._refuse_mixed(name, tensors)
        if name in _READS:
            _wait(_READS[name])
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            _wait("repeat_interleave")
        return _on_device.add(func(*args, **kwargs))

    @staticmethod
    def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        if target in _on_device and source not in _on_device:
            _note_to_device(source, non_blocking)
        elif target not in _on_device and not (non_blocking and target in _pinned):
            _wait("copy to CPU")

    @staticmethod
    def _index(name: str, args: tuple) -> None:
        """ATen/native/TensorAdvancedIndexing.cpp: a mask becomes numbers by `nonzero`, but for a
        CPU scalar that is written, which is a masked fill; a CPU scalar is otherwise copied to the
        device, and so are CPU indices."""
        target, indices = args[0], [t for t in args[1] if isinstance(t, torch.Tensor)]
        value = args[2] if name != "aten::index" else None
        if target not in _on_device:
            raise MixedDevices(f"{name}: a CPU tensor is indexed by one on cuda, at {_place()}")
        masks = [t for t in indices if t.dtype in (torch.bool, torch.uint8)]
        from_cpu = value is not None and value not in _on_device
        if from_cpu and value.dim():
            raise MixedDevices(f"{name}: CPU values are written to cuda, at {_place()}")
        if from_cpu and len(masks) == len(indices) == 1:
            return
        if masks:
            _wait("index by a mask")
        if from_cpu:
            _wait("a CPU value written by index")
        if any(t not in _on_device for t in indices):
            _wait("CPU index")

    @staticmethod
    def _refuse_mixed(name: str, tensors: list[torch.Tensor]) -> None:
        if any(t not in _on_device and t.dim() for t in tensors):
            found = [f"{tuple(t.shape)} {'cuda' if t in _on_device else 'cpu'}" for t in tensors]
            raise MixedDevices(f"{name}: {', '.join(found)}, at {_place()}")


def _note_to_device(source: torch.Tensor, non_blocking: bool) -> None:
    if source.numel() and not non_blocking:
        _wait("copy to cuda, blocking")
    elif source.numel() and source not in _pinned:
        _wait("copy to cuda, not pinned")


def _is_cuda(device: object) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and torch.device(device).type == "cuda"


with torch._C.DisableTorchFunction():
    _GETTERS = {
        getattr(torch.Tensor, name).__get__: answer
        for name, answer in {
            "device": lambda t, real: DEVICE if t in _on_device else real(t),
            "is_cuda": lambda t, real: t in _on_device,
            "is_cpu": lambda t, real: t not in _on_device and real(t),
        }.items()
    }


class _Function(TorchFunctionMode):
    """Answers for the device, and turns copies to it into copies with a mark."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func in _GETTERS:
            return _GETTERS[func](tensor, func)
        if tensor is not None and func in _METHODS:
            return _METHODS[func](func, tensor, args, kwargs)
        pin = kwargs.pop("pin_memory", False)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
            if kwargs.get("generator") is not None:
                raise MixedDevices(f"{func.__name__}: a CPU generator for cuda, at {_place()}")
            if func in (torch.tensor, torch.as_tensor):
                _wait("tensor made from values")
            return _on_device.add(func(*args, **kwargs))
        out = func(*args, **kwargs)
        return _pinned.add(out) if pin else out


def _pin_memory(func, tensor, args, kwargs):
    if tensor in _on_device:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor', only CPU tensors can be pinned")
    return _pinned.add(tensor.clone())


def _tolist(func, tensor, args, kwargs):
    if tensor in _on_device:
        _wait("tolist")
    return func(*args, **kwargs)


def _numpy(func, tensor, args, kwargs):
    if tensor in _on_device:
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {_place()}")
    return func(*args, **kwargs)


def _new_tensor(func, tensor, args, kwargs):
    if tensor not in _on_device:
        return func(*args, **kwargs)
    kwargs.pop("device", None)
    _wait("tensor made from values")
    return _on_device.add(func(*args, **kwargs))


def _cpu_or_cuda(func, tensor, args, kwargs):
    device = torch.device(func.__name__)
    return _moved(tensor, device, kwargs.get("non_blocking", False), lambda t: t)


def _to(func, tensor, args, kwargs):
    """All forms of Tensor.to."""
    device, dtypes, flags = kwargs.pop("device", None), [], []
    for word in args[1:]:
        if isinstance(word, torch.Tensor):
            device = DEVICE if word in _on_device else torch.device("cpu")
            dtypes.append(word.dtype)
        elif isinstance(word, torch.dtype):
            dtypes.append(word)
        elif isinstance(word, bool):
            flags.append(word)
        elif word is not None:
            device = word
    if dtypes:
        kwargs["dtype"] = dtypes[0]
    non_blocking = kwargs.pop("non_blocking", flags[0] if flags else False)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}

    def convert(t: torch.Tensor) -> torch.Tensor:
        return t.to(**kwargs) if kwargs else t

    if device is None:
        return convert(tensor)
    device = DEVICE if _is_cuda(device) else torch.device(device)
    return _moved(tensor, device, non_blocking, convert)


def _moved(
    tensor: torch.Tensor, device: torch.device, non_blocking: bool, convert: Callable
) -> torch.Tensor:
    is_here = tensor in _on_device
    if device.type == "cuda" and not is_here:
        _note_to_device(tensor, non_blocking)
        out = convert(tensor)
        if out.data_ptr() == tensor.data_ptr():
            out = out.clone(memory_format=torch.preserve_format)
        return _on_device.add(out)
    if device.type == "cpu" and is_here:
        if any("/torch/optim/" in frame for frame in _callers()):
            return convert(tensor)  # torch groups tensors by device in C++, which sees the real one
        _wait("copy to CPU")
        out = convert(tensor)
        with _disable_current_modes():
            return out.clone(memory_format=torch.preserve_format)
    return convert(tensor)


def _callers() -> list[str]:
    frame, names = sys._getframe(2), []
    while frame is not None and len(names) < 4:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back
    return names


_METHODS = {
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu_or_cuda,
    torch.Tensor.cuda: _cpu_or_cuda,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.is_pinned: lambda func, tensor, args, kwargs: tensor in _pinned,
    torch.Tensor.get_device: lambda func, tensor, args, kwargs: 0 if tensor in _on_device else -1,
}


class _Stream:
    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        return _Event()

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        _wait("stream.synchronize")


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    def synchronize(self):
        _record.paced["event.synchronize", _place()] += 1


class _Autocast(torch.autocast):
    """The CPU's autocast under CUDA's name: which operations it casts differs."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class _Properties:
    name, total_memory, major, minor, multi_processor_count = "pretend GPU", 80 << 30, 8, 0, 1


def _stand_ins() -> dict[tuple[object, str], object]:
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    of_cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_properties": lambda device=None: _Properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
        "max_memory_allocated": lambda device=None: 1,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
        "synchronize": lambda device=None: _wait("synchronize"),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    return {
        **{(torch.cuda, name): value for name, value in of_cuda.items()},
        (torch.Tensor, "record_stream"): lambda self, stream: None,
        (torch, "autocast"): _Autocast,
        (torch, "is_autocast_enabled"): lambda kind=None: enabled(
            "cpu" if kind in (None, "cuda") else kind
        ),
        (torch, "get_autocast_dtype"): lambda kind: dtype("cpu" if kind == "cuda" else kind),
        (torch.optim.Optimizer, "_accelerator_graph_capture_health_check"): lambda self: None,
        (torch.optim.Optimizer, "_cuda_graph_capture_health_check"): lambda self: None,
    }


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Record]:
    """One GPU for the block, `DEVICE`; yields what is recorded. Not to be nested."""
    stand_ins = _stand_ins()
    missing = object()
    before = {key: getattr(*key, missing) for key in stand_ins}
    _record.clear()
    try:
        for (owner, name), value in stand_ins.items():
            setattr(owner, name, value)
        with _Dispatch(), _Function():
            yield _record
    finally:
        for (owner, name), value in before.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
