// The table of channels: found by words, with the newest value, how often it comes, and the last minute as a line.
//
// However many channels there are, only so many rows are, and only those that can be seen are drawn.

import { decimal, duration, element, kept, rate, svg, whole, write } from "./format.js";

const ROWS_MAX = 120;
const SPARK_MS = 60000, SPARK_WIDTH = 120, SPARK_HEIGHT = 22;
const QUALITIES = [[1, "out of range"], [2, "not available"], [4, "error"], [8, "short frame"], [16, "after a gap"], [32, "clock not set"]];

const $ = (id) => document.getElementById(id);
const order = new Intl.Collator("en", { numeric: true }).compare;

export class Table {
  // `charted` has the keys that are in the chart; `toggle(key)` changes that.
  constructor(channels, charted, toggle) {
    Object.assign(this, { channels, charted, toggle });
    this.table = $("channels").querySelector("table");
    this.rows = new Map();
    this.seen = new Set();
    this.all = false;
    this.observer = new IntersectionObserver((changes) => {
      for (const { target, isIntersecting } of changes) {
        if (isIntersecting) {
          this.seen.add(target);
          this.drawRow(target);
        } else {
          this.seen.delete(target);
        }
      }
    }, { rootMargin: "200px" });
    $("search").value = kept.read("search", "");
    $("search").addEventListener("input", () => {
      kept.write("search", $("search").value);
      this.all = false;
      this.arrange();
    });
    $("channels-more").addEventListener("click", () => {
      this.all = true;
      this.arrange();
    });
  }

  // The rows that there should be, in their order.
  arrange() {
    this.channels.added = false;
    const wanted = words($("search").value);
    const found = [...this.channels.all.values()].filter((channel) => wanted.every((matches) => matches(channel.key.toLowerCase())));
    found.sort((a, b) => order(a.source, b.source) || order(a.name, b.name));
    const shown = this.all ? found : found.slice(0, ROWS_MAX);
    const total = this.channels.all.size;
    write($("channels-count"), found.length === total ? `${whole(total)}` : `${whole(found.length)} of ${whole(total)}`);
    $("channels-empty").hidden = found.length > 0;
    write($("channels-empty"), total ? "No channel is called like that." : "No channel has a value yet.");
    $("channels-more").hidden = shown.length === found.length;
    write($("channels-more"), `Show all ${whole(found.length)}`);

    const bodies = new Map();
    for (const channel of shown) {
      if (!bodies.has(channel.source)) bodies.set(channel.source, []);
      bodies.get(channel.source).push(this.row(channel));
    }
    const now = new Set(shown.map((channel) => channel.key));
    for (const [key, row] of this.rows) {
      if (now.has(key)) continue;
      this.observer.unobserve(row);
      this.seen.delete(row);
      this.rows.delete(key);
    }
    const old = [...this.table.tBodies];
    this.table.append(...[...bodies].map(([source, rows]) => {
      const head = element("tr", { className: "source" }, element("th", { scope: "rowgroup", colSpan: 4 }, source));
      return element("tbody", {}, head, ...rows);
    }));
    for (const body of old) body.remove();
  }

  row(channel) {
    let row = this.rows.get(channel.key);
    if (row) return row;
    const button = element("button", { type: "button", className: "pick" });
    button.setAttribute("aria-label", `Chart ${channel.key}`);
    button.addEventListener("click", () => this.toggle(channel.key));
    const dot = channel.name.lastIndexOf(".") + 1;
    const name = element("th", { scope: "row", title: channel.key },
      element("span", { className: "group" }, channel.name.slice(0, dot)));
    // A name that is too long for a line is broken where a word in it begins.
    for (const word of channel.name.slice(dot).split(/(?<=[a-z0-9])(?=[A-Z])|(?<=_)/)) name.append(word, document.createElement("wbr"));
    const line = svg("path", { fill: "none" });
    const spark = svg("svg", { viewBox: `0 0 ${SPARK_WIDTH} ${SPARK_HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    spark.append(line);
    const cell = element("td", { className: "spark" });
    cell.append(spark);
    row = element("tr", {}, element("td", {}, button), name, element("td", { className: "number value" }),
      element("td", { className: "unit" }), element("td", { className: "number rate" }), cell, element("td", { className: "note" }));
    row.dataset.key = channel.key;
    Object.assign(row, { channel, line, button });
    this.rows.set(channel.key, row);
    this.observer.observe(row);
    this.showPicked(row);
    return row;
  }

  showPicked(row) {
    const at = this.charted.indexOf(row.channel.key);
    row.button.setAttribute("aria-pressed", String(at >= 0));
    row.button.dataset.colour = at >= 0 ? String(at + 1) : "";
  }

  picked() {
    for (const row of this.rows.values()) this.showPicked(row);
  }

  draw() {
    if (this.channels.added) this.arrange();
    for (const row of this.seen) this.drawRow(row);
  }

  drawRow(row) {
    const { channel, cells } = row;
    const quiet = this.channels.quietSeconds(channel);
    if (row.drawn === channel.heardMs && !quiet) return;
    row.drawn = channel.heardMs;
    write(cells[2], inWords(channel));
    write(cells[3], channel.unit);
    cells[2].dataset.unit = channel.unit; // for phones, whose tables have no column for it
    write(cells[4], quiet ? "" : rate(channel.rate));
    const bad = QUALITIES.filter(([bit]) => channel.quality & bit).map(([, word]) => word);
    write(cells[6], [...bad, ...(quiet ? [`${duration(quiet)} ago`] : [])].join(", "));
    row.classList.toggle("quiet", quiet > 0);
    row.classList.toggle("doubtful", channel.quality !== 0);
    this.drawSpark(row.line, channel);
  }

  drawSpark(line, channel) {
    const from = this.channels.newestMs - SPARK_MS;
    const points = [];
    let [low, high] = [Infinity, -Infinity];
    channel.ring.since(from, (at, value) => {
      points.push([at, value]);
      if (value < low) low = value;
      if (value > high) high = value;
    });
    const tall = high - low || 1;
    let path = "", lifted = true;
    for (const [at, value] of points) {
      if (Number.isNaN(value)) {
        lifted = true;
        continue;
      }
      const x = (((at - from) / SPARK_MS) * SPARK_WIDTH).toFixed(1);
      const y = high > low ? (SPARK_HEIGHT - 2 - ((value - low) / tall) * (SPARK_HEIGHT - 4)).toFixed(1) : SPARK_HEIGHT / 2;
      path += lifted ? `M${x} ${y}` : channel.labelled ? `H${x}V${y}` : `L${x} ${y}`;
      lifted = false;
    }
    line.setAttribute("d", path);
  }
}

export function inWords(channel) {
  if (channel.number === null) return channel.text ?? "none";
  const number = decimal(channel.number, channel.decimals);
  return channel.text === null ? number : `${channel.text} (${number})`;
}

// What to search for: each word a part of `source/channel`, or with * and ? all of it.
function words(text) {
  return text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    if (!/[*?]/.test(word)) return (name) => name.includes(word);
    const signs = [...word].map((sign) => (sign === "*" ? ".*" : sign === "?" ? "." : sign.replace(/[^\w]/, "\\$&")));
    const pattern = new RegExp(`^${signs.join("")}$`);
    return (name) => pattern.test(name);
  });
}
