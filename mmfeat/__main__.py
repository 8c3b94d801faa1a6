"""`python -m mmfeat`."""

from __future__ import annotations

from mmfeat.cli.main import main

main()
