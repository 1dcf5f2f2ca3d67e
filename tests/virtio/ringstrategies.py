"""What hostile drivers write: anything at all, of which much is nearly right (strategies for hypothesis)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import strategies as st
from mockdriver import INDIRECT, NEXT, WRITE, Descriptor, MockDriver

SIZE = 8
SECTORS = 64
#: Small enough to compare before and after, and to be hit.
MEMORY = 16 * 4096
#: Where indirect tables are, as far as they are anywhere sensible.
TABLES = (0x2000, 0x2100, 0x2200)
BUFFERS = 0x3000

addresses = st.one_of(
    st.integers(BUFFERS, MEMORY - 1),
    st.sampled_from(TABLES),
    st.integers(0, MEMORY),
    st.integers(MEMORY - 20, MEMORY + 20),
    st.integers((1 << 64) - 40, (1 << 64) - 1),
    st.sampled_from([3 << 30, (3 << 30) - 1, 4 << 30, 1 << 32, (1 << 32) - 1, 1 << 63]),
)
lengths = st.one_of(
    st.integers(0, 64),
    st.sampled_from([1, 16, 32, 48, 512, 513, 1024]),
    st.sampled_from([MEMORY, MEMORY - BUFFERS, (1 << 32) - 1, (1 << 32) - 16, 1 << 31]),
)
flags = st.one_of(
    st.sampled_from([0, NEXT, WRITE, NEXT | WRITE]),
    st.sampled_from([0, NEXT, WRITE, NEXT | WRITE]),
    st.sampled_from([INDIRECT, INDIRECT | WRITE, INDIRECT | NEXT]),
    st.integers(0, 0xFFFF),
)
nexts = st.one_of(st.integers(0, SIZE + 1), st.integers(0, 0xFFFF))
wild_descriptors = st.builds(Descriptor, addresses, lengths, flags, nexts)
#: A descriptor with nothing wrong but, perhaps, its place.
mild_descriptors = st.builds(
    Descriptor,
    st.integers(BUFFERS, MEMORY - 600),
    st.sampled_from([0, 1, 16, 512]),
    st.sampled_from([0, NEXT, NEXT, WRITE, NEXT | WRITE]),
    st.integers(0, SIZE - 1),
)
indirect_descriptors = st.builds(
    Descriptor, st.sampled_from(TABLES), st.sampled_from([16, 32, 48, 128, 144]), st.just(INDIRECT), st.just(0)
)
descriptors = st.one_of(mild_descriptors, mild_descriptors, indirect_descriptors, wild_descriptors)


@st.composite
def straight_tables(draw: st.DrawFn) -> list[Descriptor]:
    """What a good driver writes, but for the one field that may be changed."""
    readable = draw(st.integers(0, 4))
    writable = draw(st.integers(0 if readable else 1, 4))
    table = [
        Descriptor(
            BUFFERS + 600 * index, draw(lengths), (NEXT if index + 1 < readable + writable else 0) | how, index + 1
        )
        for index, how in enumerate([0] * readable + [WRITE] * writable)
    ]
    index = draw(st.integers(0, len(table) - 1))
    match draw(st.sampled_from(["good", "descriptor", "next", "flags"])):
        case "descriptor":
            table[index] = draw(descriptors)
        case "next":
            table[index] = replace(table[index], next=draw(nexts))
        case "flags":
            table[index] = replace(table[index], flags=draw(flags))
    return table


tables = st.lists(descriptors, min_size=SIZE, max_size=SIZE)
indirect_tables = st.one_of(straight_tables(), st.lists(descriptors, min_size=1, max_size=SIZE + 2))
heads = st.lists(st.one_of(st.integers(0, SIZE - 1), st.integers(0, 0xFFFF)), min_size=SIZE, max_size=SIZE)


@st.composite
def rings(draw: st.DrawFn) -> Callable[[MockDriver], None]:
    """Everything that a driver writes; the result writes it."""
    table = draw(tables)
    inner = [draw(indirect_tables) for _ in TABLES]
    ring = draw(heads)
    index = draw(st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)))
    data = draw(st.binary(max_size=64))

    def write(driver: MockDriver) -> None:
        driver.memory.write(BUFFERS, data * (4096 // len(data)) if data else bytes(4096))
        for number, descriptor in enumerate(table):
            driver.set_descriptor(number, descriptor)
        for address, entries in zip(TABLES, inner, strict=True):
            driver.memory.write(address, b"".join(entry.pack() for entry in entries))
        for position, head in enumerate(ring):
            driver.set_ring(position, head)
        driver.set_available_index(index)

    return write
