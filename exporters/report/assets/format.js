/* Numbers as people read them: 1,234; 12.35k; 3e-4. */

/** `value` to `digits` significant digits, with a real minus. */
function number(value, digits = 4) {
  if (Number.isNaN(value)) return "no value";
  const sign = value < 0 ? "\u2212" : "";
  if (!Number.isFinite(value)) return `${sign}\u221e`;
  const size = Number(Math.abs(value).toPrecision(digits));
  const short = (divisor) => String(Number((size / divisor).toPrecision(digits)));
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) {
    return sign + size.toExponential().replace("e+", "e").replace("e-", "e\u2212");
  }
  if (size >= 1e6) return `${sign}${short(1e6)}M`;
  if (size >= 1e4) return `${sign}${short(1e3)}k`;
  return sign + grouped(size);
}

/** A place on an axis: whole numbers in full. */
function place(value) {
  return Number.isInteger(value) && Math.abs(value) < 1e12 ? grouped(value) : number(value, 5);
}

function grouped(value) {
  return value.toLocaleString("en-US", { maximumFractionDigits: 12 }).replace("-", "\u2212");
}

/** A number with the unit of its axis. */
function measured(value, axis, digits = 4) {
  return Number.isNaN(value) || !axis.unit ? number(value, digits) : `${number(value, digits)} ${axis.unit}`;
}

/** What an axis is called: `loss (nats)`. */
function titled(axis) {
  return axis.unit ? `${axis.label} (${axis.unit})` : axis.label;
}

/** `text` in at most `length` characters. */
function clipped(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}\u2026` : text;
}
