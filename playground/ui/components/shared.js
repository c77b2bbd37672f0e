// What several views share. In the page's head, so that it is there before the first of them.
const REASONS = { eos: "end of text", stop: "stop text", length: "token limit", cancelled: "stopped", failed: "failed" };

window.views = {
  make(name, className, content) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (content != null) node.textContent = content;
    return node;
  },

  // A token's text, its blanks made visible.
  visible: (text) => text.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5"),

  percent(p) {
    if (p == null) return "–";
    if (!p) return "0";
    return p < 1e-5 ? "< 0.001%" : `${p === 1 ? 100 : (p * 100).toPrecision(p < 0.0995 ? 2 : 3)}%`;
  },

  number: (value, digits = 0) => (value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits })),

  // The first row of a table.
  headings(titles) {
    const line = window.views.make("tr");
    for (const title of titles) {
      const cell = window.views.make("th", "", title);
      cell.scope = "col";
      line.append(cell);
    }
    return line;
  },

  // Buttons that can do nothing yet rest, and say why. Those of a tab that was never open are not there yet.
  resting: {},
  allow(can, ids, why) {
    for (const id of ids) window.views.resting[id] = can ? "" : why;
    window.views.rest();
  },
  rest() {
    for (const [id, why] of Object.entries(window.views.resting)) {
      const button = document.getElementById(id);
      if (!button) continue;
      button.disabled = Boolean(why);
      button.title = why;
    }
  },

  // What a run is doing, of its figures.
  state(s) {
    if (s.finish_reason) return REASONS[s.finish_reason] || s.finish_reason;
    if (s.position) return s.position === 1 ? "waiting, next in line" : `waiting, number ${s.position} in line`;
    return s.new_tokens ? "writing" : "prefill";
  },

  // Of a run's figures.
  tokens: (s) => `${window.views.number(s.prompt_tokens)} prompt + ${window.views.number(s.new_tokens)} written`,
  first: (s) => (s.ttft == null ? "–" : `${window.views.number(s.ttft * 1000)} ms`),
  decode: (s) => (s.decode_rate == null ? "–" : `${window.views.number(s.decode_rate, 1)} tokens/s`),
  seed: (s) => (s.seed == null ? "not used" : String(s.seed)),
};
