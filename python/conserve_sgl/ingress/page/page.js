"use strict";

/* Shows what GET conserve/status answers, once a second, and changes the server on demand. All text
   of the server's goes into the page as text, never as HTML: names of jobs come from clients. */

const POLL_MS = 1000;
const STRIP_S = 10;
const CHART_S = 300;
const RATE_S = 5; // a rate is over so long
const STEPS_AT_FIRST = 2048;
const OVERDUE_S = 5;

const BASE = location.pathname.replace(/\/conserve\/?$/, "");
const KEY = "conserve-key";
const ADMIN_KEY = "conserve-admin-key";
// In the order of the lanes; a step is [seq, start, seconds, idle, online prompt tokens, online rows,
// offline prompt tokens, offline rows, parked, sliced, bound, arrivals, preemptions, yields].
const LANES = [
  { name: "online-prompts", amount: (s) => s[4] },
  { name: "online", amount: (s) => s[5] },
  { name: "offline", amount: (s) => s[7] },
  { name: "offline-prompts", amount: (s) => (s[9] ? 0 : s[6]) },
  { name: "slices", amount: (s) => (s[9] ? s[6] : 0) },
];
const LANE_PX = 26;
const SETTINGS = ["ttft", "tpot", "yield_ms"];

const $ = (id) => document.getElementById(id);
const state = {
  shown: null, // the latest record
  seenAt: 0,
  server: null,
  next: null,
  steps: [], // of STRIP_S, oldest first
  tokens: [], // [at, offline tokens since the start] of CHART_S
  events: [], // [at, events] of the last minute
  filled: new Map(), // what an element shows
  cancels: new Map(), // buttons, by batch
  chart: null,
};

/* ---------------------------------------------------------------- words and numbers */

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });

const timeOfDay = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");
const number = (value) => (value == null ? "–" : whole.format(value));
const count = (value, what) => `${number(value)} ${what}${value === 1 ? "" : "s"}`;
const percent = (share) => (share == null ? "–" : `${whole.format(100 * share)} %`);

function milliseconds(ms) {
  if (ms == null) return "–";
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 100 ? `${whole.format(ms)} ms` : `${ms.toFixed(1)} ms`;
}

