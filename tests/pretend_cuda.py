"""CPU tensors that say they are on cuda:0, and count where the host would wait for that device.

Within `PretendCuda()` what is put on "cuda" becomes such a tensor. Counted are copies that are not
`non_blocking` from or to pinned memory, numbers read from the device, and operations whose result
has a size that only the device knows. What supcon_kernels does inside its operators is not seen.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}
OWN = ("/train/", "/supcon_kernels/", "kornia/", "timm/", "torch/optim/", "torch/amp/", "nn/utils/")


class OnCuda(Tensor):
    """A tensor in main memory that counts as one on the device."""

    inner: Tensor
    # Its device is that of `PretendCuda`, which sees every function first.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCuda":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",
        )
        made.inner = inner
        return made

    def __repr__(self, **options: Any) -> str:
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendCuda.entered.operation(func, args, kwargs or {})


class PretendCuda(TorchFunctionMode):
    """While entered, "cuda" is there; `waits` counts by place, `kernels` operations on the device."""

    entered: "PretendCuda"

    def __init__(self) -> None:
        super().__init__()
        self.reset()
        self.pinned: dict[int, Tensor] = {}  # kept, so that nothing else comes to lie there

    def reset(self) -> None:
        """Count from zero."""
        self.waits: Counter[str] = Counter()
        self.kernels = 0

    def __enter__(self) -> "PretendCuda":
        PretendCuda.entered = self
        return super().__enter__()

    def wait(self, kind: str) -> None:
        """Count a wait of the code that runs."""
        frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in OWN)]
        place = " < ".join(
            f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
            for frame in reversed(frames[-4:])
        )
        self.waits[f"{kind} in {place}"] += 1

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run what at least one tensor on the device takes part in."""
        flat, _ = tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, OnCuda)]
        others = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnCuda)]
        if func is aten.copy_.default and others:
            self._copied(*args[:2], non_blocking=len(args) > 2 and args[2])
        elif func in READS or (func in INDEXING and self._reads(args)):
            self.wait(str(func))
        elif any(x.ndim > 0 for x in others):
            raise RuntimeError(f"{func} of tensors on cuda:0 and cpu")
        inner_args, inner_kwargs = tree_map(
            lambda x: x.inner if isinstance(x, OnCuda) else x, (args, kwargs)
        )
        result = func(*inner_args, **inner_kwargs)
        if func is aten._local_scalar_dense.default:
            return result
        self.kernels += not (func.is_view or func is aten.detach.default)
        known = {id(x.inner): x for x in ours} | {id(x): x for x in others}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor) or isinstance(x, OnCuda):
                return x
            return known[id(x)] if id(x) in known else OnCuda(x)

        return tree_map(wrapped, result)

    def _reads(self, args: Any) -> bool:
        """Whether an index says only by its values how many elements it takes."""
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        if not all(isinstance(x, OnCuda) for x in args[1] if x is not None):
            return True  # it is copied to the device first
        fills = len(args) > 2 and args[2].numel() == 1  # is masked_fill there
        return bool(masks) and not fills

    def _copied(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
        ours = [isinstance(x, OnCuda) for x in (target, source)]
        if ours[0] == ours[1]:
            return
        # A small copy to the device is staged, one to the host is not, unless it ends where it lies.
        if not (non_blocking and (ours[0] or self._is_pinned(target))):
            self.wait("copy to the device" if ours[0] else "copy to the host")

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.pinned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, OnCuda):
            if func in (Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.get_device):
                return {Tensor.device.__get__: CUDA, Tensor.get_device: 0}.get(func, True)
            if func is Tensor.numpy:
                raise TypeError("can't convert a cuda:0 tensor to numpy")
            if func in (Tensor.cpu, Tensor.tolist):
                self.wait(func.__name__)
                return func(first.inner.detach())
        if func is Tensor.pin_memory:
            copy = first.clone()
            self.pinned[copy.untyped_storage().data_ptr()] = copy
            return copy
        if func is Tensor.is_pinned:
            return self._is_pinned(first)
        if func in (Tensor.to, Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        pinned, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        if not _is_cuda(device):
            result = func(*args, **kwargs)
            if pinned:
                self.pinned[result.untyped_storage().data_ptr()] = result
            return result
        kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and not isinstance(first, OnCuda):
            self.wait(func.__name__)
        is_plain = isinstance(result, Tensor) and not isinstance(result, OnCuda)
        return OnCuda(result) if is_plain else result

    def _moved(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, non_blocking = kwargs.pop("device", None), kwargs.pop("non_blocking", False)
        rest = list(args)
        if rest and isinstance(rest[0], Tensor):
            # Within this method a tensor says where it lies.
            device, rest[0] = CUDA if isinstance(rest[0], OnCuda) else "cpu", rest[0].dtype
        elif rest and isinstance(rest[0], str | torch.device):
            device = rest.pop(0)
        if flags := [value for value in rest if isinstance(value, bool)]:
            non_blocking, rest = flags[0], [value for value in rest if not isinstance(value, bool)]
        rest = [value for value in rest if value is not None]
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        y = func(x, *rest, **kwargs) if rest or kwargs else x
        to_cuda = CUDA.type if func is Tensor.cuda else device and torch.device(device).type
        if to_cuda is None or (to_cuda == "cuda") == isinstance(y, OnCuda):
            return y
        if to_cuda == "cuda":
            if not non_blocking:
                self.wait("copy to the device")
            return OnCuda(y.detach().clone())
        self.wait("copy to the host")
        return y.inner.detach().clone()


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class _Stream:
    """In the place of torch.cuda.Stream."""

    def __init__(self, *device: Any) -> None:
        pass

    def wait_stream(self, other: "_Stream") -> None:
        """No work to wait for."""


class _Event:
    """In the place of torch.cuda.Event, which needs a GPU."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self, *stream: Any) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: "_Event") -> float:
        """No time."""
        return 0.0


def _grouped(lists: Any, *options: Any) -> Any:
    """What torch groups by device, all of which is on one."""
    groups = _group_tensors_by_device_and_dtype(lists, *options)
    return {(CUDA, dtype): value for (_, dtype), value in groups.items()}


class _Generator(torch.Generator):
    """In the place of torch.Generator: always the CPU's."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls)


@contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """A `PretendCuda`, with what torch.cuda lacks here; autocast is the CPU's."""
    autocast = torch.autocast
    changes: dict[str, Any] = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *state: None,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.Event": _Event,
        "torch.cuda.Stream": _Stream,
        "torch.cuda.stream": nullcontext,
        "torch.cuda.current_stream": _Stream,
        "torch.Tensor.record_stream": lambda x, stream: None,
        "torch.cuda.synchronize": lambda *device: None,
        "torch.cuda.max_memory_reserved": lambda *device: 3 * 2**29,
        "torch.cuda.get_device_properties": lambda *device: SimpleNamespace(
            total_memory=80 * 2**30
        ),
        # The loss is computed by PyTorch's own operations.
        "supcon_kernels.backends.triton.why_not": lambda problem: "it is no GPU",
        "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype": _grouped,
        # A module's weights are replaced: torch would put new data into the old ones.
        "torch._has_compatible_shallow_copy_type": lambda *tensors: False,
        "torch.Generator": _Generator,
        "torch.autocast": lambda kind, **options: autocast("cpu", **options),
    }
    mode = PretendCuda()
    with torch.random.fork_rng(devices=[]), mode:
        patches = [patch(name, change) for name, change in changes.items()]
        for one in patches:
            one.start()
        try:
            yield mode
        finally:
            for one in patches:
                one.stop()
