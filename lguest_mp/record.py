"""What is made of named fields: records, which change, and values, which do not.

They are declared, made and checked by mypy as dataclasses are (PEP 681)::

    class Forward(Value):
        protocol: str
        host_port: int
        guest_port: int = 22

but not made by :mod:`dataclasses`, which writes source text for each class and has Python compile it. A launch makes
some eighty classes of this kind before the guest's first instruction, and that was a quarter of its time. What is made
for each of very many events is a NamedTuple (``machine/exits.py``), since these are made and hashed in C.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, dataclass_transform

#: Also of those whose class lets nobody else do so.
_set = object.__setattr__


class _Fields:
    """Something with the fields that its class declares, given by position or by name.

    A field's default is the same object for all, so it had better be immutable.
    """

    #: The fields, in order.
    __match_args__: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        names = cls.__annotations__
        cls.__match_args__ = (*cls.__match_args__, *names)  # type: ignore[misc]  # mypy wants it in the class's body
        cls._defaults = {**cls._defaults, **{name: vars(cls)[name] for name in names if name in vars(cls)}}

    def __init__(self, *values: Any, **named: Any) -> None:
        names = self.__match_args__
        given = dict(zip(names, values, strict=False))
        fields = {**self._defaults, **given, **named}
        if fields.keys() != set(names) or len(given) != len(values) or given.keys() & named.keys():
            raise TypeError(f"{type(self).__name__} is made of these fields, each once: {', '.join(names) or 'none'}")
        for name in names:
            _set(self, name, fields[name])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclass_transform(eq_default=False)
class Record(_Fields):
    """Fields that change; equal to itself only."""


@dataclass_transform(frozen_default=True)
class Value(_Fields):
    """Fields that stay as they were made; equal to others of its class with equal ones."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} of a {type(self).__name__} stays as it is")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} of a {type(self).__name__} stays as it is")

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def replace(self, **changes: Any) -> Self:
        """The same but for these fields."""
        return type(self)(**{**vars(self), **changes})
