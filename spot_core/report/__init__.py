"""What users see: log lines, tables, the command line."""
