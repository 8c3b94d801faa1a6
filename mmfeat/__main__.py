"""`python -m mmfeat`."""

from __future__ import annotations

import os
import sys

if sys.path[0] == os.getcwd():  # as the command `mmfeat`, which takes no `json.py` of the working folder for a module
    del sys.path[0]

from mmfeat.cli.main import main

main()
