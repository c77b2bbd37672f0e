// One element per turn; a turn whose text grows is appended to, so that a paint costs what is new.
const { make } = window.views;
const OPEN = "<think>", CLOSE = "</think>";

// [what was thought or null, whether that has ended, the rest]
function parts(content) {
  const lead = content.trimStart();
  if (!lead.startsWith(OPEN)) return [null, true, content];
  const end = lead.indexOf(CLOSE);
  if (end < 0) return [lead.slice(OPEN.length).trim(), false, ""];
  return [lead.slice(OPEN.length, end).trim(), true, lead.slice(end + CLOSE.length).trimStart()];
}

function write(node, text) {
  if (text.startsWith(node.data)) {
    if (text.length > node.data.length) node.appendData(text.slice(node.data.length));
  } else {
    node.data = text;
  }
}

function build(role) {
  const turn = make("div", `cv-turn cv-${role}`);
  const thought = make("details"), summary = make("summary"), inner = make("div");
  inner.append(document.createTextNode(""));
  thought.append(summary, inner);
  thought.hidden = true;
  const text = make("div", "cv-text");
  text.append(document.createTextNode(""));
  const copy = make("button", "cv-copy", "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", `Copy the ${role === "user" ? "message" : "answer"}`);
  copy.addEventListener("click", () => {
    window.copyText(turn.content);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1200);
  });
  turn.append(thought, text, copy);
  return turn;
}

function fill(turn, content) {
  if (turn.content === content) return;
  turn.content = content;
  const [thought, ended, rest] = parts(content);
  const details = turn.children[0];
  details.hidden = thought === null;
  details.children[0].textContent = ended ? "Thought" : "Thinking";
  write(details.children[1].firstChild, thought ?? "");
  write(turn.children[1].firstChild, rest);
}

function paint() {
  const view = element.querySelector(".cv");
  const turns = props.value?.turns ?? [];
  const atEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - 24;
  while (view.children.length > turns.length) view.lastChild.remove();
  turns.forEach(({ role, content }, index) => {
    const kind = role === "user" ? "user" : "assistant";
    let turn = view.children[index];
    if (!turn || !turn.classList.contains(`cv-${kind}`)) {
      const fresh = build(kind);
      if (turn) turn.replaceWith(fresh); else view.append(fresh);
      turn = fresh;
    }
    fill(turn, content);
  });
  if (atEnd) view.scrollTop = view.scrollHeight;
}

watch("value", paint);
paint();
