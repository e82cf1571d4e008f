// Rates between two snapshots of the cluster: tokens per second, time per step. The same arithmetic as `tramontane status`.
// Pure functions over responses of GET /admin/cluster and their times. Knows nothing of the page.

const WINDOW_S = 5; // rates are means over about this time
const HISTORY_S = 120; // the time that sparklines show

/** Snapshots: {view, atS}, oldest first. Adds one and drops the old ones. */
export function remember(snapshots, snapshot) {
  return [...snapshots.filter((old) => snapshot.atS - old.atS < HISTORY_S), snapshot];
}

/** {tokensPerS, ranks: [{stepS, allReduceS}]} of a replica in the newest snapshot; null for what is not known yet. */
export function rateOf(snapshots, replica) {
  const last = snapshots.at(-1);
  const known = snapshots
    .slice(0, -1)
    .filter((snapshot) => last.atS - snapshot.atS <= WINDOW_S + 0.5)
    .map((snapshot) => [snapshot, find(snapshot, replica)])
    .find(([, before]) => before);
  if (!known) return { tokensPerS: null, ranks: [] };
  const [snapshot, before] = known;
  return {
    tokensPerS: slope(before, replica, last.atS - snapshot.atS),
    ranks: replica.ranks.map((rank, i) => rankRate(before.ranks[i]?.stats, rank.stats)),
  };
}

/** Tokens per second between neighbouring snapshots, of one replica or of all of them. */
export function history(snapshots, replica = null) {
  const points = [];
  for (let i = 1; i < snapshots.length; i++) {
    const elapsedS = snapshots[i].atS - snapshots[i - 1].atS;
    const after = replica ? [find(snapshots[i], replica)].filter(Boolean) : snapshots[i].view.replicas;
    const rates = after.map((r) => [find(snapshots[i - 1], r), r]).filter(([before]) => before);
    points.push(rates.reduce((sum, [before, r]) => sum + slope(before, r, elapsedS), 0));
  }
  return points;
}

/** The same incarnation of the same replica: counters restart with each new one. */
function find(snapshot, replica) {
  return snapshot.view.replicas.find((r) => r.incarnation === replica.incarnation && r.replica_id === replica.replica_id);
}

function slope(before, after, elapsedS) {
  const count = after.load.generated_tokens_total - before.load.generated_tokens_total;
  return elapsedS > 0 ? Math.max(count, 0) / elapsedS : 0;
}

function rankRate(before, after) {
  const numSteps = before ? after.num_steps_total - before.num_steps_total : 0;
  if (numSteps <= 0) return { stepS: null, allReduceS: null };
  const known = before.all_reduce_s_total !== null && after.all_reduce_s_total !== null;
  return {
    stepS: (after.step_s_total - before.step_s_total) / numSteps,
    allReduceS: known ? (after.all_reduce_s_total - before.all_reduce_s_total) / numSteps : null,
  };
}
