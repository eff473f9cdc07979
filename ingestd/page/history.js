// What the page remembers: of every channel its newest value and those of the last minutes. All of it is bounded.

import { decimalsOf } from "./format.js";

const POINTS_MAX = 1400; // of a channel: ten minutes and more, at two a second
const POINTS_MIN = 140; // of a channel where there are very many
const ALL_POINTS_MAX = 1500000; // of all channels: 48 MB
const RATE_MS = 5000;
const CLOCK_SET_MS = 5000;
const QUIET_MS = 3000; // no value for so long is said

// Instants and the value, minimum and maximum at each, in the order of time. Grows up to `limit`, then forgets the oldest.
export class Ring {
  constructor() {
    this.limit = POINTS_MAX;
    this.room(64);
    this.begin = this.length = 0;
  }

  room(capacity) {
    const before = { at: this.at, value: this.value, low: this.low, high: this.high };
    for (const name of ["at", "value", "low", "high"]) {
      this[name] = new Float64Array(capacity);
      for (let n = 0; before.at && n < this.length; n++) {
        this[name][n] = before[name][(this.begin + n) % before.at.length];
      }
    }
    this.begin = 0;
  }

  push(at, value, low, high) {
    const capacity = this.at.length;
    if (this.length === capacity && capacity < this.limit) {
      this.room(Math.min(2 * capacity, this.limit));
    } else if (this.length >= this.limit || this.length === capacity) {
      this.begin = (this.begin + 1) % capacity;
      this.length--;
    }
    const place = (this.begin + this.length++) % this.at.length;
    this.at[place] = at;
    this.value[place] = value;
    this.low[place] = low;
    this.high[place] = high;
  }

  // A line drawn through these points is interrupted here.
  interrupt() {
    if (!this.length) return;
    const last = (this.begin + this.length - 1) % this.at.length;
    if (!Number.isNaN(this.value[last])) this.push(this.at[last] + 1, NaN, NaN, NaN);
  }

  // Calls with (at, value, low, high) for every point since an instant.
  since(from, call) {
    const capacity = this.at.length;
    let n = this.length;
    while (n > 0 && this.at[(this.begin + n - 1) % capacity] >= from) n--;
    for (; n < this.length; n++) {
      const place = (this.begin + n) % capacity;
      call(this.at[place], this.value[place], this.low[place], this.high[place]);
    }
  }
}

export class Channel {
  constructor(source, name) {
    this.key = `${source}/${name}`;
    this.source = source;
    this.name = name;
    this.ring = new Ring();
    this.decimals = 0;
    this.counts = []; // [ms, samples], for the rate
    this.labelled = false;
  }

  take(said, nowMs) {
    this.number = said.value_num;
    this.text = said.value_text;
    this.unit = said.unit ?? "";
    this.quality = said.quality;
    this.monoNs = said.ts_mono_ns;
    this.atMs = Date.parse(said.ts_utc);
    this.heardMs = nowMs;
    this.counts.push([nowMs, said.samples]);
    while (this.counts.length > 2 && this.counts[1][0] < nowMs - RATE_MS) this.counts.shift();
    if (this.number === null) return;
    this.labelled ||= this.text !== null;
    this.decimals = Math.max(this.decimals, decimalsOf(this.number));
    this.ring.push(this.atMs, this.number, said.minimum ?? this.number, said.maximum ?? this.number);
  }

  // Samples a second; null where that is not known yet.
  get rate() {
    const [begin, end] = [this.counts[0], this.counts[this.counts.length - 1]];
    return end && end[0] > begin[0] ? (end[1] - begin[1]) / (end[0] - begin[0]) * 1000 : null;
  }
}

// All channels by their key, `source/channel`.
export class Channels {
  constructor() {
    this.all = new Map();
    this.added = false;
    this.newestMs = 0; // the instant of the newest value: the right end of charts
    this.aheadNs = 0; // how far the recorder's monotonic clock is ahead of this browser's
  }

  take(values) {
    const nowMs = performance.now();
    let newestMs = 0;
    for (const said of values) {
      const key = `${said.source}/${said.channel}`;
      let channel = this.all.get(key);
      if (!channel) {
        channel = new Channel(said.source, said.channel);
        this.all.set(key, channel);
        this.added = true;
      }
      channel.take(said, nowMs);
      newestMs = Math.max(newestMs, channel.atMs);
    }
    // A moment back is another channel's sample; more than that is a clock that was set.
    if (newestMs > this.newestMs || newestMs < this.newestMs - CLOCK_SET_MS) this.newestMs = newestMs;
    if (this.added) {
      const limit = Math.max(POINTS_MIN, Math.min(POINTS_MAX, Math.floor(ALL_POINTS_MAX / this.all.size)));
      for (const channel of this.all.values()) channel.ring.limit = limit;
    }
  }

  // The recorder's clock is heard every second; in between this browser's own goes on.
  setClock(monoNs) {
    this.aheadNs = monoNs - performance.now() * 1e6;
  }

  // Seconds since a channel's newest value; 0 while it is fresh.
  quietSeconds(channel) {
    const ms = (performance.now() * 1e6 + this.aheadNs - channel.monoNs) / 1e6;
    return ms > QUIET_MS ? ms / 1000 : 0;
  }

  // Time passed in which nobody watched, or the daemon was another: rates and lines begin anew.
  interrupt() {
    for (const channel of this.all.values()) {
      channel.counts = [];
      channel.ring.interrupt();
    }
  }
}
