"""What a run says of itself: report.json, its tables, schemas and pictures."""
