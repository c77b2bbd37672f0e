// One button per run, indented under the run that it branched off from. Nothing to choose among one: nothing shown.
function paint() {
  const rows = props.value || [];
  const nav = element.querySelector(".bt");
  nav.hidden = rows.length < 2;
  nav.replaceChildren(
    ...rows.map((row) => {
      const button = window.views.make("button", "bt-run", row.label);
      button.type = "button";
      button.style.marginLeft = `${row.depth * 1.1}rem`;
      if (row.current) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => trigger("select", { run: row.run }));
      return button;
    }),
  );
}

watch("value", paint);
paint();
