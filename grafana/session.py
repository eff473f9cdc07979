"""The dashboard Session, of PostgreSQL: what was recorded."""

from __future__ import annotations

from panels import RED, Json, annotation, dashboard, field, over_time, panel, sql, table, variable

# No session where none is chosen, as in an empty database.
SESSION = "nullif(${session:sqlstring}, '')::uuid"
# A channel in a variable is `source · channel`.
BETWEEN = " · "
# The window, from edge to edge of points, so that points stay where they are while the window moves.
FROM = "utc_time($__from / $__interval_ms * $__interval_ms * 1000000)"
TO = "utc_time(($__to / $__interval_ms + 1) * $__interval_ms * 1000000)"
POINTS = "($__to / $__interval_ms - $__from / $__interval_ms + 1)::integer"
# Points shorter than this show each sample at its own time: it is that or two of a channel at 100 Hz.
SAMPLES_BELOW_MS = 20


def part(name: str, number: int) -> str:
    """Of a channel in a variable: 1 the source, 2 the channel."""
    chosen = f"(ARRAY[${{{name}:sqlstring}}]::text[])[1]"  # Of several there may be none.
    return f"split_part({chosen}, '{BETWEEN}', {number})"


def overview(name: str, channel: int = 2) -> str:
    """Points of a channel, from summaries of chunks where points are longer."""
    return f"signals_overview({SESSION}, {part(name, 1)}, {part(name, channel)}, {FROM}, {TO}, {POINTS})"


def samples(name: str, channel: int = 2) -> str:
    """Samples of a channel."""
    return f"signals_between({SESSION}, {part(name, 1)}, {part(name, channel)}, {FROM}, {TO})"


VALUES = f"""
SELECT ts_utc AS time, value_min AS minimum, value_mean AS mean, value_max AS maximum
FROM {overview("channel")}
WHERE $__interval_ms >= {SAMPLES_BELOW_MS}
UNION ALL
SELECT ts_utc, value_num, value_num, value_num
FROM {samples("channel")}
WHERE $__interval_ms < {SAMPLES_BELOW_MS}
ORDER BY 1
"""

# A point in which there was more than one state shows the first and the last by number.
STATES = f"""
SELECT o.ts_utc AS time,
       CASE WHEN o.value_min = o.value_max THEN l.low ELSE concat(l.low, ' … ', l.high) END AS state
FROM {overview("state")} o
CROSS JOIN (
    SELECT c.choices FROM signal_groups g JOIN channels c ON c.group_id = g.id
    WHERE g.source = {part("state", 1)} AND c.channel = {part("state", 2)} AND c.choices IS NOT NULL
    LIMIT 1
) d
CROSS JOIN LATERAL (
    SELECT coalesce(d.choices ->> (o.value_min + 0)::text, o.value_min::text) AS low,
           coalesce(d.choices ->> (o.value_max + 0)::text, o.value_max::text) AS high
) l
WHERE $__interval_ms >= {SAMPLES_BELOW_MS}
UNION ALL
SELECT ts_utc, coalesce(value_text, value_num::text)
FROM {samples("state")}
WHERE $__interval_ms < {SAMPLES_BELOW_MS}
ORDER BY 1
"""

# Latitude and longitude are of one message, so they have the same points.
TRACK = f"""
SELECT north.ts_utc AS time, north.value_mean AS latitude, east.value_mean AS longitude
FROM {overview("position", 2)} north
JOIN {overview("position", 3)} east ON east.ts_utc = north.ts_utc
ORDER BY 1
"""

CARS = """
SELECT DISTINCT coalesce(car_id, 'no name') FROM sessions ORDER BY 1
"""

OF_CAR = "coalesce(car_id, 'no name') = ${car:sqlstring}"

SESSIONS = f"""
SELECT concat_ws(' ', to_char(created_utc AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), name) AS __text,
       id::text AS __value
FROM sessions WHERE {OF_CAR} ORDER BY created_utc DESC
"""

CHANNELS = f"""
SELECT source || '{BETWEEN}' || channel FROM latest_signals({SESSION})
WHERE value_num IS NOT NULL ORDER BY 1
"""

STATE_CHANNELS = f"""
SELECT DISTINCT g.source || '{BETWEEN}' || c.channel
FROM latest_signals({SESSION}) l
JOIN signal_groups g ON g.source = l.source
JOIN channels c ON c.group_id = g.id AND c.channel = l.channel
WHERE c.choices IS NOT NULL ORDER BY 1
"""

POSITIONS = f"""
SELECT concat_ws('{BETWEEN}', north.source, north.channel, east.channel)
FROM latest_signals({SESSION}) north
JOIN latest_signals({SESSION}) east
  ON east.source = north.source AND east.channel = left(north.channel, -4) || '.lon'
WHERE north.channel LIKE '%.lat' ORDER BY 1
"""

