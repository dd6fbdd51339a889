"use strict";
// What comes from the network enters the page as text nodes alone; the response's Trusted Types refuse anything else.

const EVERY_MS = 2000, PATIENCE_MS = 8000, WINDOW_S = 60;
const $ = (id) => document.getElementById(id);

function h(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) if (value !== null && value !== undefined) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// ---- figures in words

const NOTHING = "–";
const count = (n) => n >= 1e6 ? (n / 1e6).toPrecision(3) + "\u00a0M"
  : n >= 1e4 ? Number((n / 1e3).toPrecision(3)) + "\u00a0k" : String(Math.round(n));
const percent = (share) => (share > 0 && share < 0.01 ? "<\u00a01" : String(Math.round(100 * share))) + "\u00a0%";
const few = (n) => n > 0 && n < 10 ? n.toPrecision(2) : count(n);
const plural = (n, what) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;
const clock = (at) => new Date(1000 * at).toLocaleTimeString([], { hourCycle: "h23" });

function seconds(s) {
  if (s === null || s === undefined) return NOTHING;
  if (s === Infinity) return ">\u00a02\u00a0min";
  if (s < 0.01) return (1000 * s).toPrecision(2) + "\u00a0ms";
  return s < 1 ? Math.round(1000 * s) + "\u00a0ms" : s < 10 ? s.toFixed(2) + "\u00a0s" : Math.round(s) + "\u00a0s";
}

// The q-quantile of a histogram's cumulative buckets, linear within one; null where it is empty.
function quantile(buckets, q) {
  const wanted = q * buckets[buckets.length - 1][1];
  if (!(wanted > 0)) return null;
  let from = 0, below = 0;
  for (const [to, upTo] of buckets) {
    if (upTo >= wanted) return to === null ? Infinity : from + (to - from) * (wanted - below) / (upTo - below);
    [from, below] = [to, upTo];
  }
}

// ---- the last minute: this router's counters now, less those of a minute ago

let samples = [];

function lately(state) {
  const now = performance.now() / 1000;
  if (samples.length && samples[0].since !== state.since) samples = [];
  samples.push({ at: now, since: state.since, totals: state.totals, histograms: state.histograms });
  while (samples.length > 2 && now - samples[1].at >= WINDOW_S) samples.shift();
  const first = samples[0];
  const totals = (from) => Object.fromEntries(Object.entries(state.totals).map(([name, value]) => [name, value - (from ? from.totals[name] : 0)]));
  const buckets = (name, from) => state.histograms[name].map(([bound, value], i) => [bound, value - (from ? from.histograms[name][i][1] : 0)]);
  const used = (name) => buckets(name, first).at(-1)[1] > 0;
  return {
    seconds: now - first.at,
    totals: totals(first),
    all: totals(null),
    // of the last minute if anything happened in it, else of all time
    histogram: (name) => used(name) ? { buckets: buckets(name, first), when: "last min" } : { buckets: buckets(name, null), when: "since the start" },
  };
}

function figure(name, value, more, kind) {
  return h("div", { class: "figure" }, h("span", { class: "quiet" }, name), h("b", { class: kind }, value), h("span", { class: "quiet" }, more));
}

function showFigures(state) {
  const recent = lately(state);
  const running = state.pools.filter((pool) => pool.role !== "prefill").reduce((sum, pool) => sum + pool.running, 0);
  const waiting = state.pools.reduce((sum, pool) => sum + pool.waiting, 0);
  const latency = (title, name) => {
    const { buckets, when } = recent.histogram(name), middle = quantile(buckets, 0.5);
    return figure(title, seconds(middle), middle === null ? "nothing yet" : `p95 ${seconds(quantile(buckets, 0.95))}, ${when}`);
  };
  const [prompts, when] = recent.totals.prompt_tokens > 0 ? [recent.totals, "last min"] : [recent.all, "since the start"];
  const failed = recent.totals.request_failures + recent.totals.requests_refused;
  $("figures").replaceChildren(
    figure("Generating", count(running), `${count(waiting)} waiting${state.queued ? `, ${count(state.queued)} in the queue` : ""}`),
    latency("First token (p50)", "time_to_first_token_seconds"),
    latency("Between tokens (p50)", "inter_token_latency_seconds"),
    figure("Prompt tokens cached", prompts.prompt_tokens > 0 ? percent(prompts.cached_tokens / prompts.prompt_tokens) : NOTHING,
      prompts.prompt_tokens > 0 ? `of ${count(prompts.prompt_tokens)}, ${when}` : "nothing yet"),
    figure("Output, tokens/s", recent.seconds > 1 ? few(recent.totals.generation_tokens / recent.seconds) : NOTHING,
      `${plural(recent.totals.request_success, "answer")}, last min`),
    figure("Failed or refused", count(failed),
      recent.totals.migrations > 0 ? `last min; ${count(recent.totals.migrations)} moved` : "last min", failed > 0 ? "bad" : null),
  );
}

