/* Layer by step: a cell for each value, the first row at the bottom. */

/** One colouring for all heatmaps of a kind, so that runs can be compared. */
function sharedColouring(peers, axis, middle) {
  return colouring(peers.map((peer) => array(peer.values)), axis, middle);
}

function heatmapPlot(host, controls, body, group, peers) {
  const frame = new Frame(host);
  const columns = array(body.columns);
  const values = array(body.values);
  const rows = body.rows.length;
  const colours = sharedColouring(peers, body.z, body.middle);
  if (colours) colourKey(controls, colours, body.z);
  const value = (r, c) => values[r * columns.length + c];
  const plot = { frame, group, rows, draw, show, follow, stops: () => columns, table };
  return plot;

  function draw() {
    const { x } = group;
    const tall = Math.max(120, Math.min(host.closest(".wide") ? 360 : 240, rows * 18));
    const left = 12 + Math.min(110, frame.widest(body.rows.map((name) => clipped(name, 18))));
    const pen = frame.open(tall, { left, right: 6, top: 20, bottom: 36 });
    const [width] = frame.size;
    const edge = edges(x).map((share) => frame.snap(share * width));
    const level = (r) => frame.snap((tall * (rows - r)) / rows);
    pen.fillStyle = colour("--empty");
    pen.fillRect(edge[0], 0, edge.at(-1) - edge[0], tall);
    for (let c = 0; c < columns.length; c++) {
      if (edge[c + 1] < 0 || edge[c] > width) continue;
      for (let r = 0; r < rows; r++) {
        const paint = colours?.of(value(r, c));
        if (!paint) continue;
        pen.fillStyle = paint;
        pen.fillRect(edge[c], level(r + 1), edge[c + 1] - edge[c], level(r) - level(r + 1));
      }
    }
    const stride = Math.ceil(14 / (tall / rows));
    for (let r = 0; r < rows; r += stride) {
      const y = frame.room.top + ((rows - r - 0.5) * tall) / rows + 3.5;
      frame.write(clipped(body.rows[r], 18), left - 7, y, "end");
    }
    frame.title(titled(body.y), 0, 11);
    frame.xAxis(x, body.x);
    if (!colours) frame.nothing();
  }

  /** Where cells meet, in shares of the width: half-way between columns. */
  function edges(x) {
    const at = Array.from(columns, x.at);
    const between = at.slice(1).map((share, i) => (share + at[i]) / 2);
    const outer = at.length > 1 ? [at[0] - (between[0] - at[0]), 2 * at.at(-1) - between.at(-1)] : [0, 1];
    return [outer[0], ...between, outer[1]];
  }

  function follow(at) {
    drawCursor(frame, group.x.at(at));
  }

  function show(wanted, down) {
    const { x } = group;
    if (!columns.length) return wanted;
    const c = nearest(columns, wanted);
    const r = rows - 1 - row(down, rows);
    follow(columns[c]);
    const edge = edges(x);
    const [from, to] = [Math.max(0, edge[c]), Math.min(1, edge[c + 1])].map((share) => share * frame.size[0]);
    const high = frame.size[1] / rows;
    const corner = { x: frame.room.left + from, y: frame.room.top + (rows - 1 - r) * high };
    frame.moving.append(shape("rect", { ...corner, width: Math.max(2, to - from), height: high, class: "cell" }));
    const where = `${body.x.label} ${place(columns[c])} \u00b7 ${body.y.label} ${clipped(body.rows[r], 40)}`;
    const what = element("b", {}, measured(value(r, c), body.z));
    const entry = element("div", { class: "entry" }, element("span", {}, body.z.label), what);
    frame.say([element("div", { class: "at" }, where), entry], x.at(columns[c]), down);
    return columns[c];
  }

  function table() {
    const told = body.rows.map((name, r) => {
      const all = Array.from(values.subarray(r * columns.length, (r + 1) * columns.length));
      const present = all.filter((one) => !Number.isNaN(one));
      const range = extent(present) ?? [NaN, NaN];
      return [name, ...[present[0] ?? NaN, present.at(-1) ?? NaN, ...range].map((one) => number(one))];
    });
    return { columns: [body.y.label, "first", "last", "lowest", "highest"], rows: told };
  }
}
