/* Lines over x: values with their intervals, raw values behind smoothed ones, thresholds, bands and marks. */

const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
const FAR = 0.05; // share of the axis beyond which the nearest point says nothing of a place

/**
 * Colour and dash of each line.
 *
 * Where the page compares runs, a run has one colour everywhere, and lines of one run differ in dashes. Otherwise each
 * line has a colour of its own. Raw values have the look of the values they lie behind.
 */
function looks(lines) {
  const many = report.runs.length > 1;
  const seen = new Map();
  const count = (line) => {
    const key = `${line.role} ${line.run}`;
    seen.set(key, (seen.get(key) ?? -1) + 1);
    return seen.get(key);
  };
  return lines.map((line) => {
    const order = count(line);
    if (line.role === "threshold") return { colour: many ? `--series-${line.run % 8}` : "--ink", dash: [5, 4] };
    return { colour: `--series-${(many ? line.run : order) % 8}`, dash: many ? DASHES[order % DASHES.length] : [] };
  });
}

function linesPlot(host, controls, body, group) {
  const frame = new Frame(host);
  const look = looks(body.lines);
  const hidden = new Set();
  const series = body.lines.map((line, i) => ({
    ...line,
    ...look[i],
    x: array(line.x),
    y: array(line.y),
    low: array(line.low),
    high: array(line.high),
    entry: i,
  }));
  const alike = new Set(series.filter((line) => line.role === "value").map((line) => line.name)).size < 2;
  const named = (line) => {
    if (report.runs.length < 2) return line.name;
    const run = clipped(report.runs[line.run], 32);
    return alike && line.role !== "threshold" ? run : `${line.name} \u00b7 ${run}`;
  };
  const several = new Set(body.bands.map((band) => band.run)).size > 1;
  // Raw values come and go with the values they lie behind.
  for (const raw of series.filter((line) => line.role === "raw")) {
    const partner = series.find((line) => line.role === "value" && line.run === raw.run && line.colour === raw.colour);
    if (partner) raw.entry = partner.entry;
  }
  const shown = () => series.filter((line) => !hidden.has(line.entry));
  const plot = { frame, group, rows: 0, draw, show, follow, stops, table };
  legend();
  return plot;

  function legend() {
    const entries = series.filter((line, i) => line.entry === i);
    if (entries.length < 2) return;
    for (const line of entries) {
      const button = element("button", { type: "button", "aria-pressed": "true", title: clipped(named(line), 300) });
      button.append(swatch(line.colour, line.role), element("span", {}, clipped(named(line), 60)));
      button.addEventListener("click", () => {
        if (!hidden.delete(line.entry)) hidden.add(line.entry);
        button.setAttribute("aria-pressed", String(!hidden.has(line.entry)));
        draw();
      });
      controls.append(button);
    }
  }

  function stops() {
    return shown().reduce((most, line) => (line.x.length > most.length ? line.x : most), []);
  }

  /** What is visible of a line: from one point before the axis to one beyond. */
  function visible(line, x) {
    let [first, last] = [0, line.x.length];
    while (first + 1 < last && line.x[first + 1] < x.low) first++;
    while (last - 1 > first && line.x[last - 2] > x.high) last--;
    return [first, last];
  }

  function yScale(x) {
    const log = body.y.scale === "log";
    const reach = (lines, names) =>
      extent(
        lines.flatMap((line) => names.flatMap((name) => Array.from(line[name].subarray(...visible(line, x))))),
        log,
      );
    const values = shown().filter((line) => line.role !== "threshold");
    const own = reach(values, ["y", "low", "high"]);
    const limits = reach(shown().filter((line) => line.role === "threshold"), ["y"]);
    if (!own || !limits) return roomy(body.y.scale, own ?? limits, 0.06);
    // A threshold that is out of all proportion, as 2 / lr is in warmup, must not flatten what it is compared with.
    const room = log ? [own[0] / 1e3, own[1] * 1e3] : [2 * own[0] - own[1], own[1] + 2 * (own[1] - own[0])];
    const low = Math.min(own[0], Math.max(limits[0], room[0]));
    return roomy(body.y.scale, [low, Math.max(own[1], Math.min(limits[1], room[1]))], 0.06);
  }

  function draw() {
    const { x } = group;
    const tall = host.closest(".wide") ? 280 : 200;
    const own = yScale(x);
    // Room at the foot for the strips of several runs.
    const y = (plot.y = several ? scale(body.y.scale, own.value((-6 * report.runs.length) / tall), own.high) : own);
    const ticks = y.ticks(Math.floor(tall / 44));
    const left = 12 + frame.widest(texts(ticks));
    const pen = frame.open(tall, { left, right: 6, top: 20, bottom: 36 });
    bands(x);
    frame.yAxis(y, ticks, body.y);
    frame.xAxis(x, body.x);
    for (const line of shown()) interval(line, x, y);
    for (const role of ["raw", "threshold", "value"]) {
      for (const line of shown().filter((one) => one.role === role)) curve(line, x, y);
    }
    pen.globalAlpha = 1;
    pen.setLineDash([]);
    marks(x);
    if (!extent(shown().flatMap((line) => Array.from(line.y)), body.y.scale === "log")) frame.nothing();
  }

  function bands(x) {
    const [width, tall] = frame.size;
    let written = 0;
    for (const band of body.bands) {
      const from = Math.max(0, x.at(band.start ?? x.low) * width);
      const to = Math.min(width, x.at(band.end ?? x.high) * width);
      if (!(to > from)) continue;
      frame.pen.fillStyle = colour(`--${band.level}`);
      // Of several runs each has a strip of its own, at the foot.
      const strip = several ? [tall - 6 * (band.run + 1), 4] : [0, tall];
      frame.pen.globalAlpha = several ? 0.55 : 0.1;
      frame.pen.fillRect(from, strip[0], to - from, strip[1]);
      frame.pen.globalAlpha = 0.45;
      if (!several && from > 0) frame.pen.fillRect(Math.round(from), 0, 1, tall);
      const text = clipped(band.label, Math.floor((to - from - 8) / 6));
      if (!several && from >= written && text.length > Math.min(4, band.label.length - 1)) {
        frame.write(text, frame.room.left + from + 5, frame.room.top + 13, "start", "band");
        written = from + frame.widest([text]);
      }
    }
    frame.pen.globalAlpha = 1;
  }

  function interval(line, x, y) {
    if (!line.low.length || !line.high.length) return;
    const { pen } = frame;
    const [width, tall] = frame.size;
    const [first, last] = visible(line, x);
    const at = (i, side) => [x.at(line.x[i]) * width, (1 - y.at(Math.max(line[side][i], y.low))) * tall];
    pen.fillStyle = pen.strokeStyle = colour(line.colour);
    const few = line.points && last - first < 80;
    pen.globalAlpha = few ? 0.6 : 0.16;
    for (let i = first; i < last; i++) {
      if (Number.isNaN(line.low[i] + line.high[i])) continue;
      if (few) frame.stroke([at(i, "low"), at(i, "high")]);
      else if (i + 1 < last && !Number.isNaN(line.low[i + 1] + line.high[i + 1])) {
        pen.beginPath();
        [at(i, "low"), at(i, "high"), at(i + 1, "high"), at(i + 1, "low")].forEach((corner) => pen.lineTo(...corner));
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
  }

  function curve(line, x, y) {
    const { pen } = frame;
    const [width, tall] = frame.size;
    const [first, last] = visible(line, x);
    const px = (i) => x.at(line.x[i]) * width;
    const py = (i) => (1 - y.at(line.y[i])) * tall;
    const is = (i) => i >= first && i < last && Number.isFinite(y.at(line.y[i]));
    pen.strokeStyle = pen.fillStyle = colour(line.colour);
    pen.globalAlpha = line.role === "raw" ? 0.3 : 1;
    pen.lineWidth = line.role === "value" ? 1.75 : 1.25;
    pen.lineJoin = "round";
    pen.setLineDash(line.role === "raw" ? [] : line.dash);
    pen.beginPath();
    for (let i = first; i < last; i++) {
      if (!is(i)) continue;
      if (is(i - 1)) pen.lineTo(px(i), py(i));
      else pen.moveTo(px(i), py(i));
    }
    pen.stroke();
    for (let i = first; i < last; i++) {
      const alone = is(i) && !is(i - 1) && !is(i + 1);
      if (!alone && !(line.points && is(i))) continue;
      pen.beginPath();
      pen.arc(px(i), py(i), line.role === "raw" ? 1.5 : 2.75, 0, 7);
      pen.fill();
    }
  }

  function marks(x) {
    const { pen } = frame;
    for (const mark of body.marks) {
      const at = x.at(mark.x) * frame.size[0];
      pen.fillStyle = pen.strokeStyle = colour(report.runs.length > 1 ? `--series-${mark.run % 8}` : `--${mark.level}`);
      pen.globalAlpha = 0.35;
      pen.lineWidth = 1;
      frame.stroke([[at, 6], [at, frame.size[1]]]);
      pen.globalAlpha = 1;
      pen.beginPath();
      [[at - 5, 0], [at + 5, 0], [at, 8]].forEach((corner) => pen.lineTo(...corner));
      pen.fill();
    }
  }

  /** Dots where the lines are at `at`, and the cursor. */
  function follow(at) {
    const { x } = group;
    drawCursor(frame, x.at(at));
    for (const line of shown()) {
      const i = nearest(line.x, at);
      const [across, up] = [x.at(line.x[i]), plot.y.at(line.y[i])];
      if (line.role !== "value" || Math.abs(across - x.at(at)) > FAR || !(up >= 0 && up <= 1)) continue;
      if (!(across >= 0 && across <= 1)) continue;
      const centre = { cx: frame.room.left + across * frame.size[0], cy: frame.room.top + (1 - up) * frame.size[1] };
      const dot = shape("circle", { ...centre, r: 4, class: "dot" });
      dot.style.setProperty("--mark", `var(${line.colour})`);
      frame.moving.append(dot);
    }
  }

  function show(wanted, down) {
    const { x } = group;
    const all = stops();
    if (!all.length) return wanted;
    const at = all[nearest(all, wanted)];
    follow(at);
    const entries = [];
    for (const line of shown()) {
      const i = nearest(line.x, at);
      const off = Math.abs(x.at(line.x[i]) - x.at(at));
      if (!line.x.length || off > FAR || entries.length > 12) continue;
      const kind = line.role === "raw" && line.entry !== series.indexOf(line) ? " (raw)" : "";
      const where = off > 0.01 ? ` at ${place(line.x[i])}` : "";
      const value = element("b", {}, measured(line.y[i], body.y));
      if (line.low.length && Number.isFinite(line.low[i] + line.high[i])) {
        value.append(element("small", {}, ` ${number(line.low[i], 3)} to ${number(line.high[i], 3)}`));
      }
      const name = element("span", {}, clipped(named(line), 44) + kind + where);
      entries.push(element("div", { class: "entry" }, swatch(line.colour, line.role), name, value));
    }
    const near = body.marks.filter((mark) => Math.abs(x.at(mark.x) - x.at(at)) * frame.size[0] < 5);
    const within = body.bands.filter((band) => at >= (band.start ?? -Infinity) && at <= (band.end ?? Infinity));
    const notes = [...within, ...near].map((note) => {
      const run = report.runs.length > 1 ? ` \u00b7 ${clipped(report.runs[note.run], 28)}` : "";
      return element("div", { class: "note" }, clipped(note.label, 80) + run);
    });
    frame.say([element("div", { class: "at" }, `${body.x.label} ${place(at)}`), ...entries, ...notes], x.at(at), down);
    return at;
  }

  function table() {
    const rows = series.map((line) => {
      const present = Array.from(line.y.keys()).filter((i) => !Number.isNaN(line.y[i]));
      const by = (better) => present.reduce((best, i) => (best < 0 || better(line.y[i], line.y[best]) ? i : best), -1);
      const told = (i) => (i === undefined || i < 0 ? "" : `${number(line.y[i])} at ${place(line.x[i])}`);
      const extremes = [by((a, b) => a < b), by((a, b) => a > b)];
      return [named(line), String(present.length), ...[present[0], present.at(-1), ...extremes].map(told)];
    });
    return { columns: [titled(body.y), "values", "first", "last", "lowest", "highest"], rows };
  }
}
