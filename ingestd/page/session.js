// What is said of the session, and what may be done to it. What this browser may not do is shown and closed, with why.

import { write } from "./format.js";

const $ = (id) => document.getElementById(id);
const KEYS = ["name", "driver", "track", "notes"];

let session = {};
let allowed = false;
let forgetting = 0;

export function showSession(said) {
  const edited = KEYS.filter((key) => isEdited(key));
  session = said;
  for (const key of KEYS) {
    if (!edited.includes(key)) $(`meta-${key}`).value = said[key] ?? "";
  }
  write($("title"), [said.car_id, said.name].filter((word, n) => word && (n || !said.name?.startsWith(word))).join(" · "));
  offer();
}

export function showRights({ may_change: may, reason, hint }) {
  allowed = may;
  $("session-why").hidden = may;
  write($("session-why"), may ? "" : `Nothing can be changed from here: ${reason}. To change it: ${hint}.`);
  for (const control of $("session").querySelectorAll("input, textarea, button")) control.disabled = !may;
  offer();
}

const isEdited = (key) => $(`meta-${key}`).value !== (session[key] ?? "");

function offer() {
  const edited = KEYS.some(isEdited);
  $("metadata-save").disabled = $("metadata-undo").disabled = !(allowed && edited);
}

async function ask(method, path, body) {
  let answer, said;
  try {
    answer = await fetch(`/api/session${path}`, {
      method,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    said = await answer.json();
  } catch {
    tell("bad", "The daemon does not answer. Nothing was changed.");
    return false;
  }
  if (!answer.ok) tell("bad", [said.error, said.hint].filter(Boolean).join(". "));
  else if (said.warning) tell("warn", said.warning);
  if (answer.ok) showSession(said.session);
  return answer.ok;
}

const SAID_MS = 8000; // how long it is said that something was done

function tell(state, text) {
  clearTimeout(forgetting);
  if (state === "ok") forgetting = setTimeout(() => tell("", ""), SAID_MS);
  $("session-said").dataset.state = state;
  $("session-said").textContent = text;
}

export function listenToSession() {
  $("metadata").addEventListener("input", offer);
  $("metadata").addEventListener("submit", async (event) => {
    event.preventDefault();
    const changes = KEYS.filter(isEdited).map((key) => [key, $(`meta-${key}`).value || null]);
    if (changes.length && (await ask("PATCH", "", Object.fromEntries(changes)))) tell("ok", "Saved.");
  });
  $("metadata").addEventListener("reset", (event) => {
    event.preventDefault();
    for (const key of KEYS) $(`meta-${key}`).value = session[key] ?? "";
    offer();
  });
  $("marker").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = $("marker-text").value.trim();
    if (!text) return tell("warn", "A marker needs a text.");
    if (await ask("POST", "/mark", { text })) {
      $("marker-text").value = "";
      tell("ok", "The marker is recorded.");
    }
  });
  $("session-start").addEventListener("click", () => {
    for (const key of KEYS) $(`start-${key}`).value = key === "driver" || key === "track" ? session[key] ?? "" : "";
    open($("start"));
  });
  $("start").addEventListener("close", async () => {
    if ($("start").returnValue !== "start") return;
    const given = KEYS.map((key) => [key, $(`start-${key}`).value]).filter(([, value]) => value);
    if (await begin("/start", Object.fromEntries(given))) tell("ok", "Another session has begun.");
  });
  $("session-stop").addEventListener("click", () => open($("stop")));
  $("stop").addEventListener("close", async () => {
    if ($("stop").returnValue === "stop" && (await begin("/stop", {}))) tell("ok", "The session has ended.");
  });
}

function open(dialog) {
  dialog.returnValue = ""; // Escape leaves it as it was.
  dialog.showModal();
}

// What was being written about the session that ends goes with it.
async function begin(path, given) {
  const before = session;
  session = Object.fromEntries(KEYS.map((key) => [key, $(`meta-${key}`).value]));
  const done = await ask("POST", path, given);
  if (!done) session = before;
  offer();
  return done;
}
