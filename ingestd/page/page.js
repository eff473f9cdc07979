// The live page: what the daemon says (stream.js) is remembered (history.js) and shown, each part by a module of its own.

import { Chart } from "./chart.js";
import { Table } from "./channels.js";
import { takeEvents } from "./events.js";
import { clock, element, mark, write } from "./format.js";
import { Channels } from "./history.js";
import { listenToSession, showRights, showSession } from "./session.js";
import { notice, showState } from "./status.js";
import { Stream } from "./stream.js";
import { Track } from "./track.js";

const WORDS = {
  connecting: ["warn", "connecting"],
  live: ["ok", "live"],
  lost: ["bad", "connection lost"],
  paused: ["warn", "paused"],
};

const channels = new Channels();
const chart = new Chart(channels, () => table.picked());
const table = new Table(channels, chart.charted, (key) => chart.toggle(key));
const track = new Track(channels);

let run = null, version = null, lostMs = 0, troubled = false, waiting = false;

new Stream("/api/live?pattern=*&seconds=0.5", {
  connection(state) {
    const [colour, word] = WORDS[state];
    const place = document.getElementById("connection");
    mark(place, colour);
    write(place, word);
    document.body.classList.toggle("old", state !== "live");
    if (state === "live") {
      lostMs = 0;
      notice("connection", "", "");
    } else if (!lostMs) {
      lostMs = Date.now();
      channels.interrupt();
      notice("connection", "bad", `The daemon has not been heard since ${clock(lostMs)}; what is shown is of then. It is being tried again.`);
    }
    title();
  },
  hello(said) {
    if (run && said.run !== run) {
      const again = element("button", { type: "button" }, "OK");
      again.addEventListener("click", () => notice("restart", "", ""));
      notice("restart", "", "");
      notice("restart", "warn", `The daemon has begun anew, heard at ${clock(Date.now())}.`, again);
    }
    if (version && said.version !== version) {
      const load = element("button", { type: "button" }, "Load");
      load.addEventListener("click", () => location.reload());
      notice("version", "warn", `The daemon is of version ${said.version} now, this page of ${version}.`, load);
    }
    run = said.run;
    version ??= said.version;
    write(document.getElementById("about"), `ingestd ${said.version}`);
    chart.charts = said.charts;
    showRights(said);
  },
  session: showSession,
  state(said) {
    channels.setClock(said.now_mono_ns);
    troubled = showState(said);
    title();
    soon();
  },
  values(said) {
    channels.take(said);
    track.take();
    soon();
  },
  events: takeEvents,
});

listenToSession();
document.addEventListener("visibilitychange", soon);

// What has come is drawn with the browser's next picture; a window that nobody sees draws nothing.
function soon() {
  if (waiting || document.hidden) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    table.draw();
    track.draw();
    chart.draw();
  });
}

function title() {
  const name = document.getElementById("title").textContent;
  document.title = `${lostMs || troubled ? "⚠" : "●"} ${name || "ingestd"}`;
}
