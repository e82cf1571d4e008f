// Draws a ClusterView: figures, one card per replica with its ranks, the gateways. Drawn again with each snapshot; it is small.
// Knows the JSON of GET /admin/cluster and of /health/ready. Sends no requests.

import { showAdapters } from "./adapters_view.js";
import { make } from "./dom.js";
import { bar, sparkline } from "./gauges.js";
import { history, rateOf } from "./rates.js";
import { table } from "./table.js";

const NOTHING = "–";
const POINTS = 60; // of a sparkline, one per second

/** snapshots: from rates.js, at least one. operations: what operations_view.js made. */
export function showCluster(panel, snapshots, operations = null) {
  const { view } = snapshots.at(-1);
  const rates = view.replicas.map((replica) => rateOf(snapshots, replica));
  replace(
    panel,
    head(view),
    view.failure && make("p", { class: "notice error" }, `No more replicas are started: ${view.failure.message} ${view.failure.remedy ?? ""}`),
    ...view.notices.map(leaving),
    figures(view, rates, snapshots),
    view.replicas.length
      ? make("div", { class: "replicas" }, view.replicas.map((replica, i) => card(replica, rates[i], snapshots)))
      : make("p", { class: "empty" }, "No replica is running. If the deployment scales to zero, the next request starts one."),
    showAdapters(view.adapters, view.deployments),
    gateways(view.gateways),
    operations,
  );
}

/** The health only, for keys that cannot see the cluster. note: the reason. */
export function showHealth(panel, health, note) {
  const replicas = (health.replicas ?? []).toSorted((a, b) => a.id.localeCompare(b.id, "en", { numeric: true }));
  const isReady = health.status === "ok";
  replace(
    panel,
    make("div", { class: "panel-head" }, make("h1", {}, isReady ? "Ready" : "Not ready")),
    make("p", { class: "notice" }, note),
    health.models ? make("div", { class: "heads" }, health.models.map(modelHealth)) : health.reason && make("p", { class: isReady ? "notice" : "notice error" }, health.reason),
    make(
      "div",
      { class: "replicas" },
      replicas.map((r) =>
        make(
          "article",
          { class: "card" },
          make("header", {}, make("h2", {}, r.id), pill(r.state.replace("_", " "), r.state)),
          make("dl", { class: "facts" }, fact("Running", r.num_running), fact("Waiting", r.num_waiting)),
          r.reason && make("p", { class: "reason" }, r.reason),
        ),
      ),
    ),
  );
}

/** One of several models. A ready one with a reason sleeps. */
function modelHealth({ model, ready, reason }) {
  const state = !ready ? "not ready" : reason ? "asleep" : "ready";
  return make("div", { class: "panel-head" }, make("h2", {}, model), pill(state, state.replace(" ", "_")), reason && make("p", {}, reason));
}

/** A message instead of the view; with `keep`, above the last view. */
export function showMessage(panel, text, { keep = false, label = null, act = null } = {}) {
  const message = make(
    "div",
    { class: keep ? "notice error stale" : "empty", role: "status" },
    make("p", {}, text),
    label && make("button", { type: "button", class: "primary", onclick: act }, label),
  );
  panel.querySelector(".stale")?.remove();
  if (keep) panel.prepend(message);
  else replace(panel, message);
}

function replace(panel, ...children) {
  panel.replaceChildren(...children.filter(Boolean));
}

function leaving({ node_ip: ip, is_head: isHead, cause, deadline }) {
  const what = isHead ? `The head node ${ip}, and with it the whole cluster,` : `Node ${ip}`;
  const left = duration(Math.max(deadline - Date.now() / 1000, 0));
  return make("p", { class: "notice error" }, `${what} stops in ${left}: ${cause}`);
}

/** One line for the model, or for each of several. */
function head(view) {
  if (!view.deployments?.length) return headOf(view, view.replicas);
  const own = ({ replica_ids: ids }) => view.replicas.filter((r) => ids.includes(r.replica_id));
  return make("div", { class: "heads" }, ...view.deployments.map((deployment) => headOf(deployment, own(deployment))));
}

function headOf({ spec, num_desired: numDesired, scaling_reason: reason, failure }, replicas) {
  const numReady = replicas.filter((r) => r.state === "ready").length;
  const plural = numDesired === 1 ? "" : "s";
  const state = stateOfModel({ spec, numDesired, numReady, failure });
  const says = state === "asleep" ? ["no replica runs, the next request starts one"] : [`${numReady} of ${numDesired} replica${plural} ready`];
  if (spec && spec.min_replicas !== spec.max_replicas) says.push(`scales from ${spec.min_replicas} to ${spec.max_replicas}`);
  if (reason && !/^\d+ replicas? wanted\.$/.test(reason)) says.push(reason); // which says no more than the numbers
  return make(
    "div",
    { class: "panel-head" },
    make("h1", {}, spec?.model_name ?? "No model yet"),
    pill(state, state.replace(" ", "_")),
    make("p", {}, says.join(" · ")),
  );
}

function stateOfModel({ spec, numDesired, numReady, failure }) {
  if (numReady) return "ready";
  if (failure) return "failed";
  if (!numDesired) return "asleep";
  return spec?.min_replicas === 0 ? "waking" : "not ready";
}

