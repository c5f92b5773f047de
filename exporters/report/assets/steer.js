/* Pointer, finger and keyboard over plots that share an x: one cursor and one zoom for all of them. */

/** Plots with the same x axis. */
class Group {
  constructor(axis) {
    this.axis = axis;
    this.range = null;
    this.zoom = null;
    this.plots = [];
  }

  /** Take what a figure reaches over into the whole. */
  cover(range) {
    if (range) this.range = this.range ? [Math.min(this.range[0], range[0]), Math.max(this.range[1], range[1])] : range;
  }

  get whole() {
    return roomy(this.axis.scale, this.range, 0.015);
  }

  get x() {
    return this.zoom ? scale(this.axis.scale, ...this.zoom) : this.whole;
  }

  /** Narrow to [low, high], or show all again with null. */
  narrow(zoom) {
    if (zoom && !(zoom[1] > zoom[0])) return;
    this.zoom = zoom;
    this.leave();
    page.zoomed(this);
  }

  /** Move the cursor to `at`, where the figure `plot` is looked at. */
  point(plot, at, down) {
    const found = plot.show(at, down);
    for (const other of this.plots) if (other !== plot && other.drawn) other.follow(found);
  }

  /** Move and stretch what the scale `x` showed, so that what was at the shares `from` is at the shares `to`. */
  stretch(x, from, to) {
    if (Math.abs(to[0] - to[1]) < 0.02) return;
    const factor = (from[0] - from[1]) / (to[0] - to[1]);
    const start = from[0] - factor * to[0];
    const low = Math.max(x.value(start), this.whole.low);
    const high = Math.min(x.value(start + factor), this.whole.high);
    this.narrow(factor > 0 && (low > this.whole.low || high < this.whole.high) ? [low, high] : null);
  }

  leave() {
    for (const plot of this.plots) if (plot.drawn) plot.frame.hush();
  }
}

/** A line of the cursor through a frame, at a share of its width; nothing beyond its ends. */
function drawCursor(frame, across) {
  frame.moving.replaceChildren();
  if (!(across >= 0 && across <= 1)) return;
  const x = frame.room.left + across * frame.size[0];
  const { top } = frame.room;
  frame.moving.append(shape("line", { x1: x, x2: x, y1: top, y2: top + frame.size[1], class: "cursor" }));
}

/**
 * Let a plot be looked into and zoomed.
 *
 * `plot` has a `frame`, a `group`, `stops()` (the x that arrow keys go to, in order), `rows` (how many there are to go
 * through upwards), `show(x, down)` (which gives the x it came to rest at) and `follow(x)`.
 */
function steer(plot) {
  const { frame, group } = plot;
  const { host } = frame;
  const fingers = new Map();
  let pinch = null;
  let from = null;
  let at = null;
  let down = 0.5;
  host.classList.add("zooms");

  const go = (x, y) => {
    at = x;
    down = y;
    group.point(plot, x, y);
  };
  const drawn = (event) => [from, frame.share(event)[0]].sort((a, b) => a - b);
  const lift = (event) => {
    from = null;
    fingers.delete(event.pointerId);
    pinch = null;
  };
  const dragged = (event) => from !== null && Math.abs(frame.share(event)[0] - from) * frame.size[0] > 6;

  host.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    if (event.pointerType === "mouse") {
      from = frame.share(event)[0];
      host.setPointerCapture(event.pointerId);
    } else {
      fingers.set(event.pointerId, frame.share(event)[0]);
      pinch = fingers.size === 2 ? { x: group.x, from: [...fingers.values()] } : null;
      if (pinch) group.leave();
    }
    if (pinch) return;
    go(group.x.value(frame.share(event)[0]), frame.share(event)[1]);
  });
  host.addEventListener("pointermove", (event) => {
    const [across, y] = frame.share(event);
    if (fingers.has(event.pointerId)) fingers.set(event.pointerId, across);
    if (pinch) {
      group.stretch(pinch.x, pinch.from, [...fingers.values()]);
      return;
    }
    go(group.x.value(across), y);
    if (!dragged(event)) return;
    const [low, high] = drawn(event);
    const box = { x: frame.room.left + low * frame.size[0], width: (high - low) * frame.size[0] };
    frame.moving.append(shape("rect", { ...box, y: frame.room.top, height: frame.size[1], class: "chosen" }));
  });
  host.addEventListener("pointerup", (event) => {
    if (dragged(event)) group.narrow(drawn(event).map(group.x.value));
    lift(event);
  });
  host.addEventListener("pointercancel", lift);
  host.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && from === null && group.leave());
  host.addEventListener("dblclick", () => group.narrow(null));
  host.addEventListener("blur", () => group.leave());
  host.addEventListener("keydown", (event) => {
    const { x } = group;
    const stops = plot.stops();
    if (!stops.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const here = nearest(stops, at ?? x.value(0.5));
    const stride = event.shiftKey ? 10 : 1;
    const visible = [nearest(stops, x.low), nearest(stops, x.high)];
    const step = (by) => go(stops[Math.min(stops.length - 1, Math.max(0, here + by))], down);
    const climb = (by) => plot.rows && go(stops[here], Math.min(1, Math.max(0, row(down, plot.rows) + by + 0.5) / plot.rows));
    const close = (factor) => {
      const share = x.at(stops[here]);
      group.narrow([share - share * factor, share + (1 - share) * factor].map(x.value));
      go(stops[here], down);
    };
    const actions = {
      ArrowLeft: () => step(at === null ? 0 : -stride),
      ArrowRight: () => step(at === null ? 0 : stride),
      ArrowUp: () => climb(-1),
      ArrowDown: () => climb(1),
      Home: () => go(stops[visible[0]], down),
      End: () => go(stops[visible[1]], down),
      "+": () => close(0.5),
      "=": () => close(0.5),
      "-": () => (group.zoom ? close(2) : undefined),
      0: () => group.narrow(null),
      Escape: () => group.leave(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
    page.announce(frame);
  });
}

/** Row of `rows` that a share of the height falls into, from the top. */
function row(down, rows) {
  return Math.min(rows - 1, Math.floor(down * rows));
}
