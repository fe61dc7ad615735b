"use strict";
for (const heading of document.querySelectorAll("thead th")) {
  heading.classList.add("sorts");
  heading.title = "Click to sort";
  heading.addEventListener("click", () => {
    const column = heading.cellIndex;
    const body = heading.closest("table").tBodies[0];
    const down = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const text = (row) => row.cells[column].textContent.trim();
    const number = (row) => { const value = parseFloat(text(row)); return Number.isNaN(value) ? -Infinity : value; };
    const words = !heading.classList.contains("number");
    const rows = [...body.rows].sort((a, b) => (words ? text(a).localeCompare(text(b)) : number(a) - number(b)));
    if (down) rows.reverse();
    body.append(...rows);
  });
}