// ---- workers

const LOOKS = { ready: "good", degraded: "warn", draining: "warn", lost: "bad", "not ready": "bad", open: "bad" };

function bar(used, cached) {
  const made = h("span", { class: "bar", "aria-hidden": "true" });
  made.style.setProperty("--used", 100 * used + "%");
  made.style.setProperty("--cached-to", 100 * Math.max(used, cached) + "%");
  return made;
}

function workerRow(worker, pool) {
  const pace = [
    worker.prompt_tokens_per_s && pool.role !== "decode" ? `${count(worker.prompt_tokens_per_s)}\u00a0tok/s` : null,
    worker.step_s && pool.role !== "prefill" ? `${seconds(worker.step_s)}/step` : null,
  ].filter(Boolean).join(", ") || NOTHING;
  const told = [pool.versions > 1 ? worker.version : "", worker.tensor_parallel_size > 1 ? `TP ${worker.tensor_parallel_size}` : ""].filter(Boolean);
  const cached = worker.blocks_total ? worker.blocks_cached / worker.blocks_total : 0;
  const state = h("td", { class: LOOKS[worker.state] }, worker.state);
  if (worker.breaker === "open") state.append(" ", h("strong", { class: "bad" }, "left alone"));
  return h("tr", { class: worker.state === "lost" ? "old" : null },
    h("td", null, worker.id, told.length ? h("small", null, " " + told.join(" ")) : null),
    state,
    h("td", { class: "number", "data-name": "running" }, count(worker.running)),
    h("td", { class: "number", "data-name": "waiting" }, count(worker.waiting)),
    h("td", { "data-name": "KV", title: `${count(worker.used * worker.blocks_total)} of ${count(worker.blocks_total)} blocks held, ${count(worker.blocks_cached)} cached` },
      bar(worker.used, cached), percent(worker.used)),
    h("td", { class: "number", "data-name": "pace" }, pace));
}

function poolPanel(pool) {
  const states = Object.entries(pool.states);
  const used = pool.blocks_total ? 1 - pool.blocks_free / pool.blocks_total : 0;
  const head = h("header", null, h("h3", null, pool.role));
  for (const [state, n] of states) head.append(h("span", { class: LOOKS[state] }, `${count(n)} ${state}`));
  if (!states.length) head.append(h("strong", { class: "warn" }, "no worker"));
  if (pool.breakers_open) head.append(h("strong", { class: "bad" }, `${count(pool.breakers_open)} left alone`));
  if (pool.versions > 1) head.append(h("span", { class: "warn" }, `${pool.versions} versions`));
  if (states.length) head.append(h("span", { class: "quiet" }, `${count(pool.running)} running, ${count(pool.waiting)} waiting, KV ${percent(used)} of ${count(pool.blocks_total)} blocks`));
  const panel = h("section", { class: "pool", id: `pool-${pool.role}` }, head);
  if (pool.shown.length) panel.append(h("table", null,
    h("thead", null, h("tr", null, ...["Worker", "State", "Running", "Waiting", "KV held", "Pace"].map((name) =>
      h("th", { scope: "col", class: ["Running", "Waiting", "Pace"].includes(name) ? "number" : null }, name)))),
    h("tbody", null, ...pool.shown.map((worker) => workerRow(worker, pool)))));
  if (pool.left_out) panel.append(h("p", { class: "quiet" }, `${plural(pool.left_out, "calmer worker")} not shown: /cluster has all`));
  return panel;
}

function showFleet(state) {
  $("pools").replaceChildren(...state.pools.map(poolPanel));
  const others = Object.entries(state.others).map(([role, n]) => `${count(n)} ${role}`);
  $("others").textContent = others.length ? `Also there: ${others.join(", ")}` : "";
}

// ---- routes: a row stays the same element, so that what is open or focused stays so

const rows = new Map();
const path = (way) => way.prefill === "local" ? `${way.decode} alone` : `${way.prefill} → ${way.decode}`;

