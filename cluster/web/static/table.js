// A table whose first column names its rows. Knows no cluster.

import { make } from "./dom.js";

/** names: of the columns. rows: lists of their cells, the first of which names the row; a row may have a `class`. */
export function table(names, rows) {
  return make(
    "table",
    {},
    make("thead", {}, make("tr", {}, names.map((name) => make("th", { scope: "col" }, name)))),
    make(
      "tbody",
      {},
      rows.map((row) => {
        const [name, ...cells] = row;
        return make("tr", { class: row.class }, make("th", { scope: "row" }, name), cells.map((cell) => make("td", {}, cell)));
      }),
    ),
  );
}
