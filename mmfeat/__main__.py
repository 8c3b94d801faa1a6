"""`python -m mmfeat`, and the command `mmfeat`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends the process without a traceback while it is imported, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mmfeat.cli.main import INTERRUPTED
    from mmfeat.cli.main import main as run

    try:
        run()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    if sys.path[0] == os.getcwd():
        del sys.path[0]  # so that, as for the command `mmfeat`, no `json.py` of the working folder is a module
    main()
