// Sorting by heading: click, Enter or Space; the choice is kept in the address as #sort=kl or #sort=kl,desc.
(function () {
  "use strict";
  const table = document.querySelector("table.sortable");
  if (!table) return;
  const body = table.tBodies[0]; // reference rows live in a second body and stay where they are
  const headings = Array.from(table.tHead.rows[table.tHead.rows.length - 1].cells);
  const original = Array.from(body.rows);

  function valueOf(row, index, numeric) {
    const raw = row.cells[index].dataset.value;
    return raw === undefined ? null : numeric ? Number(raw) : raw;
  }

  function sort(key, descending) {
    const index = headings.findIndex((heading) => heading.dataset.key === key);
    if (index < 0) return;
    const numeric = headings[index].classList.contains("numeric");
    const compare = numeric ? (a, b) => a - b : (a, b) => a.localeCompare(b);
    const rows = original
      .map((row, position) => ({ row, position, value: valueOf(row, index, numeric) }))
      .sort((a, b) => {
        if (a.value === null || b.value === null) { // what was not measured comes last, either way
          return (a.value === null) - (b.value === null) || a.position - b.position;
        }
        const order = compare(a.value, b.value);
        return (descending ? -order : order) || a.position - b.position;
      });
    body.append(...rows.map((entry) => entry.row));
    headings.forEach((heading, at) =>
      heading.setAttribute("aria-sort", at !== index ? "none" : descending ? "descending" : "ascending"));
  }

  headings.forEach((heading) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      sort(heading.dataset.key, descending);
      history.replaceState(null, "", "#sort=" + heading.dataset.key + (descending ? ",desc" : ""));
    });
  });

  function fromAddress() {
    const match = /^#sort=([\w-]+)(,desc)?$/.exec(location.hash);
    if (match) sort(match[1], Boolean(match[2]));
  }
  addEventListener("hashchange", fromAddress);
  fromAddress();
})();
