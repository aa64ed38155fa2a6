"""Child processes of ours: the command that starts one, and what it runs first.

    python .../harness/child.py MODULE [ARGS]      as `python -m MODULE` does, for a module of `harness` or `launch`

`python -m` looks for every module in the working directory and in PYTHONPATH first, the standard library's too: a
user's `signal.py`, `launch/` or `harness/` that lies there would be imported in place of what is meant. A child runs
this file by its absolute path instead. The standard library comes first then, and both packages are those that lie
beside this file; what PYTHONPATH names comes after.
"""

import sys

_PACKAGES = ("harness", "launch")


def child_command(module: str, *words: str) -> list[str]:
    """The command line that runs a module of ours in a process of its own.

    Args:
        module: full name, such as ``harness.checkpoint.save.writer``; it has an ``if __name__ == "__main__"`` part.
        words: its arguments.
    """
    import os

    return [sys.executable, os.path.abspath(__file__), module, *words]


def standard_library() -> list[str]:
    """The entries of `sys.path` that are the standard library's, in their order."""
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
        del sys.path[0]  # this file's directory: its modules would be found without their package's name
    # Imports stand below this, since what they find depends on it. `sys` and `os` are there already.
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
