"""Shell completion: what could stand where the cursor is.

The scripts for the shells are short: they hand the words before the cursor to ``lguestctl complete`` and offer what it
prints. So every shell completes the same, and guests and devices as they are at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from lguest_mp.ctl.client import Description
from lguest_mp.errors import LguestError
from lguest_mp.record import Value

if TYPE_CHECKING:
    from lguest_mp.ctl.client import Place

BASH = """\
_lguestctl() {
    local IFS=$'\\n'
    COMPREPLY=($(lguestctl complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -F _lguestctl lguestctl
"""
ZSH = """\
#compdef lguestctl
_lguestctl() {
    local -a found
    found=("${(@f)$(lguestctl complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    (( ${#found[1]} )) && compadd -Q -- "${found[@]}"
}
if [ "$funcstack[1]" = _lguestctl ]; then
    _lguestctl "$@"
else
    compdef _lguestctl lguestctl
fi
"""
FISH = """\
function __lguestctl_complete
    set -l words (commandline -opc) (commandline -ct)
    lguestctl complete -- $words[2..-1] 2>/dev/null
end
complete -c lguestctl -f -a '(__lguestctl_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
#: How long (seconds) a guest that does not answer keeps a shell waiting.
PATIENCE = 0.5


class Grammar(Value):
    """A command: what its positional arguments are (``NAME``, ``DEVICE``, ``SHELL``), and its options.

    ``optional_name``: the first of them, NAME, may be left out. Options that take a value are in ``valued``.
    """

    arguments: tuple[str, ...]
    optional_name: bool
    options: tuple[str, ...]
    valued: tuple[str, ...] = ()


class Completer(Value):
    """Completes for the ``commands``; the ``general`` options stand before them, and ``place`` is where guests are."""

    commands: dict[str, Grammar]
    general: Grammar
    place: Place

    def complete(self, words: Sequence[str]) -> list[str]:
        """What the last of the words, which may be empty, could become."""
        *before, last = words or [""]
        return sorted(found for found in set(self._candidates(before, last)) if found.startswith(last))

    def _candidates(self, before: Sequence[str], last: str) -> Iterable[str]:
        words = _after_options(before, self.general.valued)
        if words is None:
            return ()
        if not words:
            return self.general.options if last.startswith("-") else self.commands
        command = self.commands.get(words[0])
        return () if command is None else self._of_command(command, words[1:], last)

    def _of_command(self, command: Grammar, before: Sequence[str], last: str) -> Iterable[str]:
        arguments = _without_options(before, command.valued)
        if arguments is None:
            names = _without_options(before[:-1], command.valued)
            return self._sources(names) if names is not None and before[-1] == "--source" else ()
        if last.startswith("-"):
            return command.options
        return self._arguments(command, arguments)

    def _arguments(self, command: Grammar, before: Sequence[str]) -> Iterable[str]:
        """What the next positional argument could be."""
        found: list[str] = []
        known: dict[str, Callable[[], Iterable[str]]] = {
            "NAME": self._names,
            "DEVICE": lambda: self._devices(before[0] if before else None),
            "SHELL": lambda: SCRIPTS,
        }
        if len(before) < len(command.arguments):
            found += known[command.arguments[len(before)]]()
        if command.optional_name and len(before) + 1 < len(command.arguments):
            found += known[command.arguments[len(before) + 1]]()
        return found

    def _names(self) -> Iterable[str]:
        try:
            return self.place.names()
        except LguestError:
            return ()

    def _devices(self, name: str | None) -> Iterable[str]:
        """The devices and the workers of a guest, or of the only one."""
        for description in self._described(name):
            for each in description.processes:
                if each.device is not None and each.queue is not None:
                    yield from (each.device, each.name)

    def _sources(self, names: Sequence[str]) -> Iterable[str]:
        """The processes of a guest, or of the only one."""
        name = names[0] if names else None
        return [each.name for description in self._described(name) for each in description.processes]

    def _described(self, name: str | None) -> Iterable[Description]:
        try:
            found = self.place.describe_all([self.place.choose(name)], PATIENCE)
        except LguestError:
            return ()
        return [each for each in found.values() if isinstance(each, Description)]


def _after_options(words: Sequence[str], valued: Sequence[str]) -> Sequence[str] | None:
    """The words from the first that is no option; None: the next one is an option's value."""
    rest = list(words)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in valued:
            if not rest:
                return None
            rest.pop(0)
    return rest


def _without_options(words: Sequence[str], valued: Sequence[str]) -> list[str] | None:
    """The words that are no options; None: the next one is an option's value."""
    rest: list[str] = []
    is_value = False
    for word in words:
        if is_value:
            is_value = False
        elif word.startswith("-"):
            is_value = word in valued
        else:
            rest.append(word)
    return None if is_value else rest
