"use strict";
// Sorting, filtering and the choice of a plot's axis; the pages are complete without it.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function key(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.v ?? cell.textContent.trim();
  const number = Number(text.replace(/,/g, ""));
  return text === "" ? null : cell.classList.contains("number") && !Number.isNaN(number) ? number : text.toLowerCase();
}

function sort(header) {
  const table = header.closest("table"), body = table.tBodies[0], column = header.cellIndex;
  const up = header.getAttribute("aria-sort") !== "ascending";
  all("th[aria-sort]", table).forEach((h) => h.setAttribute("aria-sort", "none"));
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].map((row) => [key(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // what is unknown comes last
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en");
    return up ? order : -order;
  });
  body.append(...rows.map(([, row]) => row));
}

all("table.sortable th[aria-sort] button").forEach((b) => b.addEventListener("click", () => sort(b.parentElement)));

all("select.axis").forEach((select) =>
  select.addEventListener("change", () =>
    all(".plot", select.closest("figure")).forEach((plot) => (plot.hidden = plot.dataset.axis !== select.value))));

const form = document.querySelector("form.filters");

function filter() {
  const words = document.querySelector("#search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = Object.fromEntries(all("[data-filter]").map((s) => [s.dataset.filter, s.value]));
  const ranked = document.querySelector("#ranked").checked;
  let shown = 0, tables = 0;
  all("section.board").forEach((board) => {
    const fits = ["task", "model", "source"].every((k) => !wanted[k] || board.dataset[k] === wanted[k]);
    const about = board.querySelector("h2").textContent.toLowerCase();
    let left = 0;
    all("tbody tr", board).forEach((row) => {
      row.dataset.text ??= row.textContent.toLowerCase();
      const text = about + " " + row.dataset.text;
      row.hidden = !(fits && (!wanted.family || row.dataset.family === wanted.family) &&
        (!ranked || "ranked" in row.dataset) && words.every((w) => text.includes(w)));
      left += !row.hidden && !row.closest("table.beside");
    });
    board.hidden = left === 0;
    document.querySelector(`tr[data-board="${board.id}"]`).hidden = board.hidden;
    shown += left;
    tables += left > 0;
  });
  document.querySelector("#shown").textContent = `${shown} rows in ${tables} tables`;
}

if (form) {
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