function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} days`;
}

function moment(at, now) {
  if (at == null) return "";
  const when = clock.format(new Date(at * 1000));
  return at >= now ? `${when}, in ${duration(at - now)}` : `${when}, ${duration(now - at)} ago`;
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text != null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function put(id, text) {
  const at = $(id);
  if (at.textContent !== text) at.textContent = text;
}

/* Where the content stays the same the elements do; focus stays on what is used again. */
function refill(at, content, make) {
  const now = JSON.stringify(content);
  if (state.filled.get(at) === now) return;
  state.filled.set(at, now);
  const focused = at.contains(document.activeElement) ? document.activeElement : null;
  at.replaceChildren(...make());
  if (focused?.isConnected) focused.focus({ preventScroll: true });
}

function bar(parts, label, thin) {
  const made = element("div", null, thin ? "bar thin" : "bar");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  for (const [className, share] of parts) {
    if (!(share > 0)) continue;
    const part = element("i", null, className);
    part.style.width = `${Math.min(100, 100 * share)}%`;
    made.append(part);
  }
  return made;
}

function row(heads, first, ...cells) {
  const made = document.createElement("tr");
  const head = element("th", first);
  head.scope = "row";
  made.append(head);
  cells.forEach((cell, i) => {
    const td = document.createElement("td");
    td.dataset.name = heads[i];
    if (cell instanceof Node) {
      td.append(cell);
    } else {
      td.textContent = cell.text ?? cell;
      td.className = cell.className ?? "";
    }
    made.append(td);
  });
  return made;
}

const numeric = (text, bad) => ({ text, className: bad ? "number bad" : "number" });

/* ---------------------------------------------------------------- what is shown */

function show(snapshot) {
  if ($("content").hidden) performance.mark("shown");
  $("content").hidden = false;
  $("key-form").hidden = true;
  const { server } = snapshot;
  document.title = `${server.model} · conserve`;
  put("server", `${server.model} on ${server.host}, up ${duration(snapshot.at_s - server.started_at_s)}`);
  showWhy(snapshot);
  showOnline(snapshot.online);
  showOffline(snapshot);
  showStrip();
  showKv(snapshot.kv);
  showEvents(snapshot);
  showJobs(snapshot);
  showBatches(snapshot);
  showDial(snapshot.settings);
}

function showWhy({ why, settings, batches }) {
  put("sentence", why.text);
  const total = Object.values(why.seconds).reduce((sum, s) => sum + s, 0);
  const shares = Object.entries(why.seconds).sort((a, b) => b[1] - a[1]);
  const parts = shares.filter(([, s]) => s >= 0.005 * total).map(([w, s]) => `${w} ${percent(s / total)}`);
  put("bounds", total ? `Of the last ${duration(total)}: ${parts.join(", ")}.` : "");
  const offline = $("offline-switch");
  put("offline-switch", settings.offline === "pause" ? "Resume offline work" : "Pause offline work");
  offline.disabled = settings.offline === "end";
  $("batches-switch").hidden = settings.batches === "run" && batches.length === 0;
  put("batches-switch", settings.batches === "hold" ? "Send batches" : "Hold batches");
}

function showOnline(online) {
  const heads = ["P50", "P99", "objective", "within", "P99 of the objective"];
  const lines = [["TTFT", online.ttft], ["TPOT", online.tpot], ["ITL", online.itl]];
  refill($("latencies").tBodies[0], lines, () =>
    lines.map(([name, of]) => {
      const late = of.objective_ms != null && of.p99_ms > of.objective_ms;
      const share = of.objective_ms ? of.p99_ms / of.objective_ms : null;
      const label = share == null ? "no objective yet" : `P99 at ${percent(share)} of the objective`;
      const samples = of.samples ? percentWithin(of.within) : "no samples";
      return row(
        heads, name, numeric(milliseconds(of.p50_ms)), numeric(milliseconds(of.p99_ms), late),
        numeric(milliseconds(of.objective_ms)), numeric(samples),
        share == null ? "" : bar([[late ? "beyond" : "within", share]], label, true),
      );
    }));
  put("online-window", `of the last ${duration(online.window_s)}`);
  put("online-now",
    `${count(online.rows, "row")} decoding, ${count(online.waiting, "prompt")} waiting or computed, ` +
    `${number(online.arriving)} announced. ${count(online.arrivals, "arrival")} since the start.`);
}

/* Never 100 % when one was late. */
function percentWithin(share) {
  if (share == null) return "–";
  return share === 1 ? "100 %" : `${(Math.floor(1000 * share) / 10).toFixed(1)} %`;
}

function showOffline({ offline }) {
  const { tokens_per_s: rate, alone_tokens_per_s: alone } = offline;
  put("rate", number(rate));
  put("alone", number(alone));
  put("share", rate == null || !alone ? "–" : percent(rate / alone));
  drawChart(alone);
}

function showKv(kv) {
  const at = $("kv");
  refill(at, kv, () => {
    if (!kv) return [element("p", "This server does not tell.", "note")];
    const held = kv.offline - kv.checkpointed;
    const parts = [
      ["online", "online", kv.online],
      ["offline", "offline", held],
      ["offline-prompts", "offline, checkpointed", kv.checkpointed],
      ["cached", "cached, of nobody that runs", kv.cached],
      ["free", "free", kv.free],
    ];
    const made = [
      element("h3", `On the device: ${number(kv.total)} tokens`),
      ...shares(parts, kv.total),
      element("p", `${number(kv.reserved)} of what is free or cached are left to online requests.`, "note"),
    ];
    if (kv.host) {
      const { total, used, pinned } = kv.host;
      made.push(
        element("h3", `On the host: ${number(total)} tokens`),
        ...shares([
          ["offline-prompts", "kept for offline requests", pinned],
          ["cached", "cached", used - pinned],
          ["free", "free", total - used],
        ], total));
    }
    return made;
  });
}

function shares(parts, total) {
  const text = parts.map(([, name, tokens]) => `${name} ${percent(tokens / total)}`).join(", ");
  const list = element("ul", null, "legend");
  for (const [className, name, tokens] of parts) {
    const item = document.createElement("li");
    item.append(element("i", null, className), `${name} ${number(tokens)}`);
    list.append(item);
  }
  return [bar(parts.slice(0, -1).map(([c, , tokens]) => [c, tokens / total]), text), list];
}

const EVENTS = [
  ["preemptions", "preemptions"],
  ["yields", "prefills that yielded"],
  ["rows_parked", "rows made to sit out"],
  ["restored_tokens", "tokens found again"],
  ["recomputed_tokens", "tokens computed again"],
];

function showEvents({ at_s: now, events }) {
  state.events.push([now, events]);
  while (state.events[0][0] < now - 60) state.events.shift();
  const before = state.events[0][1];
  put("events-since", `since the start, and in the last ${duration(now - state.events[0][0])}`);
  const lines = EVENTS.map(([key, name]) => [name, events[key], events[key] - before[key]]);
  refill($("events"), lines, () =>
    lines.map(([name, total, late]) => {
      const made = document.createElement("div");
      const value = element("dd", number(total));
      value.append(" ", element("small", `+${number(late)}`));
      made.append(element("dt", name), value);
      return made;
    }));
}

function showJobs({ at_s: now, jobs, batches, offline }) {
  const oldest = offline.waiting ? `, the oldest for ${duration(offline.oldest_wait_s)}` : "";
  const late = offline.at_risk ? `; ${number(offline.at_risk)} will be late at this rate` : "";
  put("queue",
    `${number(offline.waiting)} wait${oldest}${late}; ` +
    `${number(offline.rows)} run, ${number(offline.parked)} sit out. ` +
    `Answered since the start: ${number(offline.finished)}.`);
  const heads = ["waiting", "running", "answered", "progress", "deadline", "done at"];
  refill($("jobs").tBodies[0], [jobs, batches, Math.floor(now / 10)], () => {
    if (!jobs.length) return [nothing(7, "No offline request is here.")];
    return jobs.map((job) => {
      const batch = batches.find((one) => one.id === job.name);
      const total = batch ? batch.total : job.finished + job.waiting + job.running;
      const done = batch ? batch.completed + batch.failed : job.finished;
      const isLate = job.deadline_at_s != null && job.done_at_s > job.deadline_at_s;
      const eta = moment(job.done_at_s, now);
      return row(
        heads, job.name || "without a name", numeric(number(job.waiting)), numeric(number(job.running)),
        numeric(number(job.finished)), progress(done, total),
        moment(job.deadline_at_s, now) || "none",
        { text: isLate ? `${eta}: late` : eta || "nobody knows", className: isLate ? "bad" : "" },
      );
    });
  });
}

function progress(done, total) {
  const share = total ? done / total : 0;
  const made = bar([["within", share]], `${percent(share)}: ${number(done)} of ${number(total)}`, true);
  made.title = `${number(done)} of ${number(total)}`;
  return made;
}

function showBatches({ at_s: now, batches }) {
  const heads = ["status", "progress", "failed", "expires", ""];
  refill($("batches").tBodies[0], [batches, Math.floor(now / 10)], () => {
    if (!batches.length) return [nothing(6, "No batch is under way.")];
    return batches.map((batch) => {
      const cancel = cancelButton(batch.id);
      cancel.disabled = batch.status === "cancelling" || batch.status === "finalizing";
      return row(
        heads, batch.id, batch.status, progress(batch.completed + batch.failed, batch.total),
        numeric(number(batch.failed), batch.failed > 0), moment(batch.expires_at_s, now), cancel);
    });
  });
}

function cancelButton(id) {
  if (!state.cancels.has(id)) {
    const made = element("button", "Cancel");
    made.type = "button";
    made.setAttribute("aria-label", `Cancel ${id}`);
    made.addEventListener("click", () => askToCancel(id));
    state.cancels.set(id, made);
  }
  return state.cancels.get(id);
}

function nothing(columns, text) {
  const made = document.createElement("tr");
  const cell = element("td", text, "note");
  cell.colSpan = columns;
  made.append(cell);
  return made;
}

/* What somebody is typing stays. */
function showDial(settings) {
  for (const key of SETTINGS) {
    const input = $(key);
    const holds = String(settings[key]);
    if (input.dataset.holds === holds) continue;
    if (input.value === (input.dataset.holds ?? "")) input.value = holds;
    input.dataset.holds = holds;
  }
}

/* ---------------------------------------------------------------- step by step */

function keep(snapshot) {
  const { server, at_s: now } = snapshot;
  const who = `${server.pid} ${server.started_at_s}`;
  if (state.server !== who) Object.assign(state, { server: who, steps: [], tokens: [], events: [] });
  state.next = snapshot.next_step;
  state.steps.push(...snapshot.steps);
  state.steps = state.steps.filter((step) => step[1] + (step[2] ?? 0) > now - STRIP_S);
  const { computed, output } = snapshot.offline.tokens;
  state.tokens.push([now, computed + output]);
  state.tokens = state.tokens.filter(([at]) => at > now - CHART_S - RATE_S);
}

function showStrip() {
  const { steps } = state;
  const until = state.shown.at_s;
  const since = until - STRIP_S;
  const spans = LANES.map(() => 0);
  let busy = 0;
  for (const step of steps) {
    const seconds = Math.min(step[2] ?? 0, step[1] + (step[2] ?? 0) - since);
    busy += seconds;
    LANES.forEach((lane, i) => { if (lane.amount(step)) spans[i] += seconds; });
  }
  LANES.forEach((lane, i) => put(`share-${lane.name}`, percent(spans[i] / STRIP_S)));
  put("share-idle", percent(Math.max(0, 1 - busy / STRIP_S)));
  const total = (at) => steps.reduce((sum, step) => sum + step[at], 0);
  put("strip-note",
    `${count(steps.length, "step")}; ${count(total(11), "online arrival")} (ticks above), ` +
    `${count(total(12), "preemption")} and ${count(total(13), "yield")} (ticks below). ` +
    "The stronger the colour, the more of it in the step.");
  drawStrip(steps, since, until);
}

function drawStrip(steps, since, until) {
  const canvas = $("strip");
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const x = (at) => Math.max(0, ((at - since) / (until - since)) * width);
  const colours = colors();
  const most = LANES.map((lane) => Math.max(1, ...steps.map(lane.amount)));
  pen.fillStyle = colours.line;
  for (let lane = 1; lane <= LANES.length; lane++) pen.fillRect(0, lane * LANE_PX, width, 1);
  let end = since;
  for (const step of steps) {
    const [left, right] = [x(step[1]), x(step[1] + (step[2] ?? 0))];
    pen.globalAlpha = 1;
    pen.fillStyle = colours.idle;
    if (step[1] - end > 0.001) pen.fillRect(x(end), LANES.length * LANE_PX + 6, left - x(end), LANE_PX - 12);
    end = step[1] + (step[2] ?? 0);
    LANES.forEach((lane, i) => {
      const amount = lane.amount(step);
      if (!amount) return;
      pen.globalAlpha = 0.35 + 0.65 * (amount / most[i]);
      pen.fillStyle = colours[lane.name];
      pen.fillRect(left, i * LANE_PX + 5, Math.max(right - left - 0.5, 0.7), LANE_PX - 10);
    });
    pen.globalAlpha = 1;
    pen.fillStyle = colours.text;
    if (step[11]) pen.fillRect(left, 0, 1, 5);
    if (step[12] || step[13]) pen.fillRect(left, height - 5, 1, 5);
  }
  pen.globalAlpha = 1;
  pen.fillStyle = colours.idle;
  if (until - end > 0.001) pen.fillRect(x(end), LANES.length * LANE_PX + 6, width - x(end), LANE_PX - 12);
}

function colors() {
  const style = getComputedStyle(document.documentElement);
  const names = [...LANES.map((lane) => lane.name), "idle", "line", "text", "quiet", "accent"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/* ---------------------------------------------------------------- offline tokens over time */

function ratesOverTime() {
  const at = [];
  const rates = [];
  let from = 0;
  state.tokens.forEach(([now, tokens], i) => {
    while (from + 1 < i && state.tokens[from + 1][0] <= now - RATE_S) from++;
    const [since, before] = state.tokens[from];
    if (now - since < RATE_S - 1) return;
    at.push(now);
    rates.push((tokens - before) / (now - since));
  });
  return [at, rates];
}

function drawChart(alone) {
  const [at, rates] = ratesOverTime();
  const data = [at, rates, at.map(() => alone)];
  const box = $("rate-chart");
  const mean = rates.length ? rates.reduce((sum, rate) => sum + rate, 0) / rates.length : null;
  box.setAttribute("aria-label",
    `Offline tokens a second since this page was opened, at most 5 minutes: ${number(mean)} on ` +
    `average; with no online request ${number(alone)}.`);
  const size = { width: Math.floor(box.clientWidth), height: 180 };
  if (!size.width) return;
  if (!state.chart) {
    state.chart = new uPlot(chartOptions(size), data, box);
    return;
  }
  if (state.chart.width !== size.width) state.chart.setSize(size);
  state.chart.setData(data);
}

/* From when the page was opened, but no less than a minute. */
function chartSpan() {
  const now = state.shown.at_s;
  const first = state.tokens.length ? state.tokens[0][0] + RATE_S : now;
  return [Math.max(now - CHART_S, Math.min(first, now - 60)), now];
}

function chartOptions(size) {
  const colours = colors();
  const axis = { stroke: colours.quiet, grid: { stroke: colours.line, width: 1 }, ticks: { stroke: colours.line } };
  const font = "12px system-ui, sans-serif";
  return {
    ...size,
    legend: { show: false },
    cursor: { show: false },
    scales: {
      x: { range: chartSpan },
      y: { range: (_, low, high) => [0, Math.max(1, high * 1.1)] },
    },
    axes: [
      { ...axis, font, size: 30, space: 80, values: (_, ticks) => ticks.map(timeOfDay) },
      { ...axis, font, size: 64, values: (_, ticks) => ticks.map(number) },
    ],
    series: [
      {},
      { label: "offline", stroke: colours.offline, width: 2, points: { show: false } },
      { label: "alone", stroke: colours.quiet, width: 1.5, dash: [6, 4], points: { show: false } },
    ],
  };
}

/* ---------------------------------------------------------------- asking the server */

class Refused extends Error {
  constructor(status) {
    super(`${status}`);
    this.status = status;
  }
  get wantsKey() {
    return this.status === 401 || this.status === 403;
  }
}

async function ask(path, { key, body, method } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(BASE + path, {
    method: method ?? "GET",
    headers,
    body: body ? JSON.stringify(body) : undefined,
    cache: "no-store",
    redirect: "error",
    signal: AbortSignal.timeout(30000),
  });
  if (!response.ok) throw new Refused(response.status);
  return response.json();
}

async function poll() {
  try {
    if (!document.hidden && $("key-form").hidden) await look();
  } finally {
    setTimeout(poll, POLL_MS);
  }
}

async function look() {
  const query = state.next == null ? `steps=${STEPS_AT_FIRST}` : `since=${state.next}`;
  const key = sessionStorage.getItem(KEY);
  try {
    state.shown = await ask(`/conserve/status?${query}`, { key });
  } catch (fault) {
    if (fault instanceof Refused && fault.wantsKey) askForKey(key !== null);
    return; // showFreshness says for how long
  }
  state.seenAt = performance.now();
  keep(state.shown);
  show(state.shown);
}

function askForKey(wasRefused) {
  sessionStorage.removeItem(KEY);
  $("content").hidden = true;
  $("key-form").hidden = false;
  put("key-refused", wasRefused ? "The server does not take this key." : "");
  $("key").focus();
}

function showFreshness() {
  const at = $("freshness");
  if (!$("key-form").hidden) return put("freshness", "");
  const age = (performance.now() - state.seenAt) / 1000;
  const overdue = age > OVERDUE_S && !document.hidden;
  at.className = overdue ? "bad" : "";
  put("freshness", overdue ? `No answer for ${duration(age)}` : state.shown ? "Live" : "Asking the server");
}

/* ---------------------------------------------------------------- changing the server */

/* Ask first; then do it, and stay open with the reason where that fails. */
function confirmed(title, text, yes, act) {
  const dialog = $("ask");
  put("ask-title", title);
  put("ask-text", text);
  put("ask-yes", yes);
  put("ask-fault", "");
  $("ask-key").hidden = true;
  $("ask-yes").onclick = async (event) => {
    event.preventDefault();
    if ($("admin-key").value) sessionStorage.setItem(ADMIN_KEY, $("admin-key").value);
    $("ask-yes").disabled = true;
    try {
      await act();
      dialog.close();
    } catch (fault) {
      explain(fault);
    } finally {
      $("ask-yes").disabled = false;
    }
  };
  dialog.showModal();
  $("ask-no").focus();
}

function explain(fault) {
  if (fault instanceof Refused && fault.wantsKey) {
    sessionStorage.removeItem(ADMIN_KEY);
    put("ask-fault", "The server asks for its key for changes.");
    $("ask-key").hidden = false;
    $("admin-key").value = "";
    $("admin-key").focus();
  } else if (fault instanceof Refused) {
    put("ask-fault", `Not changed: the server answered ${fault.status}.`);
  } else {
    put("ask-fault", `Not changed: ${fault.message}`);
  }
}

const changeKey = () => sessionStorage.getItem(ADMIN_KEY) ?? sessionStorage.getItem(KEY);

async function change(numbers) {
  const body = { server_args: numbers };
  const updated = await ask("/set_internal_state", { method: "POST", key: changeKey(), body });
  if (!Array.isArray(updated) || !updated.every((one) => one === true)) {
    throw new Error("the server did not take it; its log says why.");
  }
}

function askToSwitchOffline() {
  const paused = state.shown.settings.offline === "pause";
  if (paused) {
    confirmed("Resume offline work?", "Its requests go on where they were.", "Resume",
      () => change({ conserve_offline: 1 }));
  } else {
    confirmed("Pause offline work?",
      "Its requests give up their rows and their KV and wait. Nothing is lost.", "Pause",
      () => change({ conserve_offline: 0 }));
  }
}

function askToSwitchBatches() {
  if (state.shown.settings.batches === "hold") {
    confirmed("Send batches?", "The lines of all batches are sent again.", "Send",
      () => change({ conserve_batches: 1 }));
  } else {
    confirmed("Hold batches?", "No more lines of any batch are sent; what is in flight goes on.", "Hold",
      () => change({ conserve_batches: 0 }));
  }
}

function askToCancel(id) {
  confirmed("Cancel the batch?", `${id}: what is answered is kept, the rest is not done.`, "Cancel the batch",
    () => ask(`/v1/batches/${encodeURIComponent(id)}/cancel`, { method: "POST", key: sessionStorage.getItem(KEY) }));
}

/* As conserve_sgl.settings has the names: a time and a factor are two of them. */
function dialled() {
  const numbers = {};
  const words = [];
  for (const key of SETTINGS) {
    const input = $(key);
    const text = input.value.trim().replace(/\s+/g, "");
    if (text === input.dataset.holds) continue;
    const [, amount, unit] = /^(\d+(?:\.\d+)?)(ms|x)?$/.exec(text) ?? [];
    const isTime = key === "yield_ms";
    if (amount === undefined || isTime === Boolean(unit)) {
      throw new Error(`${key}: ${text || "nothing"} is not ${isTime ? "a number such as 5" : "an objective such as 200ms or 1.25x"}`);
    }
    numbers[isTime ? "conserve_yield_ms" : `conserve_${key}_${unit}`] = Number(amount);
    words.push(`${key} from ${input.dataset.holds} to ${text}`);
  }
  return { numbers, words };
}

function askToDial(event) {
  event.preventDefault();
  put("dial-fault", "");
  try {
    const { numbers, words } = dialled();
    if (!words.length) throw new Error("nothing is different from what holds");
    confirmed("Change the dial?", `${words.join(", ")}, until the server restarts.`, "Change", async () => {
      await change(numbers);
      for (const key of SETTINGS) $(key).value = $(key).dataset.holds;
    });
  } catch (fault) {
    put("dial-fault", `Not changed: ${fault.message}.`);
  }
}

/* ---------------------------------------------------------------- start */

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!/^[\x21-\x7e]+$/.test($("key").value)) {
    put("key-refused", "No key has such characters.");
    return;
  }
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
});
$("offline-switch").addEventListener("click", askToSwitchOffline);
$("batches-switch").addEventListener("click", askToSwitchBatches);
$("dial").addEventListener("submit", askToDial);
$("ask-no").addEventListener("click", () => $("ask").close());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  state.chart?.destroy();
  state.chart = null;
  if (state.shown) show(state.shown);
});
setInterval(showFreshness, POLL_MS);
poll();
