// What happened between two looks at the cluster: tokens a second, time a step. The same arithmetic as `tramontane status`.
// Pure functions over answers of GET /admin/cluster and the time they came; nothing of the page.

const WINDOW_S = 5; // rates are means over about this long
const HISTORY_S = 120; // what sparklines show

/** Looks: {view, atS}, oldest first. Adds one, forgets what is too old. */
export function remember(looks, look) {
  return [...looks.filter((old) => look.atS - old.atS < HISTORY_S), look];
}

/** {tokensPerS, ranks: [{stepS, allReduceS}]} of a replica in the newest look; null for what is not known yet. */
export function rateOf(looks, replica) {
  const last = looks.at(-1);
  const known = looks
    .slice(0, -1)
    .filter((look) => last.atS - look.atS <= WINDOW_S + 0.5)
    .map((look) => [look, find(look, replica)])
    .find(([, before]) => before);
  if (!known) return { tokensPerS: null, ranks: [] };
  const [look, before] = known;
  return {
    tokensPerS: slope(before, replica, last.atS - look.atS),
    ranks: replica.ranks.map((rank, i) => rankRate(before.ranks[i]?.stats, rank.stats)),
  };
}

/** Tokens a second between each two neighbouring looks: of one replica, or of all of them. */
export function history(looks, replica = null) {
  const points = [];
  for (let i = 1; i < looks.length; i++) {
    const elapsedS = looks[i].atS - looks[i - 1].atS;
    const after = replica ? [find(looks[i], replica)].filter(Boolean) : looks[i].view.replicas;
    const rates = after.map((r) => [find(looks[i - 1], r), r]).filter(([before]) => before);
    points.push(rates.reduce((sum, [before, r]) => sum + slope(before, r, elapsedS), 0));
  }
  return points;
}

/** The same start of the same replica: counters begin anew with another. */
function find(look, replica) {
  return look.view.replicas.find((r) => r.incarnation === replica.incarnation && r.replica_id === replica.replica_id);
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
