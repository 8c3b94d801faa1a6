"""The command line: one file for each command, with its flags and what it prints. Each command calls one function of
the library. Start with `main`, then `heads`. Only this package imports typer and rich.
"""

__all__: list[str] = []
