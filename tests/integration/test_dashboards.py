"""The dashboards: what Grafana would ask is answered, with the columns that panels need, to a role that only reads."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import asyncpg
import dashboards as filled_database
import make
import pytest
from grafana_sql import View

from tests.roles import Garage, open_garage

FOLDER = Path(__file__).parents[2] / "grafana"
SECONDS = 600
SPIKE = 1e6
BEGIN = filled_database.BEGIN
WHOLE = View(BEGIN, BEGIN + timedelta(seconds=SECONDS), variables=filled_database.chosen(filled_database.STORED))
SHORT = View(BEGIN + timedelta(seconds=60), BEGIN + timedelta(seconds=65), variables=WHOLE.variables)
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "dashboards").glob("*.json"))}
NUMBERS = {"float8", "int8", "int4", "numeric"}


@pytest.fixture(scope="module")
def reader(postgres_server: str) -> Iterator[str]:
    """The DSN of a role from `ingestd db grant --reader`, on ten minutes of a car, with a spike in them."""
    with open_garage(postgres_server) as garage:
        with ThreadPoolExecutor(1) as thread:  # A loop of its own, whatever the loop of the test.
            thread.submit(asyncio.run, fill(garage)).result()
        yield garage.dsn(garage.reader)


async def fill(garage: Garage) -> None:
    await filled_database.fill(garage.admin, SECONDS, 60)
    connection = await asyncpg.connect(garage.admin)
    await connection.execute(
        "UPDATE signal_chunks SET value_num[1][100] = $1, value_max[1] = $1 WHERE id ="
        " (SELECT min(id) FROM signal_chunks WHERE session_id = $2 AND group_id = $3)",
        SPIKE, filled_database.STORED, filled_database.ENGINE.id,
    )  # fmt: skip
    await connection.close()


@pytest.fixture
async def db(reader: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(reader)
    await connection.execute("SET timezone = 'Asia/Kathmandu'")  # Nothing may depend on the zone.
    yield connection
    await connection.close()


async def ask(db: asyncpg.Connection, query: str, view: View) -> tuple[dict[str, str], list[asyncpg.Record]]:
    """The columns of a query with their types, and its rows."""
    if "cars" in re.findall(r"\$\{(\w+)", query):
        view = View(view.begin, view.end, view.points, {"cars": [filled_database.CAR, "no name"]})
    sent = view.filled(query)
    assert "$" not in sent
    statement = await db.prepare(sent)
    return {each.name: each.type.name for each in statement.get_attributes()}, await statement.fetch()


def panels(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of all dashboards, those that ask a kind of source."""
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            if panel["datasource"]["type"] == kind:
                yield f"{name}: {panel['title']}", panel


SQL_PANELS = dict(panels("postgres"))


# What they ask for.


@pytest.mark.parametrize("title", SQL_PANELS)
@pytest.mark.parametrize("view", [WHOLE, SHORT], ids=["overview", "samples"])
async def test_a_panel_gets_what_it_shows(db: asyncpg.Connection, title: str, view: View) -> None:
    """Rows, with the columns that its kind needs, and those that its overrides and links name."""
    panel = SQL_PANELS[title]
    [target] = panel["targets"]
    columns, rows = await ask(db, target["rawSql"], view)
    if "events" in title and view is SHORT:
        return  # None is in those seconds; the query was answered.
    assert rows
    others = {name: kind for name, kind in columns.items() if name != "time"}
    match panel["type"]:
        case "timeseries":
            assert columns["time"] == "timestamptz"
            assert NUMBERS & set(others.values())
            assert set(others.values()) <= NUMBERS | ({"text"} if "metric" in others else set())
        case "state-timeline":
            assert columns["time"] == "timestamptz"
            assert others == {"state": "text"}
        case "geomap":
            location = panel["options"]["layers"][0]["location"]
            assert columns[location["latitude"]] == columns[location["longitude"]] == "float8"
            assert all(47 < row["latitude"] < 49 and 10 < row["longitude"] < 12 for row in rows)
        case "stat":
            assert set(columns.values()) <= NUMBERS
        case kind:
            assert kind == "table"
    assert (target["format"] == "time_series") == (panel["type"] == "timeseries")
    assert {each["matcher"]["options"] for each in panel["fieldConfig"]["overrides"]} <= columns.keys()
    assert set(re.findall(r"__data\.fields\.(\w+)", json.dumps(panel))) <= columns.keys()


