"""The dashboard Fleet, of PostgreSQL: cars and their sessions."""

from __future__ import annotations

from panels import ALL, YELLOW, Json, dashboard, field, over_time, panel, sql, table, variable
from session import CARS

# Sessions of the chosen cars that reach into the window. One that was never ended is taken to go on.
IN_WINDOW = """
sessions s WHERE coalesce(s.car_id, 'no name') = ANY (ARRAY[${cars:sqlstring}]::text[])
  AND s.created_utc <= $__timeTo() AND coalesce(s.ended_utc, now()) >= $__timeFrom()"""
HOURS = "extract(epoch FROM coalesce(s.ended_utc, now()) - s.created_utc)::float8"
FRAMES = "coalesce((SELECT sum(f.frames) FROM feeds f WHERE f.session_id = s.id), 0)::bigint"
GAPS_OF = "(SELECT count(*) FROM events e WHERE e.session_id = s.id AND e.kind = 'gap')"
LOST_OF = """
       (SELECT coalesce(sum((e.payload ->> 'frames')::bigint), 0)::bigint FROM events e
        WHERE e.session_id = s.id AND e.kind = 'gap')"""

TOTALS = f"""
SELECT count(DISTINCT coalesce(t.car_id, 'no name')) AS cars, count(*) AS sessions,
       coalesce(sum(t.length), 0) AS recorded,
       coalesce(sum(t.frames), 0)::bigint AS frames, coalesce(sum(t.gaps), 0)::bigint AS gaps,
       coalesce(sum(t.lost), 0)::bigint AS lost
FROM (
SELECT s.car_id, {HOURS} AS length, {FRAMES} AS frames, {GAPS_OF} AS gaps, {LOST_OF} AS lost
FROM {IN_WINDOW}
) t
"""

BY_CAR = f"""
SELECT coalesce(t.car_id, 'no name') AS car, count(*) AS sessions, sum(t.length) AS recorded,
       sum(t.frames)::bigint AS frames, sum(t.gaps)::bigint AS gaps, sum(t.lost)::bigint AS lost, max(t.finish) AS last
FROM (
SELECT s.car_id, {HOURS} AS length, {FRAMES} AS frames, {GAPS_OF} AS gaps, {LOST_OF} AS lost,
       coalesce(s.ended_utc, now()) AS finish
FROM {IN_WINDOW}
) t
GROUP BY 1 ORDER BY 1
"""

BY_SESSION = f"""
SELECT coalesce(s.car_id, 'no name') AS car, coalesce(s.name, s.id::text) AS session, s.driver, s.track,
       s.created_utc AS begin, {HOURS} AS recorded, {FRAMES} AS frames, {GAPS_OF} AS gaps, {LOST_OF} AS lost,
       s.ended_utc IS NULL AS open, s.id::text AS id,
       floor(extract(epoch FROM s.created_utc) * 1000)::bigint::text AS from_ms,
       coalesce(ceil(extract(epoch FROM s.ended_utc) * 1000)::bigint::text, 'now') AS to_ms
FROM {IN_WINDOW}
ORDER BY s.created_utc DESC LIMIT 1000
"""

A_DAY = f"""
SELECT date_trunc('day', s.created_utc, 'UTC') AS time, coalesce(s.car_id, 'no name') AS metric,
       sum({HOURS}) AS recorded
FROM {IN_WINDOW}
GROUP BY 1, 2 ORDER BY 1
"""

OPEN_SESSION = {
    "title": "open it in the dashboard Session", "targetBlank": False,
    "url": "/d/ingestd-session?var-car=${__data.fields.car:percentencode}&var-session=${__data.fields.id}"
           "&from=${__data.fields.from_ms}&to=${__data.fields.to_ms}",
}  # fmt: skip


def fleet() -> Json:
    """Cars and their sessions."""
    units = [field("recorded", unit="s"), field("frames", unit="short"), field("lost", unit="short")]
    hidden = [field(name, custom_hidden=True) for name in ("id", "from_ms", "to_ms")]
    every_column = {"calcs": ["lastNotNull"], "fields": "/.*/", "values": False}
    options = {"colorMode": "none", "graphMode": "none", "textMode": "value_and_name", "reduceOptions": every_column}
    says = "Sessions that reach into the window, counted whole."
    numbers = panel("stat", "in this window", says, sql(TOTALS), height=4, overrides=units, options=options)
    bars = {"drawStyle": "bars", "fillOpacity": 80, "stacking": {"mode": "normal", "group": "A"}}
    says = "By the day (UTC) on which a session began."
    a_day = over_time("recorded a day", says, sql(A_DAY, series=True), unit="s", custom=bars)
    return dashboard(
        "ingestd-fleet", "ingestd: fleet", "Cars, what they recorded, and where something is missing.",
        [
            [(24, numbers)],
            [(12, table("cars", "lost: frames that gaps tell of.", sql(BY_CAR), overrides=units)), (12, a_day)],
            [(24, table("sessions", "A click on a name opens it.", sql(BY_SESSION), height=14,
                        overrides=[*units, *hidden, field("session", links=[OPEN_SESSION]),
                                   field("gaps", thresholds={"mode": "absolute", "steps": [
                                       {"color": "text", "value": None}, {"color": YELLOW, "value": 1}]},
                                       custom_cellOptions={"type": "color-text"})]))],
        ],
        variables=[variable("cars", "cars", CARS, multi=True, includeAll=True, current=ALL)],
        since="now-90d",
    )  # fmt: skip
