/* Colours: those of the style sheet as a canvas takes them, and the two ramps of the heatmaps.

Both ramps are paths through OKLCH with even steps of lightness, so that equal differences look equal, also in grey and
to those who see fewer colours. */

const probe = document.body.appendChild(element("i", { hidden: "" }));
let known = new Map();

/** A colour of the style sheet by its name, such as `--ink`, under the theme of the moment. */
function colour(name) {
  if (!known.has(name)) {
    probe.style.color = `var(${name})`;
    known.set(name, getComputedStyle(probe).color);
  }
  return known.get(name);
}

/** Forget colours: the theme has changed. */
function forgetColours() {
  known = new Map();
}

/** Whether the theme of the moment, chosen or the system's, is dark. */
function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** sRGB of a colour in OKLCH (Ottosson 2020), with less chroma where a screen has not so much. */
function fromLch(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  if (chroma > 0.01 && linear.some((light) => light < 0 || light > 1)) return fromLch(lightness, chroma - 0.004, hue);
  return linear.map((light) => {
    const within = Math.min(1, Math.max(0, light));
    return Math.round(255 * (within <= 0.0031308 ? 12.92 * within : 1.055 * within ** (1 / 2.4) - 0.055));
  });
}

/** Dark violet through blue and green to pale yellow: low to high. */
function sequential(share) {
  return fromLch(0.27 + 0.67 * share, 0.09 + 0.08 * Math.sin(Math.PI * (0.15 + 0.75 * share)), 295 - 190 * share);
}

/** Blue below the middle, orange above; the middle is near the ground. */
function diverging(share) {
  const away = 2 * share - 1;
  const reach = Math.abs(away);
  const lightness = isDark() ? 0.3 + 0.5 * reach : 0.95 - 0.47 * reach;
  return fromLch(lightness, 0.005 + 0.15 * reach, away < 0 ? 252 : 48);
}

/**
 * How values become colours.
 *
 * A few far outliers would leave one colour to all others: where the whole range is more than four times that of the
 * middle 98 %, the colours end there, and the key says so.
 */
function colouring(arrays, axis, middle = null) {
  const log = axis.scale === "log";
  const values = Float64Array.from(
    arrays.flatMap((one) => Array.from(one).filter((value) => Number.isFinite(value) && (!log || value > 0))),
  ).sort();
  if (!values.length) return null;
  const into = log ? Math.log10 : (value) => value;
  const at = (share) => values[Math.round(share * (values.length - 1))];
  let [low, high] = [at(0), at(1)];
  const [tight, loose] = [at(0.01), at(0.99)];
  if (into(high) - into(low) > 4 * (into(loose) - into(tight)) && loose > tight) [low, high] = [tight, loose];
  const cut = [low > at(0), high < at(1)];
  const parts = middle !== null || (!log && low < 0 && high > 0);
  const centre = middle ?? 0;
  if (parts) {
    const reach = Math.max(Math.abs(into(high) - into(centre)), Math.abs(into(centre) - into(low))) || 1;
    [low, high] = log
      ? [10 ** (into(centre) - reach), 10 ** (into(centre) + reach)]
      : [centre - reach, centre + reach];
  }
  const [start, span] = [into(low), into(high) - into(low) || 1];
  const ramp = parts ? diverging : sequential;
  const table = Array.from({ length: 256 }, (_, i) => `rgb(${ramp(i / 255).join(" ")})`);
  return {
    ends: [low, high],
    cut,
    table,
    /** CSS colour of a value; null where there is none. */
    of: (value) => {
      const share = (into(value) - start) / span;
      return Number.isNaN(share) ? null : table[Math.round(255 * Math.min(1, Math.max(0, share)))];
    },
  };
}

/** The key of a colouring: from the lowest colour to the highest. */
function colourKey(host, colours, axis) {
  const bar = element("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const pen = bar.getContext("2d");
  colours.table.forEach((paint, i) => {
    pen.fillStyle = paint;
    pen.fillRect(i, 0, 1, 1);
  });
  const end = (i, sign) => element("span", {}, (colours.cut[i] ? `${sign} ` : "") + number(colours.ends[i], 3));
  const range = element("span", { class: "range" }, end(0, "\u2264"), bar, end(1, "\u2265"));
  host.append(element("span", { class: "name" }, titled(axis)), range);
}
