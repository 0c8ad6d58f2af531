"""Reports: records and logs to tables, figures, and one HTML page."""

from advalign.report.report import report_on

__all__ = ["report_on"]
