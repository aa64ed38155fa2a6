"""Start a module of `harness` or `launch` in a child process, and run it there.

    python .../harness/io/child_process.py MODULE [ARGS]      like `python -m MODULE`

`python -m` searches the working directory and PYTHONPATH before the standard library, and would import a user's
`signal.py`, `launch/` or `harness/` there. A child process executes this file by its absolute path instead. It searches
the standard library first, and imports both packages from this installation.
"""

import sys

_PACKAGES = ("harness", "launch")


def child_command(module: str, *words: str) -> list[str]:
    """Return the command line that runs a module, such as ``harness.checkpoint.save.writer``, as ``__main__``."""
    import os

    return [sys.executable, os.path.abspath(__file__), module, *words]


def standard_library() -> list[str]:
    """Return the entries of `sys.path` that belong to the standard library, in order."""
    import os

    directory = os.path.dirname(os.__file__)
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    return [
        path
        for path in sys.path
        if path in (directory, os.path.join(directory, "lib-dynload")) or os.path.basename(path) == archive
    ]


def _main() -> None:
    if not sys.flags.safe_path:
        del sys.path[0]  # this file's directory, whose modules would be importable without their package
    # Imports follow this change, because they depend on it. `sys` and `os` are imported already.
    standard = standard_library()
    sys.path[:] = standard + [path for path in sys.path if path not in standard]
    import os
    from importlib import import_module
    from runpy import run_module

    packages_parent = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path.insert(0, packages_parent)
    for package in _PACKAGES:
        import_module(package)
    del sys.path[0]
    del sys.argv[0]
    run_module(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main()
