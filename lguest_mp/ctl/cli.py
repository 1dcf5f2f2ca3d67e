"""The command line of ``lguestctl``.

A guest's NAME may be left out where just one guest runs, so that it is clear which is meant; not so with ``stop`` and
``reboot``, where the only guest that runs may not be the one that was thought of.
"""

from __future__ import annotations

import argparse
import os
import pwd
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lguest_mp import __version__, runtime
from lguest_mp.ctl.client import GuestGone, Place
from lguest_mp.ctl.completion import SCRIPTS, Completer, Grammar
from lguest_mp.ctl.tables import printable
from lguest_mp.errors import LguestError
from lguest_mp.jail import User
from lguest_mp.record import Value
from lguest_mp.supervisor.ending import die_by

_DESCRIPTION = "Looks after guests that lguest runs. A guest's NAME may be left out where just one guest runs."
_EPILOG = """\
Guests are those of the user who asks. Root may look after another user's with --user.

Exit status: 0 done, 1 lguestctl could not do it (one line says why), 2 usage.
"""
_HIGHEST_COUNT = 1_000_000


class UsageError(Exception):
    """The command line is none; its text says where."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help tells more")


class Option(Value):
    """An option of a command: its spellings, and what argparse is told of it."""

    names: tuple[str, ...]
    about: dict[str, Any]

    @property
    def is_valued(self) -> bool:
        """Whether a word follows it."""
        return self.about.get("action") != "store_true"


class Command(Value):
    """A command: its positional ``arguments``, and the function that does it, given where guests are."""

    name: str
    summary: str
    run: Callable[[Place, argparse.Namespace], None]
    arguments: tuple[str, ...] = ()
    needs_name: bool = True
    options: tuple[Option, ...] = ()


def _flag(*names: str, help: str) -> Option:
    return Option(names, {"action": "store_true", "help": help})


def _valued(*names: str, **about: Any) -> Option:
    return Option(names, about)


# ---- What the commands do; modules that a command alone needs are imported by it ----


def _list(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import listing  # noqa: PLC0415

    _print(listing.list_guests(place))


def _ps(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import listing  # noqa: PLC0415

    _print(listing.list_processes(place, place.choose(given.name), more=given.long))


def _top(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import top  # noqa: PLC0415

    top.show(place, given.name, top.Order(given.sort[0]), given.delay, given.count)


def _stats(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import stats  # noqa: PLC0415

    if given.json and given.prometheus:
        raise UsageError("--json and --prometheus exclude each other; give one of them")
    if given.name is not None:
        place.connect(given.name).channel.close()  # an error, if there is none
    taken = stats.take(place.describe_all(place.names() if given.name is None else [given.name]))
    sys.stdout.write(stats.as_prometheus(taken) if given.prometheus else stats.as_json(taken))


def _log(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import log  # noqa: PLC0415

    try:
        _print(log.lines(place, place.choose(given.name), given.source, given.lines, follow=given.follow))
    except GuestGone as gone:
        if not given.follow:
            raise
        _say(str(gone))


def _console(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import console  # noqa: PLC0415

    escape = console.parse_escape(given.escape)
    _say(console.attach(place, place.choose(given.name), escape))


def _jail(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import listing  # noqa: PLC0415

    _print(listing.list_jail(place, place.choose(given.name)))


def _stop(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import orders  # noqa: PLC0415

    orders.stop(place, given.name, wait=not given.no_wait)


def _reboot(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import orders  # noqa: PLC0415

    orders.reboot(place, given.name)


def _restart(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import orders  # noqa: PLC0415

    orders.restart(place, place.choose(given.name), given.device)


def _reset(place: Place, given: argparse.Namespace) -> None:
    from lguest_mp.ctl import orders  # noqa: PLC0415

    orders.reset(place, place.choose(given.name), given.device)


def _completion(place: Place, given: argparse.Namespace) -> None:
    sys.stdout.write(SCRIPTS[given.shell])


# ---- The values of options ----


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text[:9]) <= _HIGHEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {_HIGHEST_COUNT}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no time from 0.1 to 86400 seconds")
    return seconds


# ---- The commands ----

_GENERAL = (
    _valued("--user", metavar="USER", help="whose guests (as root); otherwise your own"),
    _valued("--runtime-dir", metavar="DIR", type=Path, help="where they are: what is $XDG_RUNTIME_DIR/lguest for you"),
)
COMMANDS = (
    Command("list", "the guests that run", _list),
    Command(
        *("ps", "a guest's processes: what they serve, what they use, how often they were replaced", _ps),
        *(("NAME",), False),
        (_flag("-l", "--long", help="more columns: device, queue, policy, how the last predecessor ended"),),
    ),
    Command(
        *("top", "the same, live, the busiest first; of all guests if none is named", _top),
        *(("NAME",), False),
        (
            _valued("-d", "--delay", type=_seconds, default=1.0, metavar="SECONDS", help="between two looks (1)"),
            _valued("-n", "--count", type=_count, metavar="N", help="look so often, then end"),
            _valued(
                *("-s", "--sort"),
                choices=("cpu", "memory", "requests", "bytes"),
                default="cpu",
                help="what comes first (cpu); on a terminal the keys c, m, r, b change it",
            ),
        ),
    ),
    Command(
        *("stats", "guests and processes in numbers, for programs; all guests if none is named", _stats),
        *(("NAME",), False),
        (
            _flag("--json", help="as JSON (the default)"),
            _flag("--prometheus", help="in Prometheus' text format"),
        ),
    ),
    Command(
        *("log", "what the launcher said", _log),
        *(("NAME",), False),
        (
            _flag("-f", "--follow", help="and what it says from now on, until the guest ends"),
            _valued("-n", "--lines", type=_count, default=100, metavar="N", help="the last N lines (100)"),
            _valued("--source", metavar="PROCESS", help="of one process only; supervisor is the launcher itself"),
        ),
    ),
    Command(
        *("console", "the guest's console, on this terminal", _console),
        *(("NAME",), False),
        (_valued("--escape", default="^]", metavar="KEY", help="what detaches (^], which is Ctrl-]); or none"),),
    ),
    Command("jail", "what a guest's processes may not do", _jail, ("NAME",), needs_name=False),
    Command(
        *("stop", "end a guest, as if by pulling the plug, and wait until it is gone", _stop, ("NAME",), True),
        (_flag("--no-wait", help="do not wait"),),
    ),
    Command("reboot", "have a guest start afresh, whatever it is doing", _reboot, ("NAME",)),
    Command(
        *(
            "restart",
            "replace the workers of a device (block0), or one (net0/receiveq); the guest sees a pause",
            _restart,
        ),
        *(("NAME", "DEVICE"), False),
    ),
    Command(
        *("reset", "have a device fail, so that the guest's driver resets it", _reset),
        *(("NAME", "DEVICE"), False),
    ),
    Command("completion", f"what to source in your shell: {', '.join(SCRIPTS)}", _completion, ("SHELL",)),
)


def _parser() -> _Parser:
    parser = _Parser(
        prog="lguestctl",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lguestctl {__version__}")
    for option in _GENERAL:
        parser.add_argument(*option.names, **option.about)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        one = commands.add_parser(
            command.name, help=command.summary, description=_sentence(command.summary), allow_abbrev=False
        )
        for argument in command.arguments:
            optional = argument == "NAME" and not command.needs_name
            choices = tuple(SCRIPTS) if argument == "SHELL" else None
            metavar = None if choices else argument
            one.add_argument(argument.lower(), metavar=metavar, nargs="?" if optional else None, choices=choices)
        for option in command.options:
            one.add_argument(*option.names, **option.about)
    return parser


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _completer(place: Place) -> Completer:
    return Completer(
        {each.name: _grammar(each) for each in COMMANDS}, _grammar(Command("", "", _list, (), True, _GENERAL)), place
    )


def _grammar(command: Command) -> Grammar:
    names = tuple(name for option in command.options for name in option.names)
    valued = tuple(name for option in command.options if option.is_valued for name in option.names)
    return Grammar(command.arguments, not command.needs_name, (*names, "--help"), valued)


# ---- The program ----


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:2] == ["complete", "--"]:
            _complete(words[2:])
            return 0
        given = _parser().parse_args(words)
        command = next(each for each in COMMANDS if each.name == given.command)
        command.run(_place(given.user, given.runtime_dir), given)
        sys.stdout.flush()
    except UsageError as error:
        _say(str(error))
        return 2
    except LguestError as error:
        _say(str(error))
        return 1
    except BrokenPipeError:  # whoever read it has seen enough
        die_by(signal.SIGPIPE)
    except KeyboardInterrupt:
        die_by(signal.SIGINT)
    return 0


def _complete(words: list[str]) -> None:
    """Prints what the last word could become. The general options count, so that they lead to the right guests."""
    general = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in _GENERAL:
        general.add_argument(*option.names, **option.about)
    try:
        given, _ = general.parse_known_args(words[:-1])
        place = _place(given.user, given.runtime_dir)
    except (argparse.ArgumentError, LguestError):
        return
    _print(_completer(place).complete(words))


def _place(username: str | None, directory: Path | None) -> Place:
    """Where guests are looked for. LguestError: we may not look there."""
    if username is not None and directory is not None:
        raise LguestError("--user and --runtime-dir exclude each other; give one of them")
    if directory is not None:
        return Place(directory, _owner(directory))
    if username is not None:
        user = _user(username)
        return Place(runtime.existing(user), user)
    return Place(runtime.existing())


def _user(name: str) -> User:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise LguestError(f"--user={name}: this host has no such user") from None
    if os.geteuid() not in {0, entry.pw_uid}:
        raise LguestError(f"--user={name}: only root may look after another user's guests")
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _owner(directory: Path) -> User:
    """Whose directory it is: as that user it is looked into."""
    try:
        found = directory.stat()
    except OSError as error:
        raise LguestError(f"--runtime-dir={directory}: {error.strerror}") from error
    if os.geteuid() not in {0, found.st_uid}:
        raise LguestError(f"--runtime-dir={directory}: it is another user's, and only root may look there")
    try:
        name = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        name = str(found.st_uid)
    return User(name, found.st_uid, found.st_gid)


def _print(lines: Iterable[str]) -> None:
    """Prints lines as they come."""
    for line in lines:
        print(line, flush=True)


def _say(text: str) -> None:
    print(f"lguestctl: {printable(text)}", file=sys.stderr, flush=True)
