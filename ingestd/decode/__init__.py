"""Frames to signals: signal databases (`databases`), the columnar decoder of one bus (`can`) and its layouts (`layout`)."""
