// The list of events, the newest first.

import { clock, duration, element, whole } from "./format.js";

const EVENTS_MAX = 200;
const GOOD = new Set(["link_up", "resumed", "error_active"]);
const BAD = new Set(["gap", "link_down", "bus_off", "error_passive", "garbage"]);

const list = document.querySelector("#events ol");
const shown = new Map();

// The daemon tells all that it knows after each connection: what is here already is left alone.
export function takeEvents(events) {
  for (const event of events) {
    const key = JSON.stringify([event.ts_mono_ns, event.source, event.kind, event.key]);
    if (shown.has(key)) continue;
    const item = line(event);
    shown.set(key, item);
    list.prepend(item);
  }
  for (const [key, item] of shown) {
    if (shown.size <= EVENTS_MAX) break;
    item.remove();
    shown.delete(key);
  }
  document.getElementById("events-empty").hidden = shown.size > 0;
}

function line(event) {
  const kind = event.kind.replaceAll("_", " ");
  const time = element("time", { dateTime: event.ts_utc, title: event.ts_utc }, clock(Date.parse(event.ts_utc)));
  const word = element("span", { className: "state" }, kind);
  word.dataset.state = GOOD.has(event.kind) ? "ok" : BAD.has(event.kind) ? "bad" : event.kind === "marker" ? "mark" : "";
  const item = element("li", {}, time, word, element("span", { className: "what" }, inWords(event)));
  item.dataset.kind = event.kind;
  return item;
}

function inWords({ source, kind, key, payload }) {
  if (kind === "marker") return payload.text;
  const { from_ns: from, to_ns: to, frames, reason, ...rest } = payload;
  const said = [source, reason ?? key];
  if (frames) said.push(`${whole(frames)} frames`);
  if (from !== undefined && to !== undefined) said.push(duration((to - from) / 1e9));
  for (const [name, value] of Object.entries(rest)) {
    const text = Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : value;
    said.push(`${name.replaceAll("_", " ")} ${text}`);
  }
  return said.filter(Boolean).join(", ");
}
