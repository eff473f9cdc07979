#!/usr/bin/env bash
# In the guest, after every boot: install at the first, then let guest.py record until the power goes.
set -euo pipefail

if [ ! -e /opt/ingestd/installed ]; then
  echo "installing"
  python3 -m venv /opt/ingestd
  /opt/ingestd/bin/pip install --quiet --no-index --find-links /mnt/wheels ingestd
  systemctl start postgresql
  su postgres -c 'createuser --superuser root && createdb --owner root ingestd'
  INGESTD_DSN='postgresql:///ingestd?host=/var/run/postgresql' /opt/ingestd/bin/ingestd db init
  touch /opt/ingestd/installed
  sync
fi
modprobe vcan
ip link add vcan0 type vcan
ip link set vcan0 up
exec /opt/ingestd/bin/python /mnt/share/guest.py
