"""`python -m mmfeat`."""

from mmfeat.cli import main

main()
