"""The script of `harness run`: found, and run as ``python SCRIPT`` or ``python -m MODULE`` would run it."""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from harness.errors import EXIT_DONE, EXIT_FAILED, ConfigError, HarnessError
from harness.io.standard_streams import write_error
from launch.own_packages import PACKAGES, give_way

MODULE = "-m"


@dataclass(frozen=True)
class Script:
    """What is to run.

    Args:
        path: of its file, as `sys.argv` is to have it.
        words: its own arguments.
        spec: of the module; None: it is a script.
    """

    path: str
    words: tuple[str, ...]
    spec: ModuleSpec | None


def find_script(words: Sequence[str]) -> Script:
    """Find the script or module that the command line names.

    Effects: puts the directory of its own modules first on `sys.path`; a module's packages are imported.

    Raises:
        ConfigError: if there is none.
    """
    if words[0] != MODULE:
        path = Path(words[0])
        if not path.is_file():
            raise ConfigError("", f"harness run: there is no script {path}; options of harness run stand before it")
        _put_first(str(path.resolve().parent))
        return Script(words[0], tuple(words[1:]), None)
    if len(words) < 2:
        raise ConfigError(MODULE, "needs the name of a module, as in -m package.train")
    here, name = os.getcwd(), words[1]
    _put_first(here)
    if (top := name.partition(".")[0]) in PACKAGES:
        _give_way(top)
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(MODULE, f"there is no module {name} that can be run; it is looked for in {here} first")
    return Script(spec.origin, tuple(words[2:]), spec)


def _put_first(directory: str) -> None:
    # As Python does it, which leaves it out where the user asks for that (PYTHONSAFEPATH).
    if not sys.flags.safe_path:
        sys.path.insert(0, directory)


def _give_way(package: str) -> str | None:
    return give_way(package, int(os.environ.get("WORLD_SIZE", "1")))


def run_script(script: Script, *, silent: bool) -> int:
    """Run it as `__main__`, and tell the training how it ended.

    Returns:
        The exit code, where it has one that is not raised.

    Raises:
        HarnessError: what harness has found wrong.
        SystemExit: as the script raises it.
    """
    from harness.autologging.exit_hooks import failure_of
    from harness.autologging.patcher import script_ended

    for package in PACKAGES:
        theirs = _give_way(package)
        if theirs and package == "harness" and not silent and os.environ.get("RANK", "0") == "0":
            write_error(
                f"harness: {theirs} is the package `harness` that the script imports; it is logged and saved all the "
                "same, but cannot call functions of this command's own package\n"
            )
    module = _main_module(script)
    sys.modules["__main__"] = module
    try:
        # Not with this file's own `from __future__`.
        code = compile(Path(script.path).read_bytes(), vars(module)["__file__"], "exec", dont_inherit=True)
        exec(code, vars(module))
    except SystemExit as exit:
        script_ended(failure_of(exit))
        raise
    except HarnessError as error:
        # What we have found wrong, with its remedy: where in the script that came to light is no help.
        script_ended(error)
        raise
    except BaseException as error:
        script_ended(error)
        _show(error)
        return EXIT_FAILED
    script_ended(None)
    return EXIT_DONE


def _main_module(script: Script) -> ModuleType:
    """`__main__` with the attributes that Python gives it."""
    module = ModuleType("__main__")
    path = os.path.abspath(script.path)
    spec = script.spec
    vars(module).update(
        __file__=path,
        __builtins__=builtins,
        __spec__=spec,
        __package__=None if spec is None else spec.parent,
        __loader__=SourceFileLoader("__main__", path) if spec is None else spec.loader,
        __cached__=None if spec is None else spec.cached,
        __annotations__={},
    )
    return module


def _show(error: BaseException) -> None:
    """The traceback as the script alone would have it: without the frames of this command."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
