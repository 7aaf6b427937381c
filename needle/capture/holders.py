"""What Modules, Optimizers and GradScalers hold, before and after a trace. Next: leaks.py.

A *container* is a holder's `__dict__`, or a dict or list in it. A *slot* is an item of one that a
trace has set to a Tensor of its own: an output of the program, assigned after each call. A *watch*
compares, at each call, what the structure was when the program was traced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from operator import getitem
from typing import Any, NamedTuple

from needle.autograd import HOLDERS, Holder, Tensor, Value
from needle.errors import TraceError
from needle.nn.module import Module
from needle.optim.optimizer import Optimizer

MISSING: Any = object()


class Slot(NamedTuple):
    """container[key], of a Holder; value: the trace's Tensor in it."""

    holder: Any
    container: Any
    key: Any
    value: Any
    before: Any  # MISSING where there was no such item

    def bare(self) -> Slot:
        """The slot without the trace's Tensor."""
        return self._replace(value=None)

    def get(self) -> Any:
        """The item, None where there is none."""
        is_dict = isinstance(self.container, dict)
        return self.container.get(self.key) if is_dict else self.container[self.key]

    def put(self, value: Any) -> None:
        if value is MISSING:
            del self.container[self.key]
        else:
            self.container[self.key] = value


def entries(container: Any) -> Iterable[tuple[Any, Any]]:
    return container.items() if isinstance(container, dict) else enumerate(container)


def containers(holder: Any) -> Iterator[Any]:
    """A holder's `__dict__`, and the dicts, lists and tuples in it."""
    seen: set[int] = set()
    stack: list[Any] = [vars(holder)]
    while stack:
        each = stack.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            stack += [x for _, x in entries(each) if isinstance(x, (dict, list, tuple))]


