// @ts-check
// Shows one snapshot. Elements are made once and then only changed where the text differs, so that a reader's selection and focus
// stay. Everything from the snapshot goes through textContent.

import { UNKNOWN, age, bytes, capital, duration, layers, measured, number, percent } from "./format.js";

/**
 * What `GET /api/v1/cluster` serves. proto/grokpipe/v1/snapshot.proto defines every field; they are not listed here again.
 * @typedef {any} Snapshot message ClusterSnapshot
 * @typedef {any} Node message SnapshotNode
 * @typedef {string} State a word of enum NodeState
 * @typedef {[number, number]} Span message LayerRange: first layer, layer after the last
 * @typedef {{ span: Span, name: string | null, node: Node | undefined }} Stage
 */

const NODE_STALE_SECONDS = 3; // six missed heartbeats
const PHASE_ICON = { serving: "ready", loading: "loading", waiting: "joining", down: "down", unknown: "unknown" };
/** @type {Record<string, string>} What a layer's cell shows; in every other state the layer is missing. */
const CELL_OF_STATE = { ready: "ready", draining: "ready", loading: "loading", unknown: "unplanned" };
const SVG = "http://www.w3.org/2000/svg";

/** @param {string} id @returns {HTMLElement} */
const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** @param {Element} element @param {string} text */
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** @param {HTMLElement} element @param {string} name @param {string} value */
function mark(element, name, value) {
  if (element.dataset[name] !== value) element.dataset[name] = value;
}

/** @param {string} tag @param {string} [kind] @param {(Element | string)[]} children */
function make(tag, kind, ...children) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...children);
  return element;
}

/** Icon, word and colour of a state. */
function makeBadge() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = svg.appendChild(document.createElementNS(SVG, "use"));
  const word = make("span");
  const badge = make("span", "badge", svg, word);
  /** @param {string} state @param {string} [text] */
  const set = (state, text) => {
    if (badge.dataset.state === state && !text) return;
    mark(badge, "state", state);
    use.setAttribute("href", `#i-${state}`);
    put(word, capital(text ?? state));
  };
  return { badge, set };
}

/** @param {Node | undefined} node @returns {number | null} */
function loadRatio(node) {
  if (!node || node.load.bytes === null || node.load.bytes_total === null) return null;
  return node.load.bytes_total === 0 ? 1 : Math.min(1, node.load.bytes / node.load.bytes_total);
}

/** @param {Node} node @param {number} elapsed */
const silence = (node, elapsed) => (node.heartbeat_age_seconds === null ? null : node.heartbeat_age_seconds + elapsed);

/** Whether what is known of a node is too old to pass for now. @param {Node | undefined} node @param {number} elapsed */
const isOld = (node, elapsed) => node !== undefined && (node.state === "down" || (silence(node, elapsed) ?? 0) > NODE_STALE_SECONDS);

/** @param {Stage} stage */
const stageState = (stage) => stage.node?.state ?? (stage.name === null ? "unknown" : "down");

/** The stages of the plan, and the stretches of layers that are in none. @param {Snapshot} snapshot @returns {Stage[]} */
function stagesOf(snapshot) {
  /** @type {Stage[]} */
  const stages = [];
  let next = 0;
  const gap = (/** @type {number} */ end) => {
    if (end > next) stages.push({ span: [next, end], name: null, node: undefined });
  };
  for (const { node: name, layers: span } of snapshot.plan?.stages ?? []) {
    gap(span[0]);
    stages.push({ span, name, node: snapshot.nodes.find((node) => node.name === name) });
    next = span[1];
  }
  gap(snapshot.model.layers);
  return stages;
}

