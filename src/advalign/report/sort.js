// Sort a table by a click, or a key, on a header: numbers from the largest, words from A, empty cells last.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], headers = [...table.tHead.rows[0].cells];
  const number = (text) => parseFloat(text.replace("−", "-").replace("(", ""));
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const text = (row) => row.cells[column].textContent.trim();
      const empty = (row) => ["", "–"].includes(text(row));
      const rows = [...body.rows], filled = rows.filter((row) => !empty(row));
      const numeric = filled.every((row) => !isNaN(number(text(row))));
      const before = header.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : numeric;
      const compare = (a, b) => numeric ? number(text(a)) - number(text(b)) : text(a).localeCompare(text(b));
      filled.sort((a, b) => (descending ? compare(b, a) : compare(a, b)));
      body.append(...filled, ...rows.filter(empty));
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}