function routeWords(route) {
  const come = route.ttft_s !== null;
  const times = `${come ? `first token ${seconds(route.ttft_s)}` : "no first token"}${route.predicted_s === null ? "" : `, predicted ${seconds(route.predicted_s)}`}`;
  const flags = [
    route.degraded ? h("strong", { class: "warn" }, "degraded ") : null,
    route.moves ? h("strong", { class: "warn" }, `moved ${route.moves}× `) : null,
    route.hedged ? h("strong", null, `hedged: ${route.hedged} `) : null,
    route.queued_s ? h("strong", null, `queued ${seconds(route.queued_s)} `) : null,
    route.num_sequences > 1 ? h("strong", null, `${route.num_sequences} sequences `) : null,
  ];
  return [
    h("span", { class: "quiet" }, clock(route.at)),
    h("span", { class: "path" }, path(route)),
    h("span", null, times),
    h("span", null, come ? `cached ${count(route.cached_tokens)} of ${count(route.prompt_tokens)}` : plural(route.prompt_tokens, "token")),
    h("span", { class: "why quiet" }, ...flags, route.reason),
  ];
}

function showRoutes(routes) {
  const note = routes === null ? "With tenants configured, routes are shown for your API key: the playground has the field." :
    routes.length ? "" : "None yet (the router's setting `explained` says how many it remembers).";
  $("routes-note").textContent = note;
  $("routes-note").hidden = !note;
  const keys = (routes || []).map((route) => `${route.at} ${route.request_id}`);
  for (const [key, row] of rows) if (!keys.includes(key)) { row.element.remove(); rows.delete(key); }
  (routes || []).forEach((route, i) => {
    let row = rows.get(keys[i]);
    if (!row) {
      row = { element: h("details", { class: "route" }, h("summary"), h("div", { class: "inside" })), told: "" };
      row.element.addEventListener("toggle", () => { if (row.element.open) explain(row.element.lastChild, route.request_id); });
      rows.set(keys[i], row);
    }
    const told = JSON.stringify(route);
    if (row.told !== told) {
      row.element.firstChild.replaceChildren(...routeWords(route));
      row.told = told;
    }
    const there = $("routes").children[i];
    if (there !== row.element) $("routes").insertBefore(row.element, there || null);
  });
}

async function explain(inside, requestId) {
  inside.replaceChildren(h("p", null, h("span", { class: "id" }, requestId)), h("p", { class: "quiet" }, "Asking…"));
  let found;
  try {
    found = decisions(await ask(`debug/routes/${encodeURIComponent(requestId)}`));
  } catch (error) {
    found = [h("p", { class: "bad" }, error.message)];
  }
  inside.lastChild.replaceWith(...found);
}

function decisions(page) {
  return page.sequences.slice(0, 1).flatMap((sequence) => sequence.decisions.flatMap((decision, i) => [
    h("p", null, `${sequence.decisions.length > 1 ? `Placement ${i + 1}. ` : ""}What the policy compared:`),
    h("table", null,
      h("thead", null, h("tr", null, ...["Prefill → decode", "Cost", "First token", "To compute"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, ...decision.candidates.map((option, place) => h("tr", { class: place ? null : "chosen" },
        h("td", { title: option.forbidden ?? "" }, path(option), place ? (option.forbidden ? " (not allowed)" : "") : " (chosen)"),
        h("td", null, seconds(option.cost_s)),
        h("td", null, seconds(option.ttft_s)),
        h("td", null, `${count(option.missing_tokens)} tokens`))))),
    ...(i === sequence.decisions.length - 1 ? sequence.moves : []).map((move) => h("p", { class: "warn" }, `Moved: ${move}`)),
  ]));
}

// ---- asking the router, again and again

let paused = false, timer = 0, badKey = null;

async function ask(path, more) {
  const key = $("key").value.trim();
  const headers = { ...(key && key !== badKey ? { authorization: `Bearer ${key}` } : {}), ...(more && more.headers) };
  const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS), ...more, headers });
  if (response.ok) return more && more.whole ? response : response.json();
  const told = await response.json().catch(() => null);
  const error = new Error((told && told.error && told.error.message) || `the router answered ${response.status}`);
  if (response.status === 401 && key) badKey = key;  // not asked with again, each time of which is counted as a refusal
  error.status = response.status;
  throw error;
}

