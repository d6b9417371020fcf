"""A module that stands in for CuPy where there is no GPU: CuPy's interface over NumPy arrays, as strict as CuPy is.

It is there to test the Python of the GPU backend, so it gives what the backend may use and nothing else, and refuses
what CuPy refuses or leaves undefined:

    an array is not turned into a NumPy array behind one's back, nor combined with one
    indexing and reductions give 0-d arrays, never scalars
    an index outside an array wraps round on a GPU: here that is an error, since the engine must check before
    of two values written to one position, or floats added atomically, the order is undefined: an error

CUDA kernels run under the emulation (emulation.py), with types of arguments checked against their prototypes.
"""

from __future__ import annotations

import importlib.machinery
import math
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import emulation
import numpy as np
from emulation import Schedule

from engine.backend.cuda_source import OPTIONS

BLOCKS_AT_MOST = 5  # of a grid: the result must not depend on it
SCALARS = {"int64_t": np.int64, "uint64_t": np.uint64, "uint32_t": np.uint32, "int": np.int32, "double": np.float64}
SCHEDULE = Schedule(order="random", seed=1)


class ndarray:
    """An array "on the GPU"."""

    __slots__ = ("_host",)
    __hash__ = None

    def __init__(self, host: Any):
        self._host = np.asarray(host)

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    size = property(lambda self: self._host.size)
    ndim = property(lambda self: self._host.ndim)
    itemsize = property(lambda self: self._host.itemsize)
    T = property(lambda self: ndarray(self._host.T))

    @property
    def flags(self) -> Any:
        """CuPy's flags say nothing about writing."""
        flags = self._host.flags
        return types.SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return repr(self._host)

    __str__ = __repr__

    # ── to the host, only when asked ────────────────────────────────────────────────────────────────

    def get(self) -> np.ndarray:
        return self._host.copy()

    def item(self) -> Any:
        return self._host.item()

    def tolist(self) -> Any:
        return self._host.tolist()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __index__(self) -> int:
        return operator.index(self._host.item())

    def __format__(self, spec: str) -> str:
        return format(self._host.item() if self.ndim == 0 else str(self._host), spec)

    # ── NumPy's functions on it are CuPy's ──────────────────────────────────────────────────────────

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or not hasattr(sys.modules["cupy"], ufunc.__name__):
            return NotImplemented
        return getattr(sys.modules["cupy"], ufunc.__name__)(*inputs, **options)

    def __array_function__(self, function: Any, types_: Any, args: Any, options: Any) -> Any:
        ours = getattr(sys.modules["cupy"], function.__name__, None)
        return NotImplemented if ours is None else ours(*args, **options)

    # ── indexing ────────────────────────────────────────────────────────────────────────────────────

    def __getitem__(self, index: Any) -> ndarray:
        plain = _plain_index(index)
        try:
            found = self._host[plain]
        except IndexError as error:
            if _is_basic(plain):
                raise
            raise AssertionError(f"CuPy would wrap this index round instead of saying: {error}") from None
        if isinstance(found, np.generic) and _is_basic(plain):  # a view, not a scalar
            found = self._host[(*plain, ...) if isinstance(plain, tuple) else (plain, ...)]
        return ndarray(found)

    def __setitem__(self, index: Any, value: Any) -> None:
        plain = _plain_index(index)
        if not _is_basic(plain):
            places = np.arange(self.size).reshape(self.shape)[plain]
            if np.unique(places).size != places.size:
                raise AssertionError("CuPy leaves undefined which of two values for one position is kept")
        self._host[plain] = _device_only(value)


def _plain_index(index: Any) -> Any:
    """An index as NumPy takes it; CuPy takes NumPy's arrays here too."""
    if isinstance(index, tuple):
        return tuple(_plain_index(part) for part in index)
    return index._host if isinstance(index, ndarray) else index


