"""The page of a run: report.html, one file that opens offline, made from the files beside it alone."""
