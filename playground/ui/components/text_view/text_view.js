// `shown` is what stands in the continuation's text node; a value that extends it is appended, any other starts anew.
let shown = "";
let node = null;

function restart(view) {
  const box = document.querySelector("#prompt textarea");
  const prompt = document.createElement("span");
  prompt.className = "tv-prompt";
  prompt.textContent = box ? box.value : "";
  node = document.createTextNode("");
  view.replaceChildren(prompt, node);
  shown = "";
}

function paint() {
  const view = element.querySelector(".tv-text");
  const value = props.value || "";
  if (!node || !view.contains(node) || !value.startsWith(shown) || (value === "" && shown !== "")) restart(view);
  if (value === shown) return;
  const atEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - 24;
  node.appendData(value.slice(shown.length));
  shown = value;
  if (atEnd) view.scrollTop = view.scrollHeight;
}

watch("value", paint);
