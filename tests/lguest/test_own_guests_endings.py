"""How guests of our own end: as they want, as their host wants, as the person in front of them wants."""

from __future__ import annotations

import signal
import time

import pytest
from ownguests import GUESTS, LAUNCHER, command, lines_of, play, run

from guestkit.session import Session


def test_a_guest_that_switches_itself_off() -> None:
    assert lines_of("endings", "off") == []


@pytest.mark.parametrize(
    ("scene", "reason"),
    [
        ("crashes", "CRASH: the sky is falling"),
        ("long_reason", "CRASH: " + "x" * 128),
        ("reason_nowhere", "bad read address 0x30000000 len 128"),
        ("bad_hypercall", "Bad hypercall 3"),
        ("large_hypercall", "Bad hypercall 2147483647"),
        ("bad_hypercall_in_ring", "Bad hypercall 12"),
        ("second_init", "already have lguest_data"),
        ("tables_nowhere", "bad read address 0x30000000 len 4096"),
        ("idt_entry_far_away", "Setting idt entry 4000"),
        ("task_gate", "bad IDT type 5"),
        ("gdt_entry_far_away", "too many gdt entries 32"),
        ("stack_of_ring_0", f"bad stack segment {0x68}"),
        ("stack_of_three_pages", "bad stack pages 3"),
        ("tls_nowhere", "bad read address 0x30000000 len 24"),
        ("wild_load", "bad page table entry"),
        ("wild_jump", "bad page table entry"),
        ("bad_entry", "bad page table entry"),
        ("bad_directory_entry", "bad page directory entry"),
        ("large_page", "bad page directory entry"),
        ("no_scene_of_ours", "CRASH: there is no such scene"),
    ],
)
def test_a_guest_that_asks_for_nonsense_dies_with_the_reason(scene: str, reason: str) -> None:
    ended = play("endings", scene)
    assert (ended.status, ended.lines) == (3, [])
    assert ended.said == [f"lguest: the guest died: {reason}"]


@pytest.mark.parametrize(
    ("scene", "reason"),
    [
        ("no_gate", "unhandled trap 6 at 0x"),
        ("no_stack", "bad stack page 0x8ffffffc"),
        ("stack_faults", "Bad address 0x40000f"),
        ("code_vanishes", "Bad address 0x10"),
    ],
)
def test_a_guest_whose_trap_cannot_be_delivered_dies_with_the_reason(scene: str, reason: str) -> None:
    ended = play("endings", scene)
    assert (ended.status, ended.lines) == (3, [])
    (line,) = ended.said
    assert line.startswith(f"lguest: the guest died: {reason}")


def test_a_guest_that_does_not_say_who_it_is() -> None:
    ended = run([*LAUNCHER, "4", str(GUESTS / "early.elf")])
    assert (ended.status, ended.lines) == (3, [])
    assert ended.said == ["lguest: the guest died: hypercall 17 before INIT"]


@pytest.mark.parametrize(("scene", "last_words"), [("sleeps", "asleep"), ("loops", "looping")])
def test_a_guest_that_does_not_end_is_stopped_by_a_signal(scene: str, last_words: str) -> None:
    with Session(command("endings", scene)) as session:
        session.wait_for(last_words)
        session.signal(signal.SIGTERM)
        assert session.wait() == -signal.SIGTERM
        session.wait_until_gone()
        assert session.current_settings() == session.settings


@pytest.mark.parametrize(("scene", "last_words"), [("sleeps", "asleep"), ("loops", "looping")])
def test_a_guest_that_does_not_end_is_stopped_by_three_keys(scene: str, last_words: str) -> None:
    with Session(command("endings", scene)) as session:
        session.wait_for(last_words)
        for _ in range(3):  # one after the other, as a person does it
            session.type("\x03")
            time.sleep(0.2)
        assert session.wait() == -signal.SIGINT
        session.wait_until_gone()
        assert session.current_settings() == session.settings
