// Draws which revisions of its adapters a deployment serves. Knows the registry in GET /admin/cluster. Sends no requests.

import { make } from "./dom.js";
import { table } from "./table.js";

const NOTHING = "–";

/** null without adapters. deployments: of several models, each with the names of its adapters. */
export function showAdapters({ adapters, revisions }, deployments = []) {
  if (!adapters.length) return null;
  const states = Object.fromEntries(revisions.map((revision) => [revision.id, revision.state]));
  const shown = (id) => (id === null ? NOTHING : [short(id), states[id] !== "ready" && ` (${states[id] ?? "gone"})`].filter(Boolean).join(""));
  const named = (name) => {
    const model = deployments.find((deployment) => deployment.adapters.includes(name))?.spec?.model_name;
    return model ? make("span", {}, name, make("span", { class: "hint below" }, `of ${model}`)) : name;
  };
  const rows = adapters.map((adapter) => [
    named(adapter.name),
    shown(adapter.current),
    adapter.canary === null ? NOTHING : `${shown(adapter.canary)}, ${Math.round(100 * adapter.canary_share)} %`,
    shown(adapter.previous),
  ]);
  return make(
    "section",
    { class: "card", "aria-label": "Adapters" },
    make("header", {}, make("h2", {}, "Adapters"), make("span", { class: "hint" }, "by revision; a canary with its share of the requests")),
    table(["Name", "Current", "Canary", "Previous"], rows),
  );
}

/** "support@4f2a91c0d3..." is "support@4f2a91c0". */
export function shortRevision(id) {
  return `${id.slice(0, id.lastIndexOf("@"))}@${short(id)}`;
}

/** "support@4f2a91c0d3..." is "4f2a91c0" below its adapter's name. */
function short(id) {
  return id.slice(id.lastIndexOf("@") + 1).slice(0, 8);
}
