"""Find the script of `harness run` and execute it as ``python SCRIPT`` or ``python -m MODULE`` would.

The script may have its own packages named `harness` or `launch`, which it then imports. Our modules refer to one
another as imported objects, so their names in `sys.modules` can be released. Only names that exist in the script's
package are released: our late imports need the others, and so does pickle, which finds classes by module name.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

import harness
from harness.errors import EXIT_DONE, EXIT_FAILED, ConfigError, HarnessError
from harness.io.standard_streams import write_error

MODULE = "-m"

_OURS = {"harness": Path(harness.__file__).resolve().parent, "launch": Path(__file__).resolve().parent}
# Modules that functions import while the script may be running.
LATE_IMPORTS = (
    "harness.__main__",
    "harness.autologging.exit_hooks",
    "harness.autologging.patcher",
)
# Modules of the classes whose objects ranks exchange, by name.
_EXCHANGED = ("harness.checkpoint.", "harness.run.directory", "harness.metrics.system.")


@dataclass(frozen=True)
class Script:
    """The script to run, with its path as in `sys.argv` and its arguments; only a module has a spec."""

    path: str
    words: tuple[str, ...]
    spec: ModuleSpec | None


def find_script(words: Sequence[str]) -> Script:
    """Find the script or module that the command line names.

    Effects: inserts the directory of its modules into `sys.path`; imports the packages of a module.

    Raises:
        ConfigError: if it does not exist.
    """
    if words[0] != MODULE:
        path = Path(words[0])
        if not path.is_file():
            raise ConfigError("", f"harness run: there is no script {path}; give options of harness run before it")
        _insert_path(str(path.resolve().parent))
        return Script(words[0], tuple(words[1:]), None)
    if len(words) < 2:
        raise ConfigError(MODULE, "needs the name of a module, as in -m package.train")
    here, name = os.getcwd(), words[1]
    _insert_path(here)
    if (top := name.partition(".")[0]) in _OURS:
        _release_package(top)
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(MODULE, f"there is no executable module {name}; {here} is searched first")
    return Script(spec.origin, tuple(words[2:]), spec)


def _insert_path(directory: str) -> None:
    # Python too omits the directory with PYTHONSAFEPATH.
    if not sys.flags.safe_path:
        sys.path.insert(0, directory)


def run_script(script: Script, *, silent: bool) -> int:
    """Execute the script as `__main__`, report its end to the training, and return the exit code.

    Raises:
        HarnessError: if harness rejects a call of the script.
        SystemExit: if the script raises it.
    """
    from harness.autologging.exit_hooks import failure_of
    from harness.autologging.patcher import script_ended

    for package in _OURS:
        theirs = _release_package(package)
        if theirs and package == "harness" and not silent and os.environ.get("RANK", "0") == "0":
            write_error(
                f"harness: the script imports {theirs} as `harness`; the training is logged and saved, but the script "
                "cannot call functions of the installed package harness\n"
            )
    module = _main_module(script)
    sys.modules["__main__"] = module
    try:
        # dont_inherit excludes this file's `from __future__` import.
        code = compile(Path(script.path).read_bytes(), vars(module)["__file__"], "exec", dont_inherit=True)
        exec(code, vars(module))
    except SystemExit as exit:
        script_ended(failure_of(exit))
        raise
    except HarnessError as error:
        # The message contains the remedy, so no traceback is printed.
        script_ended(error)
        raise
    except BaseException as error:
        script_ended(error)
        _print_traceback(error)
        return EXIT_FAILED
    script_ended(None)
    return EXIT_DONE


def _main_module(script: Script) -> ModuleType:
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


def _print_traceback(error: BaseException) -> None:
    """Print the traceback without the frames of this file."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)


# ------------------------------------------------------------------------------ packages with the names of ours


def _release_package(package: str) -> str | None:
    """Let the script import its own package of this name, if `sys.path` has one before ours, and return its path.

    Effects: imports torch and removes modules from `sys.modules`, if there is such a package.

    Raises:
        ConfigError: if ranks could no longer exchange objects.
    """
    spec = PathFinder.find_spec(package, sys.path)
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent == _OURS[package]:
        return None
    for late in LATE_IMPORTS:
        import_module(late)
    names = [name for name in _imported_modules(package) if _find(name, spec) is not None]
    exchanged = [name for name in names if name.startswith(_EXCHANGED)]
    if exchanged and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "",
            f"harness run: {spec.origin} has a module {exchanged[0]}, like the installed package, whose objects the "
            "ranks exchange; rename it, or run the script in one process",
        )
    for name in names:
        del sys.modules[name]
    return str(Path(spec.origin).parent if spec.submodule_search_locations is not None else spec.origin)


def _imported_modules(package: str) -> list[str]:
    return [
        name
        for name, module in sys.modules.items()
        if name.partition(".")[0] == package
        and (path := getattr(module, "__file__", None)) is not None
        and _OURS[package] in Path(path).resolve().parents
    ]


def _find(name: str, top: ModuleSpec) -> ModuleSpec | None:
    """Find the spec of a module within a package, without an import."""
    spec: ModuleSpec | None = top
    parts = name.split(".")
    for number in range(2, len(parts) + 1):
        locations: Sequence[str] | None = None if spec is None else spec.submodule_search_locations
        if locations is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:number]), locations)
    return spec