function say(status, why) {
  const word = { ready: "Ready", degraded: "Degraded", "not ready": "Not ready", unreachable: "Unreachable" }[status];
  $("status").textContent = paused ? `${word} (paused)` : word;
  $("status").className = LOOKS[status] || "bad";
  document.title = status === "ready" ? "Baton" : `${word} – Baton`;
  const more = status === "degraded" ? `${why}; until then decode workers compute the prompts, beside their tokens.` : why;
  const alarm = status === "ready" ? "" : `${word}: ${more}`;
  if ($("alarm").textContent !== alarm) $("alarm").textContent = alarm;  // said once, not every two seconds
  $("alarm").className = LOOKS[status] || "bad";
  $("alarm").hidden = !alarm;
}

async function look() {
  clearTimeout(timer);
  try {
    let state;
    try {
      state = await ask("console/state");
    } catch (error) {
      if (error.status !== 401) throw error;
      state = await ask("console/state");  // without the key that is wrong
    }
    $("about").textContent = `${state.model}, policy ${state.policy}`;
    $("key-field").hidden = !state.keys;
    say(state.status, state.why);
    showFigures(state);
    showFleet(state);
    showRoutes(state.routes);
    if (badKey && $("key").value.trim() === badKey) $("routes-note").textContent = "This API key is not known to the router.";
    document.querySelector("main").classList.remove("stale");
  } catch (error) {
    say("unreachable", `the router does not answer (${error.message}); what is shown is old.`);
    document.querySelector("main").classList.add("stale");
  }
  clearTimeout(timer);  // somebody else may have looked meanwhile
  if (!paused && !document.hidden) timer = setTimeout(look, EVERY_MS);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
  look();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) look(); });
$("key").addEventListener("change", () => { badKey = null; look(); });

// ---- the playground

let conversation = [], streaming = null;

function turn(role, text) {
  const made = h("div", { class: `turn ${role}` }, text);
  $("chat").append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

// The objects of a stream of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let left = "", read; !(read = await reader.read()).done;) {
    const parts = (left + read.value).split("\n\n");
    left = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

async function converse(message) {
  const turns = conversation;  // of which a new conversation knows nothing
  turns.push({ role: "user", content: message });
  turn("user", message);
  const answer = turn("assistant", ""), began = performance.now();
  let text = "", first = null, usage = null, route = "";
  const report = () => {
    const s = (performance.now() - began) / 1000, tokens = usage ? usage.completion_tokens : 0;
    const speed = tokens > 1 && s > first ? `, ${plural(tokens, "token")}, ${few((tokens - 1) / (s - first))} a second` : "";
    const way = route.replace(/; reason=.*/, "");  // its row below has the reason
    $("told").textContent = first === null ? "" : `First token after ${seconds(first)}${speed}. ${way}`;
  };
  streaming = new AbortController();
  busy(true);
  try {
    badKey = null;
    const response = await ask("v1/chat/completions", {
      whole: true, method: "POST", signal: streaming.signal, headers: { "content-type": "application/json" },
      body: JSON.stringify({
        messages: turns, stream: true, stream_options: { include_usage: true },
        max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
      }),
    });
    route = response.headers.get("x-baton-route") || "";
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (first === null) first = (performance.now() - began) / 1000;
      usage = event.usage || usage;
      if (event.baton) route = event.baton.route;  // as it was in the end
      const choice = event.choices[0];
      const piece = choice && choice.delta.content ? choice.delta.content : "";
      if (piece) answer.append(piece);
      text += piece;
      $("chat").scrollTop = $("chat").scrollHeight;
      if (!usage) report();
    }
    report();
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (answer.isConnected) turn(stopped ? "quiet" : "bad", stopped ? "Stopped." : error.message);
    if (error.status === 401) $("key").focus();
  }
  if (text) turns.push({ role: "assistant", content: text });
  else { turns.pop(); answer.remove(); }  // it may be asked again
  streaming = null;
  busy(false);
  look();
}

function busy(is) {
  $("chat").setAttribute("aria-busy", String(is));  // read out when it is whole
  $("send").hidden = is;
  $("stop").hidden = !is;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const message = $("message").value.trim();
  if (streaming || !message) return;
  $("message").value = "";
  converse(message);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && streaming) streaming.abort(); });
$("stop").addEventListener("click", () => { if (streaming) streaming.abort(); $("message").focus(); });
$("clear").addEventListener("click", () => {
  if (streaming) streaming.abort();
  conversation = [];
  $("chat").replaceChildren();
  $("told").textContent = "";
  $("message").focus();
});

look();
