// A document's chunks as a strip, darker where the model looked.

import { element, percent } from "./dom.js";

const MOST_CELLS = 120;

export class Strip {
  /** `chunks` of a document called `name`; `open(start, end)` is called with what is clicked at. */
  constructor(name, chunks, open) {
    this.name = name;
    this.chunks = chunks;
    this.perCell = Math.ceil(chunks.length / MOST_CELLS);
    this.cells = [];
    for (let first = 0; first < chunks.length; first += this.perCell) {
      const { start } = chunks[first];
      const { end } = chunks[Math.min(first + this.perCell, chunks.length) - 1];
      const cell = element("span", { onclick: () => open(start, end) });
      cell.style.flexGrow = end - start;
      this.cells.push(cell);
    }
    this.root = element("div", { class: "strip", role: "img" }, ...this.cells);
  }

  /** Show how much each chunk was looked at: a Map of chunk numbers to shares. `most`: the share that is darkest. */
  show(weights, most) {
    const sums = this.cells.map(() => 0);
    for (const [chunk, weight] of weights) sums[Math.floor(chunk / this.perCell)] += weight;
    this.cells.forEach((cell, index) => {
      cell.style.setProperty("--weight", Math.min(1, sums[index] / most).toFixed(3));
      cell.classList.toggle("seen", sums[index] > 0);
    });
    this.root.setAttribute("aria-label", this.words(weights));
  }

  words(weights) {
    const most = [...weights].sort((one, other) => other[1] - one[1]).slice(0, 3);
    const told = most.map(([chunk, weight]) => `chunk ${chunk + 1} (${percent(weight)})`);
    const of = `of ${this.chunks.length} in ${this.name}`;
    return told.length ? `Looked at ${told.join(", ")} ${of}` : `Looked at no chunk ${of}`;
  }
}
