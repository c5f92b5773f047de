/* Scales, ticks, and the frame of a plot: a canvas for what is dense, under an SVG for what is read.

The frame is laid out at the width that it has, and fills whatever it gets: on paper both layers grow alike. */

/** A scale between values and shares of the axis, 0 to 1. */
function scale(kind, low, high) {
  const log = kind === "log";
  const into = log ? Math.log10 : (value) => value;
  const [start, span] = [into(low), into(high) - into(low)];
  return {
    low,
    high,
    at: (value) => (into(value) - start) / span,
    value: (share) => (log ? 10 ** (start + share * span) : start + share * span),
    ticks: (count) => (log ? decades(low, high, count) : even(low, high, count)),
  };
}

/** A scale over `range` and a margin: a share of it at both ends. A single value is in the middle of a scale. */
function roomy(kind, range, margin) {
  const [low, high] = range ?? [kind === "log" ? 0.1 : 0, 1];
  if (kind === "log") {
    const factor = low === high ? 2 : (high / low) ** margin;
    return scale(kind, low / factor, high * factor);
  }
  const room = low === high ? Math.abs(low) * 0.1 || 0.5 : (high - low) * margin;
  return scale(kind, low - room, high + room);
}

function even(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 5].find((multiple) => multiple * unit >= rough * 0.999) ?? 10);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high && ticks.length < 100; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

function decades(low, high, count) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.floor(Math.log10(high))];
  const stride = Math.max(1, Math.ceil((last - first) / Math.max(1, count)));
  for (const multiples of [[1], [1, 3], [1, 2, 5]]) {
    const ticks = [];
    for (let power = first; power <= last; power += stride) {
      ticks.push(...multiples.map((multiple) => Number(`${multiple}e${power}`)));
    }
    const within = ticks.filter((tick) => tick >= low && tick <= high);
    if (within.length >= 3 || stride > 1) return within;
  }
  return even(low, high, count).filter((tick) => tick > 0);
}

/** Texts of ticks, all in thousands if the largest is. */
function texts(ticks) {
  const thousands = ticks.some((tick) => Math.abs(tick) >= 1e4) && ticks.every((tick) => Math.abs(tick) < 1e6);
  return ticks.map((tick) => {
    return thousands && Math.abs(tick) >= 100 ? `${number(tick / 1e3, 7)}k` : number(tick, 7);
  });
}

const PAPER = { wide: 700, narrow: 344, ratio: 3 };
const FONT = "11px system-ui, sans-serif";

class Frame {
  constructor(host) {
    this.host = host;
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.over = shape("svg", { "aria-hidden": "true" });
    this.moving = shape("g", {});
    this.tip = element("div", { class: "tip", hidden: "" });
    host.append(this.canvas, this.over, this.tip);
    this.pen = this.canvas.getContext("2d");
  }

  /** The width there is, on the screen or on paper. */
  get available() {
    if (!page.printing) return Math.max(160, this.host.clientWidth);
    return this.host.closest(".wide") ? PAPER.wide : PAPER.narrow;
  }

  /** Lay out: `room` around a canvas that is `tall` high. Gives a pen that draws in its pixels, emptied. */
  open(tall, room) {
    this.room = room;
    this.total = [this.available, tall + room.top + room.bottom];
    const [width, height] = this.total;
    this.size = [width - room.left - room.right, tall];
    const ratio = page.printing ? PAPER.ratio : Math.min(3, devicePixelRatio || 1);
    /** A length on the canvas, at a whole pixel of the screen: cells that meet leave no seam. */
    this.snap = (length) => Math.round(length * ratio) / ratio;
    this.canvas.width = Math.round(this.size[0] * ratio);
    this.canvas.height = Math.round(tall * ratio);
    const style = this.canvas.style;
    style.left = `${(100 * room.left) / width}%`;
    style.top = `${(100 * room.top) / height}%`;
    style.width = `${(100 * this.size[0]) / width}%`;
    style.height = `${(100 * tall) / height}%`;
    this.host.style.aspectRatio = `${width} / ${height}`;
    this.over.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.moving.replaceChildren();
    this.over.replaceChildren(this.moving);
    this.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.pen.clearRect(0, 0, ...this.size);
    this.pen.font = FONT;
    return this.pen;
  }

  /** Width of the widest of `texts` in pixels. */
  widest(texts) {
    this.pen.font = FONT;
    return Math.max(0, ...texts.map((text) => this.pen.measureText(text).width));
  }

  /** Text of an axis or a band, at pixels of the whole frame. */
  write(text, x, y, anchor = "middle", kind = "tick") {
    this.over.append(shape("text", { x, y, "text-anchor": anchor, class: kind }, text));
  }

  /** The title of an axis, as much of it as there is room for. */
  title(text, x, y, anchor = "start") {
    this.write(clipped(text, Math.floor(this.size[0] / 6.5)), x, y, anchor, "title");
  }

  /** Ticks and title under the canvas. */
  xAxis(x, axis) {
    const [width, tall] = this.size;
    const bottom = this.room.top + tall;
    const ticks = x.ticks(Math.max(2, Math.floor(width / 78)));
    const names = texts(ticks);
    let end = -Infinity;
    ticks.forEach((tick, i) => {
      const [at, text] = [x.at(tick) * width, names[i]];
      const half = this.widest([text]) / 2;
      const centre = Math.min(this.room.left + at, this.total[0] - half);
      if (centre - half < end + 8) return;
      this.write(text, centre, bottom + 15);
      end = centre + half;
    });
    this.title(titled(axis), this.room.left + width / 2, bottom + 31, "middle");
  }

  /** Ticks beside the canvas, and the title above it. */
  yAxis(y, ticks, axis) {
    const [width, tall] = this.size;
    this.pen.strokeStyle = colour("--grid");
    this.pen.lineWidth = 1;
    const names = texts(ticks);
    ticks.forEach((tick, i) => {
      const at = Math.round((1 - y.at(tick)) * tall) + 0.5;
      this.stroke([[0, at], [width, at]]);
      this.write(names[i], this.room.left - 7, this.room.top + at + 3.5, "end");
    });
    this.title(titled(axis), 0, 11);
  }

  /** Say in the middle that there is nothing to draw. */
  nothing() {
    const [x, y] = [this.room.left + this.size[0] / 2, this.room.top + this.size[1] / 2];
    this.write("No values", x, y, "middle", "empty");
  }

  stroke(points) {
    this.pen.beginPath();
    points.forEach(([x, y], i) => (i ? this.pen.lineTo(x, y) : this.pen.moveTo(x, y)));
    this.pen.stroke();
  }

  /** Where an event is on the canvas, in shares of its width and height. */
  share(event) {
    const box = this.canvas.getBoundingClientRect();
    const within = (value) => Math.min(1, Math.max(0, value));
    return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
  }

  /** Show `nodes` beside a point of the canvas, given in shares. */
  say(nodes, across, down) {
    this.tip.replaceChildren(...nodes);
    this.tip.hidden = false;
    const [width, height] = [this.host.clientWidth, this.host.clientHeight];
    const x = this.room.left + across * this.size[0];
    const y = this.room.top + down * this.size[1];
    const before = x > width / 2;
    const left = before ? x - this.tip.offsetWidth - 14 : x + 14;
    this.tip.style.left = `${Math.max(0, Math.min(left, width - this.tip.offsetWidth))}px`;
    this.tip.style.top = `${Math.max(0, Math.min(y - 20, height - this.tip.offsetHeight))}px`;
  }

  hush() {
    this.tip.hidden = true;
    this.moving.replaceChildren();
  }
}
