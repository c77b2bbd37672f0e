const { decode, first, headings, make, seed, state, tokens } = window.views;
const COLUMNS = { State: state, Tokens: tokens, "First token": first, Decode: decode, Seed: seed };

function paint() {
  const box = element.querySelector(".fg"), rows = props.value || [];
  box.hidden = !rows.length;
  document.body.toggleAttribute("data-comparing", rows.some((row) => !row.stats.finish_reason));
  window.views.allow(rows.length && rows.every((row) => row.stats.finish_reason), ["save-compare"], "There are no finished texts yet.");
  if (!rows.length) return box.replaceChildren();
  const table = make("table");
  table.createTHead().append(headings(["Column", ...Object.keys(COLUMNS)]));
  const body = table.createTBody();
  rows.forEach((row, index) => {
    const line = body.insertRow(), title = make("th", "", row.label);
    title.scope = "row";
    line.id = `stats-${index}`;
    line.append(title, ...Object.values(COLUMNS).map((read) => make("td", "", read(row.stats))));
  });
  box.replaceChildren(table);
}

watch("value", paint);
paint();
