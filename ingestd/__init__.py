"""ingestd records CAN and serial telemetry and puts it into PostgreSQL without losing a frame."""

__version__ = "0.1.0"
