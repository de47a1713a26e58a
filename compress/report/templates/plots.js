// Draws the figures that Python computed: picks one, puts in the theme's colours, places the labels.
(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const holders = Array.from(document.querySelectorAll("[data-plot]"));
  const config = { displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };

  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

  function keyOf(holder) {
    const plot = holder.dataset.plot;
    return plot.startsWith("loss/") ? plot : [chosen(plot), chosen("quality"), chosen("scale")].join("/");
  }

  // every string such as "--series-0" becomes that CSS variable's value
  function painted(value, style) {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) return value.map((inner) => painted(inner, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner, style)]));
  }

  // A name beside each marker, on the side where it covers least; a name already close by is not repeated.
  function labels(figure, width, height) {
    const { xaxis, yaxis, margin } = figure.layout;
    const inner = { width: width - margin.l - margin.r, height: height - margin.t - margin.b - 24 };
    const toY = (y) => (yaxis.type === "log" ? Math.log10(y) : y);
    const pixels = (x, y) => [
      (x - xaxis.range[0]) / (xaxis.range[1] - xaxis.range[0]) * inner.width,
      (1 - (toY(y) - yaxis.range[0]) / (yaxis.range[1] - yaxis.range[0])) * inner.height];
    const points = [];
    figure.data.filter((trace) => trace.meta && trace.meta.labels).forEach((trace) =>
      trace.x.forEach((x, i) => points.push({ at: pixels(x, trace.y[i]), name: trace.meta.labels[i], x, y: trace.y[i] })));
    const markers = points.map(({ at: [x, y] }) => [x - 7, y - 7, x + 7, y + 7]);
    const overlap = (a, b) =>
      Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
    const placed = [];
    points.forEach((point, index) => {
      const [x, y] = point.at;
      if (placed.some((p) => p.name === point.name && Math.hypot(p.at[0] - x, p.at[1] - y) < 48)) return;
      const text = new DOMParser().parseFromString(point.name, "text/html").documentElement.textContent;
      const w = text.length * 6.4 + 4, h = 15;
      const spots = [["left", "middle", 9, 0], ["right", "middle", -9, 0], ["center", "bottom", 0, -9], ["center", "top", 0, 9],
        ["left", "bottom", 7, -6], ["left", "top", 7, 6], ["right", "bottom", -7, -6], ["right", "top", -7, 6]];
      let best = null;
      spots.forEach(([ax, ay, dx, dy], rank) => {
        const left = x + dx - (ax === "left" ? 0 : ax === "right" ? w : w / 2);
        const top = y + dy - (ay === "top" ? 0 : ay === "bottom" ? h : h / 2);
        const box = [left, top, left + w, top + h];
        let cost = rank;
        markers.forEach((other, at) => { if (at !== index) cost += 2 * overlap(box, other); });
        placed.forEach((p) => { cost += 3 * overlap(box, p.box); });
        cost += 8 * (Math.max(0, -left) + Math.max(0, left + w - inner.width) + Math.max(0, -top) + Math.max(0, top + h - inner.height));
        if (best === null || cost < best.cost) best = { cost, box, ax, ay, dx, dy };
      });
      placed.push({ ...best, name: point.name, at: point.at, point });
    });
    return placed.map((p) => ({ x: p.point.x, y: yaxis.type === "log" ? Math.log10(p.point.y) : p.point.y, text: p.name,
      showarrow: false, xanchor: p.ax, yanchor: p.ay, xshift: p.dx, yshift: -p.dy, font: { size: 11.5 } }));
  }

  function draw(holder) {
    const figure = figures[keyOf(holder)];
    if (!figure) {
      Plotly.purge(holder);
      holder.textContent = "Not measured in this run.";
      holder.classList.add("empty");
      return;
    }
    if (holder.classList.contains("empty")) { holder.textContent = ""; holder.classList.remove("empty"); }
    const style = getComputedStyle(document.documentElement);
    const { data, layout } = painted(figure, style);
    const width = holder.clientWidth, height = holder.clientHeight;
    layout.width = width;
    layout.height = height;
    layout.font.family = getComputedStyle(document.body).fontFamily;
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // let a finger scroll the page
    if (layout.xaxis.range) layout.annotations = layout.annotations.concat(labels(figure, width, height));
    Plotly.react(holder, data, layout, config);
  }

  const drawAll = () => holders.forEach(draw);
  document.querySelectorAll(".picks input").forEach((input) => input.addEventListener("change", drawAll));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 120); });
  addEventListener("beforeprint", () => { // paper is white, and cannot be unfolded
    document.documentElement.dataset.theme = "paper";
    document.querySelectorAll("section > details").forEach((details) => { details.open = true; });
    drawAll();
  });
  addEventListener("afterprint", () => { delete document.documentElement.dataset.theme; drawAll(); });
  drawAll();
})();
