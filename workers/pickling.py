"""dill, and what it lacks: enums that no import finds travel by value (both processes).

dill pickles a class of the user's file by value, but its way of making the class again fails on an enum's bookkeeping
(dill 0.4 raises, or the worker does). Here an enum is made anew from its members, and gets its methods afterwards,
since a method may well refer to the enum.
"""

from __future__ import annotations

import enum
import importlib
import io
from operator import attrgetter
from typing import Any

import dill

# What EnumType keeps in a class for itself, and makes again.
_BOOKKEEPING = frozenset(
    {
        "_generate_next_value_",
        "_member_names_",
        "_member_map_",
        "_member_type_",
        "_value2member_map_",
        "_hashable_values_",
        "_unhashable_values_",
        "_unhashable_values_map_",
        "_value_repr_",
        "_use_args_",
        "_new_member_",
        "_sunder_",
        "_boundary_",
        "_flag_mask_",
        "_singles_mask_",
        "_all_bits_",
        "_inverted_",
        "__new__",
        "__new_member__",
        "__dict__",
        "__weakref__",
        "__module__",
        "__qualname__",
        "__reduce_ex__",
    }
)


def _make_enum(name: str, qualname: str, module: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
    metaclass: Any = type(bases[-1])
    namespace = metaclass.__prepare__(name, bases)
    namespace["__module__"] = module
    namespace["__qualname__"] = qualname
    for member, value in members.items():
        namespace[member] = value
    return metaclass(name, bases, namespace)


def _dress_enum(made: Any, state: tuple[dict[str, Any], dict[str, dict[str, Any]]]) -> None:
    attributes, of_members = state
    for name, value in attributes.items():
        setattr(made, name, value)
    for member, values in of_members.items():
        made[member].__dict__.update(values)


class _Pickler(dill.Pickler):  # type: ignore[misc]
    dispatch = type(dill.Pickler.dispatch)(dill.Pickler.dispatch)


def _save_enum(pickler: Any, obj: Any) -> None:
    if _is_importable(obj):
        pickler.save_global(obj, name=obj.__qualname__)
        return
    members = {name: member.value for name, member in obj.__members__.items()}
    attributes = {name: value for name, value in vars(obj).items() if name not in _BOOKKEEPING and name not in members}
    of_members = {
        member.name: {name: value for name, value in vars(member).items() if not name.startswith("_")} for member in obj
    }
    pickler.save_reduce(
        _make_enum,
        (obj.__name__, obj.__qualname__, obj.__module__, obj.__bases__, members),
        (attributes, of_members),
        state_setter=_dress_enum,
        obj=obj,
    )


def _is_importable(obj: Any) -> bool:
    """Whether the worker finds this very class by its name."""
    if obj.__module__ == "__main__":
        return False
    try:
        found = attrgetter(obj.__qualname__)(importlib.import_module(obj.__module__))
    except (ImportError, AttributeError):
        return False
    return found is obj


_Pickler.dispatch[enum.EnumMeta] = _save_enum


def dumps(value: Any) -> bytes:
    """Pickle by value what can not be imported, with the globals that it uses."""
    buffer = io.BytesIO()
    _Pickler(buffer, dill.DEFAULT_PROTOCOL, recurse=True).dump(value)
    return buffer.getvalue()


def loads(pickled: bytes) -> Any:
    """Undo `dumps`."""
    return dill.loads(pickled)
