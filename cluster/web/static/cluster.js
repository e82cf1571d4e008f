// The live view of the cluster: polls once a second while the page is visible.
// Knows GET /admin/cluster, and /health/ready for a key that is not an admin key. cluster_view.js draws it.

import { ApiError, getJson, send } from "./api.js";
import { showCluster, showHealth, showMessage } from "./cluster_view.js";
import { showOperations } from "./operations_view.js";
import { onKeyChange } from "./key.js";
import { remember } from "./rates.js";

const EVERY_MS = 1000;
const OPERATIONS_EVERY_S = 5;
const OPERATIONS_WINDOW_S = 300; // waiting times are of about the last five minutes

/** Returns {show(visible)}: call it when the panel becomes visible or hidden. */
export function startCluster(panel) {
  let snapshots = [];
  let shown = false;
  let timer = null;
  let busy = false;
  let locked = false; // the user entered no key: stop asking until there is one
  let note = null; // why the view is incomplete
  let readings = []; // of GET admin/operations: {operations, atS}, oldest first

  async function poll() {
    try {
      if (note === null) {
        const view = await getJson("admin/cluster", { cache: "no-store" });
        snapshots = remember(snapshots, { view, atS: performance.now() / 1000 });
        await readOperations();
        showCluster(panel, snapshots, showOperations(readings));
      } else {
        showHealth(panel, await health(), note);
      }
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 403) note = `${error.message} All keys can see this much.`;
      else if (error.status === 404) note = "This server has no cluster view, only the health of its replicas.";
      else if (error.status === 401) {
        locked = true;
        showMessage(panel, "Enter an API key to see the cluster.", { label: "Enter key", act: unlock });
      } else showMessage(panel, `${error.message} Trying again every second.`, { keep: snapshots.length > 0 });
    }
  }

  async function readOperations() {
    const atS = performance.now() / 1000;
    if (readings.length && atS - readings.at(-1).atS < OPERATIONS_EVERY_S) return;
    const operations = await getJson("admin/operations", { cache: "no-store" });
    readings = [...readings.filter((old) => atS - old.atS < OPERATIONS_WINDOW_S), { operations, atS }];
  }

  function unlock() {
    locked = false;
    tick();
  }

  /** Not an interval: the next poll starts after a slow response, never during it. */
  async function tick() {
    clearTimeout(timer);
    if (busy || locked || !shown || document.hidden) return;
    busy = true;
    try {
      await poll();
    } finally {
      busy = false;
    }
    timer = setTimeout(tick, EVERY_MS);
  }

  document.addEventListener("visibilitychange", tick);
  onKeyChange(() => {
    snapshots = [];
    readings = [];
    note = null;
    unlock();
  });
  showMessage(panel, "Loading the cluster …");
  return {
    show(visible) {
      shown = visible;
      tick();
    },
  };
}

/** /health/ready has status 503 and the same body if no replica is ready. */
async function health() {
  const response = await send("health/ready", { cache: "no-store" });
  if (!response.ok && response.status !== 503) throw new ApiError("This key cannot read the server's health.");
  return response.json();
}
