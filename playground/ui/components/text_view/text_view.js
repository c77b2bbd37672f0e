// Text as spans, one per token. `text` and `marks` only grow while a run writes, so a paint costs what is new; any other
// value starts anew. What was behind a token is asked from the server when somebody looks at it.
const find = (name) => element.querySelector(name);
const view = find(".tv-text"), pop = find(".tv-pop"), measure = find(".tv-measure");
const LEGENDS = {
  p: ["certain", "unlikely"], s: ["0 bits", "10 bits"], h: ["0 nats", "6 nats"], r: ["likeliest", "1000th"],
};
let run = null, marks = "", text = "", tokens = [];
let at = -1; // the token that is looked at
let pinned = false;
let explained = new Map();

function restart(value) {
  run = value.run;
  marks = text = "";
  tokens = [];
  explained = new Map();
  hide();
  view.replaceChildren();
  if (value.prompt) {
    const prompt = document.createElement("span");
    prompt.className = "tv-prompt";
    prompt.textContent = value.prompt;
    view.append(prompt);
  }
}

const clamp = (x) => Math.min(Math.max(x, 0), 1).toFixed(3);

function span(piece, record, index) {
  const [, logprob, entropy, rank, flag] = record.split(",");
  const token = document.createElement("span");
  token.className = "tk";
  token.textContent = piece;
  token.dataset.index = index;
  if (logprob) {
    token.style.setProperty("--p", clamp(1 - Math.exp(logprob)));
    token.style.setProperty("--s", clamp(-logprob / Math.LN2 / 10));
  } else {
    token.classList.add("tk-rest");
  }
  if (entropy) token.style.setProperty("--h", clamp(entropy / 6));
  if (rank) token.style.setProperty("--r", clamp(Math.log(+rank + 1) / Math.log(1000)));
  if (flag) token.classList.add("tk-forced");
  return token;
}

function paint() {
  const value = props.value || { run: null, prompt: "", text: "", marks: "" };
  const grows = value.run === run && value.marks.startsWith(marks) && value.text.startsWith(text);
  if (!grows || (value.run === null && tokens.length === 0)) restart(value);
  const atEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - 24;
  const fresh = document.createDocumentFragment();
  let place = text.length;
  for (const record of value.marks.slice(marks.length).split(";")) {
    if (!record) continue;
    const length = parseInt(record, 10);
    const token = span(value.text.slice(place, place + length), record, (value.start || 0) + tokens.length);
    place += length;
    tokens.push(token);
    fresh.append(token);
  }
  marks = value.marks;
  text = value.text;
  view.append(fresh);
  const fork = value.fork == null ? null : tokens[value.fork - (value.start || 0)];
  const marked = view.querySelector(".tk-fork");
  if (marked !== fork) {
    marked?.classList.remove("tk-fork");
    fork?.classList.add("tk-fork");
  }
  if (atEnd) view.scrollTop = view.scrollHeight;
}

// --- one token

const percent = (p) => (p == null ? "" : p < 1e-5 ? "< 0.001%" : p >= 0.0995 ? `${(p * 100).toFixed(0)}%` : `${(p * 100).toPrecision(2)}%`);
const visible = (piece) => piece.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");

function make(name, className, content) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (content != null) node.textContent = content;
  return node;
}

function bar(share, kind) {
  const cell = make("td", `tv-bar-cell tv-${kind}`);
  const fill = make("span", "tv-fill");
  fill.style.width = `${Math.max((share || 0) * 100, share ? 1 : 0)}%`;
  cell.append(fill, make("span", "tv-share", percent(share)));
  return cell;
}

function picker(data, row) {
  const button = make("button", "tv-pick", visible(row.text));
  button.type = "button";
  button.title = row.chosen ? "Draw again from here" : "Branch: continue with this token";
  button.addEventListener("click", () => branch(data.index, row.chosen ? null : row.id));
  return button;
}

function alternatives(data) {
  const table = make("table", "tv-table");
  const head = make("tr");
  for (const title of ["Token", "Raw", "After settings"]) {
    const cell = make("th", "", title);
    cell.scope = "col";
    head.append(cell);
  }
  table.append(head);
  for (const row of data.alternatives) {
    const line = make("tr", row.chosen ? "tv-chosen" : row.cut ? "tv-cut" : "");
    const name = make("td");
    name.append(props.branches ? picker(data, row) : make("span", "tv-pick", visible(row.text)));
    if (row.chosen) name.append(make("span", "tv-note", " chosen"));
    else if (row.cut) name.append(make("span", "tv-note", " cut"));
    else if (row.processed == null) name.append(make("span", "tv-note", " below these now"));
    line.append(name, bar(row.raw, "raw"), bar(row.processed, "processed"));
    table.append(line);
  }
  const others = make("tr", "tv-others");
  others.append(make("td", "", "others"), bar(data.others.raw, "raw"), bar(data.others.processed, "processed"));
  table.append(others);
  return table;
}

function gumbel(why) {
  const table = make("table", "tv-table tv-why");
  const head = make("tr");
  for (const title of ["Token", "log p", "+ noise", "= score"]) head.append(make("th", "", title));
  table.append(head);
  for (const row of why.rows) {
    const line = make("tr", row.chosen ? "tv-chosen" : "");
    line.append(make("td", "", visible(row.text)));
    for (const figure of [row.logprob, row.noise, row.score]) line.append(make("td", "tv-figure", figure.toFixed(3)));
    table.append(line);
  }
  return table;
}

