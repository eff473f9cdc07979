// The chart of chosen channels: a panel for each unit, over the same time. plotly.js draws it, and is loaded by the
// first channel that is chosen; the page does without it where the daemon has none.
//
// A line goes through the newest values; behind it is the range of all samples between them, so that no peak is missed.

import { decimal, element, kept, write } from "./format.js";

const CHANNELS_MAX = 8;
const DRAW_MS = 450;
const PANEL_PIXELS = [0, 240, 170, 130]; // by how many there are

const $ = (id) => document.getElementById(id);

export class Chart {
  // `changed()` is called when other channels are charted.
  constructor(channels, changed) {
    this.channels = channels;
    this.changed = changed;
    this.charted = kept.read("charted", []).slice(0, CHANNELS_MAX);
    this.possible = null; // until the daemon has said so
    this.loading = null;
    this.drawnAt = 0;
    this.heldMs = 0; // the right end of the chart while it is held
    this.holds = false;
    $("chart-window").value = String(kept.read("window", 120));
    if (!$("chart-window").value) $("chart-window").value = "120";
    $("chart-window").addEventListener("change", () => {
      kept.write("window", Number($("chart-window").value));
      this.draw(true);
    });
    $("chart-hold").addEventListener("click", () => this.hold(!this.holds));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw(true));
    this.list();
  }

  // Whether the daemon has plotly.js.
  set charts(possible) {
    this.possible = possible;
    this.list();
  }

  toggle(key) {
    const at = this.charted.indexOf(key);
    if (at >= 0) this.charted.splice(at, 1);
    else if (this.charted.length < CHANNELS_MAX) this.charted.push(key);
    kept.write("charted", this.charted);
    this.list();
    this.changed();
    this.draw(true);
  }

  hold(holds) {
    this.holds = holds;
    this.heldMs = this.channels.newestMs;
    $("chart-hold").setAttribute("aria-pressed", String(holds));
    write($("chart-hold"), holds ? "Held" : "Hold");
    if (!holds) this.draw(true);
  }

  list() {
    $("charted").replaceChildren(...this.charted.map((key, at) => {
      const button = element("button", { type: "button", title: `Take ${key} out of the chart` },
        element("span", { className: "unseen" }, "Take out of the chart: "), key.slice(key.lastIndexOf("/") + 1));
      button.dataset.colour = String(at + 1);
      button.addEventListener("click", () => this.toggle(key));
      return element("li", {}, button);
    }));
    const draws = this.possible && this.charted.length > 0;
    $("plot").hidden = !draws;
    $("chart-empty").hidden = draws;
    $("chart-hold").disabled = $("chart-window").disabled = !draws;
    write($("chart-empty"), this.possible === false
      ? "No chart: the recorder lacks plotly. Install it there: pip install 'ingestd[page]', and load this page again."
      : "Choose channels below: the button before a channel draws it here.");
  }

  load() {
    this.loading ??= new Promise((resolve, reject) => {
      const script = element("script", { src: "/page/plotly.min.js" });
      script.onload = resolve;
      script.onerror = () => {
        script.remove();
        this.loading = null; // The next look tries again.
        reject(new Error("plotly.js could not be loaded"));
      };
      document.head.append(script);
    });
    return this.loading;
  }

  async draw(atOnce = false) {
    const now = performance.now();
    if (!this.possible || !this.charted.length || (this.holds && !atOnce) || (!atOnce && now - this.drawnAt < DRAW_MS)) return;
    this.drawnAt = now;
    try {
      await this.load();
    } catch (error) {
      $("chart-empty").hidden = false;
      return write($("chart-empty"), `${error.message}; tried again.`);
    }
    if (!this.charted.length) return;
    $("chart-empty").hidden = true;
    const channels = this.charted.map((key) => this.channels.all.get(key));
    const units = [...new Set(channels.map((channel) => channel?.unit ?? ""))];
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const traces = channels.flatMap((channel, at) => channel
      ? this.traces(channel, colour(`--c${at + 1}`), units.indexOf(channel.unit)) : []);
    const place = $("plot");
    const height = `${units.length * (PANEL_PIXELS[units.length] ?? 115) + 46}px`;
    const grows = place.style.height !== height;
    place.style.height = height;
    await window.Plotly.react(place, traces, this.layout(units, colour), { displayModeBar: false, displaylogo: false, responsive: true, doubleClick: false });
    if (grows) await window.Plotly.Plots.resize(place); // It keeps the height that it had.
    if (!this.listening) {
      this.listening = true;
      place.on("plotly_relayout", (change) => {
        if (change["xaxis.range[0]"] !== undefined) this.hold(true); // Who looks closer does not want it to move away.
      });
      place.on("plotly_doubleclick", () => this.hold(false));
    }
  }

  get endMs() {
    return this.holds ? this.heldMs : this.channels.newestMs;
  }

  // plotly shows instants in UTC: moved by the zone they read as the clock on the wall.
  shown(ms) {
    return ms - new Date(this.endMs).getTimezoneOffset() * 60000;
  }

  traces(channel, colour, panel) {
    const [x, y, low, high] = [[], [], [], []];
    const from = this.endMs - Number($("chart-window").value) * 1000;
    channel.ring.since(from, (at, value, least, most) => {
      x.push(this.shown(at));
      y.push(Number.isNaN(value) ? null : value);
      low.push(Number.isNaN(least) ? null : least);
      high.push(Number.isNaN(most) ? null : most);
    });
    const common = { x, mode: "lines", type: "scatter", yaxis: panel ? `y${panel + 1}` : "y", showlegend: false };
    const shape = channel.labelled ? "hv" : "linear";
    // What is known of the time between two points is known at the later one: steps backwards.
    const range = { ...common, hoverinfo: "skip", line: { width: 0, shape: "vh" } };
    return [
      { ...range, y: low },
      { ...range, y: high, fill: "tonexty", fillcolor: faint(colour) },
      {
        ...common,
        y,
        name: plain(channel.key),
        line: { width: 1.6, color: colour, shape },
        text: y.map((value) => (value === null ? "" : `${decimal(value, channel.decimals)} ${plain(channel.unit)}`)),
        hovertemplate: "%{text}<extra>%{fullData.name}</extra>",
      },
    ];
  }

  layout(units, colour) {
    const lines = { gridcolor: colour("--line"), zeroline: false, linecolor: colour("--line"), tickfont: { color: colour("--dim") } };
    const end = this.endMs;
    const layout = {
      uirevision: `${this.charted.join()} ${this.holds}`,
      margin: { l: 58, r: 12, t: 8, b: 30 },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: { family: "inherit", size: 11, color: colour("--dim") },
      hovermode: "x",
      hoverlabel: { font: { family: "inherit", size: 11 } },
      dragmode: "zoom",
      xaxis: {
        ...lines,
        type: "date",
        hoverformat: "%H:%M:%S.%L",
        tickformat: "%H:%M:%S",
        nticks: Math.max(3, Math.floor($("plot").clientWidth / 110)),
        range: [this.shown(end - Number($("chart-window").value) * 1000), this.shown(end)],
        anchor: units.length > 1 ? `y${units.length}` : "y",
      },
    };
    const gap = units.length > 1 ? 0.05 : 0;
    const tall = (1 - gap * (units.length - 1)) / units.length;
    units.forEach((unit, n) => {
      const top = 1 - n * (tall + gap);
      layout[n ? `yaxis${n + 1}` : "yaxis"] = {
        ...lines, domain: [Math.max(0, top - tall), top], title: { text: plain(unit), standoff: 4, font: { color: colour("--dim") } },
        nticks: 5, fixedrange: true,
      };
    });
    return layout;
  }
}

// plotly reads some HTML in texts; names and units of signal databases are no HTML.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

// A colour written #rrggbb, see-through.
function faint(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},0.22)`;
}
