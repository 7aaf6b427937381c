"""Which of a trace's Tensors outlive it, and who holds them. Next: variant.py.

A Tensor that only the traced graph refers to has as many references as the graph has; one more, and
somebody else holds it: a list of losses, a global variable, an attribute of an object that is
neither a Module nor an Optimizer. Nobody would update what it holds at the next call.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from types import CellType, FunctionType
from typing import Any

from needle.autograd import Value


def outliving(created: Iterable[Value], references: Iterable[Any]) -> list[Value]:
    """The values, keys of a dict, that are referred to more often than by that, by their own graph
    and in `references`."""
    probe: Any = Value._new(None, (), (), False)  # this variable stands for the dict
    found = [*created, probe]
    tuples = {id(x.inputs): x.inputs for x in found}
    tuples |= {id(x.operands): x.operands for x in found if x.cached_data is None}
    inside = chain(chain.from_iterable(tuples.values()), (x._grad for x in found), references)
    known = Counter(map(id, inside))
    counts = list(map(sys.getrefcount, found))
    return [x for x, n in zip(found, counts, strict=True) if n > counts[-1] + known[id(x)]]


def name_holder(value: Value, ours: Iterable[Any]) -> str:
    """Who holds a value, in words. ours: objects that do not count."""
    ignored = set(map(id, ours))
    found: list[Any] = [value]
    kinds = ""
    for _ in range(4):
        ignored |= {id(found), *map(id, found)}
        pairs = [(x, y) for x in found for y in gc.get_referrers(x) if id(y) not in ignored]
        for x, holder in pairs:
            name = name_of(x, holder)
            if name:
                return kinds + name
            name = name_local(holder)
            if name:
                return f"{kinds}a {type(holder).__name__}, {name}"
        found = [y for _, y in pairs if isinstance(y, (list, dict, tuple, set))]
        if not found:
            break
        kinds += f"a {type(found[0]).__name__} in "
    return kinds.removesuffix(" in ") or "an object without a name"


def name_of(x: Any, holder: Any) -> str:
    """The attribute, global or enclosing variable by which holder holds x."""
    if isinstance(holder, CellType):
        for closure in gc.get_referrers(holder):
            for function in gc.get_referrers(closure) if isinstance(closure, tuple) else ():
                if isinstance(function, FunctionType) and function.__closure__ is closure:
                    names = zip(closure or (), function.__code__.co_freevars, strict=True)
                    name = next(name for cell, name in names if cell is holder)
                    return f"variable {name!r} around {function.__name__}"
        return ""
    if isinstance(holder, dict):
        key = next((key for key, each in holder.items() if each is x), None)
        if "__builtins__" in holder:
            return f"global variable {key!r} of {holder.get('__name__')}"
        owners = gc.get_referrers(holder)
        owner = next((y for y in owners if getattr(y, "__dict__", None) is holder), None)
        return "" if owner is None else f"attribute {key!r} of {type(owner).__name__}"
    if hasattr(holder, "__dict__") and not isinstance(holder, FunctionType):
        key = next((key for key, each in vars(holder).items() if each is x), None)
        return "" if key is None else f"attribute {key!r} of {type(holder).__name__}"
    return ""


def name_local(holder: Any) -> str:
    """The variable of a running function that is the holder."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("needle"):
            for name, x in frame.f_locals.items():
                if x is holder:
                    return f"variable {name!r} of {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
