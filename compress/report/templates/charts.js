// Pictures are drawn (see chart.html.j2); this switches between them, tells of points, and heeds the legends.
(async function () {
  "use strict";
  const packed = document.getElementById("book").textContent.trim();
  const holders = Array.from(document.querySelectorAll("[data-plot]"));
  const off = new WeakMap(holders.map((holder) => [holder, new Set()])); // names switched off in a picture
  const bubble = document.createElement("div");
  bubble.className = "bubble";
  bubble.hidden = true;
  document.body.append(bubble);
  let book;
  try {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    book = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  } catch (error) {
    return; // an older browser, or nothing packed: the pictures stay as they are, and offer nothing to switch
  }
  document.documentElement.classList.add("ready");

  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

  function keyOf(holder) {
    const plot = holder.dataset.plot;
    return plot.startsWith("loss/") ? plot : [chosen(plot), chosen("quality"), chosen("scale")].join("/");
  }

  function draw(holder) {
    const picture = book.pictures[keyOf(holder)];
    holder.innerHTML = picture ? picture.html : '<p class="absent">Not measured in this run.</p>';
    holder.querySelectorAll(".legend button").forEach((button) => {
      if (off.get(holder).has(button.textContent)) show(holder, button, false);
    });
  }

  function show(holder, button, visible) {
    button.setAttribute("aria-pressed", visible);
    off.get(holder)[visible ? "delete" : "add"](button.textContent);
    holder.querySelector(`[data-of="${button.dataset.series}"]`).style.display = visible ? "" : "none";
  }

  // the point nearest to where the pointer is, if one is near: [distance, x, y, lines]
  function nearest(holder, area, event) {
    const picture = book.pictures[keyOf(holder)];
    if (!picture) return null;
    const box = area.getBoundingClientRect();
    const shown = Array.from(holder.querySelectorAll("[data-of]"), (group) => group.style.display !== "none");
    let best = null;
    for (const [x, y, series, told] of picture.points) {
      const at = [box.left + x * box.width, box.top + y * box.height];
      const distance = Math.hypot(at[0] - event.clientX, at[1] - event.clientY);
      if (shown[series] && distance < 28 && (!best || distance < best[0])) {
        best = [distance, ...at, Array.isArray(told) ? told : book.lines[told]];
      }
    }
    return best;
  }

  function tell(event) {
    const area = event.target.closest && event.target.closest(".area");
    const found = area && nearest(area.closest("[data-plot]"), area, event);
    bubble.hidden = !found;
    if (!found) return;
    const [, x, y, lines] = found;
    bubble.replaceChildren(...lines.map((line, index) => {
      const element = document.createElement(index ? "div" : "b");
      element.textContent = line;
      return element;
    }));
    const { offsetWidth: width, offsetHeight: height } = bubble;
    const left = x + 14 + width < innerWidth - 8 ? x + 14 : Math.max(8, Math.min(x - 14 - width, innerWidth - 8 - width));
    const top = y - height - 14 > 8 ? y - height - 14 : y + 16;
    bubble.style.transform = `translate(${left}px, ${top}px)`;
  }

  addEventListener("pointermove", tell);
  addEventListener("pointerdown", tell);
  addEventListener("scroll", () => { bubble.hidden = true; }, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") bubble.hidden = true; });
  addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest(".legend button");
    if (button) show(button.closest("[data-plot]"), button, button.getAttribute("aria-pressed") !== "true");
  });
  document.querySelectorAll(".picks input").forEach((input) =>
    input.addEventListener("change", () => { bubble.hidden = true; holders.forEach(draw); }));
  holders.forEach(draw); // a browser that comes back to the page keeps what was chosen
})();

addEventListener("beforeprint", () => { // paper cannot be unfolded
  document.querySelectorAll("section > details").forEach((details) => { details.open = true; });
});
