"""A teacher that is a module in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from limbeck.batch import device_of, map_tensors
from limbeck.cache import module_identity
from limbeck.registry import nearest
from limbeck.taps import OUTPUT_NAMES, Read, Recorder, Tap, requested_outputs, resolve
from limbeck.teachers.inputs import ModuleInputs
from limbeck.teachers.precision import DTYPES, converted, quantized
from limbeck.types import Batch, Signal

CPU = torch.device("cpu")


class Reader:
    """Reads the taps of one module, for any batch.

    Args:
        module: The module, which is run as it is.
        read: Names its outputs where they have no names.

    Example:
        >>> reader = Reader(nn.Linear(2, 3))
        >>> reader.offers("logits"), reader.offers("lgits")
        (True, False)
    """

    def __init__(self, module: nn.Module, read: Read | None = None) -> None:
        self.module = module
        self.read = read
        self.call = ModuleInputs(module)
        self._recorders: dict[tuple[str, ...], Recorder] = {}

    def offers(self, tap: str) -> bool:
        """Whether the module has this tap."""
        try:
            self._resolve([tap])
        except ValueError:
            return False
        return True

    def names(self) -> Iterable[str]:
        """The module's paths and the known output names."""
        return [*(name for name, _ in self.module.named_modules()), *OUTPUT_NAMES]

    def __call__(self, batch: Batch, wants: Sequence[str], compiled: Callable[..., Any] | None = None) -> Signal:
        """Run the module, or what it was compiled to, and read the wanted taps.

        Raises:
            ValueError: a tap that it does not have.
        """
        recorder = self._recorder(tuple(wants))
        with nullcontext() if compiled is None else _compiled_with(recorder):
            _, values = record(recorder, lambda **extra: self.call(batch, run=compiled, **extra))
        return Signal({tap: tensor.detach() for tap, tensor in values.items()})

    def _resolve(self, taps: Iterable[str]) -> dict[str, Tap]:
        return resolve(self.module, taps, any_output=self.read is not None)

    def _recorder(self, wants: tuple[str, ...]) -> Recorder:
        if wants not in self._recorders:
            self._recorders[wants] = Recorder(self.module, self._resolve(wants), self.read)
        return self._recorders[wants]


