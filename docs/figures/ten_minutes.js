// The seven figures of "Ten minutes", each in its place: <figure data-figure="...">. What a place holds before (a still
// picture) is what a page without scripts shows.

import { blockTable } from "./block_table.js";
import { growingCache } from "./growing_cache.js";
import { kernelProgram } from "./kernel_program.js";
import { onlineSoftmax } from "./online_softmax.js";
import { pageTables } from "./page_tables.js";
import { queryKeyValue } from "./query_key_value.js";
import { reservations } from "./reservations.js";

const FIGURES = { queryKeyValue, growingCache, reservations, pageTables, blockTable, onlineSoftmax, kernelProgram };

for (const place of document.querySelectorAll("[data-figure]")) {
  Promise.resolve(FIGURES[place.dataset.figure](place)).catch((error) => {
    place.textContent = `This figure could not be drawn: ${error.message}`;
  });
}
