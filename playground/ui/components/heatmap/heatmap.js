// The stops of viridis: even steps of lightness, readable without colour vision. The legend's gradient is the same.
const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const find = (name) => element.querySelector(name);
let cells = null; // Float32Array of the grid that is shown
let at = 0; // the cell that the readout speaks of

function colour(share) {
  const x = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const i = Math.min(Math.floor(x), STOPS.length - 2);
  return STOPS[i].map((from, c) => Math.round(from + (STOPS[i + 1][c] - from) * (x - i)));
}

const figure = (value) => value.toPrecision(3);

function readout() {
  const v = props.value;
  if (!cells || !cells.length) return;
  const row = Math.floor(at / v.columns);
  const where = v.rows > 1 ? `${v.row} ${row}, ${v.column} ${at % v.columns}` : `${v.column} ${at}`;
  find(".hm-readout").textContent = `${where}: scale ${figure(cells[at])}`;
}

function draw() {
  const v = props.value || {};
  find(".hm-title").textContent = v.title || "";
  find(".hm-note").textContent = v.note || "";
  find(".hm").classList.toggle("hm-bare", !v.data);
  if (!v.data) {
    cells = null;
    return;
  }
  const bytes = Uint8Array.from(atob(v.data), (c) => c.charCodeAt(0));
  cells = new Float32Array(bytes.buffer);
  at = Math.min(at, cells.length - 1);
  const canvas = find(".hm-canvas");
  canvas.width = v.columns;
  canvas.height = v.rows;
  canvas.style.aspectRatio = `${v.columns} / ${Math.max(v.rows, v.columns / 12)}`;
  canvas.style.maxHeight = "22rem";
  const image = new ImageData(v.columns, v.rows);
  const span = Math.log(v.high / v.low) || 1;
  cells.forEach((value, i) => {
    const [r, g, b] = colour(v.high > v.low ? Math.log(value / v.low) / span : 0.5);
    image.data.set([r, g, b, 255], i * 4);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.setAttribute(
    "aria-label",
    `${v.title}: ${v.rows} by ${v.columns} scales from ${figure(v.low)} to ${figure(v.high)}, ` +
      `median ${figure(v.median)}. Arrow keys move between cells.`,
  );
  find(".hm-low").textContent = figure(v.low);
  find(".hm-high").textContent = figure(v.high);
  readout();
}

element.addEventListener("pointermove", (event) => {
  const canvas = find(".hm-canvas");
  if (event.target !== canvas || !cells) return;
  const box = canvas.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * props.value.columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * props.value.rows);
  at = Math.min(Math.max(row * props.value.columns + column, 0), cells.length - 1);
  readout();
});

element.addEventListener("keydown", (event) => {
  const columns = props.value.columns;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (!step || !cells || event.target !== find(".hm-canvas")) return;
  event.preventDefault();
  if (at + step >= 0 && at + step < cells.length) at += step;
  readout();
});

watch("value", draw);
draw();
