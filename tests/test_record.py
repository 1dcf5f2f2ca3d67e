"""Records and values: what a class of them is told by its fields alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lguest_mp.record import Record, Value


class Point(Value):
    x: int
    y: int
    name: str = ""

    @property
    def is_named(self) -> bool:
        return bool(self.name)


class Place(Value):
    x: int
    y: int
    name: str = ""


class Nothing(Value):
    """Has no fields."""


class Counter(Record):
    limit: int
    count: int = 0


class Clock(Counter):
    unit: str = "s"


@pytest.mark.parametrize("point", [Point(1, 2), Point(1, y=2), Point(y=2, x=1), Point(1, 2, ""), Point(1, 2, name="")])
def test_fields_are_given_by_position_or_by_name_and_have_defaults(point: Point) -> None:
    assert (point.x, point.y, point.name) == (1, 2, "")
    assert list(vars(point)) == ["x", "y", "name"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Point(1),  # type: ignore[call-arg]
        lambda: Point(1, name="y is missing"),  # type: ignore[call-arg]
        lambda: Point(1, 2, "", 4),  # type: ignore[call-arg]
        lambda: Point(1, 2, z=3),  # type: ignore[call-arg]
        lambda: Point(1, z=2),  # type: ignore[call-arg]
        lambda: Point(1, 2, x=1),  # type: ignore[misc]
        lambda: Nothing(1),
        lambda: Point(1, 2).replace(z=3),
    ],
)
def test_other_fields_are_none(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"is made of these fields, each once: (x, y, name|none)$"):
        make()


def test_a_value_equals_those_of_its_class_with_equal_fields() -> None:
    assert Point(1, 2) == Point(1, 2)
    assert hash(Point(1, 2)) == hash(Point(y=2, x=1))
    assert Point(1, 2) != Point(1, 3)
    assert Point(1, 2) != Place(1, 2)
    assert Point(1, 2) != (1, 2, "")
    assert {Point(1, 2), Point(1, 2), Place(1, 2)} == {Place(1, 2), Point(1, 2)}


def test_a_value_stays_as_it_is() -> None:
    point = Point(1, 2)
    with pytest.raises(AttributeError, match="x of a Point stays as it is"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="y of a Point stays as it is"):
        del point.y
    assert point == Point(1, 2)


def test_another_value_differs_in_what_is_replaced() -> None:
    point = Point(1, 2)
    assert point.replace(name="home") == Point(1, 2, "home")
    assert point.replace(name="home").is_named
    assert not point.is_named


def test_a_value_without_fields_is_true() -> None:
    assert Nothing()
    assert Nothing() == Nothing()
    assert vars(Nothing()) == {}


def test_a_record_changes_and_equals_itself_only() -> None:
    one, other = Counter(5), Counter(5)
    one.count += 1
    assert (one.limit, one.count, other.count) == (5, 1, 0)
    assert Counter(5) != Counter(5)
    assert len({one, other, one}) == 2


def test_fields_are_inherited() -> None:
    clock = Clock(5, unit="ms")
    assert list(vars(clock).items()) == [("limit", 5), ("count", 0), ("unit", "ms")]
    assert list(vars(Counter(5))) == ["limit", "count"]


@pytest.mark.parametrize(("some", "text"), [(Point(1, 2, "a"), "Point(x=1, y=2, name='a')"), (Nothing(), "Nothing()")])
def test_it_is_shown_as_it_is_made(some: Value, text: str) -> None:
    assert repr(some) == text


def test_fields_are_matched_by_position() -> None:
    match Point(1, 2):
        case Point(x, 2, name):
            assert (x, name) == (1, "")
        case _:
            pytest.fail("a point is none")
