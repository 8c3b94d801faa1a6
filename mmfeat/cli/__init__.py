"""The command line: a file a command, with its flags and what a person sees. Start with `main`, then `heads`. The
only package that imports typer and rich; each command calls one function of the library.
"""

__all__: list[str] = []
