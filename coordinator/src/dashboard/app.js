// @ts-check
// Keeps the page fed: one event stream while the page is visible, polling while there is none, and a clock that lets ages grow
// and turns figures grey when nothing new comes. What it looks like is decided in view.js.

import { show } from "./view.js";

const STALE_SECONDS = 2.5; // two missed snapshots; with the clock below, seen within three seconds
const REOPEN_SECONDS = 6; // of silence on an open stream
const RETRY_SECONDS = [1, 2, 3, 5];

/** @type {EventSource | null} */
let source = null;
/** @type {import("./view.js").Snapshot | null} */
let snapshot = null;
let received = performance.now(); // of the snapshot, else of the first attempt
let opened = performance.now();
let failures = 0;
let retryTimer = 0;

/** @param {import("./view.js").Snapshot} next */
function accept(next) {
  snapshot = next;
  received = performance.now();
  render();
}

function render() {
  const elapsed = (performance.now() - received) / 1000;
  show(snapshot, elapsed, elapsed > STALE_SECONDS);
}

function open() {
  close();
  opened = performance.now();
  source = new EventSource("/api/v1/events");
  source.addEventListener("snapshot", (event) => {
    failures = 0;
    accept(JSON.parse(event.data));
  });
  // The browser's own retry gives up on an error status and waits as long as it likes, so do it here.
  source.addEventListener("error", retry);
}

function close() {
  clearTimeout(retryTimer);
  source?.close();
  source = null;
}

function retry() {
  close();
  const wait = RETRY_SECONDS[Math.min(failures, RETRY_SECONDS.length - 1)] ?? 5;
  failures += 1;
  // Not all tabs at once, after a restart.
  retryTimer = setTimeout(open, wait * 1000 * (0.8 + 0.4 * Math.random()));
  if (failures > 1) poll();
}

// The stream may be refused (too many tabs) where a single question is not.
async function poll() {
  try {
    const answer = await fetch("/api/v1/cluster", { signal: AbortSignal.timeout(2000) });
    if (answer.ok) accept(await answer.json());
  } catch {
    // The clock shows that nothing came.
  }
}

setInterval(() => {
  if (document.hidden) return;
  render();
  const silent = (performance.now() - Math.max(received, opened)) / 1000;
  if (source && silent > REOPEN_SECONDS) retry();
}, 250);

// Browsers allow about six connections to a server: a hidden tab gives its own back.
document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
open();