@pytest.mark.parametrize("none", ["", []], ids=["empty", "nothing"])
async def test_where_nothing_can_be_chosen_nothing_is_shown(db: asyncpg.Connection, none: str | list[str]) -> None:
    """As in an empty database: no error. Grafana puts in an empty text, or nothing for a variable that has several."""
    several = {"channel", "state", "cars"}
    view = View(
        BEGIN, WHOLE.end, variables={each: none if each in several else "" for each in ("cars", *WHOLE.variables)}
    )
    for dashboard in DASHBOARDS.values():
        asked = [target["rawSql"] for panel in dashboard["panels"] for target in panel["targets"] if "rawSql" in target]
        asked += [each["target"]["rawSql"] for each in dashboard.get("annotations", {}).get("list", [])]
        asked += [each["query"] for each in dashboard["templating"]["list"] if each["datasource"]["type"] == "postgres"]
        for query in asked:
            rows = await db.fetch(view.filled(query))
            if "session:" in query:
                assert rows == []


async def test_points_keep_every_spike(db: asyncpg.Connection) -> None:
    """The greatest and the least sample of the window are in its plot, of points or of samples; none comes twice."""
    query = SQL_PANELS["session: $channel"]["targets"][0]["rawSql"]
    bounds = await db.fetchrow(
        "SELECT min(value_num), max(value_num), count(*) FROM signals_between($1, 'can0', 'Engine.Speed', $2, $3)",
        filled_database.STORED, SHORT.begin, SHORT.end,
    )  # fmt: skip
    _, rows = await ask(db, query, SHORT)
    assert (min(row["minimum"] for row in rows), max(row["maximum"] for row in rows)) == (bounds[0], bounds[1])
    # The last point begins within the window and is shown to its end.
    assert bounds[2] <= len(rows) <= bounds[2] + 1
    _, points = await ask(db, query, WHOLE)
    assert max(row["maximum"] for row in points) == SPIKE
    assert all(row["minimum"] <= row["mean"] <= row["maximum"] for row in points)
    assert 900 < len(points) < 1500
    assert len({row["time"] for row in points}) == len(points)
    assert {row["time"].microsecond % 500_000 for row in points} == {0}


async def test_states_are_labels(db: asyncpg.Connection) -> None:
    """Of the definition, from points and from samples."""
    for view in (WHOLE, SHORT):
        _, rows = await ask(db, SQL_PANELS["session: $state"]["targets"][0]["rawSql"], view)
        said = {label for row in rows for label in row["state"].split(" … ")}
        assert said <= set(filled_database.GEARS.values())
        assert len(said) >= 1


async def test_a_variable_offers_what_is_there(db: asyncpg.Connection) -> None:
    """Each query of a variable gives values, and what the bench has chosen is among them."""
    for dashboard in DASHBOARDS.values():
        for each in dashboard["templating"]["list"]:
            if each["datasource"]["type"] == "prometheus":
                continue
            columns, rows = await ask(db, each["query"], WHOLE)
            assert list(columns) in (["__text", "__value"], ["car"], ["channel"]) or len(columns) == 1
            offered = {row["__value"] if "__value" in columns else row[0] for row in rows}
            wanted = filled_database.CAR if each["name"] == "cars" else WHOLE.variables[each["name"]]
            assert wanted in offered, each["name"]


