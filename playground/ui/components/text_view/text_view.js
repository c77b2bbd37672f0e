// Text as spans, one per token. `text` and `marks` only grow while a run writes, so a paint costs what is new; any other
// value starts anew. What was behind a token is asked from the server when somebody looks at it.
const { make } = window.views;
const find = (name) => element.querySelector(name);
const view = find(".tv-text"), measure = find(".tv-measure");
const LEGENDS = {
  p: ["certain", "unlikely"], s: ["0 bits", "10 bits"], h: ["0 nats", "6 nats"], r: ["likeliest", "1000th"],
};
let run = null, marks = "", text = "", tokens = [];
let at = -1, pinned = -1; // the token that is looked at, and the one that was chosen to stay
let explained = new Map();
let followed = false; // the panel shows the scales of the token that was chosen

function restart(value) {
  run = value.run;
  marks = text = "";
  tokens = [];
  explained = new Map();
  hide();
  view.replaceChildren();
  find(".tv-title").textContent = value.title || "";
  if (value.prompt) {
    view.append(make("span", "tv-prompt", value.prompt));
  }
}

const clamp = (x) => Math.min(Math.max(x, 0), 1).toFixed(3);

function span(piece, record, index) {
  const [, logprob, entropy, rank, flag] = record.split(",");
  const token = make("span", "tk", piece);
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
  if (atEnd && !value.open) view.scrollTop = view.scrollHeight;
  if (value.open != null && at < 0 && innerWidth > 999 && (document.body.dataset.tab ?? "generate") === "generate") look(value.open, true);
}

// --- one token: asked from the server when somebody looks, shown by the inspector (`inspector.js`)

const say = (name, detail) => document.dispatchEvent(new CustomEvent(name, { detail }));

async function look(index, pin) {
  const token = tokens[index];
  if (!token || token.classList.contains("tk-rest")) return;
  if (pin) pinned = index;
  tokens[at]?.classList.remove("tk-at");
  at = index;
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
  const choose = props.branches && !data.recorded ? (id) => branch(number, id) : null;
  if (pin) document.body.dataset.token = "pinned";
  window.views.shown = { data, choose, source: element }; // an inspector that comes later finds it there
  say("token-shown", window.views.shown);
  if (pin) keepInView(token);
  if (pin && data && !data.error && !data.recorded) {
    followed = true;
    trigger("focus", { run, index: number }); // the scales follow
  }
}

// On a phone the inspector is a sheet over the lower half: the token stays above it.
function keepInView(token) {
  const sheet = document.getElementById("inspector"), box = token.getBoundingClientRect();
  const top = sheet && getComputedStyle(sheet).position === "fixed" ? sheet.getBoundingClientRect().top : innerHeight;
  if (top > 80 && box.bottom > top - 12) window.scrollBy({ top: box.bottom - top + 48 });
}

function forget() {
  tokens[at]?.classList.remove("tk-at");
  at = pinned = -1;
}

function hide() {
  if (at < 0) return;
  forget();
  if (followed) trigger("blur");
  followed = false;
  delete document.body.dataset.token;
  window.views.shown = null;
  say("token-left");
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
  if (index < 0 || event.pointerType === "touch") return;
  waiting = setTimeout(() => look(index, false), 90);
});
view.addEventListener("pointerleave", () => {
  clearTimeout(waiting);
  if (pinned >= 0 && pinned !== at) look(pinned, true);
});
view.addEventListener("click", (event) => {
  const index = indexOf(event.target);
  clearTimeout(waiting);
  if (index >= 0) look(index, true);
  else hide();
});
element.addEventListener("keydown", (event) => {
  if (event.target !== view) return;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") hide();
  else if (step && tokens.length) {
    event.preventDefault();
    const next = Math.min(Math.max(at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step, 0), tokens.length - 1);
    tokens[next].scrollIntoView({ block: "nearest" });
    look(next, true);
  } else if (event.key === "Enter" && at >= 0) {
    event.preventDefault();
    document.querySelector("#inspector button.in-row")?.focus();
  }
});
document.addEventListener("token-shown", (event) => {
  if (event.detail.source !== element) forget();
});
document.addEventListener("token-closed", (event) => {
  if (at < 0) return;
  hide();
  if (!event.detail?.elsewhere) view.focus({ preventScroll: true }); // a click elsewhere has its own focus
});

// One choice of colours for all texts of the page.
function colour(name) {
  measure.value = view.dataset.measure = name;
  const legend = LEGENDS[name];
  find(".tv-legend").hidden = !legend;
  if (legend) [find(".tv-low").textContent, find(".tv-high").textContent] = legend;
}
measure.addEventListener("change", () => {
  document.body.dataset.measure = measure.value;
  say("measure-chosen", measure.value);
});
document.addEventListener("measure-chosen", (event) => colour(event.detail));
colour(document.body.dataset.measure ?? "s");

find(".tv-copy").addEventListener("click", (event) => {
  window.copyText(text);
  event.target.textContent = "Copied";
  setTimeout(() => { event.target.textContent = "Copy"; }, 1200);
});

find(".tv-expand").addEventListener("click", (event) => {
  const wide = find(".tv").classList.toggle("tv-wide"); // page.css hides the other columns
  event.target.textContent = wide ? "All columns" : "Expand";
  event.target.setAttribute("aria-pressed", String(wide));
});

watch("value", paint);
paint();