function figures(view, rates, snapshots) {
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const known = rates.map((rate) => rate.tokensPerS).filter((rate) => rate !== null);
  const load = (name) => sum(view.replicas.map((r) => r.load[name]));
  const points = history(snapshots).slice(-POINTS);
  const blocks = load("num_blocks");
  return make(
    "dl",
    { class: "figures" },
    figure("Tokens per second", known.length ? count(sum(known)) : NOTHING, sparkline(points, POINTS, "Tokens per second in the last minute")),
    figure("KV cache", percent(load("num_used_blocks"), blocks), bar(load("num_used_blocks"), blocks, "KV cache in use")),
    figure("Running", count(load("num_running")), note("on replicas")),
    figure("Waiting", count(load("num_waiting")), note("on replicas")),
    figure("Queued", count(sum(view.gateways.map((g) => g.num_queued))), note("at gateways")),
  );
}

function figure(name, value, below) {
  return make("div", { class: "figure" }, make("dt", {}, name), make("dd", {}, make("span", { class: "value" }, value), below));
}

function note(text) {
  return make("span", { class: "hint" }, text);
}

function card(replica, rate, snapshots) {
  const { load } = replica;
  const kv = `${count(load.num_used_blocks)} of ${count(load.num_blocks)} blocks`;
  const points = history(snapshots, replica).slice(-POINTS);
  return make(
    "article",
    { class: "card" },
    make("header", {}, make("h2", {}, replica.replica_id), pill(stateOf(replica), replica.state), uptime(replica)),
    replica.facts?.device && make("p", { class: "hint" }, replica.facts.device),
    replica.reason && make("p", { class: "reason" }, replica.reason),
    replica.state === "starting" && bar(replica.progress[0], replica.progress[1], "Weights read"),
    make(
      "dl",
      { class: "facts" },
      fact("Tokens/s", rate.tokensPerS === null ? NOTHING : count(rate.tokensPerS)),
      fact("Running", count(load.num_running)),
      fact("Waiting", count(load.num_waiting)),
      fact("Cache hits", percent(load.prefix_hits_total, load.prefix_queries_total)),
    ),
    sparkline(points, POINTS, `Tokens per second of ${replica.replica_id} in the last minute`),
    make("div", { class: "kv" }, make("span", {}, "KV cache"), make("span", {}, load.num_blocks ? kv : NOTHING)),
    bar(load.num_used_blocks, load.num_blocks, `KV cache of ${replica.replica_id}`),
    replica.ranks.length > 0 && ranks(replica, rate),
    gpus(replica),
  );
}

function ranks(replica, rate) {
  const rows = replica.ranks.map((rank, i) => {
    const stuck = replica.load.stuck_ranks.includes(rank.rank);
    const row = [
      stuck ? `${rank.rank} stuck` : rank.rank,
      rank.node_ip,
      milliseconds(rate.ranks[i]?.stepS),
      milliseconds(rate.ranks[i]?.allReduceS),
    ];
    row.class = stuck && "stuck";
    return row;
  });
  return table(["Rank", "Node", "Step", "All-reduce"], rows);
}

/** What the drivers say, of the ranks that have a GPU. */
function gpus(replica) {
  const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);
  const rows = replica.ranks
    .filter((rank) => rank.stats.gpu)
    .map(({ rank, stats: { gpu } }) => [
      rank,
      `${gib(gpu.used_bytes)} of ${gib(gpu.total_bytes)} GiB`,
      gpu.temperature_c === null ? NOTHING : `${gpu.temperature_c} °C`,
    ]);
  return rows.length > 0 && table(["GPU of rank", "Memory", "Temperature"], rows);
}

function gateways(list) {
  if (!list.length) return null;
  const rows = list.map((g) => [g.url, count(g.num_running), count(g.num_queued)]);
  return make("section", { class: "card gateways" }, table(["Gateway", "Running", "Queued"], rows));
}

function pill(text, state) {
  return make("span", { class: `pill ${state}` }, text);
}

function uptime({ ready_at: readyAt }) {
  return readyAt !== null && make("span", { class: "hint" }, `up ${duration(Date.now() / 1000 - readyAt)}`);
}

function fact(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}

function stateOf({ state, phase, progress, drain_until: drainUntil }) {
  if (state === "starting") {
    const [done, total] = progress;
    return total ? `${phase ?? "starting"} ${Math.floor((100 * done) / total)} %` : (phase ?? "starting");
  }
  if (state === "draining" && drainUntil !== null) return `draining, ${Math.max(Math.round(drainUntil - Date.now() / 1000), 0)} s`;
  return state;
}

function count(value) {
  return Math.round(value).toLocaleString("en");
}

function percent(part, whole) {
  if (part > 0 && part / whole < 0.005) return "< 1 %";
  return whole ? `${Math.round((100 * part) / whole)} %` : NOTHING;
}

function milliseconds(seconds) {
  return seconds === null || seconds === undefined ? NOTHING : `${(seconds * 1000).toFixed(1)} ms`;
}

function duration(seconds) {
  const s = Math.max(Math.floor(seconds), 0);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}