function reason(data) {
  const why = data.why, box = make("div", "tv-reason");
  if (why.kind === "forced") {
    box.append(make("p", "", "Chosen by hand: this branch begins here. The draw that it replaced had these alternatives."));
  } else if (why.kind === "greedy") {
    const margin = why.margin == null ? "" : ` It leads by ${why.margin.toFixed(3)} nats.`;
    box.append(make("p", "", `Greedy takes the likeliest token.${margin}`));
  } else if (why.kind === "multinomial") {
    box.append(make("p", "", `The uniform ${why.uniform.toFixed(6)} fell into this token's part of the cumulative ` +
      `distribution, ${why.low.toFixed(6)} to ${why.high.toFixed(6)}.`));
    const line = make("div", "tv-line");
    const part = make("span", "tv-part"), pin = make("span", "tv-pin");
    part.style.left = `${why.low * 100}%`;
    part.style.width = `${Math.max((why.high - why.low) * 100, 0.5)}%`;
    pin.style.left = `${why.uniform * 100}%`;
    line.append(part, pin);
    box.append(line);
  } else {
    box.append(make("p", "", "The largest log p + noise wins (Gumbel-max):"), gumbel(why));
  }
  return box;
}

function fill(data) {
  pop.replaceChildren();
  const title = make("p", "tv-head");
  title.append(make("strong", "", visible(data.text)), ` token ${data.id}, position ${data.index + 1}`);
  pop.append(title);
  if (!data.alternatives) {
    pop.append(make("p", "", `Probability ${percent(data.probability)}.`));
    return;
  }
  const cut = data.filter.cut > 5e-5 ? ` The filters kept ${data.filter.kept} ${data.filter.kept === 1 ? "token" : "tokens"} and cut ${percent(data.filter.cut)}.` : "";
  const penalised = data.after_penalties == null ? "" : `, after penalties ${percent(data.after_penalties)}`;
  pop.append(make("p", "tv-sub", `Probability ${percent(data.probability)}${penalised}, rank ${data.rank + 1}, ` +
    `entropy ${data.entropy.toFixed(2)} nats, after settings ${data.processed_entropy.toFixed(2)}.${cut}`));
  pop.append(reason(data), alternatives(data));
}

function place(token) {
  const box = element.querySelector(".tv").getBoundingClientRect(), spot = token.getBoundingClientRect();
  const left = Math.min(Math.max(spot.left - box.left - 16, 0), Math.max(box.width - pop.offsetWidth, 0));
  pop.style.left = `${left}px`;
  pop.style.top = `${spot.bottom - box.top + 6}px`;
}

async function look(index, pin) {
  const token = tokens[index];
  if (!token || token.classList.contains("tk-rest")) return;
  tokens[at]?.classList.remove("tk-at");
  at = index;
  pinned = pinned || pin;
  token.classList.add("tk-at");
  const asked = run, number = +token.dataset.index;
  let failed = null; // not kept: the next look asks again
  if (!explained.has(number)) {
    try {
      const answer = await server.answer({ run, index: number });
      if (!answer.error) explained.set(number, answer);
      else failed = answer;
    } catch {
      failed = { error: "The server did not answer; point at the token again." };
    }
  }
  if (asked !== run || at !== index) return;
  const data = explained.get(number) || failed;
  pop.hidden = false;
  if (data.error) pop.replaceChildren(make("p", "", data.error));
  else fill(data);
  place(token);
}

function hide() {
  tokens[at]?.classList.remove("tk-at");
  at = -1;
  pinned = false;
  pop.hidden = true;
}

function branch(index, token) {
  const source = run;
  hide();
  trigger("select", { run: source, index, token });
}

const indexOf = (target) => tokens.indexOf(target.closest?.(".tk"));
let waiting = null;

view.addEventListener("pointerover", (event) => {
  const index = indexOf(event.target);
  clearTimeout(waiting);
  if (index < 0 || pinned || event.pointerType === "touch") return;
  waiting = setTimeout(() => look(index, false), 90);
});
find(".tv").addEventListener("pointerleave", () => {
  clearTimeout(waiting);
  if (!pinned) hide();
});
view.addEventListener("click", (event) => {
  const index = indexOf(event.target);
  pinned = false;
  if (index >= 0) look(index, true);
  else hide();
});
element.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !pop.hidden) {
    hide();
    view.focus();
    event.preventDefault();
  }
  if (event.target !== view) return;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step && tokens.length) {
    event.preventDefault();
    const next = Math.min(Math.max(at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step, 0), tokens.length - 1);
    tokens[next].scrollIntoView({ block: "nearest" });
    look(next, true);
  } else if (event.key === "Enter" && !pop.hidden) {
    event.preventDefault();
    pop.querySelector("button")?.focus();
  }
});

measure.addEventListener("change", () => {
  view.dataset.measure = measure.value;
  const legend = LEGENDS[measure.value];
  find(".tv-legend").hidden = !legend;
  if (legend) [find(".tv-low").textContent, find(".tv-high").textContent] = legend;
});

find(".tv-copy").addEventListener("click", (event) => {
  navigator.clipboard?.writeText(text).then(() => {
    event.target.textContent = "Copied";
    setTimeout(() => { event.target.textContent = "Copy"; }, 1200);
  });
});

find(".tv-expand").addEventListener("click", (event) => {
  const wide = find(".tv").classList.toggle("tv-wide"); // page.css hides the other columns
  event.target.textContent = wide ? "All columns" : "Expand";
  event.target.setAttribute("aria-pressed", String(wide));
});

watch("value", paint);
paint();
