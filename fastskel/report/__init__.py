"""A run as one page: `write_report` puts record, curves, results and features into a self-contained HTML file."""

from fastskel.report.page import write_report

__all__ = ["write_report"]
