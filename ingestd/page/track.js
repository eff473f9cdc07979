// The way driven since the page was opened: from channels that are a latitude and a longitude, north up.

import { kept, svg, write } from "./format.js";

const LATITUDE = /^(?:gps_?|gnss_?|pos(?:ition)?_?)?lat(?:itude)?(?:_?deg)?$/i;
const POINTS_MAX = 2000;
const WIDTH = 400, HEIGHT = 260, EDGE = 18;
const METRES_A_DEGREE = 111320;

const $ = (id) => document.getElementById(id);

export class Track {
  constructor(channels) {
    this.channels = channels;
    this.pairs = new Map(); // by the latitude's key
    this.looked = 0;
    this.wanted = kept.read("track", "");
    $("track-source").addEventListener("change", (event) => {
      this.wanted = event.target.value;
      kept.write("track", this.wanted);
      this.draw();
    });
    this.way = svg("path", { class: "way", fill: "none" });
    this.scale = svg("path", { class: "scale", fill: "none" });
    this.metres = svg("text", { class: "metres", x: EDGE, y: HEIGHT - 14 });
    this.here = svg("circle", { class: "here", r: 5 });
    $("map").setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    $("map").append(this.way, this.scale, this.metres, this.here);
  }

  // After new values.
  take() {
    if (this.looked !== this.channels.all.size) this.look();
    for (const pair of this.pairs.values()) {
      const { latitude, longitude, points } = pair;
      if (latitude.number === null || longitude.number === null || latitude.monoNs === pair.lastNs) continue;
      if (latitude.quality || longitude.quality || Math.abs(latitude.monoNs - longitude.monoNs) > 1e9) continue;
      pair.lastNs = latitude.monoNs;
      points.push([latitude.number, longitude.number]);
      // The older half is thinned: a long way stays whole, and the newest part of it fine.
      if (points.length > POINTS_MAX) pair.points = points.filter((_, n) => n > POINTS_MAX / 2 || n % 2 === 0);
    }
  }

  look() {
    this.looked = this.channels.all.size;
    for (const latitude of this.channels.all.values()) {
      const [, before, last] = latitude.key.match(/^(.*?)([^./]*)$/);
      if (!LATITUDE.test(last) || this.pairs.has(latitude.key)) continue;
      const names = [last.replace(/latitude/i, alike("longitude")), last.replace(/lat/i, alike("lon")), last.replace(/lat/i, alike("lng"))];
      const longitude = names.filter((name) => name !== last)
        .map((name) => this.channels.all.get(before + name)).find(Boolean);
      if (!longitude) continue;
      this.pairs.set(latitude.key, { latitude, longitude, points: [], lastNs: 0 });
      $("track-source").append(new Option((before || latitude.source).replace(/[./]$/, ""), latitude.key));
    }
    $("track-source").hidden = this.pairs.size < 2;
  }

  draw() {
    const pair = this.pairs.get(this.wanted) ?? [...this.pairs.values()].find((each) => each.points.length);
    const has = Boolean(pair?.points.length);
    $("track-empty").hidden = has;
    $("map").toggleAttribute("hidden", !has);
    if (!has) return write($("track-position"), "");
    $("track-source").value = pair.latitude.key;
    const last = pair.points[pair.points.length - 1];
    write($("track-position"), `${last[0].toFixed(5)}°, ${last[1].toFixed(5)}°`);
    this.drawWay(pair.points);
  }

  drawWay(points) {
    const shrink = Math.cos((points[0][0] * Math.PI) / 180); // of a degree of longitude there
    let [west, east, south, north] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const [latitude, longitude] of points) {
      west = Math.min(west, longitude * shrink);
      east = Math.max(east, longitude * shrink);
      south = Math.min(south, latitude);
      north = Math.max(north, latitude);
    }
    const least = 20 / METRES_A_DEGREE; // who stands still is a point and no noise
    const a_degree = Math.min((WIDTH - 2 * EDGE) / Math.max(east - west, least), (HEIGHT - 3 * EDGE) / Math.max(north - south, least));
    const x = (longitude) => (WIDTH / 2 + (longitude * shrink - (west + east) / 2) * a_degree).toFixed(1);
    const y = (latitude) => (HEIGHT / 2 - EDGE / 2 - (latitude - (south + north) / 2) * a_degree).toFixed(1);
    this.way.setAttribute("d", `M${points.map(([latitude, longitude]) => `${x(longitude)} ${y(latitude)}`).join("L")}`);
    const [latitude, longitude] = points[points.length - 1];
    this.here.setAttribute("cx", x(longitude));
    this.here.setAttribute("cy", y(latitude));
    const a_metre = a_degree / METRES_A_DEGREE;
    const metres = [1, 2, 5].flatMap((n) => [1, 10, 100, 1000, 10000, 100000].map((ten) => n * ten)).sort((a, b) => b - a)
      .find((length) => length * a_metre <= WIDTH / 4) ?? 1;
    this.scale.setAttribute("d", `M${EDGE} ${HEIGHT - 10}v4h${(metres * a_metre).toFixed(1)}v-4`);
    this.metres.textContent = metres >= 1000 ? `${metres / 1000} km` : `${metres} m`;
  }
}

// Writes a word as the one it replaces is written: lat → lon, Lat → Lon, LAT → LON.
const alike = (word) => (found) =>
  found === found.toUpperCase() ? word.toUpperCase() : found[0] === found[0].toUpperCase() ? word[0].toUpperCase() + word.slice(1) : word;