async def test_gaps_and_markers_are_annotations(db: asyncpg.Connection) -> None:
    """With a time, a text and tags; a gap has an end, and is there where only a part of it is in the window."""
    found = {}
    for each in DASHBOARDS["session"]["annotations"]["list"]:
        columns, found[each["name"]] = await ask(db, each["target"]["rawSql"], WHOLE)
        assert columns.items() >= {"time": "timestamptz", "text": "text", "tags": "text"}.items()
    [gap] = found["gaps"]
    assert gap["timeend"] - gap["time"] == timedelta(seconds=SECONDS / 100)
    assert (gap["text"], gap["tags"]) == ("can0 gap:  7 frames", "gap,can0,")
    assert len(found["events"]) == 20
    within: datetime = gap["time"] + timedelta(seconds=1)
    inside = View(within, within + timedelta(seconds=1), variables=WHOLE.variables)
    gaps = DASHBOARDS["session"]["annotations"]["list"][0]["target"]["rawSql"]
    assert len((await ask(db, gaps, inside))[1]) == 1


async def test_the_fleet_in_numbers(db: asyncpg.Connection) -> None:
    """Cars, sessions, seconds, frames, gaps and lost frames are those that were stored."""
    _, [row] = await ask(db, SQL_PANELS["fleet: in this window"]["targets"][0]["rawSql"], WHOLE)
    assert dict(row) == {
        "cars": 1, "sessions": 2, "recorded": SECONDS + 60, "frames": (SECONDS + 60) * 100, "gaps": 2, "lost": 14,
    }  # fmt: skip
    _, rows = await ask(db, SQL_PANELS["fleet: sessions"]["targets"][0]["rawSql"], WHOLE)
    by_id = {row["id"]: row for row in rows}
    row = by_id[str(filled_database.STORED)]
    assert (int(row["from_ms"]), int(row["to_ms"])) == tuple(
        int(moment.timestamp() * 1000) for moment in (WHOLE.begin, WHOLE.end)
    )


# How they are made.


def test_the_files_are_what_the_scripts_make() -> None:
    """`python grafana/make.py` changes nothing."""
    assert DASHBOARDS.keys() == make.DASHBOARDS.keys()
    for name in DASHBOARDS:
        assert (FOLDER / "dashboards" / f"{name}.json").read_text(encoding="utf-8") == make.text(name), name


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_well_formed(name: str) -> None:
    """Its uid, ids, places, sources and queries; variables that are used are there; a query asks the panel's source."""
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == f"ingestd-{name}"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references))
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        assert all(target.get("expr") or target.get("rawSql") for target in panel["targets"])
    provisioned = (FOLDER / "provisioning/datasources/ingestd.yml").read_text()
    uids = set(re.findall(r"^    uid: (\S+)$", provisioned, re.MULTILINE))
    assert uids == {"ingestd-prometheus", "ingestd-postgresql"}
    assert set(re.findall(r'"uid": "(ingestd-(?:prometheus|postgresql))"', json.dumps(dashboard))) <= uids
    named = {each["name"] for each in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{(\w+):sqlstring\}|\$(instance)\b", json.dumps(dashboard)))
    assert {name for pair in used for name in pair if name} == named
    assert {panel["repeat"] for panel in dashboard["panels"] if "repeat" in panel} <= named


def test_no_password_is_in_the_provisioning() -> None:
    """It, and all that differs from machine to machine, comes from the environment; the page names each variable."""
    text = (FOLDER / "provisioning/datasources/ingestd.yml").read_text()
    assert re.findall(r"password: (.*)", text) == ["$INGESTD_POSTGRESQL_PASSWORD"]
    text += (FOLDER / "provisioning/dashboards/ingestd.yml").read_text()
    page = (FOLDER.parent / "docs/grafana.md").read_text()
    variables = set(re.findall(r"\$(INGESTD_\w+)", text))
    assert len(variables) == 7
    assert {name for name in variables if name not in page} == set()