/** @param {Snapshot | null} snapshot @param {number} elapsed @param {boolean} stale */
function showVerdict(snapshot, elapsed, stale) {
  const phase = snapshot && !stale ? snapshot.verdict.phase : "unknown";
  mark(byId("verdict"), "phase", phase);
  byId("verdict-icon").setAttribute("href", `#i-${PHASE_ICON[phase]}`);
  const text = snapshot?.verdict.text ?? "";
  const colon = text.indexOf(":");
  if (!snapshot) {
    put(byId("verdict-word"), stale ? "No contact:" : "Connecting:");
    put(byId("verdict-text"), stale ? "the coordinator does not answer, retrying" : "asking the coordinator");
  } else if (stale) {
    put(byId("verdict-word"), "Unknown:");
    put(byId("verdict-text"), `no contact with the coordinator for ${age(elapsed)}. Last heard: “${text}”`);
  } else {
    put(byId("verdict-word"), text.slice(0, colon + 1));
    put(byId("verdict-text"), text.slice(colon + 1).trim());
  }
  document.title = `${phase === "unknown" ? "?" : capital(phase)} · ${snapshot?.cluster || "grokpipe"}`;

  const link = byId("link");
  mark(link, "link", stale ? "lost" : snapshot ? "live" : "wait");
  const old = snapshot ? `, values are ${age(elapsed)} old` : "";
  put(byId("link-text"), stale ? `Disconnected, retrying${old}` : snapshot ? "Live" : "Connecting");
  document.documentElement.toggleAttribute("data-stale", stale);
  for (const note of document.querySelectorAll(".stale-note")) put(note, stale && snapshot ? `${age(elapsed)} ago` : "");
}

let announced = "";
let announcedEvent = -1;

/** Says aloud what is new, and not every second what ticks. @param {Snapshot | null} snapshot @param {boolean} stale */
function announce(snapshot, stale) {
  if (!snapshot) return;
  const key = stale ? "stale" : `${snapshot.verdict.phase} ${snapshot.verdict.missing_layers.join()}`;
  const latest = snapshot.events.at(-1);
  const parts = [];
  if (key !== announced) parts.push(stale ? "Disconnected from the coordinator" : snapshot.verdict.text);
  if (latest && latest.id !== announcedEvent && announcedEvent >= 0) parts.push(latest.text);
  announced = key;
  announcedEvent = latest?.id ?? 0;
  if (parts.length > 0) put(byId("announce"), parts.join(". "));
}

/** @type {{ at: number, rate: number | null }[]} */
const history = [];
const HISTORY_SECONDS = 300;

/** @param {number | null} rate */
function showSpark(rate) {
  const now = performance.now() / 1000;
  const last = history.at(-1);
  if (!last || now - last.at >= 0.9) history.push({ at: now, rate });
  while (history[0] && history[0].at < now - HISTORY_SECONDS) history.shift();
  const top = Math.max(1e-9, ...history.map((point) => point.rate ?? 0));
  const span = Math.max(30, now - (history[0]?.at ?? now));
  const points = history.filter((point) => point.rate !== null).map(({ at, rate: y }) => `${(300 * (1 - (now - at) / span)).toFixed(1)},${(38 - 36 * ((y ?? 0) / top)).toFixed(1)}`);
  byId("spark").setAttribute("points", points.join(" "));
}

/** @param {Snapshot} snapshot @param {number} elapsed @param {boolean} stale */
function showTiles(snapshot, elapsed, stale) {
  const { nodes, plan, requests, model, verdict } = snapshot;
  // Every token passes the last stage.
  const last = nodes.find((node) => node.name === plan?.stages.at(-1)?.node);
  const rate = last && last.state !== "down" ? last.tokens_per_second : null;
  put(byId("t-rate"), number(rate));
  put(byId("t-predicted"), number(plan?.predicted_tokens_per_second));
  put(byId("t-measured"), measured(plan?.predicted_tokens_per_second, plan?.measured_tokens_per_second));
  put(byId("t-running"), `${requests.running}`);
  put(byId("t-waiting"), `${requests.waiting}`);
  const missing = verdict.missing_layers.reduce((sum, [start, end]) => sum + end - start, 0);
  put(byId("t-layers"), `${Math.max(0, model.layers - missing)} / ${model.layers}`);
  put(byId("t-epoch"), plan ? `plan ${plan.epoch}` : "no plan yet");
  put(byId("t-nodes"), `${nodes.filter((node) => node.state === "ready" && (stale || !isOld(node, elapsed))).length} / ${nodes.length}`);
  /** @type {State[]} */
  const others = ["down", "excluded", "loading", "joining", "draining", "standby"];
  const counts = others.map((state) => ({ state, count: nodes.filter((node) => node.state === state).length }));
  const silent = nodes.filter((node) => node.state !== "down" && isOld(node, elapsed)).length;
  if (silent > 0 && !stale) counts.push({ state: /** @type {any} */ ("silent"), count: silent });
  put(byId("t-others"), counts.filter(({ count }) => count > 0).map(({ state, count }) => `${count} ${state}`).join(", ") || "all of them");
  if (!stale) showSpark(rate);
}

