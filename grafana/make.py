"""Makes the dashboards: `python grafana/make.py` writes grafana/dashboards/*.json; a test compares them.

A dashboard is rows of panels, a panel a function call: its kind, title, explanation and queries. To change one, change
it here, run this, and Grafana has it within ten seconds. To try something first, change it in Grafana: what it shows
under "JSON model" has the names that belong here.

Grafana puts in `$__from` and `$__to` (milliseconds since 1970), `$__interval_ms` (the length of a point of the panel)
and the variables, `${session:sqlstring}` in quotes.
"""

from __future__ import annotations

import json
from pathlib import Path

from fleet import fleet
from service import service
from session import session

HERE = Path(__file__).parent
DASHBOARDS = {"service": service, "session": session, "fleet": fleet}


def text(name: str) -> str:
    """A dashboard as it is in its file."""
    return json.dumps(DASHBOARDS[name](), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (HERE / "dashboards" / f"{each}.json").write_text(text(each), encoding="utf-8")
