/* Amounts by name, with the number beside each bar. */

function barsPlot(host, controls, body) {
  const values = array(body.values);
  const runs = body.names.length ? values.length / body.names.length : 0;
  const amount = (run, i) => values[run * body.names.length + i];
  const frame = { host, tip: host };
  if (runs > 1) {
    for (let run = 0; run < runs; run++) {
      const name = clipped(report.runs[run] ?? "", 60);
      controls.append(element("span", { class: "entry" }, swatch(`--series-${run % 8}`), name));
    }
  }
  return { frame, draw, table };

  function draw() {
    const reach = extent(body.limit === null ? values : [...values, body.limit]) ?? [0, 1];
    const x = body.x.scale === "log" ? roomy("log", extent(values, true), 0.05) : scale("linear", Math.min(0, reach[0]), reach[1] || 1);
    const at = (value) => Math.min(100, Math.max(0, 100 * x.at(value))) || 0;
    const list = element("div", { class: "bars", role: "list" });
    body.names.forEach((name, i) => {
      const tracks = element("div", { class: "tracks" });
      for (let run = 0; run < runs; run++) {
        const value = amount(run, i);
        const bar = element("i", { class: "bar", "aria-hidden": "true" });
        bar.style.setProperty("--mark", `var(--series-${run % 8})`);
        const start = body.x.scale === "log" ? 0 : at(Math.min(0, value));
        bar.style.left = `${start}%`;
        bar.style.width = `${at(Math.max(0, value)) - start}%`;
        const track = element("div", { class: "track" }, bar);
        if (body.limit !== null) {
          const line = element("i", { class: "limit", "aria-hidden": "true" });
          line.style.left = `${at(body.limit)}%`;
          track.append(line);
        }
        tracks.append(track, element("span", { class: "amount" }, measured(value, body.x, 3)));
      }
      const label = element("span", { class: "label", title: clipped(name, 300) }, clipped(name, 60));
      list.append(element("div", { class: "row", role: "listitem" }, label, tracks));
    });
    host.replaceChildren(list);
    const limit = body.limit === null ? "" : ` \u00b7 line: limit of ${measured(body.limit, body.x, 3)}`;
    host.append(element("p", { class: "foot" }, titled(body.x) + limit));
  }

  function table() {
    const rows = body.names.map((name, i) => [
      name,
      ...Array.from({ length: runs }, (_, run) => measured(amount(run, i), body.x)),
    ]);
    const heads = runs > 1 ? report.runs.slice(0, runs) : [titled(body.x)];
    return { columns: ["", ...heads], rows };
  }
}
