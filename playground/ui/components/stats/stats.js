const { allow, decode, first, make, number, seed, state, tokens } = window.views;

function prefill(s) {
  if (s.prefill_rate == null) return "–";
  if (!s.prefill_rate) return "in the cache";
  const cached = s.cached_tokens ? `, ${number(s.cached_tokens)} in the cache` : "";
  return `${number(s.prefill_rate)} tokens/s${cached}`;
}

// Run turns into Stop while a text is being written: see page.css.
function mark(s) {
  const name = element.closest("#stats, #stats-chat")?.id, body = document.body;
  const writing = new Set((body.dataset.writing || "").split(" "));
  writing[s && !s.finish_reason ? "add" : "delete"](name);
  body.dataset.writing = [...writing].join(" ").trim();
}

const NEEDS = { stats: ["continue", "receipt"], "stats-chat": ["retry", "edit", "clear-chat"] };

function paint() {
  const s = props.value;
  mark(s);
  const ids = NEEDS[element.closest("#stats, #stats-chat")?.id];
  allow(Boolean(s?.finish_reason && s.new_tokens), ids, s && !s.finish_reason ? "Wait for the end, or press Stop." : "There is no text yet.");
  const items = s
    ? [
        ["State", state(s)],
        ["Tokens", tokens(s)],
        ["First token", first(s)],
        ["Prefill", prefill(s)],
        ["Decode", decode(s)],
        ["KV cache", `${number(s.cache_used)} of ${number(s.context)} tokens`],
        ["Seed", seed(s)],
      ]
    : [["State", "ready"]];
  const list = element.querySelector(".stats");
  list.replaceChildren(
    ...items.map(([name, text]) => {
      const pair = make("div");
      pair.append(make("dt", "", name), make("dd", "", text));
      return pair;
    }),
  );
}

watch("value", paint);
paint();
