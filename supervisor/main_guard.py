"""Tells a user's file that starts the daemon without a guard (supervisor process, and workers that import the file).

A new worker imports the file of its parent's ``__main__``. Where that file calls ``engine.run()`` outside
``if __name__ == "__main__":``, every worker would start a daemon of its own. Both ends look out for it: the parent
reads its source before it starts anything, and a worker refuses to start a daemon while it imports.
"""

from __future__ import annotations

import ast
import multiprocessing.process
import sys
from pathlib import Path
from types import FrameType
from typing import Optional

from speedlayer.supervisor.errors import ConfigurationError

_REMEDY = (
    "engine.run() must stand below a guard, since each worker process imports this file:\n"
    '    if __name__ == "__main__":\n'
    "        engine.run()"
)


def require() -> None:
    """Raise `ConfigurationError` if the running call to ``engine.run()`` has no guard."""
    if _is_importing_main():
        raise ConfigurationError(f"a worker process was about to start a daemon of its own: {_REMEDY}")
    frame = _main_module_frame()
    if frame is not None and not _is_guarded(Path(frame.f_code.co_filename), frame.f_lineno):
        raise ConfigurationError(f"{frame.f_code.co_filename}, line {frame.f_lineno}: {_REMEDY}")


def _is_importing_main() -> bool:
    """Whether this is a new worker that imports its parent's ``__main__``; it carries this mark meanwhile."""
    import multiprocess.process

    processes = (multiprocessing.process.current_process(), multiprocess.process.current_process())
    return any(getattr(process, "_inheriting", False) for process in processes)


def _main_module_frame() -> Optional[FrameType]:
    """Return the frame of the main file's own code, from which `engine.run()` was reached; None in a shell."""
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    frame: Optional[FrameType] = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename == main_file:
            return frame
        frame = frame.f_back
    return None


def _is_guarded(file: Path, line: int) -> bool:
    """Whether the line stands below any ``if``: what the condition says is left to its author."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return True  # not a source file that a worker would import
    return any(
        isinstance(node, ast.If) and node.lineno < line <= (node.end_lineno or node.lineno) for node in ast.walk(tree)
    )
