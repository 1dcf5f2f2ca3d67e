"""A shell with job control and one job: ``python job_shell.py fg|bg <command...>``.

It runs the command as a job of its own, in the foreground or in the background, and says what becomes of it. When the
job stops it takes the terminal back and waits for SIGUSR1; SIGUSR1 brings the job to the foreground.
"""

from __future__ import annotations

import os
import signal
import sys
import termios


def main() -> int:
    where, *command = sys.argv[1:]
    # A shell changes the terminal from the background; this one waits for SIGUSR1 when it chooses to.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU, signal.SIGUSR1, signal.SIGCHLD})
    settings = termios.tcgetattr(0)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        if where == "fg":
            os.tcsetpgrp(0, os.getpid())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTTOU, signal.SIGUSR1, signal.SIGCHLD})
        os.execv(command[0], command)
    say(f"job {job}")
    while True:
        if signal.sigwait({signal.SIGUSR1, signal.SIGCHLD}) == signal.SIGUSR1:
            os.tcsetpgrp(0, job)
            os.killpg(job, signal.SIGCONT)
            continue
        pid, status = os.waitpid(job, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            cooked = termios.tcgetattr(0) == settings
            os.tcsetpgrp(0, os.getpgrp())
            termios.tcsetattr(0, termios.TCSADRAIN, settings)
            say(f"stopped, terminal restored: {cooked}")
        elif pid:
            say(f"ended {os.waitstatus_to_exitcode(status)}, terminal restored: {termios.tcgetattr(0) == settings}")
            return 0


def say(text: str) -> None:
    os.write(1, f"shell: {text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
