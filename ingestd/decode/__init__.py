"""Frames to signals: signal databases (`databases`), the decoder of a bus (`can`), and its layouts (`layout`)."""