/** @param {Span} span @param {string | null} name */
function makeStage(span, name) {
  const title = name === null ? make("span", "name", "No node") : make("a", "name", name);
  if (name !== null) title.setAttribute("href", `#node-${encodeURIComponent(name)}`);
  const { badge, set } = makeBadge();
  const cells = make("div", "cells");
  cells.setAttribute("aria-hidden", "true"); // the text below says the same
  for (let layer = span[0]; layer < span[1]; layer += 1) {
    const cell = make("span", "cell", `${layer}`);
    cell.dataset.layer = `${layer}`;
    cells.append(cell);
  }
  const text = make("p", "stage-text");
  const item = make("li", "stage", make("div", "stage-head", title, badge), cells, text);
  item.style.setProperty("--layers", `${span[1] - span[0]}`);
  item.style.setProperty("--columns", span[1] - span[0] > 32 ? "32" : "8");
  return { item, set, cells, text };
}

/** @type {ReturnType<typeof makeStage>[]} */
let strip = [];
let stripKey = "";

/** @param {Snapshot} snapshot @param {Stage[]} stages @param {number} elapsed */
function showStrip(snapshot, stages, elapsed) {
  const key = JSON.stringify(stages.map(({ span, name }) => [span, name]));
  if (key !== stripKey) {
    stripKey = key;
    strip = stages.map(({ span, name }) => makeStage(span, name));
    const end = (/** @type {string} */ word) => make("li", "end", make("span", undefined, word));
    byId("strip").replaceChildren(end("Embedding"), ...strip.map(({ item }) => item), end("Head"));
  }
  stages.forEach((stage, index) => {
    const shown = strip[index];
    if (shown) showStage(shown, stage, snapshot.plan !== null, elapsed);
  });
}

/** @param {ReturnType<typeof makeStage>} shown @param {Stage} stage @param {boolean} planned @param {number} elapsed */
function showStage({ item, set, cells, text }, stage, planned, elapsed) {
  const state = planned && stage.name === null ? "down" : stageState(stage);
  mark(item, "state", state);
  set(state, planned ? undefined : "no plan");
  const ratio = loadRatio(stage.node);
  const count = stage.span[1] - stage.span[0];
  const kind = CELL_OF_STATE[state] ?? "missing";
  [...cells.children].forEach((child, index) => {
    const cell = /** @type {HTMLElement} */ (child);
    const filled = kind === "loading" ? Math.min(1, Math.max(0, (ratio ?? 0) * count - index)) : 0;
    mark(cell, "cell", kind === "loading" && filled >= 1 ? "loaded" : kind);
    cell.style.setProperty("--filled", `${(filled * 100).toFixed(0)}%`);
  });
  const old = isOld(stage.node, elapsed);
  item.classList.toggle("old", old);
  const parts = [`${count === 1 ? "Layer" : "Layers"} ${layers(stage.span)}`];
  if (state === "loading") parts.push(`${percent(ratio)} read`);
  else if (kind === "ready") parts.push(`step ${duration(stage.node?.step_seconds_p50)}`);
  if (kind !== "missing" && stage.node && old) parts.push(`silent for ${age(silence(stage.node, elapsed))}`);
  if (kind === "missing") parts.push("no live stage");
  put(text, parts.join(" · "));
}

