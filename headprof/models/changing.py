"""Changing a model for a while, and putting back exactly what was found.

Whoever runs a model otherwise than it was loaded (another attention function, layers that run in chunks, hooks) says so
by a `Change`, which is in force while the context of `changed` lasts. Contexts may nest, and may be left in another
order than they were entered: what is left of them is then made anew upon what was found. A model is changed by one
thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from headprof.errors import ModelError
from headprof.models.decoder import decoder_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

_NOTHING = object()


class Changes:
    """What has been changed, and the way back."""

    def __init__(self) -> None:
        self._way_back: list[Callable[[], object]] = []

    def keep(self, mapping: MutableMapping[str, Any], name: str) -> None:
        """Note an entry, or that there is none, which is about to be changed: `vars(module)` for an attribute."""
        found = mapping.get(name, _NOTHING)

        def put_back() -> None:
            if found is _NOTHING:
                mapping.pop(name, None)
            else:
                mapping[name] = found

        self._way_back.append(put_back)

    def set(self, mapping: MutableMapping[str, Any], name: str, value: Any) -> None:
        """Change an entry."""
        self.keep(mapping, name)
        mapping[name] = value

    def hook(self, handle: RemovableHandle) -> None:
        """Take a hook that has just been registered away again in the end."""
        self._way_back.append(handle.remove)

    def take_back(self) -> None:
        """Put back all that was found, the last change first."""
        while self._way_back:
            self._way_back.pop()()


class Change(Protocol):
    """What someone wants of a model for a while."""

    @property
    def kind(self) -> str | None:
        """Changes of one kind may look at each other, so they are made anew together; `None` for one by itself."""
        ...

    def make(self, changes: Changes, in_force: Sequence[Change]) -> None:
        """Change the model.

        Args:
            changes: by which all of it is done.
            in_force: all changes to the model, this one included, in the order in which they were asked for.
        """
        ...


@dataclass
class _HeldModel:
    """A model on which changes are in force; `config` is the object by which it is found."""

    config: Any
    thread: threading.Thread
    changes: list[Change] = field(default_factory=list)
    made: list[Changes] = field(default_factory=list)

    def take_back(self, start: int) -> None:
        """What was changed from change number `start` on."""
        while len(self.made) > start:
            self.made.pop().take_back()

    def make(self) -> None:
        """All that is not made."""
        for change in self.changes[len(self.made) :]:
            self.made.append(Changes())
            change.make(self.made[-1], self.changes)

    def add(self, change: Change) -> None:
        related = any(change.kind is not None and each.kind == change.kind for each in self.changes)
        self.take_back(0 if related else len(self.made))
        self.changes.append(change)
        self.make()

    def remove(self, change: Change) -> None:
        place = next(place for place, each in enumerate(self.changes) if each is change)
        related = any(each is not change and each.kind == change.kind for each in self.changes)
        self.take_back(0 if related and change.kind is not None else place)
        del self.changes[place]
        self.make()


_held: dict[int, _HeldModel] = {}
_lock = threading.Lock()


@contextmanager
def changed(model: PreTrainedModel, change: Change) -> Iterator[None]:
    """Let a change be in force while the context lasts; afterwards the model is as it would be without it.

    Raises:
        ModelError: another thread holds the model.
    """
    config = getattr(decoder_of(model), "config", model.config)
    with _lock:
        _enter(model, config, change)
    try:
        yield
    finally:
        with _lock:
            _leave(config, change)


def _enter(model: PreTrainedModel, config: Any, change: Change) -> None:
    here = threading.current_thread()
    held = _held.setdefault(id(config), _HeldModel(config, here))
    if held.thread is not here and held.thread.is_alive():
        raise ModelError(
            f"The {type(model).__name__} is in use by the thread {held.thread.name!r}, inside `compressed` or the "
            "like: leave that context first, or load the model once more for this thread."
        )
    held.thread = here
    try:
        held.add(change)
    except BaseException:
        _leave(config, change)
        raise


def _leave(config: Any, change: Change) -> None:
    held = _held[id(config)]
    try:
        held.remove(change)
    finally:
        if not held.changes:
            del _held[id(config)]
