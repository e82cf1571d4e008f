// The live view of the cluster: asks once a second while someone looks, and shows the answer.
// Knows GET /admin/cluster, and /health/ready for a key that may not see the former. How it looks is cluster_view.js's.

import { ApiError, getJson, send } from "./api.js";
import { showCluster, showHealth, showMessage } from "./cluster_view.js";
import { onKeyChange } from "./key.js";
import { remember } from "./rates.js";

const EVERY_MS = 1000;

/** {show(visible)}: whether the panel is the one that is seen. */
export function startCluster(panel) {
  let looks = [];
  let shown = false;
  let timer = null;
  let busy = false;
  let locked = false; // the user did not give a key: ask no more until there is one
  let note = null; // why there is less than the whole to see

  async function look() {
    try {
      if (note === null) {
        const view = await getJson("admin/cluster", { cache: "no-store" });
        looks = remember(looks, { view, atS: performance.now() / 1000 });
        showCluster(panel, looks);
      } else {
        showHealth(panel, await health(), note);
      }
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 403) note = `${error.message} This is what every key may see.`;
      else if (error.status === 404) note = "This server shows no cluster, only the health of its replicas.";
      else if (error.status === 401) {
        locked = true;
        showMessage(panel, "The cluster is shown to those who have a key.", { label: "Enter key", act: unlock });
      } else showMessage(panel, `${error.message} Trying again every second.`, { keep: looks.length > 0 });
    }
  }

  function unlock() {
    locked = false;
    tick();
  }

  /** Not an interval: a slow answer is waited for, never overtaken. */
  async function tick() {
    clearTimeout(timer);
    if (busy || locked || !shown || document.hidden) return;
    busy = true;
    try {
      await look();
    } finally {
      busy = false;
    }
    timer = setTimeout(tick, EVERY_MS);
  }

  document.addEventListener("visibilitychange", tick);
  onKeyChange(() => {
    looks = [];
    note = null;
    unlock();
  });
  showMessage(panel, "Looking at the cluster …");
  return {
    show(visible) {
      shown = visible;
      tick();
    },
  };
}

/** /health/ready answers 503 with the same body when nothing is ready. */
async function health() {
  const response = await send("health/ready", { cache: "no-store" });
  if (!response.ok && response.status !== 503) throw new ApiError("The server does not show its health to this key.");
  return response.json();
}
