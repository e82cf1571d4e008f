// Small charts: a bar and a sparkline. Knows no cluster.

import { make, makeSvg } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 28;

/** A bar filled to part/whole, with `label` for screen readers. */
export function bar(part, whole, label) {
  const share = whole ? Math.min(part / whole, 1) : 0;
  const fill = make("div", { class: share > 0.9 ? "fill high" : "fill" });
  fill.style.width = `${100 * share}%`;
  const range = { "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) };
  return make("div", { class: "gauge", role: "meter", "aria-label": label, ...range }, fill);
}

/** A line with its area, the newest point on the right, with room for `count` points. */
export function sparkline(points, count, label) {
  const top = Math.max(...points, 1e-9);
  const x = (i) => WIDTH - (points.length - 1 - i) * (WIDTH / (count - 1));
  const y = (value) => HEIGHT - 1.5 - (value / top) * (HEIGHT - 4);
  const line = points.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`);
  const svg = { class: "sparkline", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label };
  const ground = makeSvg("path", { class: "ground", d: `M0,${HEIGHT - 1.5} H${WIDTH}` });
  if (points.length < 2) return makeSvg("svg", svg, ground);
  return makeSvg(
    "svg",
    svg,
    ground,
    makeSvg("path", { class: "area", d: `M${x(0).toFixed(1)},${HEIGHT} L${line.join(" L")} L${WIDTH},${HEIGHT} Z` }),
    makeSvg("polyline", { points: line.join(" ") }),
  );
}
