"""The command line in processes of their own that start quickly: forks of one that has imported torch already.

What reads its environment when it is imported (huggingface_hub, transformers, the consoles of the command line) is not
imported before the fork.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    # Beside ours what huggingface_hub needs, a third of its time to import; what is not there is left out.
    CONTEXT.set_forkserver_preload(["abliterate.api", "typer", "rich.progress", "httpx2", "yaml", "filelock", "jinja2"])


class Running:
    """``abliterate`` with some arguments, as ``subprocess.Popen`` shows a process: as far as tests use it."""

    def __init__(self, args: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._said = tempfile.TemporaryDirectory()
        self._files = [Path(self._said.name) / name for name in ("stdout", "stderr")]
        for path in self._files:
            path.touch()
        self._process = CONTEXT.Process(target=_work, args=(list(args), dict(environment), folder, self._files))
        self._process.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join()
        self._said.cleanup()

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that ended it."""
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it has said when it ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {timeout} s")
        shown, said = (path.read_text("utf-8") for path in self._files)
        return shown, said

    def send_signal(self, number: int) -> None:
        """Signal it."""
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()


def _work(args: list[str], environment: dict[str, str], folder: Path, files: list[Path]) -> None:
    early = sorted({"huggingface_hub", "transformers", "abliterate.cli"} & set(sys.modules))
    if early:
        raise AssertionError(f"imported before the environment is set: {early}")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(files, start=1):
        opened = os.open(path, os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["abliterate", *args]
    from abliterate.cli.app import main

    main()