class Snapshot:
    """All Holders as they are now."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[Any, Any, Any]] = {}  # (holder, container, copy) by id
        for holder in list(HOLDERS.values()):
            for each in containers(holder):
                copy = dict(each) if isinstance(each, dict) else list(each)
                self.before[id(each)] = holder, each, copy

    def restore(self) -> None:
        """Set back what has changed."""
        for _, container, before in self.before.values():
            now = list(entries(container))
            same = len(now) == len(before) and all(
                x is y and key == other
                for (key, x), (other, y) in zip(now, entries(before), strict=True)
            )
            if not same and isinstance(container, dict):
                container.clear()
                container.update(before)
            elif not same:
                container[:] = before

    def slots(self, created: Collection[Value]) -> list[Slot]:
        """Where Tensors of a trace are held now."""
        found = []
        for holder in list(HOLDERS.values()):
            for container in containers(holder):
                if isinstance(container, tuple):
                    continue
                _, _, copy = self.before.get(id(container), (None, None, {}))
                known = dict(entries(copy))
                found += [
                    Slot(holder, container, key, x, known.get(key, MISSING))
                    for key, x in entries(container)
                    if isinstance(x, Tensor) and x in created
                ]
        for slot in found:
            if slot.before is MISSING and isinstance(slot.container, list):
                name = type(slot.holder).__name__
                reason = f"a list in {name} grows by a traced Tensor at each call"
                cure = "write to an item that is there, or return the Tensor"
                raise TraceError(f"jit: expected lists of one length; received: {reason}; {cure}")
        return found

    def relevant(
        self, called: Iterable[Module], touched: Collection[Value], slots: Iterable[Slot]
    ) -> dict[int, Any]:
        """The holders that a trace depends on, by id: those called, those that hold a tensor it
        read or wrote (an optimizer's params do not count), and all Modules below them."""
        found = {id(x): x for x in (*called, *(slot.holder for slot in slots))}
        below: dict[int, list[Module]] = {}
        for holder, container, before in self.before.values():
            mine = [x for _, x in entries(before)]
            below.setdefault(id(holder), []).extend(x for x in mine if isinstance(x, Module))
            is_params = isinstance(holder, Optimizer) and container is vars(holder).get("params")
            if not is_params and any(isinstance(x, Value) and x in touched for x in mine):
                found[id(holder)] = holder
        stack = list(found)
        while stack:
            for module in below.get(stack.pop(), ()):
                if id(module) not in found:
                    found[id(module)] = module
                    stack.append(id(module))
        return found


def is_structure(x: Any) -> bool:
    """Whether an item of a container is part of the structure that a program is made for."""
    return isinstance(x, (Value, Holder, dict, list, tuple))


class Watch:
    """Items that must be what they were, and containers that must be as long."""

    def __init__(self) -> None:
        self.containers: list[Any] = []
        self.keys: list[Any] = []
        self.held: list[Any] = []
        self.labels: list[str] = []
        self.sized: list[Any] = []
        self.lengths: list[int] = []
        self.names: list[str] = []

    def item(self, container: Any, key: Any, value: Any, label: str) -> None:
        self.containers.append(container)
        self.keys.append(key)
        self.held.append(value)
        self.labels.append(label)

    def holder(self, holder: Any, snapshot: Snapshot, slots: Collection[tuple[int, Any]]) -> None:
        """Watch a holder as it was; slots, (id(container), key), may change."""
        name = type(holder).__name__
        if isinstance(holder, Module):
            vars(holder).setdefault("training", holder.training)
        for container in containers(holder):
            if id(container) not in snapshot.before or isinstance(container, tuple):
                continue
            before = snapshot.before[id(container)][2]
            self.container(container, before, slots, name)
            if container is vars(holder) and isinstance(holder, Module):
                training = before.get("training", type(holder).training)
                self.item(container, "training", training, f"training of {name}")

    def container(
        self, container: Any, before: Any, slots: Collection[tuple[int, Any]], name: str
    ) -> None:
        now = dict(entries(container))
        known = dict(entries(before))
        fixed = {key: x for key, x in known.items() if is_structure(x)}
        for key, x in known.items():
            changes = (id(container), key) in slots
            stays = not isinstance(x, Value) if changes else key in fixed and now.get(key) is x
            if stays:
                label = key if isinstance(key, (str, int)) else type(key).__name__
                self.item(container, key, x, f"{name}.{label}")
        if isinstance(container, dict) or fixed or not known:
            gained = [key for key in now.keys() - known.keys() if not is_structure(now[key])]
            lost = [key for key in known.keys() - now.keys() if key not in fixed]
            self.sized.append(container)
            self.lengths.append(len(known) + len(gained) - len(lost))
            self.names.append(name)

    def holds(self) -> bool:
        try:
            same = list(map(getitem, self.containers, self.keys)) == self.held
            return same and list(map(len, self.sized)) == self.lengths
        except (LookupError, ValueError):  # gone; or arrays were compared
            return False

    def difference(self) -> str:
        """What has changed, in words; empty where nothing has."""
        for container, key, value, label in zip(
            self.containers, self.keys, self.held, self.labels, strict=True
        ):
            now = dict(entries(container)).get(key, MISSING)
            if isinstance(value, bool) and now != value:
                return f"{label}: {value} -> {now}"
            if now is not value and not isinstance(value, bool):
                return f"{label}: replaced" if now is not MISSING else f"{label}: removed"
        for container, length, name in zip(self.sized, self.lengths, self.names, strict=True):
            if len(container) != length:
                return f"structure of {name}: {length} -> {len(container)} items"
        return ""


def named_values(function: Any) -> dict[str, Any]:
    """The global variables that a function's code names."""
    names: dict[str, Any] = {}
    known, stack = getattr(function, "__globals__", {}), [getattr(function, "__code__", None)]
    while stack:
        code = stack.pop()
        if code is not None:
            names |= {name: known[name] for name in code.co_names if name in known}
            stack += [x for x in code.co_consts if hasattr(x, "co_names")]
    return names
