const { make, visible } = window.views;

function paint() {
  const value = props.value || { tokens: [], note: "" };
  const chips = value.tokens.map((token) => {
    const chip = make("span", token.special ? "tc-chip tc-special" : "tc-chip", "");
    chip.append(make("span", "tc-text", visible(token.text)), make("span", "tc-id", token.id));
    if (token.special) chip.title = "a special token";
    return chip;
  });
  element.querySelector(".tc").replaceChildren(make("p", "tc-note", value.note), ...chips);
}

watch("value", paint);
paint();
