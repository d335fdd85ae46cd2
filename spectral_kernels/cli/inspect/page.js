"use strict";
// The order and the choice of the rows. Without this script the table is as it was written.
(() => {
  const FEW = 400; // rows that are laid out quickly; a button shows all
  const table = document.getElementById("matrices");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const nameOf = new Map(rows.map((row) => [row, row.cells[0].textContent]));
  const heads = [...table.tHead.rows[0].cells];
  const input = document.getElementById("filter");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let order = rows;
  let isComplete = false;
  const byName = new Intl.Collator("en", { numeric: true }).compare;

  // A cell's number, where NaN is above all others; null: it is empty, or no number.
  function numberOf(cell) {
    const text = cell.dataset.v;
    if (text === undefined) return null;
    if (text.startsWith("nan")) return NaN;
    return Number(text.split(" ")[0].replace("inf", "Infinity"));
  }

  function larger(a, b) {
    if (Number.isNaN(a)) return Number.isNaN(b) ? 0 : 1;
    if (Number.isNaN(b)) return -1;
    return a === b ? 0 : a > b ? 1 : -1;
  }

  // Empty cells are last in both directions; equal ones keep the order of the page.
  function ordered(column, direction) {
    const isNumber = heads[column].dataset.order === "number";
    const keys = rows.map((row) => {
      const cell = row.cells[column];
      return isNumber ? numberOf(cell) : cell.textContent || null;
    });
    const compare = isNumber ? larger : byName;
    const places = rows.map((_, i) => i);
    places.sort((i, j) => {
      const a = keys[i], b = keys[j];
      if (a === null || b === null) return (a === null) - (b === null) || i - j;
      return direction * compare(a, b) || i - j;
    });
    return places.map((i) => rows[i]);
  }

  function sortBy(column) {
    const head = heads[column];
    const first = head.dataset.order === "number" ? "descending" : "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    // The third click brings back the order of the page.
    const next = { none: first, [first]: second, [second]: "none" }[head.getAttribute("aria-sort")];
    for (const other of heads) other.setAttribute("aria-sort", other === head ? next : "none");
    order = next === "none" ? rows : ordered(column, next === "ascending" ? 1 : -1);
    show();
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(column));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });

  // A part of the name in any case, or a pattern of the whole name if it has * or ?.
  function matcher(text) {
    const wanted = text.trim();
    if (!/[*?]/.test(wanted)) {
      const part = wanted.toLowerCase();
      return (name) => name.toLowerCase().includes(part);
    }
    const escaped = wanted.replace(/[.+^${}()|[\]\\]/g, "\\$&");
    const pattern = escaped.replace(/\*+/g, ".*").replace(/\?/g, ".");
    const expression = new RegExp(`^${pattern}$`, "is");
    return (name) => expression.test(name);
  }

  function show() {
    const matches = matcher(input.value);
    const found = order.filter((row) => matches(nameOf.get(row)));
    const shown = isComplete ? found : found.slice(0, FEW);
    const piece = document.createDocumentFragment();
    for (const row of shown) piece.append(row);
    body.replaceChildren(piece);
    more.hidden = shown.length === found.length;
    const cut = more.hidden ? "" : `, the first ${FEW} shown`;
    count.textContent = `${found.length} of ${rows.length}${cut}`;
  }

  function showAll() {
    isComplete = true;
    show();
  }

  input.addEventListener("input", show);
  more.addEventListener("click", showAll);
  window.addEventListener("beforeprint", showAll);
  document.querySelector(".filter").hidden = false;
  show(); // a browser may keep the text when it loads the page again
})();
