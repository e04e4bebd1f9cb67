"""Taps: places to read a model, and the recorder that reads them.

A tap is a string. It names a module by its path, ``"encoder.layer.3"``, and reads that module's output; or an
output of the whole model by its name, ``"logits"``, ``"hidden_states.3"``, ``"attentions.5"``. After a ``#``
comes what to take where a module returns several things: ``"encoder#1"`` the second item, ``"encoder#pooled"``
a key, ``"classifier#input"`` the module's first input instead of its output; `Picked` takes it by a function.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.registry import closest, nearest

OUTPUT_NAMES = frozenset(
    {
        "logits",
        "hidden_states",
        "attentions",
        "last_hidden_state",
        "pooler_output",
        "start_logits",
        "end_logits",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "image_embeds",
        "text_embeds",
    }
)
"""What transformers models call their outputs. A model read by `read=` may use any other name."""

ON_REQUEST = ("hidden_states", "attentions")
"""Outputs that a transformers model returns only when it is asked with ``output_<name>=True``."""

HIDDEN_STATES = "hidden_states"

INPUT = "input"
"""The part of a tap that asks for a module's input, ``"classifier#input"``."""

Read = Callable[[Any], Mapping[str, Any]]


class Picked(str):
    """A tap with a function that takes the tensor out of what the module, or the whole model, returns.

    Args:
        path: The module's path; ``""`` is the whole model.
        pick: Takes what the module returned and gives a tensor.
        name: Its name, which stands behind a ``#`` and tells apart two picks of one place; it, and not the
            function, is what a cache of the teacher goes by.

    Example:
        >>> half = Picked("encoder", lambda output: output[0][:, :2], "half")
        >>> half, parse(half, ["encoder"]).pick is half.pick
        ('encoder#half', True)
    """

    pick: Callable[[Any], Tensor]

    def __new__(cls, path: str, pick: Callable[[Any], Tensor], name: str) -> Picked:
        """A string, so that it stands wherever a tap does."""
        if not callable(pick):
            raise TypeError(f"pick is a function of what a module returns, got {pick!r}")
        tap = super().__new__(cls, f"{path}#{name}")
        tap.pick = pick
        return tap

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What copies of it are made of."""
        path, _, name = self.partition("#")
        return path, self.pick, name


@dataclasses.dataclass(frozen=True)
class Tap:
    """A parsed tap: a module's path, or None for an output of the model, and which part of it, or a function.

    Example:
        >>> parse("encoder#1", ["encoder"])
        Tap(text='encoder#1', module='encoder', name='', part='1')
        >>> parse("hidden_states.3", ["encoder"])
        Tap(text='hidden_states.3', module=None, name='hidden_states', part='3')
    """

    text: str
    module: str | None
    name: str
    part: str
    pick: Callable[[Any], Tensor] | None = dataclasses.field(default=None, repr=False)


def parse(text: str, paths: Iterable[str], any_output: bool = False) -> Tap:
    """Parse a tap against the module paths of a model.

    Args:
        text: The tap.
        paths: The model's module paths.
        any_output: Accept unknown output names (the model's outputs are mapped by `read=`).

    Raises:
        ValueError: no such module and no such output; the message lists the nearest paths.
    """
    paths = set(paths)
    path, _, part = text.partition("#")
    if path in paths:
        return Tap(text, module=path, name="", part=part, pick=text.pick if isinstance(text, Picked) else None)
    name, _, index = text.partition(".")
    if name in OUTPUT_NAMES or (any_output and "#" not in text):
        return Tap(text, module=None, name=name, part=index)
    named = (paths | OUTPUT_NAMES) - {""}
    wrong = path if closest(path, paths) else name  # of an output, only the name can be wrong
    raise ValueError(f"no module or output {text!r}; {nearest(wrong, named)}")


def resolve(model: nn.Module, taps: Iterable[str], any_output: bool = False) -> dict[str, Tap]:
    """Parse taps against a model.

    Raises:
        ValueError: a tap that the model does not have.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> resolve(model, ["0"])["0"].module
        '0'
    """
    paths = [name for name, _ in model.named_modules()]
    return {text: parse(text, paths, any_output) for text in taps}


def read_output(output: Any, read: Read | None = None) -> Mapping[str, Any]:
    """Name the outputs of a model: a tensor is its logits, a mapping or dataclass speaks for itself.

    Raises:
        TypeError: the outputs have no names and no `read` was given.

    Example:
        >>> sorted(read_output((torch.zeros(1), torch.ones(1)), read=lambda o: {"logits": o[0]}))
        ['logits']
    """
    if read is not None:
        return read(output)
    if isinstance(output, Tensor):
        return {"logits": output}
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple) and hasattr(output, "_asdict"):  # a named tuple
        return dict(output._asdict())
    if dataclasses.is_dataclass(output):
        return vars(output)
    raise TypeError(
        f"the model returned a {type(output).__name__}, whose parts have no names; "
        "name them with read=lambda output: {'logits': output[0]}"
    )


def pick(value: Any, part: str, text: str) -> Tensor:
    """Take one tensor out of what a module or an output holds.

    Raises:
        ValueError: there is no such part, or it is no tensor.
    """
    cure = "; load the model with attn_implementation='eager'" if "attentions" in text else ""
    if isinstance(value, Mapping) and part:
        if part not in value:
            raise ValueError(f"tap {text!r}: there is no {part!r}; {nearest(part, value)}{cure}")
        value = value[part]
    elif isinstance(value, (tuple, list)):
        value = value[_index(part, len(value), text, cure)]
    elif part and not (part == "0" and isinstance(value, Tensor)):  # layers of transformers gave tuples until 5.0
        raise ValueError(f"tap {text!r} asks for part {part!r} of a {type(value).__name__}, which has none")
    if isinstance(value, Tensor):
        return value
    raise ValueError(f"tap {text!r} gave no tensor but {type(value).__name__}{cure}")


def _index(part: str, count: int, text: str, cure: str) -> int:
    """Which of several tensors a tap takes; a module's first by default, of the model's outputs none."""
    if not part and text in OUTPUT_NAMES:
        raise ValueError(
            f"tap {text!r} holds {count} tensors; say which, as in '{text}.{max(0, count - 1)}'{cure}"
        )
    if part and not part.removeprefix("-").isdigit():
        raise ValueError(f"tap {text!r} asks for part {part!r} of {count}; write a number")
    index = int(part or 0)
    if not -count <= index < count:
        raise ValueError(f"tap {text!r} asks for part {index} of {count}; count from 0{cure}")
    return index


def requested_outputs(taps: Iterable[Tap]) -> dict[str, bool]:
    """The keyword arguments that make a transformers model return what the taps read."""
    names = {tap.name for tap in taps if tap.module is None}
    wanted = [o for o in ON_REQUEST if any(n == o or n.endswith(f"_{o}") for n in names)]
    return {f"output_{name}": True for name in wanted}


@dataclasses.dataclass
class _Sight:
    """What one thread sees of one forward pass."""

    recording: bool = False
    seen: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    versions: dict[str, int] = dataclasses.field(default_factory=dict)

    def forget(self) -> None:
        self.seen.clear()
        self.versions.clear()


class Recorder:
    """Reads taps while a model runs. Hooks exist only while armed, or pinned for `torch.compile`.

    Each thread that arms it sees its own forward pass alone: the replicas of `torch.nn.DataParallel` share their
    hooks, which then have to be pinned.

    Args:
        model: The model to read.
        taps: Parsed taps by their text, from `resolve`.
        read: Names the model's outputs where they have no names.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> recorder = Recorder(model, resolve(model, ["0", "logits"]))
        >>> with recorder.armed():
        ...     output = model(torch.zeros(1, 2))
        >>> sorted(recorder.collect(output))
        ['0', 'logits']
        >>> len(model[0]._forward_hooks)
        0
    """

    def __init__(self, model: nn.Module, taps: Mapping[str, Tap], read: Read | None = None) -> None:
        self.model = model
        self.taps = dict(taps)
        self.read = read
        self.cloned: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._pinned = False
        # One thread uses the same object time and again: what was compiled would be compiled anew for another.
        self._latest = _Sight()
        self._free = [self._latest]
        self._of_threads: dict[int, _Sight] = {}

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Record what the taps see inside the block; what this thread saw before is forgotten."""
        sight = self._latest = self._sight()
        sight.forget()
        if not self._pinned:
            self._attach()
        sight.recording = True
        try:
            yield
        finally:
            sight.recording = False
            if not self._pinned:
                self._detach()

    def pin(self) -> None:
        """Keep the hooks attached: a compiled model ignores hooks that come after its first call."""
        if not self._pinned:
            self._attach()
            self._pinned = True

    def unpin(self) -> None:
        """Take pinned hooks away."""
        self._pinned = False
        self._detach()

    def collect(self, output: Any) -> dict[str, Tensor]:
        """Return the tensor of every tap, given the model's output; the recorder keeps none of them.

        Raises:
            ValueError: a tapped module did not run, or an output is not there.
        """
        named = None
        found = {}
        sight = self._sight()
        for text, tap in self.taps.items():
            if tap.module is not None:
                if text not in sight.seen:
                    raise ValueError(f"the module of tap {text!r} did not run in this forward pass")
                found[text] = sight.seen[text]
                continue
            named = read_output(output, self.read) if named is None else named
            if text in named:  # a name with dots
                found[text] = pick(named[text], "", text)
                continue
            if tap.name not in named:
                raise ValueError(f"{type(self.model).__name__} gave no {tap.name!r}; {nearest(tap.name, named)}")
            found[text] = pick(named[tap.name], tap.part, text)
        sight.forget()
        del self._of_threads[threading.get_ident()]
        self._free.append(sight)
        return found

    def overwritten(self) -> set[str]:
        """The taps whose tensor a later in-place operation changed; they are cloned from now on."""
        sight = self._sight()
        changed = {t for t, v in sight.versions.items() if sight.seen[t]._version != v}
        self.cloned |= changed
        return changed

    def _sight(self) -> _Sight:
        """What this thread sees, from when it first arms until it has collected."""
        thread = threading.get_ident()
        if thread not in self._of_threads:
            try:
                self._of_threads[thread] = self._free.pop()
            except IndexError:
                self._of_threads[thread] = _Sight()
        return self._of_threads[thread]

    def _attach(self) -> None:
        modules = dict(self.model.named_modules())
        for tap in self.taps.values():
            if tap.module is not None:
                module = modules[tap.module]
                handle = (
                    module.register_forward_pre_hook(_InputHook(self, tap), with_kwargs=True)
                    if tap.part == INPUT and tap.pick is None
                    else module.register_forward_hook(_OutputHook(self, tap))
                )
                self._handles.append(handle)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def record(self, tap: Tap, tensor: Tensor) -> None:
        """Keep what one tap saw; called by the hooks.

        Raises:
            ValueError: the module ran twice in one forward pass.
        """
        compiling = torch.compiler.is_compiling()
        sight = self._latest if compiling else self._of_threads.get(threading.get_ident())
        if sight is None or not sight.recording:
            return
        if tap.text in sight.seen:
            raise ValueError(
                f"the module of tap {tap.text!r} ran more than once in one forward pass; "
                "tap an output of the model instead, such as 'hidden_states.3'"
            )
        # A compiled tensor has no version that would tell of a later change in place.
        kept = tensor.clone() if compiling or tap.text in self.cloned else tensor
        sight.seen[tap.text] = kept
        if not compiling and not kept.is_inference():
            sight.versions[tap.text] = kept._version


@dataclasses.dataclass
class _OutputHook:
    """A forward hook; an object, since a model with a closure in it can be neither copied nor pickled."""

    recorder: Recorder
    tap: Tap

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.tap.pick is None:
            tensor = pick(output, self.tap.part, self.tap.text)
        else:
            tensor = pick(self.tap.pick(output), "", self.tap.text)
        self.recorder.record(self.tap, tensor)


@dataclasses.dataclass
class _InputHook:
    """A hook that runs before the module, which may overwrite its input."""

    recorder: Recorder
    tap: Tap

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        name = None if inputs else first_named(module, named)
        first = inputs if name is None else named[name]
        self.recorder.record(self.tap, pick(first, "", self.tap.text))


def first_named(module: nn.Module, named: Mapping[str, Any]) -> str | None:
    """The name under which a module was given its first input, where it was by name.

    Example:
        >>> first_named(nn.Linear(2, 3), {"input": torch.zeros(1, 2)})
        'input'
    """
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return next((name for name in (first, HIDDEN_STATES) if name in named), None)
