"""Launching and operating: CLI, control service, checks of a machine, dashboards. May import every other room."""
