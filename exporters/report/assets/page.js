/* The page: figures are drawn as they come into view; theme, zoom, paper, tables and copies. */

const KINDS = { lines: linesPlot, heatmap: heatmapPlot, headmap: headmapPlot, pathways: pathwaysPlot, bars: barsPlot };
const root = document.documentElement;
const groups = new Map();

const page = {
  printing: false,

  /** Tell those who do not see it what the keyboard has come to. */
  announce(frame) {
    const words = frame.tip.hidden ? [] : Array.from(frame.tip.children, (line) => line.textContent);
    document.getElementById("page-live").textContent = words.join(", ");
  },

  /** Redraw after a group's zoom, and offer the way back. */
  zoomed(group) {
    group.plots.forEach(refresh);
    const chip = document.getElementById("page-zoom");
    chip.hidden = !Array.from(groups.values()).some((one) => one.zoom);
    if (group.zoom) {
      const ends = group.zoom.map((value) => place(group.axis.label === "step" ? Math.round(value) : value));
      chip.firstElementChild.textContent = `${clipped(group.axis.label, 24)} ${ends.join(" \u2013 ")}`;
    }
  },
};

const figures = Array.from(document.querySelectorAll(".figure"), (node) => {
  const figure = { ...report.figures[node.dataset.figure], node, host: node.querySelector(".plot"), near: false, plot: null };
  if (figure.reach !== undefined) {
    const { x } = figure.body;
    const key = `${x.label} ${x.unit} ${x.scale}`;
    if (!groups.has(key)) groups.set(key, new Group(x));
    figure.group = groups.get(key);
    figure.group.cover(figure.reach);
  }
  return figure;
});

/** The plot of a figure, made when it is first wanted. */
function made(figure) {
  if (!figure.plot) {
    const peers = figures.filter((other) => other.family === figure.family && other.kind === figure.kind);
    const controls = figure.node.querySelector(".controls");
    const bodies = peers.map((peer) => peer.body);
    figure.plot = KINDS[figure.kind](figure.host, controls, figure.body, figure.group, bodies);
    figure.plot.figure = figure;
    if (figure.group) {
      figure.group.plots.push(figure.plot);
      steer(figure.plot);
    }
  }
  return figure.plot;
}

function draw(figure) {
  const plot = made(figure);
  plot.frame.hush?.();
  plot.draw();
  plot.drawn = true;
  if (figure.group) figure.host.dataset.range = [figure.group.x.low, figure.group.x.high].join(" ");
}

/** Draw what is near the view now, the rest when it comes there. */
function refresh(plot) {
  if (plot.figure.near) draw(plot.figure);
  else plot.drawn = false;
}

const arriving = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const figure = figures.find((one) => one.host === target);
      figure.near = isIntersecting;
      if (isIntersecting && !figure.plot?.drawn) draw(figure);
    }
  },
  { rootMargin: "300px" },
);
const widths = new Map();
const resizing = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const before = widths.get(target);
    widths.set(target, contentRect.width);
    const figure = figures.find((one) => one.host === target);
    if (before !== undefined && before !== contentRect.width && figure.plot && !page.printing) refresh(figure.plot);
  }
});
for (const { host } of figures) {
  arriving.observe(host);
  resizing.observe(host);
}

function redraw() {
  forgetColours();
  figures.filter((figure) => figure.plot).forEach((figure) => refresh(figure.plot));
}

/* Theme: the system's, until the reader says otherwise; kept for the session. */

const memory = {
  // A page that is opened from a mail or in a sandbox may have no storage.
  read: () => {
    try {
      return sessionStorage.getItem("theme");
    } catch {
      return null;
    }
  },
  write: (theme) => {
    try {
      sessionStorage.setItem("theme", theme);
    } catch {
      /* then it lasts as long as the page */
    }
  },
};
const themeButton = document.getElementById("page-theme");

function setTheme(theme) {
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
  themeButton.textContent = isDark() ? "Light" : "Dark";
  themeButton.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  redraw();
}
themeButton.addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  memory.write(theme);
  setTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(memory.read()));
setTheme(memory.read());

/* Paper is light, and has all figures at its own width. */

addEventListener("beforeprint", () => {
  page.printing = true;
  root.dataset.theme = "light";
  forgetColours();
  figures.forEach(draw);
});
addEventListener("afterprint", () => {
  page.printing = false;
  setTheme(memory.read());
});

document.getElementById("page-zoom").addEventListener("click", () => groups.forEach((group) => group.zoom && group.narrow(null)));

for (const figure of figures) {
  figure.node.querySelector("details.data").addEventListener("toggle", ({ target }) => {
    if (!target.open) return;
    const { columns, rows } = made(figure).table();
    const line = (cells, name) => element("tr", {}, ...cells.map((cell) => element(name, {}, clipped(cell, 300))));
    const body = element("tbody", {}, ...rows.map((cells) => line(cells, "td")));
    const table = element("table", {}, element("thead", {}, line(columns, "th")), body);
    target.querySelector("div").replaceChildren(table);
  });
}

for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected: press Ctrl+C";
    }
  });
}

/* The section that is read is marked in the navigation. */

const links = new Map(Array.from(document.querySelectorAll("nav a"), (link) => [link.hash.slice(1), link]));
const reading = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const link = links.get(target.id);
      if (isIntersecting) link?.setAttribute("aria-current", "true");
      else link?.removeAttribute("aria-current");
    }
  },
  { rootMargin: "-20% 0px -79% 0px" },
);
document.querySelectorAll("main > section").forEach((section) => reading.observe(section));
