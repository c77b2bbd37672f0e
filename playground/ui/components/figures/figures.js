const REASONS = { eos: "end of text", stop: "stop text", length: "token limit", cancelled: "stopped", failed: "failed" };
const number = (value, digits = 0) => (value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits }));

function state(s) {
  if (s.finish_reason) return REASONS[s.finish_reason] || s.finish_reason;
  if (s.position) return s.position === 1 ? "waiting, next in line" : `waiting, number ${number(s.position)} in line`;
  return s.new_tokens ? "writing" : "prefill";
}

const COLUMNS = {
  State: state,
  Tokens: (s) => `${number(s.prompt_tokens)} prompt + ${number(s.new_tokens)} written`,
  "First token": (s) => (s.ttft == null ? "–" : `${number(s.ttft * 1000)} ms`),
  Decode: (s) => (s.decode_rate == null ? "–" : `${number(s.decode_rate, 1)} tokens/s`),
  Seed: (s) => (s.seed == null ? "not used" : String(s.seed)),
};

function cell(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  if (name === "th") made.scope = "col";
  return made;
}

function paint() {
  const box = element.querySelector(".fg"), rows = props.value || [];
  box.hidden = !rows.length;
  document.body.toggleAttribute("data-comparing", rows.some((row) => !row.stats.finish_reason));
  if (!rows.length) return box.replaceChildren();
  const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  head.append(cell("th", "Column"), ...Object.keys(COLUMNS).map((name) => cell("th", name)));
  rows.forEach((row, index) => {
    const line = body.insertRow(), title = cell("th", row.label);
    title.scope = "row";
    line.id = `stats-${index}`;
    line.append(title, ...Object.values(COLUMNS).map((read) => cell("td", read(row.stats))));
  });
  box.replaceChildren(table);
}

watch("value", paint);
paint();
