"""Frames out of python-can's messages, for the kinds that its readers read: ASC and TRC."""

from __future__ import annotations

import logging
import math

from can import Message

from ingestd.model import Flag
from ingestd.sources.captures.base import SECOND_NS, STAMP_NS_MAX
from ingestd.sources.captures.text import Frame, LineError

# Its readers log every line that they find odd. Those that are damage are counted here, and the first few described.
logging.getLogger("can.io").setLevel(logging.CRITICAL)

# Everything a malformed line has been seen to raise inside python-can's parsers.
PARSE_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError)


def frame_of(message: Message, channel_first: int, shift_ns: int = 0) -> Frame:
    """The frame of a message, with the number of the first channel, which becomes can0, and a shift of its stamp.

    Raises LineError when the message cannot be a frame.
    """
    if not math.isfinite(message.timestamp) or abs(message.timestamp) > STAMP_NS_MAX / SECOND_NS:
        raise LineError("the time stamp is out of range")
    flags = (
        Flag.EXTENDED * message.is_extended_id
        | Flag.REMOTE * message.is_remote_frame
        | Flag.FD * message.is_fd
        | Flag.BITRATE_SWITCH * message.bitrate_switch
        | Flag.ERROR_STATE * message.error_state_indicator
        | Flag.TRANSMITTED * (not message.is_rx)
    )
    if message.is_error_frame:
        flags = flags & ~Flag.EXTENDED | Flag.ERROR  # python-can's default for a frame without id is extended.
    channel = message.channel if isinstance(message.channel, int) else channel_first
    return Frame(
        round(message.timestamp * 1e6) * 1000 + shift_ns,
        f"can{max(channel - channel_first, 0)}",
        message.arbitration_id,
        flags,
        b"" if message.is_remote_frame else bytes(message.data),
    )


def check_payload(message: Message, length: int) -> Message:
    """The message, which must have all of its payload. Raises ValueError when bytes are missing."""
    if not message.is_remote_frame and not message.is_error_frame and len(message.data) != length:
        raise ValueError(f"{len(message.data)} payload bytes instead of {length}")
    return message
