"""The report: what a run found, as one page that opens without a network; tables and figures for papers."""