def _is_basic(index: Any) -> bool:
    return not any(isinstance(part, (np.ndarray, list)) for part in (index if isinstance(index, tuple) else (index,)))


def _device_only(value: Any) -> Any:
    """An operand: an array on the device, or a number. CuPy takes no NumPy array here."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value


def _wrapped(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_wrapped(v) for v in value)
    return ndarray(value) if isinstance(value, (np.ndarray, np.generic)) else value


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A NumPy function as CuPy has it: operands and results live on the device."""
    def run(*args: Any, **options: Any) -> Any:
        out = options.pop("out", None)
        out = out[0] if isinstance(out, tuple) else out
        moved = {k: _device_only(v) for k, v in options.items()}
        if out is not None:
            moved["out"] = out._host
        with np.errstate(all="ignore"):
            found = function(*[_operand(a) for a in args], **moved)
        return out if out is not None else _wrapped(found)
    run.__name__ = function.__name__
    return run


def _operand(value: Any) -> Any:
    return [_device_only(v) for v in value] if isinstance(value, (list, tuple)) and any(
        isinstance(v, ndarray) for v in value) else _device_only(value)


METHODS = """sum prod max min any all argmax argmin cumsum reshape transpose astype view copy ravel swapaxes squeeze
             __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __mod__ __pow__
             __neg__ __abs__ __invert__ __and__ __or__ __xor__ __rand__ __ror__ __lshift__ __rshift__
             __eq__ __ne__ __lt__ __le__ __gt__ __ge__""".split()
IN_PLACE = "__iadd__ __isub__ __imul__ __itruediv__".split()


def _method(name: str) -> Callable[..., Any]:
    of_numpy = getattr(np.ndarray, name)

    def run(self: ndarray, *args: Any, **options: Any) -> Any:
        return on_device(of_numpy)(self, *args, **options)
    return run


def _in_place(name: str) -> Callable[..., Any]:
    def run(self: ndarray, other: Any) -> ndarray:
        getattr(self._host, name)(_device_only(other))
        return self
    return run


for _name in METHODS:
    setattr(ndarray, _name, _method(_name))
for _name in IN_PLACE:
    setattr(ndarray, _name, _in_place(_name))


# ── functions ─────────────────────────────────────────────────────────────────────────────────────────

FUNCTIONS = """negative abs absolute sign floor ceil trunc rint round square sqrt reciprocal exp expm1 log log1p log2
               log10 logaddexp sin cos tan arcsin arccos arctan arctan2 sinh cosh tanh arcsinh arccosh arctanh hypot
               add subtract multiply divide power floor_divide remainder fmod maximum minimum where
               copysign nextafter signbit
               equal not_equal less less_equal logical_and logical_or logical_xor logical_not
               bitwise_and bitwise_or bitwise_xor invert left_shift right_shift isnan isinf isfinite
               any all cumsum cumprod flip matmul broadcast_to ascontiguousarray zeros_like moveaxis
               transpose take_along_axis""".split()
MAKERS = "empty zeros ones arange".split()


class _Add:
    """cupy.add: callable, with `at`."""

    __name__ = "add"

    def __call__(self, *args: Any, **options: Any) -> Any:
        return on_device(np.add)(*args, **options)

    @staticmethod
    def at(a: ndarray, index: Any, b: Any) -> None:
        if a.dtype.name not in ("int32", "uint32", "uint64"):
            raise AssertionError(f"cupy.add.at of {a.dtype}: atomics exist for int32, uint32, uint64 (and, in no fixed "
                                 "order, for floats)")
        np.add.at(a._host, _plain_index(index), _device_only(b))


def _copyto(to: ndarray, source: Any, casting: str = "same_kind") -> None:
    with np.errstate(all="ignore"):
        np.copyto(to._host, _device_only(source), casting=casting)


def _as_strided(x: ndarray, shape: Any, strides: Any) -> ndarray:
    return ndarray(np.lib.stride_tricks.as_strided(x._host, shape, strides))


