#!/usr/bin/env bash
# In the guest, after every boot.
set -euo pipefail

if [ ! -e /opt/ingestd/bin/ingestd ]; then
  echo "installing"
  python3 -m venv /opt/ingestd
  /opt/ingestd/bin/pip install --quiet --no-index --find-links /mnt/wheels ingestd
  ln -s /opt/ingestd/bin/ingestd /usr/local/bin/
  systemctl enable --quiet --now postgresql
fi
exec /opt/ingestd/bin/python /mnt/share/guest.py
