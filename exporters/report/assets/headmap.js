/* Layer by head: a cell for each head, coloured by the statistic that the reader chooses. */

function headmapPlot(host, controls, body, _group, peers) {
  const frame = new Frame(host);
  const layers = body.layers.length;
  let chosen = 0;
  let here = null;
  const statistic = () => body.statistics[chosen];
  const heads = () => (layers ? array(statistic().values).length / layers : 0);
  const value = (layer, head) => array(statistic().values)[layer * heads() + head];
  const key = element("span", { class: "key" });
  const meaning = element("p", { class: "meaning" });
  let colours = null;
  choose();
  listen();
  return { frame, draw, table };

  function choose() {
    const select = element("select", { "aria-label": "Statistic" });
    body.statistics.forEach((one, i) => select.append(element("option", { value: i }, clipped(one.axis.label, 60))));
    select.addEventListener("change", () => {
      chosen = Number(select.value);
      draw();
    });
    controls.append(select, key, meaning);
  }

  function draw() {
    const { axis } = statistic();
    const alike = peers.map((peer) => peer.statistics.find((one) => one.axis.label === axis.label)).filter(Boolean);
    colours = sharedColouring(alike, axis, null);
    key.replaceChildren();
    if (colours) colourKey(key, colours, axis);
    meaning.textContent = statistic().meaning;
    const left = 12 + frame.widest(body.layers.map((name) => clipped(name, 12)));
    const across = heads();
    const most = Math.max(120, frame.available - left - 6);
    const tall = Math.max(60, Math.min(layers * 30, (layers * most) / across, 330));
    const pen = frame.open(tall, { left, right: 6, top: 20, bottom: 36 });
    const [wide, high] = [frame.size[0] / across, tall / layers];
    const gap = Math.min(wide, high) > 7 ? 1 : 0;
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < across; head++) {
        pen.fillStyle = colours?.of(value(layer, head)) ?? colour("--empty");
        pen.fillRect(head * wide, (layers - 1 - layer) * high, wide - gap, high - gap);
      }
      if (layer % Math.ceil(14 / high) === 0) {
        const y = frame.room.top + (layers - layer - 0.5) * high + 3.5;
        frame.write(clipped(body.layers[layer], 12), left - 7, y, "end");
      }
    }
    for (let head = 0; head < across; head += Math.ceil(24 / wide)) {
      frame.write(String(head), left + (head + 0.5) * wide, frame.room.top + tall + 15);
    }
    if (!colours) frame.nothing();
    frame.title("layer", 0, 11);
    frame.title("head", left + frame.size[0] / 2, frame.room.top + tall + 31, "middle");
  }

  function show(layer, head) {
    here = [layer, head];
    const [wide, high] = [frame.size[0] / heads(), frame.size[1] / layers];
    const [across, down] = [(head + 0.5) / heads(), (layers - layer - 0.5) / layers];
    const corner = { x: frame.room.left + head * wide, y: frame.room.top + (layers - 1 - layer) * high };
    frame.moving.replaceChildren(shape("rect", { ...corner, width: wide, height: high, class: "cell" }));
    const { axis } = statistic();
    const what = element("b", {}, measured(value(layer, head), axis));
    frame.say(
      [
        element("div", { class: "at" }, `layer ${clipped(body.layers[layer], 30)} \u00b7 head ${head}`),
        element("div", { class: "entry" }, element("span", {}, axis.label), what),
      ],
      across,
      down,
    );
  }

  function listen() {
    const point = (event) => {
      const [across, down] = frame.share(event);
      if (heads()) show(layers - 1 - row(down, layers), row(across, heads()));
    };
    host.addEventListener("pointermove", point);
    host.addEventListener("pointerdown", point);
    host.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && frame.hush());
    host.addEventListener("blur", () => frame.hush());
    host.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
      if (event.key === "Escape") frame.hush();
      if (!by || !heads()) return;
      event.preventDefault();
      const to = here ? [here[0] + by[0], here[1] + by[1]] : [0, 0];
      show(Math.min(layers - 1, Math.max(0, to[0])), Math.min(heads() - 1, Math.max(0, to[1])));
      page.announce(frame);
    });
  }

  function table() {
    const rows = body.layers.map((name, layer) => {
      const all = Array.from({ length: heads() }, (_, head) => value(layer, head));
      const range = extent(all);
      if (!range) return [name, "no value", "", ""];
      const present = all.filter((one) => !Number.isNaN(one));
      const mean = present.reduce((sum, one) => sum + one, 0) / present.length;
      const told = range.map((one) => `${number(one)} (head ${all.indexOf(one)})`);
      return [name, told[0], number(mean), told[1]];
    });
    return { columns: ["layer", `lowest ${titled(statistic().axis)}`, "mean", "highest"], rows };
  }
}
