/* The numbers of the page: arrays in base64, decoded when something is drawn that needs them. */

const report = JSON.parse(document.getElementById("page-data").textContent);
const TYPES = { f4: Float32Array, f8: Float64Array };
const decoded = new Map();

/** The array that `reference` names; empty for null. Little-endian, as every machine with a browser is. */
function array(reference) {
  if (reference === null) return new Float32Array(0);
  const index = reference.array;
  if (!decoded.has(index)) {
    const [type, text] = report.arrays[index];
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    decoded.set(index, new TYPES[type](bytes.buffer));
  }
  return decoded.get(index);
}

/** Smallest and largest finite value (positive ones for a log scale); null if there is none. */
function extent(values, log = false) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (!Number.isFinite(value) || (log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

/** Index of the entry of the sorted `values` that is nearest to `value`. */
function nearest(values, value) {
  let [low, high] = [0, values.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < value) low = middle;
    else high = middle;
  }
  return value - values[low] <= values[high] - value ? low : high;
}

/** An element. What others have named reaches the page as text and attributes, never as markup. */
function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An element of SVG. */
function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A square of a colour of the style sheet, such as `--series-0`. */
function swatch(colour, kind = "value") {
  const mark = element("i", { class: `swatch ${kind}`, "aria-hidden": "true" });
  mark.style.setProperty("--mark", `var(${colour})`);
  return mark;
}
