const { headings, make, percent, visible } = window.views;

function cell(value, column, figures) {
  if (figures) return make("td", "bb-figure", value == null ? "cut" : value.toPrecision(4));
  const box = make("td", `bb-cell bb-${column}`);
  const fill = make("span", "bb-fill");
  fill.style.width = `${value * 100}%`;
  box.append(fill, make("span", "bb-share", percent(value)));
  return box;
}

function paint() {
  const value = props.value || {};
  const box = element.querySelector(".bb");
  box.replaceChildren();
  box.classList.toggle("bb-drawing", value.done != null && value.done < 1); // Draw turns into Stop: see page.css
  if (!value.rows) {
    box.append(make("p", "bb-note", value.empty || ""));
    return;
  }
  if (value.done != null && value.done < 1) {
    const bar = make("progress", "bb-progress");
    bar.max = 1;
    bar.value = value.done;
    bar.setAttribute("aria-label", "Draws made");
    box.append(bar);
  }
  const table = make("table", "bb-table");
  table.append(headings(["Token", ...value.columns]));
  for (const row of value.rows) {
    const line = make("tr", row.chosen ? "bb-chosen" : row.aside ? "bb-aside" : "");
    line.append(make("td", "bb-token", visible(row.label)));
    row.values.forEach((number, column) => line.append(cell(number, column, value.figures)));
    table.append(line);
  }
  box.classList.toggle("bb-stale", Boolean(value.stale));
  if (value.stale) box.append(make("p", "bb-warning", value.stale));
  box.append(table, make("p", "bb-note", value.note || ""));
}

watch("value", paint);
paint();
