const { make } = window.views;
const find = (name) => element.querySelector(name);

function paint() {
  const value = props.value || {};
  find(".mh-model").textContent = value.name || "";
  find(".mh-about").textContent = value.about || "";
  find(".mh-where").textContent = value.where || "";
  find(".mh-where").title = value.path || "";
}

// --- the tour: a card beside one part of the page after another

const STEPS = [
  ["#prompt", "A prompt", "The model goes on from here. Type your own, or take one of the examples."],
  ["#settings", "How words are drawn", "Greedy takes the likeliest word. Multinomial and Gumbel-max draw by probability; temperature flattens or sharpens it. Run starts, and turns into Stop."],
  ["#output", "The text, word by word", "Each token is coloured by its surprise. Point at one, or walk through them with the arrow keys."],
  ["#inspector", "What stood behind a word", "What else could have come, and why the draw took this one, in its own numbers. Choose another word to write on from there."],
  ["#panel", "8 bits and a scale", "Weights and activations are stored in 8 bits each; every block of 128 has a scale that restores them. Here are the scales."],
  ["[role=tablist]", "Further", "Compare writes under several settings at once; the Lab takes a draw apart."],
];
let card = null, step = 0;

function leave() {
  card?.remove();
  card = null;
  document.querySelectorAll(".mh-lit").forEach((part) => part.classList.remove("mh-lit"));
  find(".mh-tour").focus();
}

function button(text, action) {
  const made = make("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function visit(number) {
  step = number;
  document.querySelectorAll(".mh-lit").forEach((part) => part.classList.remove("mh-lit"));
  const [where, title, text] = STEPS[step], target = document.querySelector(where);
  target?.classList.add("mh-lit");
  target?.scrollIntoView({ block: "nearest" });
  const heading = make("strong", "", `${title} (${step + 1} of ${STEPS.length})`), words = make("p", "", text), row = make("div");
  row.append(button("Skip", leave));
  if (step) row.append(button("Back", () => visit(step - 1)));
  row.append(step + 1 < STEPS.length ? button("Next", () => visit(step + 1)) : button("Done", leave));
  card.replaceChildren(heading, words, row);
  row.lastChild.focus();
}

find(".mh-tour").addEventListener("click", () => {
  if (card) return leave();
  document.querySelector("[data-tab-id=generate]")?.click();
  card = make("div", "mh-card");
  card.setAttribute("role", "dialog");
  card.setAttribute("aria-label", "Tour");
  card.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
  });
  document.querySelector(".gradio-container").append(card); // where our styles reach
  visit(0);
});

watch("value", paint);
paint();
