"""Runs commands of ``bisenet``, each in a fork of this process, which has imported all they need and done nothing else.

A line of JSON orders one, its exit code answers. With the argument ``bare`` nothing is imported but the command line,
and no command can import torch. ``conftest.command`` asks for them.
"""

import gc
import json
import os
import signal
import sys

from bisenet.cli import main


def run(arguments: list[str], cwd: str, environment: dict[str, str], files: list[str], figures: bool) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate((os.devnull, *files)):
        os.dup2(os.open(file, os.O_RDWR), number)
    sys.path.insert(0, cwd)
    sys.argv = ["bisenet", *arguments]
    signal.alarm(600)
    if not figures:
        conftest.draw_nothing()
    main()


if __name__ == "__main__":
    if sys.argv[1:] == ["bare"]:
        sys.modules["torch"] = None  # type: ignore[assignment]
    else:
        import conftest

        from bisenet import compare, experiment, predict  # noqa: F401
    gc.freeze()  # else a fork would copy what it collects
    for line in iter(sys.stdin.readline, ""):
        if (child := os.fork()) == 0:
            run(**json.loads(line))
            break
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
