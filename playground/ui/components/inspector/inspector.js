// What stood behind one token. A text view says which (see `text_view.js`); here it is only laid out.
const body = element.querySelector(".in-body"), close = element.querySelector(".in-close");
const EMPTY = "Point at a word of the text, or choose it with the arrow keys: here stand the words that could have come " +
  "instead, and why the draw took this one.";

const { headings, make, percent, visible } = window.views;

function bar(share, most, kind) {
  const fill = make("span", `in-fill in-${kind}`);
  fill.style.width = `${share ? Math.max((share / most) * 100, 1) : 0}%`;
  return fill;
}

// One alternative: its text, the bar of its probability, the number, and what the settings make of it.
function alternative(row, most, greedy, choose) {
  const line = make(choose ? "button" : "div", `in-row ${row.chosen ? "in-chosen" : row.cut ? "in-cut" : ""}`);
  const bars = make("span", "in-bars");
  bars.append(bar(row.raw, most, "raw"));
  if (!greedy) bars.append(bar(row.processed, most, "after"));
  line.append(make("span", "in-token", row.id == null ? row.text : visible(row.text)), bars, make("span", "in-share", percent(row.raw)));
  if (!greedy) line.append(make("span", "in-share", row.cut ? "cut" : percent(row.processed)));
  if (choose) {
    line.type = "button";
    line.title = row.chosen ? "Draw again from here" : "Write on from here with this token";
    line.addEventListener("click", () => choose(row.chosen ? null : row.id));
  }
  return line;
}

function alternatives(data, greedy, choose) {
  const list = make("div", `in-list ${greedy ? "in-greedy" : ""}`), head = make("div", "in-row in-titles");
  for (const title of ["Token", "", "Raw", ...(greedy ? [] : ["After"])]) head.append(make("span", "", title));
  list.append(head);
  const rows = [...data.alternatives, { ...data.others, text: "others" }];
  const most = Math.max(...rows.map((row) => Math.max(row.raw || 0, greedy ? 0 : row.processed || 0)));
  for (const row of data.alternatives) list.append(alternative(row, most, greedy, choose));
  const others = alternative(rows.at(-1), most, greedy, null);
  others.classList.add("in-others");
  list.append(others);
  return list;
}

function gumbel(why) {
  const table = make("table", "in-why");
  table.append(headings(["Token", "log p", "+ noise", "= score"]));
  for (const row of why.rows) {
    const line = make("tr", row.chosen ? "in-chosen" : "");
    line.append(make("td", "in-token", visible(row.text)));
    for (const figure of [row.logprob, row.noise, row.score]) line.append(make("td", "in-figure", figure.toFixed(3)));
    table.append(line);
  }
  return table;
}

function uniform(why) {
  const line = make("div", "in-line"), part = make("span", "in-part"), pin = make("span", "in-pin");
  part.style.left = `${why.low * 100}%`;
  part.style.width = `${Math.max((why.high - why.low) * 100, 0.5)}%`;
  pin.style.left = `${why.uniform * 100}%`;
  line.append(part, pin);
  return line;
}

function reason(data) {
  const why = data.why, box = make("div", "in-reason");
  const say = (text) => box.append(make("p", "in-note", text));
  if (why.kind === "forced") {
    say("Chosen by hand: this branch begins here. The draw that it replaced had these alternatives.");
  } else if (why.kind === "greedy") {
    say(`Why this one? Greedy takes the likeliest token.${why.margin == null ? "" : ` It leads by ${why.margin.toFixed(3)} nats.`}`);
  } else if (why.kind === "multinomial") {
    say(`Why this one? The uniform number ${why.uniform.toFixed(6)} fell into its part of the cumulative distribution, ` +
      `${why.low.toFixed(6)} to ${why.high.toFixed(6)}.`);
    box.append(uniform(why));
  } else {
    say("Why this one? The largest log p + noise wins (Gumbel-max).");
    box.append(gumbel(why));
  }
  return box;
}

// What penalties, temperature and filters made of the token's probability, step by step.
function changes(data, greedy) {
  const steps = [`raw ${percent(data.probability)}`], chosen = data.alternatives.find((row) => row.chosen);
  if (data.after_penalties != null) steps.push(`after penalties ${percent(data.after_penalties)}`);
  if (!greedy && chosen?.processed != null) steps.push(`after temperature and filters ${percent(chosen.processed)}`);
  let text = `${steps.join(" → ")}. Entropy ${data.entropy.toFixed(2)} nats`;
  if (!greedy) text += `, after settings ${data.processed_entropy.toFixed(2)}`;
  if (data.filter.cut > 5e-5) text += `. Filters kept ${data.filter.kept} ${data.filter.kept === 1 ? "token" : "tokens"}, cut ${percent(data.filter.cut)}`;
  return `${text}.`;
}

function show({ data, choose }) {
  body.replaceChildren();
  close.hidden = false;
  if (data.error) return body.append(make("p", "in-note", data.error));
  const head = make("p", "in-head"), greedy = data.why?.kind === "greedy" || data.settings?.sampler === "greedy";
  const rank = data.rank == null ? "" : `, rank ${data.rank + 1}`;
  head.append(make("strong", "in-token", visible(data.text)),
    make("span", "in-note", `token ${data.id}, position ${data.index + 1}, probability ${percent(data.probability)}${rank}`));
  body.append(head);
  if (!data.alternatives) return;
  const what = choose ? "What else could have come here. Choose one to write on from there." : "What else could have come here.";
  body.append(make("p", "in-note", what), alternatives(data, greedy, choose), reason(data), make("p", "in-note", changes(data, greedy)));
}

function empty() {
  close.hidden = true;
  body.replaceChildren(make("p", "in-note", EMPTY));
}

const leave = () => document.dispatchEvent(new CustomEvent("token-closed"));
close.addEventListener("click", leave);
element.addEventListener("keydown", (event) => {
  const rows = [...body.querySelectorAll("button.in-row")], at = rows.indexOf(document.activeElement);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") leave();
  if (step && at >= 0) {
    event.preventDefault();
    rows[Math.min(Math.max(at + step, 0), rows.length - 1)].focus();
  }
});
document.addEventListener("token-shown", (event) => show(event.detail));
document.addEventListener("token-left", empty);
if (window.views.shown) show(window.views.shown);
else empty();