class ModuleTeacher:
    """A frozen module as a teacher: always in eval mode, no gradient, on the device of the batch.

    Args:
        module: The trained model. It is frozen (``requires_grad`` off) and put into eval mode; with `dtype` or
            `int8` a copy of it is, and the model is not changed.
        read: Names the module's outputs where they have no names.
        device: Where the teacher stays; each batch is moved there, and the signals to where the batch came from.
            By default the teacher goes where the batch is.
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``: a copy computes in it, whatever autocast is on, and floating
            inputs are converted. Signals stay in it; losses between logits compute in float32 all the same.
        int8: A copy multiplies in int8 in its `nn.Linear` layers, each input quantised as it comes; on the CPU.
        compile: Compile the module with `torch.compile`; or a dict of options for that.

    Raises:
        TypeError: no module.
        ValueError: an unknown dtype or device, or options that contradict each other.

    Example:
        >>> teacher = ModuleTeacher(nn.Linear(2, 3))
        >>> teacher.offers("logits"), teacher.offers("lgits")
        (True, False)
        >>> teacher.signal({"input": torch.zeros(4, 2)}, ["logits"])["logits"].shape
        torch.Size([4, 3])
        >>> small = ModuleTeacher(nn.Linear(2, 3), dtype="bf16")
        >>> small.signal({"input": torch.zeros(4, 2)}, ["logits"])["logits"].dtype
        torch.bfloat16
    """

    def __init__(
        self,
        module: nn.Module,
        read: Read | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        int8: bool = False,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        check_module(module, "a teacher")
        self.device = None if device is None else _checked_device(device)
        _check_options(self.device, dtype, int8, compile)
        self.device = CPU if int8 else self.device
        self.dtype, self.int8 = dtype, int8
        module = quantized(module) if int8 else module if dtype is None else converted(module, dtype)
        self.module = module.eval().requires_grad_(False)
        if self.device is not None:
            self.module.to(self.device)
        self._reader = Reader(self.module, read)
        options = compile if isinstance(compile, Mapping) else {}
        self._compiled = torch.compile(self.module, **options) if compile is not False else None

    def offers(self, tap: str) -> bool:
        """Whether the module has this tap."""
        return self._reader.offers(tap)

    def names(self) -> Iterable[str]:
        """The module's paths and the known output names."""
        return self._reader.names()

    @torch.no_grad()
    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Run the module on the batch and read the wanted taps.

        Raises:
            ValueError: a tap that the module does not have, a batch without what it takes, or a device without
                values.
        """
        home = device_of(batch)
        self._follow(home)
        self.module.eval()
        with self._precision():
            signal = self._reader(self._placed(batch), wants, self._compiled)
        if home is None or self.device in (None, home):
            return signal
        if self.device is not None and self.device.type == "meta":
            raise ValueError("the teacher is on 'meta', which holds no values to give; choose another device")
        return Signal({tap: value.to(home) for tap, value in signal.values.items()})

    def reads_labels_of(self, batch: Batch) -> bool:
        """Whether the inputs of the module's decoder are made of the batch's labels."""
        return self._reader.call.prepared(batch) is not batch

    def identity(self) -> Mapping[str, Any]:
        """Its weights, class and configuration, and the precision where one was chosen."""
        chosen = {"dtype": self.dtype} if self.dtype else {"int8": True} if self.int8 else {}
        return {**module_identity(self.module), **chosen}

    def lend(self, path: str) -> nn.Module:
        """A part of the module, for a loss that passes the student's features through it.

        Raises:
            ValueError: there is no such part, or it computes elsewhere or in another precision than the student.
        """
        if self.dtype or self.device:
            raise ValueError(
                f"the loss passes the student through the teacher's {path!r}, which is on a device or in a "
                "precision of its own; leave device, dtype and int8 out"
            )
        modules = dict(self.module.named_modules())
        if path not in modules:
            raise ValueError(f"the teacher has no module {path!r}; {nearest(path, modules)}")
        part: nn.Module = modules[path]
        return part

    def _follow(self, home: torch.device | None) -> None:
        """Move to where the batch is; the Distiller moves the student only."""
        here = next(self.module.parameters(), None)
        if self.device is None and home is not None and here is not None and here.device != home:
            self.module.to(home)

    def _placed(self, batch: Batch) -> Batch:
        """The batch on the device, and its floating entries in the dtype, that were chosen."""
        if self.device is None and self.dtype is None:
            return batch
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        return map_tensors(batch, lambda t: t.to(self.device, dtype if t.is_floating_point() else None))

    def _precision(self) -> AbstractContextManager[Any]:
        """A precision that was chosen holds under the autocast of a training too."""
        here = next((t.device for t in (*self.module.parameters(), *self.module.buffers())), CPU)
        return torch.autocast(here.type, enabled=False) if self.dtype or self.int8 else nullcontext()


@contextmanager
def _compiled_with(recorder: Recorder) -> Iterator[None]:
    """Pin a recorder, and have what was compiled without its hooks, for other taps, be compiled anew."""
    recorder.pin()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        yield


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device  # with its number, where it has one
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"a teacher cannot be on {str(device)!r}: {reason}; choose another device") from None


def check_module(module: Any, what: str) -> None:
    """Refuse what cannot be run.

    Raises:
        TypeError: no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{what} is a torch.nn.Module, got a {type(module).__name__}; pass a module")


def _check_options(device: torch.device | None, dtype: Any, int8: Any, compile: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r} for a teacher; known: {', '.join(DTYPES)}")
    if not isinstance(compile, (bool, Mapping)):
        raise TypeError(f"compile is True, False or a dict of options for torch.compile, got {compile!r}")
    if int8 and dtype is not None:
        raise ValueError(f"a teacher computes in int8 or in {dtype}; leave one of them out")
    if int8 and device is not None and device != CPU:
        raise ValueError(f"int8 is for the CPU, and the device is {str(device)!r}; take dtype='bf16' there")


def record(recorder: Recorder, run: Callable[..., Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run a model under a recorder; return its output and what the taps saw.

    A tapped tensor that a later in-place operation overwrote is cloned, and the model is run once more: this
    happens on the first batch only.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> _, seen = record(Recorder(model, resolve(model, ["0"])), lambda: model(torch.ones(1, 2)))
        >>> bool((seen["0"] == model[0](torch.ones(1, 2))).all())
        True
    """
    extra: Mapping[str, Any] = requested_outputs(recorder.taps.values())
    with recorder.armed():
        output = run(**extra)
    if recorder.overwritten():
        with recorder.armed():
            output = run(**extra)
    return output, recorder.collect(output)
