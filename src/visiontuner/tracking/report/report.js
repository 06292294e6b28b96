"use strict";
// Tables with the class "sortable" are sorted by a click on a heading; without a script they stay
// as they are. A cell sorts by its data-value if it has one, and cells with nothing come last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table, headings, column));
  });
}

function sort(table, headings, column) {
  const again = headings[column].getAttribute("aria-sort") === "ascending";
  const sign = again ? -1 : 1;
  headings.forEach((heading) => heading.removeAttribute("aria-sort"));
  headings[column].setAttribute("aria-sort", again ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
  rows.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b)));
  body.append(...rows.map(([, row]) => row));
}

function key(cell) {
  return (cell.dataset.value ?? cell.textContent).trim();
}

function compare(a, b) {
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? a.localeCompare(b) : difference;
}

// The map of the images: what lies under the pointer is shown large, and only what is asked for
// keeps its colour. Without a script it stays as it is.
const map = document.querySelector("figure.map");
if (map) showMap(map);

function showMap(map) {
  const data = JSON.parse(map.querySelector("script").textContent);
  const [svg, form, tip] = ["svg", ".filter", ".tip"].map((name) => map.querySelector(name));
  const points = [...svg.querySelector(".points").children];
  let shown = points.map(() => true);

  form.hidden = false;
  form.addEventListener("change", () => {
    const [label, split] = [form.elements.class.value, form.elements.split.selectedIndex];
    const names = [...form.elements.split.options].map((option) => option.value);
    const splits = ["train", "validation", "test"];
    const boxes = [...form.querySelectorAll("input:checked")];
    const marks = boxes.reduce((sum, box) => sum | Number(box.value), 0);
    shown = points.map((_, row) =>
      (label === "" || data.labels[row] === Number(label)) &&
      (split === 0 || splits[data.splits[row]] === names[split]) &&
      (marks === 0 || (data.marks[row] & marks) !== 0));
    points.forEach((point, row) => point.classList.toggle("off", !shown[row]));
    for (const mark of svg.querySelectorAll(".marks > g")) {
      mark.classList.toggle("off", !shown[mark.dataset.row]);
    }
  });

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let nearest = -1, least = 15 ** 2;
    points.forEach((_, row) => {
      const distance = (data.x[row] - x) ** 2 + (data.y[row] - y) ** 2;
      if (shown[row] && distance < least) [nearest, least] = [row, distance];
    });
    tip.hidden = nearest < 0;
    if (nearest < 0) return;
    describe(nearest);
    const frame = map.getBoundingClientRect();
    const left = event.clientX - frame.left + 16, top = event.clientY - frame.top + 16;
    tip.style.left = `${Math.max(0, Math.min(left, frame.width - tip.offsetWidth - 8))}px`;
    tip.style.top = `${top}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });

  function describe(row) {
    const side = data.side, canvas = tip.querySelector("canvas");
    canvas.getContext("2d").drawImage(
      map.querySelector(".sprite"), (row % data.columns) * side,
      Math.floor(row / data.columns) * side, side, side, 0, 0, canvas.width, canvas.height);
    const lines = [data.classes[data.labels[row]], data.paths[row], data.said[row]];
    tip.querySelector("span").textContent = lines.filter(Boolean).join("\n");
  }
}