/** @param {Snapshot} snapshot @param {Stage[]} stages */
function showTwin(snapshot, stages) {
  const body = byId("twin");
  while (body.children.length > stages.length) body.lastElementChild?.remove();
  stages.forEach((stage, index) => {
    const row = body.children[index] ?? body.appendChild(make("tr", undefined, scoped("th", "row"), ...Array.from({ length: 6 }, () => make("td"))));
    const { node, name, span } = stage;
    const state = snapshot.plan === null ? "no plan" : node?.state ?? "down";
    const texts = [`${index + 1}`, name ?? "none", layers(span), state, percent(loadRatio(node)), duration(node?.step_seconds_p50), number(node?.queue_depth, 0)];
    texts.forEach((text, column) => put(/** @type {Element} */ (row.children[column]), text));
  });
}

/** @param {string} tag @param {string} scope */
function scoped(tag, scope) {
  const cell = make(tag);
  cell.setAttribute("scope", scope);
  return cell;
}

/** A bar of parts, each with its share of the whole. @param {string[]} kinds */
function makeBar(kinds) {
  const parts = kinds.map((kind) => make("span", kind));
  const bar = make("div", "bar", ...parts);
  bar.setAttribute("aria-hidden", "true"); // the figures stand beside it
  /** @param {(number | null)[]} shares */
  const set = (shares) => parts.forEach((part, index) => part.style.setProperty("width", `${((shares[index] ?? 0) * 100).toFixed(1)}%`));
  return { bar, set };
}

/** @param {string} name */
function makeNode(name) {
  const { badge, set } = makeBadge();
  const load = makeBar(["filled"]);
  const memory = makeBar(["weights", "kv"]);
  const text = Object.fromEntries(
    ["device", "place", "layers", "loaded", "weights", "kv", "free", "rss", "rate", "idle", "step", "queue", "heartbeat", "error", "errorAge"].map((key) => [key, make("span")]),
  );
  /** @param {string} key @param {string} kind */
  const line = (key, kind) => make("div", kind, /** @type {Element} */ (text[key]));
  /** @param {string} label @param {string} kind @param {Element[]} children */
  const cell = (label, kind, ...children) => {
    const td = make("td", kind, make("div", undefined, ...children));
    td.dataset.label = label;
    td.setAttribute("role", "cell");
    return td;
  };
  /** @param {string} word @param {string} key */
  const figure = (word, key) => make("span", `figure k-${key}`, `${word} `, /** @type {Element} */ (text[key]));
  const head = make("th", undefined, make("div", "name", name), line("device", "sub"), line("place", "sub"));
  head.setAttribute("scope", "row");
  head.setAttribute("role", "rowheader");
  const row = make(
    "tr",
    undefined,
    head,
    cell("State", "", badge),
    cell("Layers loaded", "ticks", make("div", undefined, /** @type {Element} */ (text.layers)), load.bar, line("loaded", "sub")),
    cell("Memory", "ticks memory", memory.bar, make("div", "sub figures", figure("weights", "weights"), figure("KV", "kv"), figure("free", "free"), figure("process", "rss"))),
    cell("Tok/s", "ticks num", line("rate", ""), line("idle", "sub")),
    cell("Step (median)", "ticks num", line("step", ""), line("queue", "sub")),
    cell("Heartbeat", "num", line("heartbeat", "")),
    cell("Last error", "error", line("error", ""), line("errorAge", "sub")),
  );
  row.id = `node-${name}`;
  row.setAttribute("role", "row");
  row.tabIndex = -1; // reached from the strip
  return { row, set, load, memory, text };
}

/** @type {Map<string, ReturnType<typeof makeNode>>} */
const rows = new Map();

/** @param {Snapshot} snapshot @param {number} elapsed */
function showNodes(snapshot, elapsed) {
  const body = byId("nodes");
  const names = new Set(snapshot.nodes.map((node) => node.name));
  for (const [name, { row }] of rows) {
    if (names.has(name)) continue;
    row.remove();
    rows.delete(name);
  }
  snapshot.nodes.forEach((node, index) => {
    const shown = rows.get(node.name) ?? makeNode(node.name);
    rows.set(node.name, shown);
    if (body.children[index] !== shown.row) body.insertBefore(shown.row, body.children[index] ?? null);
    showNode(shown, node, elapsed);
  });
  byId("no-nodes").hidden = snapshot.nodes.length > 0;
}

