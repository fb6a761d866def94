"""What `spot doctor` looks at, one area a file. A check raises nothing: what it meets becomes a finding."""
