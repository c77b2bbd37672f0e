const REASONS = {
  eos: "end of text",
  stop: "stop text",
  length: "token limit",
  cancelled: "stopped",
  failed: "failed",
};

function number(value, digits = 0) {
  return value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });
}

function prefill(s) {
  if (s.prefill_rate == null) return "–";
  if (!s.prefill_rate) return "in the cache";
  const cached = s.cached_tokens ? `, ${number(s.cached_tokens)} in the cache` : "";
  return `${number(s.prefill_rate)} tokens/s${cached}`;
}

function state(s) {
  if (s.finish_reason) return REASONS[s.finish_reason] || s.finish_reason;
  if (s.position) return s.position === 1 ? "waiting, next in line" : `waiting, number ${number(s.position)} in line`;
  return s.new_tokens ? "writing" : "prefill";
}

// Run turns into Stop while a text is being written: see page.css.
function mark(s) {
  const name = element.closest("#stats, #stats-chat")?.id, body = document.body;
  const writing = new Set((body.dataset.writing || "").split(" "));
  writing[s && !s.finish_reason ? "add" : "delete"](name);
  body.dataset.writing = [...writing].join(" ").trim();
}

function paint() {
  const s = props.value;
  mark(s);
  const items = s
    ? [
        ["State", state(s)],
        ["Tokens", `${number(s.prompt_tokens)} prompt + ${number(s.new_tokens)} written`],
        ["First token", s.ttft == null ? "–" : `${number(s.ttft * 1000)} ms`],
        ["Prefill", prefill(s)],
        ["Decode", s.decode_rate == null ? "–" : `${number(s.decode_rate, 1)} tokens/s`],
        ["KV cache", `${number(s.cache_used)} of ${number(s.context)} tokens`],
        ["Seed", s.seed == null ? "not used" : String(s.seed)],
      ]
    : [["State", "ready"]];
  const list = element.querySelector(".stats");
  list.replaceChildren(
    ...items.map(([name, text]) => {
      const pair = document.createElement("div");
      const term = document.createElement("dt");
      const detail = document.createElement("dd");
      term.textContent = name;
      detail.textContent = text;
      pair.append(term, detail);
      return pair;
    }),
  );
}

watch("value", paint);
paint();