/** @param {ReturnType<typeof makeNode>} shown @param {Node} node @param {number} elapsed */
function showNode({ row, set, load, memory, text }, node, elapsed) {
  /** @param {string} key @param {string} value */
  const say = (key, value) => put(/** @type {Element} */ (text[key]), value);
  const later = (/** @type {number | null} */ seconds) => (seconds === null ? null : seconds + elapsed);
  const heartbeat = silence(node, elapsed);
  row.classList.toggle("old", isOld(node, elapsed));
  mark(row, "state", node.state);
  set(node.state);
  say("device", node.device ?? "device unknown");
  const up = node.uptime_seconds === null ? "" : `up ${age(node.uptime_seconds)}`;
  const place = [node.address ?? "address unknown", node.pid === null ? "" : `pid ${node.pid}`, up, node.joins > 1 ? `joined ${node.joins} times` : ""];
  say("place", place.filter(Boolean).join(" · "));

  const ratio = loadRatio(node);
  say("layers", node.layers ? `${layers(node.layers)} · ${percent(ratio)}` : "none");
  load.set([ratio]);
  load.bar.hidden = node.layers === null;
  say("loaded", node.load.bytes_total ? `${bytes(node.load.bytes)} of ${bytes(node.load.bytes_total)}` : "");

  const { weights_bytes: weights, kv_bytes: kv, free_bytes: free, rss_bytes: rss } = node.memory;
  const whole = (weights ?? 0) + (kv ?? 0) + (free ?? 0);
  memory.set(whole > 0 ? [(weights ?? 0) / whole, (kv ?? 0) / whole] : [0, 0]);
  say("weights", bytes(weights));
  say("kv", bytes(kv));
  say("free", bytes(free));
  say("rss", bytes(rss));

  say("rate", number(node.tokens_per_second));
  say("idle", node.idle_ratio === null ? "" : `idle ${percent(node.idle_ratio)}`);
  say("step", duration(node.step_seconds_p50));
  say("queue", node.queue_depth === null ? "" : `queue ${node.queue_depth}`);
  say("heartbeat", heartbeat === null ? UNKNOWN : `${age(heartbeat)} ago`);
  say("error", node.last_error ?? "none");
  mark(/** @type {HTMLElement} */ (text.error), "error", node.last_error === null ? "none" : node.state === "down" || node.state === "excluded" ? "now" : "past");
  say("errorAge", node.last_error === null || node.last_error_age_seconds === null ? "" : `${age(later(node.last_error_age_seconds))} ago`);
}

const EVENTS_SHOWN = 10;

/** Latest first. @param {Snapshot} snapshot @param {number} elapsed */
function showEvents(snapshot, elapsed) {
  const list = byId("events");
  const events = snapshot.events.slice(-EVENTS_SHOWN).reverse();
  while (list.children.length > events.length) list.lastElementChild?.remove();
  events.forEach((event, index) => {
    const item = list.children[index] ?? list.appendChild(make("li", undefined, make("span", "when"), make("code"), make("span", "what")));
    put(/** @type {Element} */ (item.children[0]), `${age(event.age_seconds + elapsed)} ago`);
    put(/** @type {Element} */ (item.children[1]), event.code);
    put(/** @type {Element} */ (item.children[2]), event.text);
  });
  byId("no-events").hidden = events.length > 0;
}

/**
 * Shows `snapshot` as it was `elapsed` seconds ago; `stale` when that is too long to pass for now.
 * @param {Snapshot | null} snapshot @param {number} elapsed @param {boolean} stale
 */
export function show(snapshot, elapsed, stale) {
  showVerdict(snapshot, elapsed, stale);
  announce(snapshot, stale);
  if (!snapshot) return;
  // A cluster that nobody named has the program's name, which stands there already.
  put(byId("cluster"), snapshot.cluster === "grokpipe" ? "" : snapshot.cluster);
  put(byId("model"), `${snapshot.model.name} · ${snapshot.model.layers} layers`);
  const stages = stagesOf(snapshot);
  showTiles(snapshot, elapsed, stale);
  showStrip(snapshot, stages, elapsed);
  showTwin(snapshot, stages);
  showNodes(snapshot, elapsed);
  showEvents(snapshot, elapsed);
}
