// The connection to the daemon: server-sent events, tried again for ever, with a word about how it stands.
//
// A window that nobody has seen for a while lets go: the daemon then has nothing to do for it, and a browser has only
// six connections to one server.

const RETRY_MS = 2000;
const SILENT_MS_MAX = 8000; // the daemon says something every second; a half-open connection never ends by itself
const HIDDEN_MS_MAX = 300000;

export class Stream {
  // `on` has a function for each kind of message, and `connection(state)`: "connecting", "live", "lost", "paused".
  constructor(address, on) {
    this.address = address;
    this.on = on;
    this.source = null;
    this.heardAt = 0;
    this.timer = 0;
    this.hiding = 0;
    setInterval(() => this.listenForSilence(), 1000);
    document.addEventListener("visibilitychange", () => this.seenOrHidden());
    addEventListener("pagehide", () => this.source?.close());
    this.open();
  }

  open() {
    clearTimeout(this.timer);
    this.source?.close();
    this.heardAt = performance.now();
    const source = (this.source = new EventSource(this.address));
    for (const kind of ["hello", "session", "state", "values", "events"]) {
      source.addEventListener(kind, (message) => {
        if (source !== this.source) return;
        this.heardAt = performance.now();
        if (kind === "hello") this.on.connection("live");
        this.on[kind](JSON.parse(message.data));
      });
    }
    source.onerror = () => source === this.source && this.lost();
  }

  // The browser tries again by itself after some errors and not after others: here always the same.
  lost() {
    this.source.close();
    this.source = null;
    this.on.connection("lost");
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.open(), RETRY_MS);
  }

  listenForSilence() {
    if (this.source && performance.now() - this.heardAt > SILENT_MS_MAX) this.lost();
  }

  seenOrHidden() {
    clearTimeout(this.hiding);
    if (document.hidden) {
      this.hiding = setTimeout(() => {
        clearTimeout(this.timer);
        this.source?.close();
        this.source = null;
        this.on.connection("paused");
      }, HIDDEN_MS_MAX);
    } else if (!this.source) {
      this.open();
    }
  }
}
