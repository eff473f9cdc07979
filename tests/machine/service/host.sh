#!/usr/bin/env bash
# On the host, beside the guest.
exec python3 host.py
