"""The control service, by version."""