def _stable(function: Callable[..., Any]) -> Callable[..., Any]:
    """CuPy sorts stably, and takes no other kind."""
    def run(x: ndarray, axis: int = -1, kind: str | None = None) -> ndarray:
        if kind not in (None, "stable"):
            raise ValueError("kind can only be None or 'stable'")
        return ndarray(function(x._host, axis, kind="stable"))
    return run


def _erf(x: ndarray, out: ndarray) -> None:
    out._host[...] = np.vectorize(math.erf, otypes=[float])(x._host)


class RawModule:
    """A CUDA program, compiled for the emulation at once."""

    def __init__(self, *, code: str, options: tuple[str, ...]):
        chosen = [o for o in options if o not in OPTIONS]
        if chosen not in (["-DREAL_BITS=32"], ["-DREAL_BITS=64"]):
            raise AssertionError(f"RawModule: options are {options}")
        self.program = emulation.build(code, int(chosen[0][-2:]))

    def get_function(self, symbol: str) -> Callable[..., None]:
        program = self.program
        [name] = [k.name for k in program.kernels.values() if k.symbol(program.bits) == symbol]

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
            assert block == (256,) and len(grid) == 1 and grid[0] > 0, (grid, block)
            for value, parameter in zip(args, program.kernels[name].parameters):
                wanted = (ndarray, type(None)) if parameter.is_pointer else SCALARS[parameter.type]
                if not isinstance(value, wanted):
                    raise TypeError(f"{symbol}: {parameter.name} is {type(value).__name__}, expected {parameter.type}")
                element = {"real*": f"float{program.bits}", "int64_t*": "int64", "double*": "float64",
                           "uint32_t*": "uint32"}.get(parameter.type)
                if isinstance(value, ndarray) and value.dtype != element:
                    raise TypeError(f"{symbol}: {parameter.name} holds {value.dtype}, expected {element}")
            program.launch(name, [a._host if isinstance(a, ndarray) else a for a in args],
                           Schedule(min(grid[0], BLOCKS_AT_MOST), SCHEDULE.order, SCHEDULE.seed))
        return launch


class CUDARuntimeError(RuntimeError):
    """What CuPy raises for errors of the CUDA runtime."""


def make(device_count: Callable[[], int] = lambda: 1, driver: int = 13000) -> dict[str, types.ModuleType]:
    """The modules, by the names under which to put them into sys.modules."""
    cupy, cupyx, scipy, special = (types.ModuleType(name) for name in
                                   ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.special"))
    members: dict[str, Any] = {name: on_device(getattr(np, name)) for name in FUNCTIONS}
    members |= {name: on_device(getattr(np, name)) for name in MAKERS}
    members |= {"ndarray": ndarray, "add": _Add(), "copyto": _copyto, "sort": _stable(np.sort),
                "argsort": _stable(np.argsort), "RawModule": RawModule, "nan": np.nan, "inf": np.inf,
                "asarray": lambda x, dtype=None: ndarray(np.array(_device_if(x), dtype=dtype)),
                "asnumpy": lambda x: x.get(),
                "lib": types.SimpleNamespace(stride_tricks=types.SimpleNamespace(as_strided=_as_strided)),
                "cuda": types.SimpleNamespace(
                    runtime=types.SimpleNamespace(getDeviceCount=device_count, driverGetVersion=lambda: driver,
                                                  CUDARuntimeError=CUDARuntimeError),
                    Device=lambda: types.SimpleNamespace(attributes={"MultiProcessorCount": 1}))}
    vars(cupy).update(members)
    special.erf = _erf
    cupyx.scipy, scipy.special = scipy, special
    modules = {"cupy": cupy, "cupyx": cupyx, "cupyx.scipy": scipy, "cupyx.scipy.special": special}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return modules


def _device_if(value: Any) -> Any:
    """asarray copies host data to the device; a device array stays what it is."""
    return value._host if isinstance(value, ndarray) else value
