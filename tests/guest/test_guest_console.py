"""The terminal: what is typed and shown, its size, and that the person gets it back as it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from guestkit.attached import Attached
from guestkit.guest import Guest, Launch
from guestkit.kit import GuestKit
from guestkit.session import PATIENCE


def press_interrupt_three_times(guest: Guest) -> None:
    """As a person does: one key after the other (what is pasted does not count)."""
    for _ in range(3):
        guest.type("\x03")
        time.sleep(0.2)


def test_what_is_typed_goes_to_the_serial_port_until_the_console_is_ready(launch: Launch) -> None:
    guest = launch(arguments=("quiet", "agent=ttyS0", "load=virtio_pci"))
    guest.boot("ttyS0")
    assert guest.run("tty") == "/dev/ttyS0\n"
    guest.agent.start("console_driver bind; agent hvc0")
    on_console = guest.boot("hvc0")
    assert on_console.run("tty") == "/dev/hvc0\n"
    guest.power_off()


def test_every_byte_arrives_in_order(launch: Launch) -> None:
    guest = launch()
    guest.boot()
    text = "".join(chr(33 + (i * 7 + i // 90) % 90) for i in range(3000)).replace("'", "+").replace("\\", "/")
    assert guest.run(f"echo '{text}'") == text + "\n"
    assert guest.run("seq 5000") == "".join(f"{i}\n" for i in range(1, 5001))
    guest.power_off()


def test_the_guest_sees_the_terminals_size_and_its_changes(launch: Launch) -> None:
    guest = launch(columns=91, rows=33)
    guest.boot()
    wait_for_size = "for i in $(seq 100); do [ \"$(stty size)\" = '{}' ] && exit 0; usleep 100000; done; exit 1"
    guest.run(wait_for_size.format("33 91"))
    guest.resize(120, 44)
    guest.signal(signal.SIGWINCH)
    guest.run(wait_for_size.format("44 120"))
    guest.power_off()


def test_a_person_with_a_shell_has_job_control_and_an_interrupt_key(launch: Launch) -> None:
    guest = launch()
    guest.boot()
    guest.agent.start("PS1='% ' setsid -c sh -i; true")
    guest.wait_for("% ")
    # What says that it runs is in the foreground by then, so that the key is for it.
    for number, (key, answer) in enumerate((("\x1a", "Stopped"), ("\x03", "% "))):
        guest.type(f"sh -c 'echo begin $(({number} + 40)); exec sleep 1000'\n")
        guest.wait_for(f"begin {number + 40}")
        guest.type(key)
        guest.wait_for(answer)
    guest.type("echo alive $((6 * 7))\n")
    guest.wait_for("alive 42")
    guest.type("poweroff -f\n")
    assert guest.wait() == 0


def test_three_interrupts_within_a_second_stop_the_guest(launch: Launch) -> None:
    guest = launch()
    guest.boot()
    press_interrupt_three_times(guest)
    assert guest.wait() == -signal.SIGINT
    guest.wait_until_gone(1.0)
    assert guest.current_settings() == guest.settings


def test_three_interrupts_stop_a_guest_before_its_console_is_ready(launch: Launch) -> None:
    guest = launch(arguments=("quiet", "agent=ttyS0", "load=none"))
    guest.boot("ttyS0")
    press_interrupt_three_times(guest)
    assert guest.wait() == -signal.SIGINT
    guest.wait_until_gone(1.0)
    assert guest.current_settings() == guest.settings


def test_the_end_of_input_is_not_the_end_of_the_guest(kit: GuestKit, initrd: Path) -> None:
    command = [sys.executable, "-m", "lguest_mp", f"--initrd={initrd}", "128", str(kit.kernel.image), "quiet"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if line == "agent: ready on hvc0\n":
                launcher.stdin.write("run 1 sleep 2; echo still here; poweroff -f\n")
                launcher.stdin.close()
                break
        rest = launcher.stdout.read()
    assert "still here" in rest
    assert launcher.returncode == 0


def test_who_is_attached_types_to_the_serial_port_until_the_console_is_ready_and_sees_both(launch: Launch) -> None:
    guest = launch(arguments=("quiet", "agent=ttyS0", "load=virtio_pci"))
    guest.boot("ttyS0")
    with Attached(guest.pid) as person:
        person.wait_for(rb"^init: started\r*$[^@]*^agent: ready on ttyS0\r*$")
        person.type("run 1 tty\n")
        person.wait_for(rb"^/dev/ttyS0\r*$[^@]*^@1 0\r*$")
        person.type("run 2 console_driver bind; agent hvc0\n")
        person.wait_for(rb"^agent: ready on hvc0\r*$")
        person.type("run 3 tty\n")
        person.wait_for(rb"^/dev/hvc0\r*$[^@]*^@3 0\r*$")
        for _ in range(3):
            person.type("\x03")
        person.type("run 4 echo alive\n")
        person.wait_for(rb"^alive\r*$")
    with Attached(guest.pid) as another:
        another.wait_for(rb"^alive\r*$")
    assert another.seen.startswith(person.seen[: person.seen.index(b"alive")])
    guest.power_off()


def test_what_nobody_is_in_front_of_can_be_attached_to(kit: GuestKit, initrd: Path) -> None:
    command = [sys.executable, "-m", "lguest_mp", f"--initrd={initrd}", "128", str(kit.kernel.image), "quiet"]
    null = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=null, stdout=null) as launcher, ExitStack() as people:
        people.callback(launcher.kill)
        wait_until(lambda: Path(f"/proc/{launcher.pid}/comm").read_text() == "lguest\n")
        person = people.enter_context(Attached(launcher.pid))
        person.wait_for(rb"^agent: ready on hvc0\r*$")
        person.type("run 1 seq 20000\n")
        person.wait_for(rb"^@1 0\r*$")
        text = person.seen.replace(b"\r", b"")
        assert b"\n".join(b"%d" % number for number in range(1, 20001)) in text
        person.type("run 2 poweroff -f\n")
        assert launcher.wait() == 0


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
