// Draws what one gateway has measured: waiting times, responses by status, failovers, tokens by key, and links.
// Knows the JSON of GET /admin/operations and the arithmetic of histograms. Sends no requests.

import { make } from "./dom.js";
import { table } from "./table.js";

const NOTHING = "–";

/** readings: {operations, atS}, oldest first. Times are of what came between the first and the last, or of all while that is nothing. */
export function showOperations(readings) {
  if (!readings.length) return null;
  const { operations } = readings.at(-1);
  const before = readings[0].operations;
  return make(
    "section",
    { class: "card operations", "aria-label": "This gateway" },
    make("header", {}, make("h2", {}, "This gateway"), make("span", { class: "hint" }, "times of the last minutes, counts since its start")),
    table(
      ["Time", "p50", "p99"],
      [
        ["To the first token", ...times(before.first_token, operations.first_token)],
        ["Between tokens", ...times(before.between_tokens, operations.between_tokens)],
      ],
    ),
    make(
      "dl",
      { class: "facts statuses" },
      ...Object.entries(operations.responses).map(([status, number]) => fact(`HTTP ${status}`, number.toLocaleString("en"))),
      fact("Failovers", operations.num_failovers.toLocaleString("en")),
    ),
    operations.keys.length > 0 && keys(operations.keys),
    make(
      "p",
      { class: "links" },
      make("a", { href: "docs" }, "API"),
      ...Object.entries(operations.links).map(([name, address]) => make("a", { href: address, rel: "noreferrer" }, name)),
    ),
  );
}

/** The value below which the share `q` of the counts lies, linear within a bucket, as Prometheus' histogram_quantile; null without counts. */
export function quantile(bounds, counts, q) {
  const total = counts.at(-1);
  if (!total) return null;
  const rank = q * total;
  const i = counts.findIndex((count) => count >= rank);
  if (i >= bounds.length) return bounds.at(-1); // above the last bound
  const low = i ? bounds[i - 1] : 0;
  const below = i ? counts[i - 1] : 0;
  return low + ((bounds[i] - low) * (rank - below)) / (counts[i] - below || 1);
}

/** The counts of what came after `before`; all, if nothing did. */
export function since(before, after) {
  const counts = after.counts.map((count, i) => count - (before.counts[i] ?? 0));
  return counts.at(-1) > 0 ? counts : after.counts;
}

function times(before, after) {
  return [0.5, 0.99].map((q) => time(before, after, q));
}

function time(before, after, q) {
  const seconds = quantile(after.bounds, since(before, after), q);
  if (seconds === null) return NOTHING;
  return seconds < 1 ? `${(seconds * 1000).toPrecision(3)} ms` : `${seconds.toPrecision(3)} s`;
}

function keys(list) {
  const rows = list.slice(0, 10).map((key) => [key.name, key.num_prompt_tokens.toLocaleString("en"), key.num_output_tokens.toLocaleString("en")]);
  return table(["Key", "Prompt tokens", "Output tokens"], rows);
}

function fact(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}
