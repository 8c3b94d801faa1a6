"""The report: the results of a run as one page that opens without a network, and tables and figures for papers. Start
with `report`; each section of the page is a file. Imports `mmfeat.audit` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "report": ["write_report", "write_comparison"],
    },
)
