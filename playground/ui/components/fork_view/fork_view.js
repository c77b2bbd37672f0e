const { headings, make, percent, visible } = window.views;
let seen = "";

// columns on the same weights share the raw probabilities; on others each cell has its own
const shared = (value) => value.rows.some((row) => row.raw != null);

function content(cell, own) {
  const score = cell.score == null ? "" : `, score ${cell.score.toFixed(2)}`;
  return `${own ? `raw ${percent(cell.raw)}, after settings ` : ""}${percent(cell.processed)}${score}`;
}

function paint() {
  const value = props.value;
  const state = JSON.stringify(value);
  if (state === seen) return;
  seen = state;
  const box = element.querySelector(".fv");
  box.hidden = !value;
  box.replaceChildren();
  if (!value) return;
  if (value.note) {
    box.append(make("p", "", value.note));
    return;
  }
  box.append(make("p", "fv-title", `The texts part at token ${value.at + 1}.`));
  const table = make("table", "fv-table");
  table.append(headings(["Token", ...(shared(value) ? ["Raw"] : []), ...value.labels]));
  for (const row of value.rows) {
    const line = make("tr");
    line.append(make("td", "fv-token", visible(row.text)));
    if (shared(value)) line.append(make("td", "fv-figure", percent(row.raw)));
    for (const cell of row.cells) {
      const name = cell.chosen ? "fv-figure fv-chosen" : "fv-figure";
      line.append(make("td", name, content(cell, !shared(value))));
    }
    table.append(line);
  }
  const scroll = make("div", "fv-scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Probabilities at the fork");
  scroll.append(table);
  const list = make("ul", "fv-why");
  value.columns.forEach((column, index) => {
    list.append(make("li", "", `${value.labels[index]}: “${visible(column.text)}”, ${column.why}.`));
  });
  box.append(scroll, list);
}

watch("value", paint);
paint();
