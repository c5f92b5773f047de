/* Routes through the layers, drawn over the tokens: the embeddings at the bottom, the last layer at the top.

A line from a token to another is an attention head that reads there; straight up is what a position kept. */

function pathwaysPlot(host, controls, body) {
  const level = Math.max(18, Math.min(34, 640 / body.layers));
  const foot = 74;
  const edges = body.edges.filter((edge) => edge.share > 0).sort((a, b) => a.share - b.share);
  const heaviest = edges.at(-1)?.share ?? 1;
  const area = shape("svg", { "aria-hidden": "true" });
  const tip = element("div", { class: "tip", hidden: "" });
  const scroll = element("div", { class: "scroll" }, area);
  host.append(scroll, tip);
  const frame = { host, tip };
  let lines = [];
  let here = edges.length;
  let isShown = false;
  controls.append(
    entry("--series-0", "value", "read by a head"),
    entry("--muted", "value", "kept by the position"),
    element("span", { class: "name" }, "width: share of what arrives"),
  );
  listen();
  return { frame, draw, table };

  function entry(mark, kind, text) {
    return element("span", { class: "entry" }, swatch(mark, kind), text);
  }

  /** A token with its spaces and line ends visible. */
  function spelled(text) {
    return clipped(text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/ /g, "\u00b7"), 12) || "\u2205";
  }

  function draw() {
    const available = page.printing ? PAPER.wide : host.clientWidth;
    const left = 46;
    const pitch = Math.max(24, (available - left - 12) / Math.max(1, body.tokens.length));
    const width = left + pitch * body.tokens.length + 12;
    const tall = 16 + level * body.layers;
    const x = (position) => left + (position + 0.5) * pitch;
    const y = (depth) => tall - depth * level;
    area.replaceChildren();
    area.setAttribute("viewBox", `0 0 ${width} ${tall + foot}`);
    area.style.width = page.printing ? "100%" : `${width}px`;
    for (let depth = 0; depth <= body.layers; depth++) {
      area.append(shape("line", { x1: left, x2: width - 8, y1: y(depth), y2: y(depth), class: "level" }));
      if (depth % Math.ceil(body.layers / 12) !== 0) continue;
      const name = depth ? `layer ${depth - 1}` : "tokens";
      area.append(shape("text", { x: left - 6, y: y(depth) + 3.5, "text-anchor": "end", class: "tick" }, name));
    }
    lines = edges.map((edge) => {
      const [x1, y1, x2, y2] = [x(edge.key), y(edge.layer), x(edge.query), y(edge.layer + 1)];
      const middle = (y1 + y2) / 2;
      const share = Math.sqrt(edge.share / heaviest);
      const path = shape("path", {
        d: `M${x1} ${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}`,
        class: edge.head < 0 ? "route kept" : "route",
        "stroke-width": (0.8 + 6 * share).toFixed(2),
        "stroke-opacity": (0.25 + 0.7 * share).toFixed(2),
      });
      area.append(path);
      return path;
    });
    body.tokens.forEach((token, position) => {
      const at = [x(position), tall + 14];
      const text = shape("text", { x: at[0], y: at[1], class: position === body.target ? "token target" : "token" });
      text.setAttribute("text-anchor", "end");
      text.setAttribute("transform", `rotate(-48 ${at.join(" ")})`);
      text.append(spelled(token));
      area.append(text, shape("circle", { cx: x(position), cy: y(0), r: 2.5, class: "node" }));
    });
    area.append(shape("circle", { cx: x(body.target), cy: y(body.layers), r: 5, class: "node target" }));
    // Routes gather at the target, which in a long sentence lies outside the frame at first.
    if (!isShown) scroll.scrollLeft = x(body.target) - 0.8 * scroll.clientWidth;
    isShown = true;
  }

  function told(edge) {
    const token = (position) => `${position} \u201c${spelled(body.tokens[position] ?? "")}\u201d`;
    if (edge.head < 0) return [`layer ${edge.layer}`, `position ${token(edge.query)} keeps what it has`];
    return [`layer ${edge.layer}, head ${edge.head}`, `position ${token(edge.query)} reads ${token(edge.key)}`];
  }

  function show(i) {
    here = i;
    const edge = edges[i];
    lines.forEach((line, other) => line.classList.toggle("chosen", other === i));
    const [where, what] = told(edge);
    const share = element("b", {}, `${number(100 * edge.share, 3)} %`);
    const entryOf = element("div", { class: "entry" }, element("span", {}, what), share);
    tip.replaceChildren(element("div", { class: "at" }, where), entryOf);
    tip.hidden = false;
    const [line, box] = [lines[i].getBoundingClientRect(), host.getBoundingClientRect()];
    const left = line.right - box.left + 12;
    tip.style.left = `${Math.max(0, Math.min(left, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, Math.min(line.top - box.top - 8, box.height - tip.offsetHeight))}px`;
  }

  function hush() {
    tip.hidden = true;
    lines.forEach((line) => line.classList.remove("chosen"));
  }

  function listen() {
    // The line that is nearest, so that thin ones can be pointed at.
    const point = (event) => {
      const matrix = area.getScreenCTM();
      if (!lines.length || !matrix) return;
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
      let [best, distance] = [-1, 14];
      lines.forEach((line, i) => {
        const length = line.getTotalLength();
        for (let share = 0; share <= 1; share += 0.1) {
          const spot = line.getPointAtLength(share * length);
          const away = Math.hypot(spot.x - at.x, spot.y - at.y);
          if (away < distance) [best, distance] = [i, away];
        }
      });
      if (best < 0) hush();
      else show(best);
    };
    host.addEventListener("pointermove", point);
    host.addEventListener("pointerdown", point);
    host.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hush());
    host.addEventListener("blur", hush);
    host.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: 1, ArrowUp: 1, ArrowRight: -1, ArrowDown: -1 }[event.key];
      if (event.key === "Escape") hush();
      if (!by || !lines.length) return;
      event.preventDefault();
      // From the heaviest down.
      show(Math.min(lines.length - 1, Math.max(0, here >= lines.length ? lines.length - 1 : here - by)));
      page.announce(frame);
    });
  }

  function table() {
    const rows = edges.slice(-60).reverse();
    return {
      columns: ["where", "what", "share"],
      rows: rows.map((edge) => [...told(edge), `${number(100 * edge.share, 3)} %`]),
    };
  }
}
