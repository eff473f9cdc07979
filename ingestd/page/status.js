// How the recording goes: the row of tiles, the table of sources, and what needs to be said above everything else.

import { bytes, clock, duration, element, mark, rate, whole, write } from "./format.js";

const $ = (id) => document.getElementById(id);
const LINKS = { open: ["ok", "open"], opening: ["warn", "opening"], retrying: ["bad", "down"] };

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const lostOf = (source) => sum(Object.values(source.dropped));

function tile(name, state, said, more = "") {
  const place = $(`tile-${name}`);
  mark(place, state);
  write(place.children[1], said);
  write(place.children[2], more);
  place.title = more;
}

export function showState(state) {
  const sources = state.sources.filter((source) => source.link !== null);
  const away = sources.filter((source) => source.link !== "open");
  if (!state.journal.writable) {
    tile("recording", "bad", "not recording", `the journal takes nothing: ${state.journal.trouble || "the disk refuses"}`);
  } else if (away.length) {
    const [first] = away;
    tile("recording", away.length === sources.length ? "bad" : "warn",
      `${sources.length - away.length} of ${sources.length} sources`, `${first.source}: ${first.reason || first.link}`);
  } else {
    tile("recording", "ok", "recording", `${sources.length} of ${sources.length} sources`);
  }

  const rates = state.sources.map((source) => source.frames_per_second);
  tile("frames", "", rates.includes(null) ? "–" : `${whole(sum(rates))}/s`, `${whole(sum(state.sources.map((s) => s.received)))} received`);

  const lost = sum(state.sources.map(lostOf));
  const wrong = state.sources.filter((source) => !source.balanced).map((source) => source.source);
  if (!state.balanced) tile("books", "bad", "not balanced", wrong.join(", "));
  else if (!state.recovered) tile("books", "warn", "balanced", "what earlier runs left is being looked through");
  else tile("books", lost ? "warn" : "ok", "balanced", lost ? `${whole(lost)} frames lost` : "nothing lost");

  const behind = state.backlog_seconds > 10;
  tile("backlog", behind ? "warn" : "", state.backlog_frames ? duration(state.backlog_seconds) : "none",
    state.backlog_frames ? `${whole(state.backlog_frames)} frames wait` : "everything is stored");

  const trouble = { ...state.trouble };
  const why = trouble.database ?? "";
  delete trouble.database;
  if (state.database_up) tile("database", why ? "warn" : "ok", "up", why || (state.lag_seconds ? `${duration(state.lag_seconds)} behind` : ""));
  else tile("database", "bad", "away", why || "not connected yet");

  const { bytes: used, bytes_max: room, writable } = state.journal;
  const full = used / room > 0.9 && behind;
  tile("journal", writable ? (full ? "warn" : "") : "bad", bytes(used), `of ${bytes(room)}`);

  const wrongs = [
    ...(state.journal.writable ? [] : [`Nothing is recorded: ${state.journal.trouble || "the disk refuses"}`]),
    ...(state.balanced ? [] : [`The books do not balance: ${wrong.join(", ")}`]),
    ...away.map((source) => `${source.source}: ${source.reason || source.link}`),
    ...(state.database_up ? [] : [`The database is away, and everything is kept in the journal: ${why || "not connected yet"}`]),
    ...Object.entries(trouble).map(([what, reason]) => `${what}: ${reason}`),
  ];
  notice("trouble", state.journal.writable && state.balanced ? "warn" : "bad", wrongs.join("\n"));
  notice("left-out", "warn", state.frames_left_out
    ? `${whole(state.frames_left_out)} frames came too fast for this page and are left out here. They are recorded.` : "");
  write($("clock"), clock(Date.parse(state.now_utc)));
  showSources(state.sources);
  return wrongs.length > 0;
}

function showSources(sources) {
  const body = $("sources").querySelector("tbody");
  const rows = new Map([...body.rows].map((row) => [row.dataset.source, row]));
  for (const source of sources) {
    let row = rows.get(source.source);
    if (!row) {
      row = element("tr", {}, element("th", { scope: "row" }), element("td", { className: "link" },
        element("span", { className: "state" }), element("span", { className: "reason" })));
      for (const name of ["frames/s", "received", "stored", "waiting", "lost"]) {
        const cell = element("td", { className: "number" });
        cell.dataset.name = name;
        row.append(cell);
      }
      row.append(element("td", {}, element("span", { className: "state" })));
      row.dataset.source = source.source;
      body.append(row);
    }
    rows.delete(source.source);
    const [name, link, perSecond, received, stored, waiting, lost, books] = row.cells;
    const [state, word] = LINKS[source.link] ?? ["", "not configured"];
    write(name, source.source);
    mark(link.firstChild, state);
    write(link.firstChild, word);
    const controller = source.controller === "error-active" ? "" : source.controller;
    const load = source.bus_load === null ? "" : `bus ${Math.round(100 * source.bus_load)} % busy`;
    write(link.lastChild, [source.reason, controller, load].filter(Boolean).join(", "));
    write(perSecond, rate(source.frames_per_second));
    write(received, whole(source.received));
    write(stored, whole(source.committed));
    write(waiting, whole(source.pending));
    write(lost, whole(lostOf(source)));
    mark(lost, lostOf(source) ? "bad" : source.rejected ? "warn" : "");
    lost.title = [...Object.entries(source.dropped), ["set aside, because the database can never take them:", source.rejected]]
      .filter(([, count]) => count).map(([reason, count]) => `${reason} ${whole(count)}`).join(", ");
    mark(books.firstChild, source.balanced ? "ok" : "bad");
    write(books.firstChild, source.balanced ? "balanced" : "not balanced");
  }
  for (const row of rows.values()) row.remove();
}

// One line above everything, until its text is empty. Read out by screen readers when it appears.
export function notice(name, state, text, ...more) {
  let place = $(`notice-${name}`);
  if (!text) return place?.remove();
  if (!place) {
    place = element("p", { id: `notice-${name}`, className: "notice" }, element("span"), ...more);
    $("notices").append(place);
  }
  mark(place, state);
  write(place.firstChild, text);
}
