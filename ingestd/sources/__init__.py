"""Devices and files that give frames."""
