"use strict";
const table = document.querySelector("table");
const body = table.tBodies[0];
const form = document.querySelector("#filters");
const heads = [...table.tHead.rows[0].cells];
const names = heads.map((head) => head.textContent);
const rows = [...body.rows];
const text = (row, column) => row.cells[column].textContent;

function show() {
  const wanted = [...form.querySelectorAll("select")]
    .filter((select) => select.selectedIndex > 0)
    .map((select) => [names.indexOf(select.name), select.value]);
  let count = 0;
  for (const row of rows) {
    row.hidden = !wanted.every(([column, value]) => text(row, column) === value);
    count += !row.hidden;
  }
  document.querySelector("#count").textContent = `${count} of ${rows.length} rows`;
}

function compare(a, b) {
  const [x, y] = [parseFloat(a), parseFloat(b)];
  if (!isNaN(x) && !isNaN(y)) return x - y;
  return a.localeCompare(b);
}

function sort(column) {
  const rising = heads[column].getAttribute("aria-sort") !== "ascending";
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", rising ? "ascending" : "descending");
  const known = (row) => text(row, column) !== "" && text(row, column) !== "diverged";
  rows.sort((a, b) => known(b) - known(a) ||
    (rising ? 1 : -1) * compare(text(a, column), text(b, column)));
  body.append(...rows);
}

heads.forEach((head, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = names[column];
  button.addEventListener("click", () => sort(column));
  head.replaceChildren(button);
});

for (const select of form.querySelectorAll("select")) {
  const column = names.indexOf(select.name);
  const values = new Set(rows.map((row) => text(row, column)));
  select.append(new Option("all", ""));
  for (const value of values) if (value) select.append(new Option(value, value));
  select.addEventListener("change", show);
}

function follow() {
  // cells.html#text-low-8 shows one stream.
  const stream = form.querySelector("select[name=stream]");
  const wanted = decodeURIComponent(location.hash.slice(1));
  if ([...stream.options].some((option) => option.value === wanted)) {
    stream.value = wanted;
  }
  show();
}

form.addEventListener("reset", () => setTimeout(show));
window.addEventListener("hashchange", follow);
form.hidden = false;
follow();