OF_SESSION = f"""
SELECT car_id AS car, name, driver, track, created_utc AS begin, ended_utc AS end, notes, id::text AS id
FROM sessions WHERE id = {SESSION}
"""

LATEST = f"""
SELECT source, channel, value_num AS value, value_text AS text, unit, quality, ts_utc AS time
FROM latest_signals({SESSION}) ORDER BY 1, 2
"""

EVENTS = f"""
SELECT e.begin AS time, e.source, e.kind, e.key, e.payload::text AS payload
FROM (
    SELECT *, utc_time(ts_mono_ns + utc_offset_ns) AS begin FROM events WHERE session_id = {SESSION}
) e
WHERE $__timeFilter(e.begin) ORDER BY 1 DESC LIMIT 500
"""

GAPS = f"""
SELECT g.begin AS time, g.finish AS timeend, concat_ws(' ', g.source, 'gap:', g.key, g.frames) AS text,
       concat_ws(',', 'gap', g.source, g.key) AS tags
FROM (
    SELECT source, key, utc_time(ts_mono_ns + utc_offset_ns) AS begin,
           utc_time(coalesce((payload ->> 'to_ns')::bigint, ts_mono_ns) + utc_offset_ns) AS finish,
           (payload ->> 'frames') || ' frames' AS frames
    FROM events WHERE session_id = {SESSION} AND kind = 'gap'
) g
WHERE g.finish >= $__timeFrom() AND g.begin <= $__timeTo() ORDER BY 1 LIMIT 500
"""

MARKS = f"""
SELECT e.begin AS time, concat_ws(' ', e.source, e.kind, e.payload ->> 'text', e.payload ->> 'reason') AS text,
       concat_ws(',', e.kind, e.source) AS tags
FROM (
    SELECT *, utc_time(ts_mono_ns + utc_offset_ns) AS begin FROM events
    WHERE session_id = {SESSION} AND kind <> 'gap'
) e
WHERE $__timeFilter(e.begin) ORDER BY 1 LIMIT 500
"""

BAND = [
    field("minimum", custom_lineWidth=0, color={"mode": "fixed", "fixedColor": "blue"}),
    field("maximum", custom_lineWidth=0, custom_fillBelowTo="minimum", custom_fillOpacity=30,
          color={"mode": "fixed", "fixedColor": "blue"}),
    field("mean", color={"mode": "fixed", "fixedColor": "blue"}),
]  # fmt: skip
# A point may be as short as there are pixels for; without this none is shorter than a minute.
SHORTEST: Json = {"interval": "1ms"}


def session() -> Json:
    """What was recorded."""
    track_layer = {
        "type": "route", "name": "track", "config": {"arrow": 1}, "tooltip": True,
        "location": {"mode": "coords", "latitude": "latitude", "longitude": "longitude"},
    }  # fmt: skip
    geomap = {
        "view": {"id": "fit", "allLayers": True, "padding": 10}, "layers": [track_layer],
        "basemap": {"type": "default", "name": "map", "config": {}}, "tooltip": {"mode": "details"},
        "controls": {"showZoom": True, "showAttribution": True, "showScale": True},
    }  # fmt: skip
    says = "Where the car was, by its receiver, on a map from the Internet."
    track = panel("geomap", "track", says, sql(TRACK), height=12, maxDataPoints=2000, options=geomap, **SHORTEST)
    says = "Minimum to maximum of each point, and its mean: no spike is lost."
    values = over_time("$channel", says, sql(VALUES, series=True), repeat="channel", repeatDirection="h", maxPerRow=2,
                       overrides=BAND, **SHORTEST)  # fmt: skip
    says = "Each point's label; a point with several shows the least and the greatest."
    states = panel("state-timeline", "$state", says, sql(STATES), height=4, repeat="state", repeatDirection="v",
                   custom={"fillOpacity": 70, "lineWidth": 0},
                   options={"mergeValues": True, "showValue": "auto", "rowHeight": 0.9}, **SHORTEST)  # fmt: skip
    latest = table("latest values", "The newest of every channel. Quality 0 is good.", sql(LATEST), height=12)
    return dashboard(
        "ingestd-session", "ingestd: session", "What was recorded: values, states, the track, what happened.",
        [
            [(24, table("session", "What is known of it.", sql(OF_SESSION), height=4))],
            [(24, values)],
            [(24, states)],
            [(14, track), (10, latest)],
            [(24, table("events", "Markers, gaps, links up and down; the newest first.", sql(EVENTS)))],
        ],
        variables=[
            variable("car", "car", CARS),
            variable("session", "session", SESSIONS),
            variable("channel", "channels", CHANNELS, multi=True),
            variable("state", "states", STATE_CHANNELS, multi=True),
            variable("position", "position", POSITIONS),
        ],
        annotations=[annotation("gaps", RED, GAPS), annotation("events", "blue", MARKS)],
        since="now-6h",
    )  # fmt: skip
