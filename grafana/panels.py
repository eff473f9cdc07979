"""What dashboards are built of: queries, panels, variables, in the JSON that Grafana reads."""

from __future__ import annotations

import textwrap
from typing import Any

Json = dict[str, Any]

PROMETHEUS: Json = {"type": "prometheus", "uid": "ingestd-prometheus"}
POSTGRESQL: Json = {"type": "postgres", "uid": "ingestd-postgresql"}
WIDTH = 24  # of a dashboard, in Grafana's columns
GREEN, YELLOW, RED = "green", "yellow", "red"
ALL: Json = {"text": "All", "value": "$__all"}  # of a variable, at the beginning
LAST: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}  # of a series
STEPS_SHOWN: Json = {"thresholdsStyle": {"mode": "line"}}


def sql(text: str, *, series: bool = False) -> Json:
    """A query of PostgreSQL; `series`: its column `time` is that of samples."""
    query = textwrap.dedent(text).strip()
    return {
        "datasource": POSTGRESQL, "editorMode": "code", "format": "time_series" if series else "table",
        "rawQuery": True, "rawSql": query,
    }  # fmt: skip


def promql(expression: str, legend: str = "", *, instant: bool = False) -> Json:
    """A query of Prometheus: a series over time, or the value now."""
    return {
        "datasource": PROMETHEUS, "editorMode": "code", "expr": " ".join(expression.split()), "instant": instant,
        "range": not instant, "legendFormat": legend or "__auto",
    }  # fmt: skip


def panel(kind: str, title: str, says: str, *targets: Json, height: int = 8, **more: Any) -> Json:
    """A panel. `more`: unit, steps (of thresholds), names (of values), custom, overrides, options, what Grafana has."""
    defaults: Json = {"custom": more.pop("custom", {}), "unit": more.pop("unit", "none")}
    if minimum := more.pop("minimum", None):
        defaults["min"] = float(minimum)
    if steps := more.pop("steps", None):
        first, *others = steps
        defaults["thresholds"] = {
            "mode": "absolute",
            "steps": [{"color": first, "value": None}, *({"color": color, "value": at} for at, color in others)],
        }
        defaults["color"] = {"mode": "thresholds"}
    if names := more.pop("names", None):
        options = {value: {"text": text, "color": color, "index": n} for n, (value, text, color) in enumerate(names)}
        defaults["mappings"] = [{"type": "value", "options": options}]
    return {
        "type": kind, "title": title, "description": says, "datasource": targets[0]["datasource"],
        "targets": [{"refId": chr(ord("A") + number), **target} for number, target in enumerate(targets)],
        "fieldConfig": {"defaults": defaults, "overrides": more.pop("overrides", [])},
        "options": more.pop("options", {}), "height": height, **more,
    }  # fmt: skip


def stat(title: str, says: str, target: Json, **more: Any) -> Json:
    """One number, or one for each daemon, on its colour."""
    options = {"colorMode": "background", "graphMode": "none", "reduceOptions": LAST}
    return panel("stat", title, says, target, height=4, options=options, **more)


def over_time(title: str, says: str, *targets: Json, **more: Any) -> Json:
    """Lines."""
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 0, "showPoints": "auto", "spanNulls": False}
    options = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
               "tooltip": {"mode": "multi", "sort": "desc"}}  # fmt: skip
    return panel("timeseries", title, says, *targets, custom=custom | more.pop("custom", {}), options=options, **more)


def table(title: str, says: str, target: Json, **more: Any) -> Json:
    """Rows."""
    return panel("table", title, says, target, options={"showHeader": True, "cellHeight": "sm"}, **more)


def field(name: str, **properties: Any) -> Json:
    """What holds for one column alone; `custom.hidden` is written custom_hidden."""
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": key.replace("_", "."), "value": value} for key, value in properties.items()],
    }


def variable(name: str, label: str, query: str, *, multi: bool = False, source: Json = POSTGRESQL, **more: Any) -> Json:
    """A choice at the top of the dashboard, asked for anew whenever the range of time changes."""
    return {
        "name": name, "label": label, "type": "query", "datasource": source, "query": textwrap.dedent(query).strip(),
        "definition": "", "refresh": 2, "multi": multi, "includeAll": False, "sort": 0, "current": {}, "options": [],
        "regex": "", "hide": 0, "skipUrlSync": False,
    } | more  # fmt: skip


def annotation(name: str, color: str, query: str) -> Json:
    """Marks in all panels over time."""
    return {
        "name": name, "enable": True, "hide": False, "iconColor": color, "datasource": POSTGRESQL,
        "target": {**sql(query), "refId": "Anno"},
    }  # fmt: skip


def dashboard(uid: str, title: str, says: str, rows: list[list[tuple[int, Json]]], **more: Any) -> Json:
    """Rows of (width, panel), from the top to the bottom."""
    panels: list[Json] = []
    y = 0
    for row in rows:
        x = 0
        for width, each in row:
            rest = {key: value for key, value in each.items() if key != "height"}
            panels.append({"id": len(panels) + 1, "gridPos": {"x": x, "y": y, "w": width, "h": each["height"]}, **rest})
            x += width
        assert x == WIDTH, f"{title}: a row is {x} wide"
        y += max(each["height"] for _, each in row)
    others = [{"type": "dashboards", "title": "ingestd", "tags": ["ingestd"], "asDropdown": True, "keepTime": False}]
    return {
        "uid": uid, "title": title, "description": says, "tags": ["ingestd"], "schemaVersion": 39, "version": 1,
        "editable": True, "timezone": "browser", "graphTooltip": 1, "links": others, "panels": panels,
        "time": {"from": more.pop("since", "now-1h"), "to": "now"}, "refresh": more.pop("refresh", ""),
        "templating": {"list": more.pop("variables")}, "annotations": {"list": more.pop("annotations", [])},
    }  # fmt: skip
