"""A hostile program in a guest takes devices from their drivers and misuses them; all else goes on as if nothing was.

The program is ``perl/hostile.pl``. While it has one device, the guest works with all others and looks at what comes; a
process that ended would have another number or none. Afterwards the device's own driver takes it again, and it works.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import cycle

from guestkit.disk import MIB, make_sparse
from guestkit.guest import Guest, excerpt
from guestkit.scripts import command
from guestkit.soak.plan import Plan, Report, Room

_MEMORY = 256
#: What the program needs of the guest's memory (hostile.pl): the kernel leaves it alone.
_RESERVED = f"memmap=4M${_MEMORY - 4}M"
#: How long it has a device before the next one's turn, in seconds.
_TURN = 30.0
_CONTENT_SIZE = 4 * MIB
#: What the program says at its end, and the guest after it.
_DONE = re.compile(r"(\d+) acts, (\d+) handshakes, (\d+) notifications, (\d+) used\s+rounds (\d+)")
#: What the launcher says when a driver broke the standard, and when a worker died, which it need not.
_STOPPED = re.compile(r"lguest: (\w+/\w+): .*the device needs a reset")
_DIED = re.compile(r"lguest: (\w+/\w+) (?:was killed by \w+|exited with status \d+)")


@dataclass(frozen=True)
class _Prey:
    """A device: its slot, its name, and the shell command that succeeds if it works (with its driver)."""

    slot: int
    name: str
    works: str


def _preys(content: bytes) -> list[_Prey]:
    """All of them, as the command line of :func:`hostile` has it."""
    digest = hashlib.sha256(content).hexdigest()
    ping = "ip link set eth0 up && (ip addr add 10.0.2.15/24 dev eth0 2>/dev/null; ping -q -A -c 3 10.0.2.2 >/dev/null)"
    return [
        _Prey(1, "console", "console_driver bind && echo shown >/dev/hvc0 && console_driver unbind"),
        _Prey(
            2, "block0", f"[ $(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum | cut -c -64) = {digest} ]"
        ),
        _Prey(3, "block1", "dd if=/dev/zero of=/dev/vdb bs=64k count=16 oflag=direct conv=fsync 2>/dev/null"),
        _Prey(4, "net0", ping),
        _Prey(5, "rng0", "[ $(head -c 3000 /dev/hwrng | wc -c) = 3000 ]"),
    ]


def hostile(room: Room, plan: Plan, turn: float = _TURN) -> Report:
    """Each device in turns, but one disk, whose every byte is looked at all the time."""
    content = random.Random(plan.seed).randbytes(_CONTENT_SIZE)
    good = room.directory / "good.img"
    good.write_bytes(content)
    other = make_sparse(room.directory / "other.img", _CONTENT_SIZE)
    options = (f"--block={good}", f"--block={other}", "--net=user", "--rng")
    preys = _preys(content)
    report = Report()
    done: Counter[str] = Counter()
    with room.guest(
        plan,
        *options,
        memory=_MEMORY,
        arguments=("quiet", "agent=ttyS0", _RESERVED),
        variables={"PATH": room.kit.slirp.search_path()},
    ) as guest:
        guest.boot("ttyS0")
        # A vector that nobody has makes the kernel print in the midst of what the agent says.
        guest.run("modprobe virtio_net; echo 0 >/proc/sys/kernel/printk")
        turns = cycle(prey for prey in preys if prey.name != "block0")
        for number in plan.rounds():
            prey = next(turns)
            others = [each for each in preys if each is not prey]
            done.update(_let_loose(guest, prey, others, plan.seed + number, turn))
            # With its own driver again, it works as before.
            guest.run(prey.works)
        guest.power_off()
        said = guest.errors
    report["what the program did"] = dict(done)
    report["devices stopped for it"] = dict(Counter(_STOPPED.findall(said)))
    report["workers that died"] = dict(Counter(_DIED.findall(said)))
    return report


def _let_loose(guest: Guest, prey: _Prey, others: list[_Prey], seed: int, seconds: float) -> dict[str, int]:
    """The program has ``prey`` for so long, while the guest works with ``others``; how often it did what."""
    before = _outside(guest, prey)
    works = " && ".join(f"{{ {other.works}; }}" for other in others if other.name != "console")
    loose = command("hostile", prey.slot, seed, seconds, _MEMORY)
    # All in one command: while the program has the console, nothing that is typed goes to the agent.
    answer = guest.run(
        f"{loose} >/tmp/hostile 2>&1 & enemy=$!; rounds=0; "
        f"while kill -0 $enemy 2>/dev/null; do {works} || {{ echo failed; exit 1; }}; rounds=$((rounds + 1)); done; "
        "wait $enemy; status=$?; console_driver unbind; cat /tmp/hostile; echo rounds $rounds; exit $status",
        seconds=seconds * 10 + 120,
    )
    after = _outside(guest, prey)
    assert after == before, f"processes came or went while {prey.name} was misused with seed {seed}: {before}, {after}"
    # Whatever a misused console has shown may stand before it.
    match = _DONE.search(answer)
    assert match, f"the program said: {excerpt(answer)}"
    acts, handshakes, notifications, used, rounds = map(int, match.groups())
    assert min(acts, used, rounds) > 0, f"neither it nor the guest got far: {match[0]}"
    return {
        "acts": acts,
        "handshakes": handshakes,
        "notifications": notifications,
        "buffers used": used,
        "checks": rounds,
    }


def _outside(guest: Guest, prey: _Prey) -> dict[str, int]:
    """The guest's processes except those that serve the queues of ``prey``."""
    members = guest.members()
    return {name: pid for name, pid in members.items() if not (name.startswith(f"{prey.name}/") and name.endswith("q"))}
