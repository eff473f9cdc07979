"""Measurements. Everything is a ratio to a baseline of the same run: machines differ, and vary from hour to hour."""
