"use strict";
(() => {
  const themes = ["auto", "light", "dark"];
  const theme = document.querySelector(".theme");
  if (theme) {
    theme.hidden = false;
    theme.addEventListener("click", () => {
      const next = themes[(themes.indexOf(theme.dataset.now) + 1) % themes.length];
      theme.dataset.now = next;
      theme.textContent = `Colours: ${next}`;
      if (next === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = next;
    });
  }

  const value = (row, column) => {
    const cell = row.cells[column];
    const own = cell.dataset.v;
    if (own === undefined) return cell.textContent.trim();
    return own === "" ? null : Number(own);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const body = head.closest("table").tBodies[0];
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentElement.querySelectorAll("[aria-sort]")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [value(row, head.cellIndex), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // nothing comes last, either way
        return up ? compare(a, b) : compare(b, a);
      });
      body.append(...rows.map(([, row]) => row));
    });
  }

  for (const tools of document.querySelectorAll(".tools")) {
    const rows = [...document.getElementById(tools.dataset.table).tBodies[0].rows];
    const search = tools.querySelector("input");
    const kinds = tools.querySelector("select");
    const count = tools.querySelector("[role=status]");
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const show = () => {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, index) => {
        const kind = !kinds || !kinds.value || row.classList.contains(kinds.value);
        row.hidden = !(kind && wanted.every((word) => texts[index].includes(word)));
        shown += !row.hidden;
      });
      count.textContent = `${shown} of ${rows.length} shown`;
    };
    tools.hidden = false;
    search.addEventListener("input", show);
    if (kinds) kinds.addEventListener("change", show);
    show();
  }

  addEventListener("beforeprint", () => {
    for (const closed of document.querySelectorAll("details:not([open])")) {
      closed.open = true;
      closed.dataset.closed = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const opened of document.querySelectorAll("details[data-closed]")) {
      opened.open = false;
      delete opened.dataset.closed;
    }
  });
})();
